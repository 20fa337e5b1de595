from __future__ import annotations

import pytest
import torch

from mmctr.layers import jagged as layers
from mmctr.layers.jagged import linear_of_rows, pool_rows, row_dots, segment_ids, segment_softmax, take_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 300])
def test_take_rows_and_its_gradient_equal_indexing(dtype, count):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator, dtype=dtype)
    index = torch.randint(0, 37, (count,), generator=generator)  # rows 37-39 are never read
    weight = torch.randn(count, 6, generator=generator, dtype=dtype)
    results = []
    for take in (take_rows, lambda x, index: x[index]):
        leaf = x.clone().requires_grad_()
        taken = take(leaf, index)
        (taken * weight).sum().backward()
        results.append((taken.detach(), leaf.grad))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0)
    torch.testing.assert_close(results[0][1], results[1][1])


def test_segments():
    offsets = torch.tensor([0, 2, 2, 5])
    segments = segment_ids(offsets, 5)
    assert segments.tolist() == [0, 0, 2, 2, 2]
    values, weights = torch.arange(10.0).reshape(5, 2), torch.tensor([1.0, -1.0, 2.0, 0.0, 1.0])
    assert pool_rows(values, torch.arange(5), offsets, weights).tolist() == [[-2, -2], [0, 0], [16, 19]]
    assert pool_rows(values, torch.tensor([4, 4, 0, 1, 2]), offsets).tolist() == [[16, 18], [0, 0], [6, 9]]
    scores = torch.tensor([0.0, 1.0, 1000.0, 1000.0, -1000.0])
    expected = torch.cat([torch.softmax(scores[:2], 0), torch.tensor([0.5, 0.5, 0.0])])
    torch.testing.assert_close(segment_softmax(scores, segments, 3), expected)
    assert segment_softmax(scores[:0], segments[:0], 3).shape == (0,)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("lengths", [[3, 0, 5, 1], [0, 0], [4]])
def test_pooling_and_its_gradient_equal_indexing(lengths, weighted):
    g = torch.Generator().manual_seed(0)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    index = torch.randint(0, 5, (sum(lengths),), generator=g)
    results = []
    for fast in (True, False):
        x = torch.randn(7, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
        weights = torch.linspace(-1, 2, len(index)).requires_grad_()
        if fast:
            pooled = pool_rows(x, index, offsets, weights if weighted else None)
        else:
            taken = x[index] * weights[:, None] if weighted else x[index]
            pooled = torch.stack([part.sum(0) for part in taken.split(lengths)])
        (pooled * torch.arange(3)).sum().backward()
        results.append((pooled.detach(), x.grad, weights.grad if weighted else torch.zeros(0)))
    for fast, simple in zip(*results, strict=True):
        torch.testing.assert_close(fast, simple)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("count", [0, 3, 11, 50])  # on the rows taken, in one chunk and in several; on all rows
def test_a_linear_layer_of_rows(count, bias, monkeypatch):
    monkeypatch.setattr(layers, "CHUNK", 4)
    results = []
    for fast in (True, False):
        torch.manual_seed(0)
        x, layer = torch.randn(6, 4).requires_grad_(), torch.nn.Linear(4, 3, bias=bias)
        index = torch.randint(0, 6, (count,))
        out = linear_of_rows(x, index, layer.weight, layer.bias) if fast else layer(x[index])
        (out * torch.arange(3)).sum().backward()
        results.append([out.detach(), x.grad, *(p.grad for p in layer.parameters())])
    for fast, simple in zip(*results, strict=True):
        torch.testing.assert_close(fast, simple)


@pytest.mark.parametrize("count", [0, 3, 11])
def test_inner_products_of_rows(count, monkeypatch):
    monkeypatch.setattr(layers, "CHUNK", 4)
    results = []
    for fast in (True, False):
        torch.manual_seed(0)
        x, y = torch.randn(6, 4).requires_grad_(), torch.randn(3, 4).requires_grad_()
        i, j = torch.randint(0, 6, (count,)), torch.randint(0, 3, (count,))
        out = row_dots(x, i, y, j) if fast else (x[i] * y[j]).sum(1)
        (out * torch.arange(count)).sum().backward()
        results.append([out.detach(), x.grad, y.grad])
    for fast, simple in zip(*results, strict=True):
        torch.testing.assert_close(fast, simple)
