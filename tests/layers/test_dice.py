from __future__ import annotations

import pytest
import torch

from mmctr.layers import jagged as layers
from mmctr.layers import native
from mmctr.layers.dice import Dice, _DiceFunction


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
