from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmctr.layers import jagged as layers
from mmctr.layers import native
from mmctr.layers.jagged import segment_ids
from mmctr.rankers.base import RankerInput
from mmctr.rankers.din import DIN, DINConfig
from tests.helpers.references import explicit_unit, repeated, separate

D, C = 4, 3
LENGTHS = [3, 0, 1, 5]


def inputs(lengths=LENGTHS, num_items=12) -> RankerInput:
    return repeated(lengths, num_items, D, C)


def din(weights="intensity", activation="dice", seed=0) -> DIN:
    torch.manual_seed(seed)
    model = DINConfig(attention=[6, 5], mlp=[7], weights=weights, activation=activation).build(D, C)
    for name, parameter in model.named_parameters():
        if name.endswith("alpha"):
            torch.nn.init.normal_(parameter)
    return model


def padded_reference(model: DIN, x: RankerInput) -> torch.Tensor:
    """One impression after another; statistics of Dice over all history values, none over padding."""
    segments = segment_ids(x.history_offsets, len(x.history))
    target, history = x.items[x.target], x.items[x.history]
    scores = explicit_unit(model.unit, target[segments], history)
    longest, rows = max(x.history_offsets.diff().tolist()) + 1, []
    for b in range(len(x.target)):
        start, end = x.history_offsets[b : b + 2].tolist()
        padding = (0, longest - (end - start))
        keys = torch.nn.functional.pad(history[start:end], (0, 0, *padding))
        if model.config.weights == "softmax" and end > start:
            a = torch.softmax(torch.nn.functional.pad(scores[start:end], padding, value=-torch.inf), 0)
        else:
            a = torch.nn.functional.pad(scores[start:end], padding)
        interest = (a[:, None] * keys).sum(0)
        rows.append(torch.cat([x.context[b], target[b], interest, interest * target[b]]))
    return model.mlp(torch.stack(rows)).squeeze(1)


@pytest.fixture(params=["compiled", "torch"])
def way(request, monkeypatch) -> str:
    """Both ways through the hot places."""
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no compiler")
    return request.param


# few items that appear again and again, and many that mostly do not; in one chunk and in several
@pytest.mark.parametrize("num_items, lengths", [(3, LENGTHS), (40, LENGTHS), (5, [7, 0, 9, 1, 2, 2, 30, 0, 4, 4])])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("weights", ["intensity", "softmax"])
def test_jagged_equals_padded_in_value_and_gradient(weights, training, num_items, lengths, way, monkeypatch):
    monkeypatch.setattr(layers, "CHUNK", 16)
    results = []
    for forward in (lambda m, x: m(x).logits, padded_reference):
        model, x = din(weights).train(training), inputs(lengths, num_items)
        logits = forward(model, x)
        (logits * torch.linspace(-1, 2.2, len(lengths))).sum().backward()
        results.append([logits.detach(), x.items.grad, x.context.grad, *(p.grad for p in model.parameters())])
    for fast, simple in zip(*results, strict=True):
        torch.testing.assert_close(fast, simple, rtol=1e-3, atol=1e-5)
    read = torch.zeros(num_items, dtype=torch.bool)
    read[torch.cat([x.target, x.history])] = True
    assert torch.equal(results[0][1].abs().sum(1) > 0, read)  # every target and behaviour is read, and no other item


def test_positions_of_any_integer_type_and_none_outside(way):
    model, x = din().eval(), inputs()
    short = replace(x, history=x.history.int(), history_offsets=x.history_offsets.int())
    torch.testing.assert_close(model(short).logits, model(x).logits)
    with pytest.raises((IndexError, RuntimeError)):
        model(replace(x, history=x.history + 9))


@pytest.mark.lowest
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("weights", ["intensity", "softmax"])
@pytest.mark.parametrize("lengths", [[0, 0, 0], [0, 2, 0], [1]])
def test_empty_histories_are_finite(weights, lengths, training):
    model, x = din(weights).train(training), inputs(lengths)
    logits = model(x).logits
    logits.sum().backward()
    assert logits.isfinite().all() and logits.shape == (len(lengths),)
    for parameter in model.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()
    if not training:  # no behaviours: the interest is zero
        empty = torch.cat([x.context[:1], x.items[x.target[:1]], torch.zeros(1, 2 * D)], 1)
        if lengths[0] == 0:
            torch.testing.assert_close(logits[0], model.mlp(empty)[0, 0])


def test_the_order_of_impressions_does_not_matter():
    x, order = inputs(), [2, 0, 3, 1]
    slices = [slice(*x.history_offsets[b : b + 2].tolist()) for b in order]
    moved = RankerInput(
        items=x.items,
        target=x.target[order],
        history=torch.cat([x.history[part] for part in slices]),
        history_offsets=torch.tensor([0, *torch.tensor([LENGTHS[b] for b in order]).cumsum(0).tolist()]),
        context=x.context[order],
    )
    for training in (True, False):
        torch.testing.assert_close(din().train(training)(moved).logits, din().train(training)(x).logits[order])


def test_intensity_grows_with_repeated_behaviours_and_softmax_does_not():
    target, context = torch.randn(1, D), torch.zeros(1, C)
    once, twice = torch.randn(1, D), None
    twice = once.repeat(2, 1)
    for weights, same in (("softmax", True), ("intensity", False)):
        model = din(weights).eval()
        logits = [model(separate(target, keys, torch.tensor([0, len(keys)]), context)).logits for keys in (once, twice)]
        assert torch.allclose(*logits, atol=1e-6) == same
