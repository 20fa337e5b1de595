"""Gradient caching: contrastive batches larger than memory, with a few rows encoded at a time.

GradCache (Gao et al. 2021, arXiv 2101.06983): the features of all chunks are computed without a graph; the loss gives
the gradient of each feature; then each chunk is encoded again, with the same random numbers, and the gradient of the
features is propagated back into the parameters. The result is the gradient of the whole batch at the price of a second
forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from mmctr.layers.batch_norm import separate_statistics
from mmctr.training.task import ChunkedTask


def chunked_backward(
    model: Any,
    task: ChunkedTask,
    batch: Any,
    size: int,
    accelerator: Accelerator,
    seed: Callable[[int], int],
) -> dict[str, Tensor]:
    """Accumulate the gradient of a batch into the parameters, one chunk at a time.

    Batch normalisation computes statistics of single chunks in single processes, which may differ in their numbers of
    chunks. The running statistics count each chunk once, and are then averaged over processes.

    Args:
        model: the result of `accelerator.prepare` for `task`.
        task: the task.
        batch: the batch.
        size: largest number of rows of a chunk.
        accelerator: processes and precision.
        seed: the seed of the random numbers of a chunk, by the number of the chunk.

    Returns:
        The loss terms, scalars by name.
    """
    chunks = task.chunks(batch, size)
    # data-parallel hooks must not average each chunk by itself
    with accelerator.no_sync(model), separate_statistics(task.modules()):
        with torch.no_grad(), accelerator.autocast(), _statistics_kept(task):
            parts = [_seeded(task, chunk, seed(number)) for number, chunk in enumerate(chunks)]
        leaves = {
            name: torch.cat([part[name] for part in parts if name in part]).requires_grad_()
            for name in dict.fromkeys(name for part in parts for name in part)
        }
        sizes = [{name: len(values) for name, values in part.items()} for part in parts]
        del parts
        with accelerator.autocast():
            terms = task.terms_of(leaves, batch)
        accelerator.backward(torch.stack(list(terms.values())).sum())
        done = dict.fromkeys(leaves, 0)
        for number, chunk in enumerate(chunks):
            with accelerator.autocast():
                features = _seeded(task, chunk, seed(number))
            pairs = []
            for name, values in features.items():
                start, done[name] = done[name], done[name] + sizes[number][name]
                gradient = leaves[name].grad
                if gradient is not None and values.requires_grad:
                    pairs.append((values, gradient[start : done[name]].to(values.dtype)))
            if pairs:
                # gradients of the features are scaled already where fp16 scales the loss
                torch.autograd.backward([values for values, _ in pairs], [gradient for _, gradient in pairs])
    if accelerator.num_processes > 1:
        _average_gradients(task)
    return terms


def _seeded(task: ChunkedTask, chunk: Any, seed: int) -> dict[str, Tensor]:
    """The features of a chunk, with random numbers from a seed."""
    torch.manual_seed(seed)
    return task.encode_chunk(chunk)


@contextmanager
def _statistics_kept(task: ChunkedTask) -> Iterator[None]:
    """Within the context running statistics do not change: the second pass updates the statistics."""
    norms = [module for module in task.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    counted = [norm.num_batches_tracked for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, count in zip(norms, momenta, counted, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def _average_gradients(task: ChunkedTask) -> None:
    """Average the gradients over processes, as one tensor; a parameter without gradient counts as zero."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for p in task.parameters():
        if p.requires_grad:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            by_dtype.setdefault(p.dtype, []).append(p.grad)
    for gradients in by_dtype.values():
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
