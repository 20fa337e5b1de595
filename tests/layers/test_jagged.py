from __future__ import annotations

import pytest
import torch

from mmctr.layers import jagged as layers
from mmctr.layers import native
from mmctr.layers.dice import Dice, _DiceFunction
from mmctr.layers.jagged import linear_of_rows, pool_rows, row_dots, segment_ids, segment_softmax, take_rows
from mmctr.layers.mlp import MLP


def simple_dice(s, alpha, mean, var, eps=1e-8):
    p = torch.sigmoid((s - mean) / torch.sqrt(var + eps))
    return p * s + (1 - p) * alpha * s


@pytest.mark.parametrize("channels", [1, 4, 16, 40, 80])
@pytest.mark.parametrize("rows", [0, 1, 5, 3000])
def test_compiled_dice_equals_torchs(channels, rows, monkeypatch):
    if native.library() is None:
        pytest.skip("no compiler")
    results = []
    for compiled in (True, False):
        torch.manual_seed(0)
        dice, x = Dice(channels), (torch.randn(rows, channels) * 30 + 5).requires_grad_()
        torch.nn.init.normal_(dice.alpha)
        if not compiled:
            monkeypatch.setattr(native, "library", lambda: None)
        out = dice(x)
        (out * torch.randn(rows, channels)).sum().backward()
        with torch.no_grad():
            evaluated = dice.eval()(x)
        results.append([out.detach(), x.grad, dice.alpha.grad, dice.running_mean, dice.running_var, evaluated])
    for name, fast, simple in zip(("out", "x", "alpha", "mean", "var", "evaluated"), *results, strict=True):
        # of one row the deviation is 0, and large terms of its gradient cancel
        atol = 0.2 if rows == 1 and name == "x" else 1e-5 * max(1, rows) ** 0.5
        torch.testing.assert_close(fast, simple, rtol=1e-4, atol=atol)


def test_a_batch_without_rows_leaves_the_running_averages():
    dice = Dice(4)
    dice(torch.randn(9, 4))
    before = dice.running_mean.clone(), dice.running_var.clone()
    dice(torch.zeros(0, 4))
    assert torch.equal(dice.running_mean, before[0]) and torch.equal(dice.running_var, before[1])


def test_compiled_dice_keeps_what_is_not_a_number_and_saturates():
    dice, x = Dice(3).eval(), torch.tensor([[float("nan"), 1e30, -1e30], [0.0, 3e38, -80.0]])
    dice.alpha.data.fill_(0.5)
    with torch.no_grad():
        out = dice(x)
    expected = torch.tensor([[float("nan"), 1e30, -0.5e30], [0.0, 3e38, -40.0]])
    torch.testing.assert_close(out, expected, equal_nan=True)


def test_without_a_compiler_torch_does_it(monkeypatch, tmp_path):
    native.library.cache_clear()
    monkeypatch.setenv("MMCTR_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "/no/such/compiler")
    try:
        with pytest.warns(UserWarning, match="cannot be compiled or loaded.*goes on with torch"):
            assert native.library() is None
        assert Dice(3)(torch.randn(5, 3)).shape == (5, 3)
        native.library.cache_clear()
        monkeypatch.setenv("MMCTR_NATIVE", "0")
        assert native.library() is None
    finally:
        native.library.cache_clear()


def test_dice_in_training_equals_the_formula_on_the_batch():
    torch.manual_seed(0)
    dice, x = Dice(4), torch.randn(50, 4) * torch.tensor([1.0, 5.0, 0.1, 2.0]) + 3
    torch.nn.init.normal_(dice.alpha)
    expected = simple_dice(x, dice.alpha, x.mean(0), x.var(0, unbiased=False))
    torch.testing.assert_close(dice(x), expected)
    torch.testing.assert_close(dice.running_mean, 0.1 * x.mean(0))
    torch.testing.assert_close(dice.running_var, 0.9 + 0.1 * x.var(0, unbiased=False))


def test_dice_in_evaluation_uses_the_running_averages_alone():
    torch.manual_seed(0)
    dice = Dice(3).eval()
    dice.running_mean[:] = torch.tensor([1.0, -1.0, 0.0])
    dice.running_var[:] = torch.tensor([4.0, 1.0, 0.25])
    torch.nn.init.normal_(dice.alpha)
    x = torch.randn(7, 3)
    before = dice.running_mean.clone(), dice.running_var.clone()
    torch.testing.assert_close(dice(x), simple_dice(x, dice.alpha, *before))
    torch.testing.assert_close(dice(x[:1]), dice(x)[:1])  # rows do not see each other
    assert dice.running_mean.equal(before[0]) and dice.running_var.equal(before[1])


@pytest.mark.parametrize("chunk", [4, 100])
def test_dice_gradients_are_those_of_the_formula(chunk, monkeypatch):
    monkeypatch.setattr(layers, "CHUNK", chunk)
    torch.manual_seed(0)
    x = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    alpha = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, a: _DiceFunction.apply(s, a, 1e-8)[0], (x, alpha))
    weight = torch.randn(9, 3, dtype=torch.float64)
    fast = torch.autograd.grad((_DiceFunction.apply(x, alpha, 1e-8)[0] * weight).sum(), (x, alpha))
    simple = torch.autograd.grad(
        (simple_dice(x, alpha, x.mean(0), x.var(0, unbiased=False)) * weight).sum(), (x, alpha)
    )
    for a, b in zip(fast, simple, strict=True):
        torch.testing.assert_close(a, b)


def test_dice_of_no_rows_one_row_and_constants_is_finite():
    for rows in (torch.zeros(0, 2), torch.ones(1, 2), torch.full((6, 2), -3.0)):
        dice, x = Dice(2), rows.clone().requires_grad_()
        dice(x).sum().backward()
        assert x.grad.isfinite().all() and dice.alpha.grad.isfinite().all()
        assert dice.running_mean.isfinite().all() and dice.running_var.isfinite().all()


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


def test_an_mlp_is_linear_activation_dropout():
    kinds = [type(layer).__name__ for layer in MLP(3, [4, 5], 1, "prelu", 0.1)]
    assert kinds == ["Linear", "PReLU", "Dropout", "Linear", "PReLU", "Dropout", "Linear"]
    assert MLP(3, [], 2, "relu")(torch.zeros(7, 3)).shape == (7, 2)
