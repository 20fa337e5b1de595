from __future__ import annotations

import pytest
import torch

from mmctr.layers import native
from mmctr.layers.activation_unit import Interaction
from mmctr.layers.jagged import segment_ids
from tests.helpers.references import explicit_unit, repeated
from tests.rankers.test_din import din, inputs


@pytest.mark.parametrize("activation", ["dice", "relu", "prelu", "sigmoid"])
def test_the_unit_equals_the_explicit_concatenation(activation):
    unit, x = din(activation=activation).unit, inputs()
    query = x.items[x.target]
    fast = unit(query, x.items, x.history, x.history_offsets)
    slow = explicit_unit(unit, query[segment_ids(x.history_offsets, len(x.history))], x.items[x.history])
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


@pytest.fixture(params=["compiled", "torch"])
def way(request, monkeypatch) -> str:
    """Both ways through the hot places."""
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no compiler")
    return request.param


@pytest.mark.parametrize("hidden", [1, 16, 40, 80, 97, 128])
@pytest.mark.parametrize("dim", [3, 16, 72, 128])
def test_the_compiled_layer_equals_torchs(dim, hidden, monkeypatch):
    """Of every width it has code for, with one key, none, and more than it takes at a time."""
    if native.library() is None:
        pytest.skip("no compiler")
    results = []
    for compiled in (True, False):
        x = repeated([70, 0, 1, 3, 200, 5], 40, dim, 1)
        g = torch.Generator().manual_seed(1)
        shapes = ((6, dim), (hidden, dim), (6, hidden), (hidden, dim))
        query, weight, part, key_weight = (torch.randn(*s, generator=g).requires_grad_() for s in shapes)
        if not compiled:
            monkeypatch.setattr(native, "library", lambda: None)
        out = Interaction.apply(query, x.items, weight, part, key_weight, x.history, x.history_offsets)
        (out * torch.randn(out.shape, generator=g)).sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in (query, x.items, weight, part, key_weight))])
    for fast, simple in zip(*results, strict=True):
        torch.testing.assert_close(fast, simple, rtol=1e-4, atol=1e-4 * simple.abs().max().item())


def test_finite_differences_of_the_interaction(way):
    x = repeated([3, 0, 2], 4, 3, 1)
    g = torch.Generator().manual_seed(1)
    leaves = [torch.randn(*shape, generator=g) for shape in ((3, 3), (4, 3), (5, 3), (3, 5), (5, 3))]
    weight = torch.randn(5, 5, generator=g).double()  # of the (H, hidden) outputs

    def total(*leaves):
        return (Interaction.apply(*leaves, x.history, x.history_offsets).double() * weight).sum()

    leaves = [leaf.requires_grad_() for leaf in leaves]
    grads = torch.autograd.grad(total(*leaves), leaves)
    for number, (leaf, grad) in enumerate(zip(leaves, grads, strict=True)):
        direction = torch.randn(leaf.shape, generator=g)
        moved = [
            [part + e * direction if i == number else part for i, part in enumerate(leaves)] for e in (1e-2, -1e-2)
        ]
        # exact but for rounding: in each leaf alone the function is linear
        slope = (total(*moved[0]) - total(*moved[1])) / 2e-2
        torch.testing.assert_close((grad * direction).sum().double(), slope.detach(), rtol=1e-3, atol=1e-3)
