from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mmctr.rankers.base import RankerInput
from mmctr.rankers.dien import DIEN, DIENConfig
from tests.helpers.references import one_by_one, repeated, separate

D, C, LENGTHS = 4, 2, [3, 0, 1, 5]


def inputs(num_items=16) -> RankerInput:
    return repeated(LENGTHS, num_items, D, C)


def dien(**values) -> DIEN:
    torch.manual_seed(1)
    return DIENConfig(mlp=[6], activation="sigmoid", **values).build(D, C)


def reference(model: DIEN, x: RankerInput) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One impression after another, as the paper writes it."""
    offsets = x.history_offsets
    target, history, negatives = x.items[x.target], x.items[x.history], x.items[x.negatives]
    interests = one_by_one(model.extractor, history, torch.zeros(len(history)), offsets)
    rows, terms = [], []
    for b in range(len(x.target)):
        own = slice(*offsets[b : b + 2].tolist())
        h, e, n = interests[own], history[own], negatives[own]
        for t in range(len(h) - 1):
            clicked, not_clicked = (h[t] @ (model.next_item(v) if model.next_item else v) for v in (e[t + 1], n[t + 1]))
            terms.append(-torch.log(torch.sigmoid(clicked)) - torch.log(1 - torch.sigmoid(not_clicked)))
        a = torch.softmax(h @ model.query.weight @ target[b], 0)
        one = torch.tensor([0, len(h)])
        scaled = h * a[:, None] if model.config.gate == "aigru" else h
        states = one_by_one(model.evolver, scaled, a, one)
        state = states[-1] if len(h) else torch.zeros(h.shape[1])
        total = e.sum(0)
        rows.append(torch.cat([x.context[b], target[b], total, total * target[b], state]))
    auxiliary = model.config.auxiliary_weight * torch.stack(terms).mean() if model.config.auxiliary_weight else None
    return model.mlp(torch.stack(rows)).squeeze(1), auxiliary


@pytest.mark.parametrize("gate", ["augru", "augru_official", "agru", "aigru"])
@pytest.mark.parametrize("values", [{}, {"auxiliary_weight": 0.0}, {"auxiliary_weight": 0.3, "hidden_dim": 7}])
@pytest.mark.parametrize(
    "num_items", [3, 30]
)  # what is linear in an item is computed once an item, or once a behaviour
def test_it_equals_the_paper_in_value_and_gradient(gate, values, num_items):
    results = []
    for fast in (True, False):
        model, x = dien(gate=gate, **values), inputs(num_items)
        if fast:
            output = model(x)
            logits, auxiliary = output.logits, output.losses.get("auxiliary")
        else:
            logits, auxiliary = reference(model, x)
        loss = (logits * torch.tensor([1.0, -2.0, 3.0, 0.5])).sum()
        (loss if auxiliary is None else loss + auxiliary).backward()
        grads = [x.items.grad, x.context.grad, *(p.grad for p in model.parameters())]
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
    output = model(separate(two, two, torch.tensor([0, 1, 2]), torch.randn(2, C, generator=g), two))
    assert float(output.losses["auxiliary"].detach()) == 0
    (output.logits.sum() + output.losses["auxiliary"]).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_order_matters_to_dien():
    model, x = dien().eval(), replace(inputs(), history=torch.arange(9))
    flipped = torch.cat([part.flip(0) for part in x.history.split(LENGTHS)])
    other = replace(x, history=flipped)
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
