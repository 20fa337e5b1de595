"""Contrastive batches larger than memory: gradients of a loss over all rows, with a few rows encoded at a time.

GradCache (Gao et al. 2021, arXiv 2101.06983): the features of all chunks are made without a graph; the loss gives the
gradient of each feature; then each chunk is encoded once more, under the same random numbers, and that gradient is sent
back through it. The result is the gradient of the whole batch at the price of a second forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from mmctr.training.task import ChunkedTask


def chunked_backward(
    model: Any,
    task: ChunkedTask,
    batch: Any,
    size: int,
    accelerator: Accelerator,
    seed: Callable[[int], int],
) -> dict[str, Tensor]:
    """Accumulate the gradient of a batch into the parameters, `size` rows at a time; returns the loss terms.

    Args:
        model: `task` as `accelerator.prepare` gave it back.
        seed: of the random numbers of each chunk.

    Batch normalisation sees a chunk at a time, and takes its statistics into account once.
    """
    chunks = task.chunks(batch, size)
    with accelerator.no_sync(model):  # data-parallel hooks must not average each chunk by itself
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
    torch.manual_seed(seed)
    return task.encode_chunk(chunk)


@contextmanager
def _statistics_kept(task: ChunkedTask) -> Iterator[None]:
    """The first pass must not move running statistics: the second will."""
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
    """Over processes, as one tensor. A parameter that got no gradient here counts as zero."""
    parameters = [p for p in task.parameters() if p.requires_grad]
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    by_kind: dict[torch.dtype, list[Tensor]] = {}
    for p in parameters:
        by_kind.setdefault(p.dtype, []).append(p.grad)  # type: ignore[arg-type]
    for gradients in by_kind.values():
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
