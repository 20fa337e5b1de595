from __future__ import annotations

import pytest
import torch

from mmctr.rankers.din import DIN, ActivationUnit, DINConfig
from mmctr.rankers.layers import RankerInput, segment_ids

D, C = 4, 3
LENGTHS = [3, 0, 1, 5]


def inputs(lengths=LENGTHS, seed=0) -> RankerInput:
    g = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    b, h = len(lengths), sum(lengths)
    target, history, context = (torch.randn(n, d, generator=g) for n, d in ((b, D), (h, D), (b, C)))
    return RankerInput(
        target=target.requires_grad_(),
        history=history.requires_grad_(),
        history_offsets=offsets,
        context=context.requires_grad_(),
    )


def din(weights="intensity", activation="dice", seed=0) -> DIN:
    torch.manual_seed(seed)
    model = DINConfig(attention=[6, 5], mlp=[7], weights=weights, activation=activation).build(D, C)
    for name, parameter in model.named_parameters():
        if name.endswith("alpha"):
            torch.nn.init.normal_(parameter)
    return model


def explicit_unit(unit: ActivationUnit, query, keys):
    return unit.rest(unit.act(unit.first(torch.cat([query, keys, query - keys, query * keys], 1)))).squeeze(1)


def padded_reference(model: DIN, x: RankerInput) -> torch.Tensor:
    """One impression after another; statistics of Dice over all history values, none over padding."""
    segments = segment_ids(x.history_offsets, len(x.history))
    scores = explicit_unit(model.unit, x.target[segments], x.history)
    longest, rows = 6, []
    for b in range(len(x.target)):
        start, end = x.history_offsets[b : b + 2].tolist()
        keys = torch.nn.functional.pad(x.history[start:end], (0, 0, 0, longest - (end - start)))
        padding = (0, longest - (end - start))
        if model.config.weights == "softmax" and end > start:
            a = torch.softmax(torch.nn.functional.pad(scores[start:end], padding, value=-torch.inf), 0)
        else:
            a = torch.nn.functional.pad(scores[start:end], padding)
        interest = (a[:, None] * keys).sum(0)
        rows.append(torch.cat([x.context[b], x.target[b], interest, interest * x.target[b]]))
    return model.mlp(torch.stack(rows)).squeeze(1)


@pytest.mark.parametrize("activation", ["dice", "relu", "prelu", "sigmoid"])
def test_the_unit_equals_the_explicit_concatenation(activation):
    unit, x = din(activation=activation).unit, inputs()
    segments = segment_ids(x.history_offsets, len(x.history))
    fast = unit(x.target, x.history, segments)
    torch.testing.assert_close(fast, explicit_unit(unit, x.target[segments], x.history), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("weights", ["intensity", "softmax"])
def test_jagged_equals_padded_in_value_and_gradient(weights, training):
    results = []
    for forward in (lambda m, x: m(x).logits, padded_reference):
        model, x = din(weights).train(training), inputs()
        logits = forward(model, x)
        (logits * torch.tensor([1.0, -2.0, 3.0, 0.5])).sum().backward()
        gradients = [x.target.grad, x.history.grad, x.context.grad, *(p.grad for p in model.parameters())]
        results.append([logits.detach(), *gradients])
    for fast, simple in zip(*results, strict=True):
        torch.testing.assert_close(fast, simple, rtol=1e-3, atol=1e-5)
    for gradient in results[0][1:4]:
        assert (gradient.abs().sum(1) > 0).all()  # every target, behaviour and context is read


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
        empty = torch.cat([x.context[:1], x.target[:1], torch.zeros(1, 2 * D)], 1)
        if lengths[0] == 0:
            torch.testing.assert_close(logits[0], model.mlp(empty)[0, 0])


def test_the_order_of_impressions_does_not_matter():
    x, order = inputs(), [2, 0, 3, 1]
    slices = [slice(*x.history_offsets[b : b + 2].tolist()) for b in order]
    moved = RankerInput(
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
        logits = [
            model(RankerInput(target, keys, torch.tensor([0, len(keys)]), context)).logits for keys in (once, twice)
        ]
        assert torch.allclose(*logits, atol=1e-6) == same
