from __future__ import annotations

import math

import pytest
import torch

from mmctr.rankers.dien import DIEN, DIENConfig
from mmctr.rankers.layers import RankerInput
from tests.rankers.references import one_by_one

D, C, LENGTHS = 4, 2, [3, 0, 1, 5]


def inputs() -> RankerInput:
    g = torch.Generator().manual_seed(0)
    offsets = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()])
    b, h = len(LENGTHS), sum(LENGTHS)
    target, history, context, negatives = (
        torch.randn(n, d, generator=g).requires_grad_() for n, d in ((b, D), (h, D), (b, C), (h, D))
    )
    return RankerInput(target, history, offsets, context, negatives)


def dien(**values) -> DIEN:
    torch.manual_seed(1)
    return DIENConfig(mlp=[6], activation="sigmoid", **values).build(D, C)


def reference(model: DIEN, x: RankerInput) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One impression after another, as the paper writes it."""
    offsets = x.history_offsets
    interests = one_by_one(model.extractor, x.history, torch.zeros(len(x.history)), offsets)
    rows, terms = [], []
    for b in range(len(x.target)):
        own = slice(*offsets[b : b + 2].tolist())
        h, e, n = interests[own], x.history[own], x.negatives[own]
        for t in range(len(h) - 1):
            clicked, not_clicked = h[t] @ model.next_item(e[t + 1]), h[t] @ model.next_item(n[t + 1])
            terms.append(-torch.log(torch.sigmoid(clicked)) - torch.log(1 - torch.sigmoid(not_clicked)))
        a = torch.softmax(h @ model.query.weight @ x.target[b], 0)
        one = torch.tensor([0, len(h)])
        scaled = h * a[:, None] if model.config.gate == "aigru" else h
        states = one_by_one(model.evolver, scaled, a, one)
        state = states[-1] if len(h) else torch.zeros(h.shape[1])
        total = e.sum(0)
        rows.append(torch.cat([x.context[b], x.target[b], total, total * x.target[b], state]))
    auxiliary = model.config.auxiliary_weight * torch.stack(terms).mean() if model.config.auxiliary_weight else None
    return model.mlp(torch.stack(rows)).squeeze(1), auxiliary


@pytest.mark.parametrize("gate", ["augru", "augru_official", "agru", "aigru"])
@pytest.mark.parametrize("values", [{}, {"auxiliary_weight": 0.0}, {"auxiliary_weight": 0.3, "hidden_dim": 7}])
def test_it_equals_the_paper_in_value_and_gradient(gate, values):
    results = []
    for fast in (True, False):
        model, x = dien(gate=gate, **values), inputs()
        if fast:
            output = model(x)
            logits, auxiliary = output.logits, output.losses.get("auxiliary")
        else:
            logits, auxiliary = reference(model, x)
        loss = (logits * torch.tensor([1.0, -2.0, 3.0, 0.5])).sum()
        (loss if auxiliary is None else loss + auxiliary).backward()
        grads = [x.target.grad, x.history.grad, x.context.grad, x.negatives.grad, *(p.grad for p in model.parameters())]
        results.append([logits.detach(), auxiliary, *grads])
    for got, expected in zip(*results, strict=True):
        if expected is None:  # no loss, or a gate this form does not have
            assert got is None or got.eq(0).all()
        else:
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


def test_the_auxiliary_loss_is_of_training_alone():
    model, x = dien(), inputs()
    assert set(model(x).losses) == {"auxiliary"}
    assert model.eval()(x).losses == {}
    # states and items near zero know nothing: 2 log 2
    with torch.no_grad():
        for parameter in model.extractor.parameters():
            parameter.zero_()
    assert float(model.train()(x).losses["auxiliary"].detach()) == pytest.approx(2 * math.log(2), rel=1e-5)


def test_histories_of_one_behaviour_have_no_auxiliary_loss():
    g = torch.Generator().manual_seed(0)
    two = torch.randn(2, D, generator=g)
    model = dien()
    output = model(RankerInput(two, two, torch.tensor([0, 1, 2]), torch.randn(2, C, generator=g), two))
    assert float(output.losses["auxiliary"].detach()) == 0
    (output.logits.sum() + output.losses["auxiliary"]).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_order_matters_to_dien():
    model, x = dien().eval(), inputs()
    flipped = torch.cat([part.flip(0) for part in x.history.split(LENGTHS)])
    other = RankerInput(x.target, flipped, x.history_offsets, x.context)
    different = (model(x).logits - model(other).logits).abs() > 1e-6
    assert different.tolist() == [True, False, False, True]


def test_the_loss_pulls_the_next_item_and_pushes_the_negative():
    model, x = dien(), inputs()
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    before = float(model(x).losses["auxiliary"].detach())
    for _ in range(50):
        optimizer.zero_grad()
        model(x).losses["auxiliary"].backward()
        optimizer.step()
    assert float(model(x).losses["auxiliary"].detach()) < 0.8 * before
