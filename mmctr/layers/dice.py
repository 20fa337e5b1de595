"""Dice, the data-adaptive activation of DIN (Zhou et al. 2018, section 5.3), with statistics over all processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmctr.distributed import sum_over_processes
from mmctr.layers import native
from mmctr.layers.jagged import chunks


class _DiceFunction(torch.autograd.Function):
    """Dice on batch statistics with a hand-written backward pass: fewer passes over memory than autograd needs, and a
    chunk of rows goes through all passes while the chunk is in the cache.

    With u = (s - mean) * r, r = 1 / sqrt(var + eps), p = sigmoid(u): f = s (alpha + (1 - alpha) p). Mean and variance
    are over the rows of all processes, so the gradients of both are summed over processes too.
    """

    @staticmethod
    def forward(ctx, s: Tensor, alpha: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = sum_over_processes(s.new_tensor([float(len(s))]))
        count = rows.clamp(min=1)
        mean = sum_over_processes(s.sum(0)) / count
        ctx.native = s.shape[1] <= native.MAX_CHANNELS and s.is_contiguous() and native.usable(s, alpha)
        if ctx.native:
            squares = native.dice_squares(s, mean)
        else:
            squares = torch.zeros_like(mean)
            for part in chunks(len(s), s.device):
                squares += (s[part] - mean).square_().sum(0)
        var = sum_over_processes(squares) / count
        r = torch.rsqrt(var + eps)
        if ctx.native:
            out = native.dice_forward(s, mean, r, alpha)
        else:
            out = torch.empty_like(s)
            for part in chunks(len(s), s.device):
                p = (s[part] - mean).mul_(r).sigmoid_()
                torch.addcmul(alpha, p, 1 - alpha, out=out[part]).mul_(s[part])
        ctx.save_for_backward(s, alpha, mean, r, count)
        ctx.mark_non_differentiable(mean, var, rows)
        return out, mean, var, rows

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None]:
        s, alpha, mean, r, count = ctx.saved_tensors
        if ctx.native:
            out, sums = native.dice_backward(s, grad.contiguous(), mean, r, alpha)
        else:
            out, sums = _DiceFunction._fixed_statistics(s, grad, mean, r, alpha)
        # the gradient by way of the statistics, as in batch norm
        du, du_u = sum_over_processes(sums[2:].clone()) * (1 - alpha) / count
        factor, constant = -r * r * du_u, -r * du
        if ctx.native:
            native.dice_finish(out, s, mean, factor, constant)
        else:
            for part in chunks(len(s), s.device):
                out[part].addcmul_(s[part] - mean, factor).add_(constant)
        return out, sums[0] - sums[1], None

    @staticmethod
    def _fixed_statistics(s: Tensor, grad: Tensor, mean: Tensor, r: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of s for constant statistics, and the sums (4, channels) of grad s, grad s p,
        dL/du / (1 - alpha) and u dL/du / (1 - alpha)."""
        keep, out, sums = 1 - alpha, torch.empty_like(s), s.new_zeros((4, s.shape[1]))
        for part in chunks(len(s), s.device):
            x = s[part]
            u = (x - mean).mul_(r)
            p = torch.sigmoid(u)
            grad_s = grad[part] * x
            d = grad_s * p
            sums[0] += grad_s.sum(0)
            sums[1] += d.sum(0)
            d.addcmul_(d, p, value=-1)  # dL/du, but for the factor 1 - alpha
            sums[2] += d.sum(0)
            sums[3] += u.mul_(d).sum(0)
            # the gradients by way of the direct factor s and by way of u, for constant statistics
            torch.addcmul(alpha, p, keep, out=out[part]).mul_(grad[part]).addcmul_(d, keep * r)
        return out, sums


class Dice(nn.Module):
    """Data-adaptive activation of DIN (Zhou et al. 2018, section 5.3): f(s) = p(s) s + (1 - p(s)) alpha s,
    p(s) = sigmoid((s - E[s]) / sqrt(Var[s] + eps)), alpha learned per channel.

    Training uses the mean and variance of the mini-batch over all processes and updates moving averages; evaluation
    uses the moving averages. Histories are jagged, so padding does not enter the statistics.

    Args:
        num_channels: number of channels.
        eps: constant added to the variance.
        momentum: weight of the mini-batch in the moving averages.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_channels: int, eps: float = 1e-8, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.alpha = nn.Parameter(torch.zeros(num_channels))
        self.register_buffer("running_mean", torch.zeros(num_channels))
        self.register_buffer("running_var", torch.ones(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation to (n, channels); the result has the same shape and type."""
        s = x.float()
        if self.training:
            out, mean, var, rows = _DiceFunction.apply(s, self.alpha, self.eps)
            with torch.no_grad():
                weight = self.momentum * (rows > 0)  # no rows at all have no statistics
                self.running_mean.lerp_(mean, weight)
                self.running_var.lerp_(var, weight)
            return out.to(x.dtype)
        r = torch.rsqrt(self.running_var + self.eps)
        plain = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if not plain and s.is_contiguous() and native.usable(s, self.alpha, self.running_mean):
            return native.dice_forward(s, self.running_mean, r, self.alpha).to(x.dtype)
        p = torch.sigmoid((s - self.running_mean) * r)
        return (s * (p + self.alpha * (1 - p))).to(x.dtype)
