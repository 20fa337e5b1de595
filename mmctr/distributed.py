"""Operations over the processes of distributed training: gathers with gradients, sums, means and sharded tensors."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


def start_processes(**options: Any) -> Accelerator:
    """The Accelerator of the processes that a launcher has started, or of one process.

    Args:
        options: arguments of `Accelerator`.

    Raises:
        ValueError: a launcher has started several processes, and each believes to be alone: all of them would write the
            same files.
    """
    from accelerate import Accelerator  # slow to import, and most users of this module get one

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and not torch.accelerator.is_available():
        # processes of torchrun find each other only so; the argument `cpu` would switch sharding off
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    accelerator = Accelerator(**options)
    if accelerator.num_processes != processes:
        raise ValueError(
            f"{processes} processes were started, but each works alone: start them with `accelerate launch`, or set "
            f"ACCELERATE_USE_CPU=true to use the CPU"
        )
    return accelerator


def world_size() -> int:
    """Number of processes; 1 without distributed training."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    """Concatenate over processes. Backward: every process reads the slice of this process, so the gradients of that
    slice are summed over processes."""

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
    """Gather the rows of all processes, differentiably.

    Args:
        x: (B, ...) rows of this process; B is equal in all processes.

    Returns:
        (W * B, ...) rows of the W processes in the order of the ranks.
    """
    if world_size() == 1:
        return x
    if x.is_floating_point() and x.requires_grad:
        return _Gather.apply(x)
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def masked_mean_over_processes(values: Tensor, valid: Tensor | None = None) -> Tensor:
    """The mean over the valid rows of all processes, 0 without valid rows.

    Every process gets the sum of the local values over the total number of valid rows, times the number of processes.
    The average over processes, as data-parallel training averages gradients, is then the mean.

    Args:
        values: (B,) values; B is equal in all processes.
        valid: (B,) bool mask; None: all rows.

    Returns:
        A scalar.
    """
    if valid is None:
        return values.mean()
    count = valid.sum()
    if world_size() > 1:
        dist.all_reduce(count)
    return torch.where(valid, values, 0.0).sum() * world_size() / count.clamp(min=1)


def sum_over_processes(x: Tensor) -> Tensor:
    """Replace `x` by the sum of `x` over all processes, in place and without gradient; a single process changes
    nothing."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def jagged_mean_over_processes(x: Tensor) -> Tensor:
    """The mean of values over all processes, 0 without values.

    Every process gets a share of the mean such that the average over processes, as data-parallel training averages
    gradients, is the mean over all values.

    Args:
        x: (n,) values; n may differ between processes.

    Returns:
        A scalar.
    """
    count = sum_over_processes(x.new_tensor([float(len(x))])).clamp(min=1)
    return x.sum() * (world_size() / count).squeeze()


def own_columns(num_rows: int, device: torch.device) -> Tensor:
    """The positions of the rows of this process in the batch that `gather_rows` returns.

    Args:
        num_rows: B, number of rows of this process.
        device: device of the result.

    Returns:
        (B,) int64.
    """
    first = dist.get_rank() * num_rows if world_size() > 1 else 0
    return torch.arange(first, first + num_rows, device=device)


def gather_parts(rows: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    """Gather rows and gradients of all processes, where the number of rows may differ between processes.

    Args:
        rows: (R,) row numbers of this process.
        grads: (R, D) gradients of the rows.

    Returns:
        The row numbers and the gradients of all processes; gradients are divided by the number of processes.
    """
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
    """The fraction of processes that have a row.

    Args:
        rows: (R,) distinct row numbers of this process.

    Returns:
        (R,) fractions in (0, 1].
    """
    everywhere, parts = gather_parts(rows, torch.ones(len(rows), 1, device=rows.device))
    distinct, positions = torch.unique(everywhere, return_inverse=True)
    shares = torch.zeros(len(distinct), device=rows.device).index_add_(0, positions, parts[:, 0])
    return shares[torch.searchsorted(distinct, rows)]


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that is sharded over processes; other tensors are returned unchanged. All processes must
    call this function."""
    gather: Any = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def spread_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Shard a whole tensor as another tensor is sharded. All processes must call this function.

    Args:
        tensor: the whole tensor.
        other: a tensor of the same shape, sharded over processes or not.

    Returns:
        `tensor` itself where `other` is not sharded or has another shape.
    """
    if tensor.numel() == other.numel() == 1:
        tensor = tensor.reshape(other.shape)  # a scalar is sharded as a vector
    # DTensor is recognised by an attribute: the import takes a third of a second, which other runs do not need
    if hasattr(other, "full_tensor") and tensor.shape == other.shape:
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(other, DTensor)
        return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)
    return tensor
