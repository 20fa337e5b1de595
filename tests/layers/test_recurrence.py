from __future__ import annotations

import pytest
import torch

from mmctr.layers.recurrence import Recurrence, TimeMajor, _Recur
from tests.helpers.references import one_by_one

D, IN = 4, 3
GATES = ["gru", "agru", "augru", "augru_official"]


def jagged(lengths, seed=0, dim=IN):
    g = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    total = int(offsets[-1])
    return torch.randn(total, dim, generator=g), torch.rand(total, generator=g), offsets


def recurrence(gate="gru") -> Recurrence:
    torch.manual_seed(3)
    return Recurrence(IN, D, gate)


def test_time_major_by_hand():
    layout = TimeMajor.of(torch.tensor([0, 2, 2, 5, 6]), 6)  # lengths 2, 0, 3, 1
    assert layout.sizes == [3, 2, 1]
    assert layout.order.tolist() == [2, 0, 5, 3, 1, 4]
    assert layout.segments.tolist() == [2, 0, 3, 2, 0, 2]
    assert layout.previous.tolist() == [0, 1, 3]
    assert layout.last.tolist() == [4, 6, 5, 2]


def test_time_major_without_histories():
    layout = TimeMajor.of(torch.zeros(4, dtype=torch.int64), 0)
    assert layout.sizes == [] and layout.last.tolist() == [0, 0, 0] and len(layout.order) == 0
    assert recurrence()(torch.zeros(0, 3 * D), layout).shape == (0, D)


def run(model: Recurrence, values, layout, attention=None) -> torch.Tensor:
    return model(model.input(values), layout, attention)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("lengths", [[3, 0, 1, 5], [1], [2, 2, 2], [0, 0, 7]])
def test_values_and_gradients_equal_the_formulae(gate, lengths):
    results = []
    for fast in (True, False):
        model = recurrence(gate)
        values, attention, offsets = jagged(lengths)
        values.requires_grad_(), attention.requires_grad_()
        if fast:
            layout = TimeMajor.of(offsets, len(values))
            out = run(model, values[layout.order], layout, None if gate == "gru" else attention[layout.order])
            states = torch.zeros_like(out).index_copy(0, layout.order, out)
        else:
            states = one_by_one(model, values, attention, offsets)
        weight = torch.randn(states.shape, generator=torch.Generator().manual_seed(9))
        (states * weight).sum().backward()
        grads = [values.grad, *(p.grad for p in model.parameters())]
        results.append([states.detach(), *grads, *([] if gate == "gru" else [attention.grad])])
    for fast, simple in zip(*results, strict=True):
        torch.testing.assert_close(fast, torch.zeros_like(fast) if simple is None else simple, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gate", GATES)
def test_finite_differences(gate):
    values, attention, offsets = jagged([3, 1, 4], dim=3 * D)
    layout = TimeMajor.of(offsets, len(values))
    model = recurrence(gate).double()
    inputs = [values.double(), model.hidden.weight.detach(), model.hidden.bias.detach(), attention.double()]
    if gate == "gru":
        inputs[3] = None
    inputs = [None if x is None else x.clone().requires_grad_() for x in inputs]
    factor = torch.randn(len(values), D, generator=torch.Generator().manual_seed(1)).double()

    def total() -> torch.Tensor:
        return (_Recur.apply(*inputs, layout, gate) * factor).sum()

    leaves = [x for x in inputs if x is not None]
    for leaf, grad in zip(leaves, torch.autograd.grad(total(), leaves), strict=True):
        with torch.no_grad():
            flat = leaf.view(-1)
            for i in range(len(flat)):
                kept, sums = flat[i].item(), []
                for step in (1e-5, -1e-5):
                    flat[i] = kept + step
                    sums.append(total().item())
                flat[i] = kept
                assert grad.view(-1)[i].item() == pytest.approx((sums[0] - sums[1]) / 2e-5, rel=1e-6, abs=1e-8)


def test_a_second_backward_pass_is_refused():
    values, _, offsets = jagged([3, 1], dim=3 * D)
    states = recurrence()(values.requires_grad_(), TimeMajor.of(offsets, 4))
    states.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        states.sum().backward()


def test_it_is_the_gru_of_torch():
    """torch's gate z keeps the state where u moves it: the weights of the update gate change their sign."""
    model, theirs = recurrence(), torch.nn.GRU(IN, D)
    with torch.no_grad():
        for ours, weight, bias in (
            (model.input, theirs.weight_ih_l0, theirs.bias_ih_l0),
            (model.hidden, theirs.weight_hh_l0, theirs.bias_hh_l0),
        ):
            (u, r, c), (bu, br, bc) = ours.weight.chunk(3), ours.bias.chunk(3)
            weight.copy_(torch.cat([r, -u, c]))
            bias.copy_(torch.cat([br, -bu, bc]))
    values, _, offsets = jagged([5, 5])
    layout = TimeMajor.of(offsets, 10)
    out = run(model, values[layout.order], layout).view(5, 2, D)
    torch.testing.assert_close(out, theirs(values.view(2, 5, IN).transpose(0, 1))[0])


def test_attention_of_zero_and_one():
    values, _, offsets = jagged([4, 2])
    layout = TimeMajor.of(offsets, 6)
    ordered, gru = values[layout.order], run(recurrence(), values[layout.order], layout)
    zero, one = torch.zeros(6), torch.ones(6)
    # the paper's form: nothing happens at 0, a plain GRU at 1
    torch.testing.assert_close(run(recurrence("augru"), ordered, layout, zero), torch.zeros(6, D))
    torch.testing.assert_close(run(recurrence("augru"), ordered, layout, one), gru)
    half = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])  # both histories step twice, then one is let alone
    kept = run(recurrence("augru"), ordered, layout, half)
    assert torch.equal(kept[4], kept[2]) and torch.equal(kept[5], kept[2])
    # the authors' code: a plain GRU at 0, the candidate itself at 1
    torch.testing.assert_close(run(recurrence("augru_official"), ordered, layout, zero), gru)
    torch.testing.assert_close(
        run(recurrence("augru_official"), ordered, layout, one), run(recurrence("agru"), ordered, layout, one)
    )
    assert not torch.allclose(run(recurrence("augru_official"), ordered, layout, one), gru)


def test_histories_do_not_see_each_other():
    values, attention, offsets = jagged([3, 6, 1])
    layout = TimeMajor.of(offsets, 10)
    together = run(recurrence("augru"), values[layout.order], layout, attention[layout.order])
    alone = TimeMajor.of(torch.tensor([0, 3]), 3)
    torch.testing.assert_close(
        together[layout.segments == 0], run(recurrence("augru"), values[:3], alone, attention[:3]), rtol=1e-5, atol=1e-6
    )
