"""What differs between one process and many: sizes, gathers with gradient, means, sharded tensors."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    """Concatenate over processes. Backward: all of them read our slice, so their gradients of it are summed."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather_rows(x: Tensor) -> Tensor:
    """(B, ...) of this process -> (W * B, ...) of all in rank order, differentiable. B is equal everywhere."""
    if world_size() == 1:
        return x
    if x.is_floating_point() and x.requires_grad:
        return _Gather.apply(x)
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def masked_mean_over_processes(values: Tensor, valid: Tensor | None = None) -> Tensor:
    """The mean of (B,) values over the valid rows of all processes, 0 where there are none.

    Each process gets its own share times the number of processes, so that the average over them is the mean.
    """
    if valid is None:
        return values.mean()
    count = valid.sum()
    if world_size() > 1:
        dist.all_reduce(count)
    return torch.where(valid, values, 0.0).sum() * world_size() / count.clamp(min=1)


def sum_over_processes(x: Tensor) -> Tensor:
    """The sum of `x` over all processes, in place and without gradient; `x` itself in a single process."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def jagged_mean_over_processes(x: Tensor) -> Tensor:
    """The mean of (n,) values over all processes, each with another n; 0 where there are none.

    A process gets a share of the mean such that the average over processes, as data-parallel training averages
    gradients, is the mean over all values.
    """
    count = sum_over_processes(x.new_tensor([float(len(x))])).clamp(min=1)
    return x.sum() * (world_size() / count).squeeze()


def own_columns(num_rows: int, device: torch.device) -> Tensor:
    """(B,) the columns of the gathered batch that hold this process's rows."""
    first = dist.get_rank() * num_rows if world_size() > 1 else 0
    return torch.arange(first, first + num_rows, device=device)


def gather_parts(rows: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of all processes, whose numbers differ, and their gradients divided by the number of processes."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows, grads
    world = dist.get_world_size()
    sizes = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
    counts = [int(size) for size in sizes]
    gathered = []
    for part in (rows, grads / world):
        padded = part.new_zeros((max(counts), *part.shape[1:]))
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(parts, padded)
        gathered.append(torch.cat([whole[:count] for whole, count in zip(parts, counts, strict=True)]))
    return gathered[0], gathered[1]


def share_of_processes(rows: Tensor) -> Tensor:
    """(R,) for each of the distinct rows (R,) of this process the fraction of processes that have it too."""
    everywhere, parts = gather_parts(rows, torch.ones(len(rows), 1, device=rows.device))
    distinct, positions = torch.unique(everywhere, return_inverse=True)
    shares = torch.zeros(len(distinct), device=rows.device).index_add_(0, positions, parts[:, 0])
    return shares[torch.searchsorted(distinct, rows)]


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor that is spread over processes, which all take part; another one as it is."""
    return tensor.full_tensor() if _is_spread(tensor) else tensor  # type: ignore[attr-defined]


def spread_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor spread as `other` is, if it is; all processes take part."""
    if tensor.numel() == other.numel() == 1:
        tensor = tensor.reshape(other.shape)  # a scalar is spread as a vector
    if _is_spread(other) and tensor.shape == other.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)  # type: ignore[attr-defined]
    return tensor


def _is_spread(tensor: Tensor) -> bool:
    """Whether it is a DTensor; importing that takes a third of a second, which plain runs need not spend."""
    return hasattr(tensor, "full_tensor")
