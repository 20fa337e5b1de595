"""Batch normalisation with the statistics of all processes, on any device and for the layers of any library.

`torch.nn.SyncBatchNorm` needs a GPU, and replaces layers by a class without what subclasses of other libraries add,
such as the activation inside the layers of timm.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mmctr.distributed import sum_over_processes, world_size


def share_statistics(module: nn.Module, compiled: bool = False) -> None:
    """Let all batch normalisation layers of a module take the statistics of training batches over all processes.

    The class of each layer is replaced by a subclass; parameters, buffers and names stay. In one process, and in
    evaluation mode, a layer computes what it did before. In training all processes must call a layer equally often; the
    numbers of rows may differ, and a process may have no rows.

    Args:
        module: the module; its batch normalisation layers are changed in place.
        compiled: whether `torch.compile` is going to compile the module.
    """
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and not isinstance(layer, _SharedStatistics):
            changed: Any = layer
            changed.__class__ = _with_shared_statistics(type(layer), compiled)


@contextmanager
def separate_statistics(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the context each process takes statistics of the rows of that process alone; at the end the running
    statistics are averaged over processes, so that all processes have the same. For passes that processes make in
    different numbers."""
    layers = [layer for layer in modules if isinstance(layer, _SharedStatistics)]
    for layer in layers:
        layer.is_separate = True
    try:
        yield
    finally:
        for layer in layers:
            layer.is_separate = False
    for layer in layers:
        for statistics in (layer.running_mean, layer.running_var) if world_size() > 1 else ():
            if statistics is not None:
                sum_over_processes(statistics).div_(world_size())


class _Standardise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) by channel, the second dimension, with mean and variance over all processes."""

    @staticmethod
    def forward(ctx, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dims = [0, *range(2, x.dim())]
        rows = x.new_tensor([x.numel() // x.shape[1]])
        *total, count = sum_over_processes(torch.cat([x.sum(dims), rows]))
        mean = _by_channel(torch.stack(total) / count.clamp(min=1), x)
        var = sum_over_processes((x - mean).square().sum(dims)) / count.clamp(min=1)
        r = _by_channel(torch.rsqrt(var + eps), x)
        out = (x - mean) * r
        ctx.save_for_backward(out, r, count.clamp(min=1))
        ctx.mark_non_differentiable(mean, var, count)
        return out, mean.reshape(-1), var, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        out, r, count = ctx.saved_tensors
        dims = [0, *range(2, grad.dim())]
        sums = sum_over_processes(torch.stack([grad.sum(dims), (grad * out).sum(dims)])) / count
        return r * (grad - _by_channel(sums[0], grad) - out * _by_channel(sums[1], grad)), None


def _by_channel(values: Tensor, x: Tensor) -> Tensor:
    """(C,) values as a tensor that broadcasts with x (n, C, ...)."""
    return values.reshape(1, -1, *[1] * (x.dim() - 2))


class _SharedStatistics(nn.modules.batchnorm._BatchNorm):
    """The first base class of a batch normalisation layer with the statistics of all processes."""

    is_separate = False
    """whether this process takes statistics of its rows alone"""

    def forward(self, x: Tensor) -> Tensor:
        """The layer of the other base class for x (n, C, ...)."""
        if not self.training or self.is_separate or world_size() == 1:
            return super().forward(x)
        return self._over_processes(x)

    def _over_processes(self, x: Tensor) -> Tensor:
        """As `forward`, with the statistics of all processes.

        The input is standardised first. The forward pass of the other base class then normalises with mean 0 and
        variance 1, and adds scale, shift and whatever else the class computes.
        """
        standard, mean, var, count = _Standardise.apply(x.float(), self.eps)
        self._update(mean, var, float(count))
        kept: Any = self.running_mean, self.running_var
        self.running_mean, self.running_var = torch.zeros_like(mean), torch.full_like(mean, 1 - self.eps)
        self.training = False
        try:
            return super().forward(standard.to(x.dtype))
        finally:
            self.training = True
            self.running_mean, self.running_var = kept

    @torch.no_grad()
    def _update(self, mean: Tensor, var: Tensor, count: float) -> None:
        """Move the running statistics towards those of a batch of `count` values a channel, as torch does."""
        if self.running_mean is None or self.running_var is None or not count:
            return
        weight = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if weight is None:
                weight = 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean), weight or 0.0)
        self.running_var.lerp_((var * (count / max(count - 1, 1))).to(self.running_var), weight or 0.0)


@cache
def _with_shared_statistics(layer: type[nn.Module], compiled: bool) -> type[nn.Module]:
    """The subclass of a class of layers that shares statistics; `torch.compile` leaves the sums over processes out."""
    methods = {"_over_processes": torch.compiler.disable(_SharedStatistics._over_processes)} if compiled else {}
    return type(layer.__name__, (_SharedStatistics, layer), {"__module__": layer.__module__, **methods})
