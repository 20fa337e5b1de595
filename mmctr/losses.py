"""Losses as functions of tensors, exact over many processes.

Contrastive losses compare this process's rows with the columns of all processes. The gradient is that of one process
holding the whole batch, once data-parallel training has averaged over processes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    """Concatenate over processes. Backward: all of them read our slice, so their gradients of it are summed."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[override]
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather_rows(x: Tensor) -> Tensor:
    """(B, ...) of this process -> (W * B, ...) of all in rank order, differentiable. B is equal everywhere."""
    if _world_size() == 1:
        return x
    if x.is_floating_point() and x.requires_grad:
        return _Gather.apply(x)  # type: ignore[return-value]
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def _own_columns(num_rows: int, device: torch.device) -> Tensor:
    """(B,) the columns of the gathered batch that hold this process's rows."""
    first = dist.get_rank() * num_rows if _world_size() > 1 else 0
    return torch.arange(first, first + num_rows, device=device)


def _false_negatives(ids: Tensor, all_ids: Tensor, own: Tensor) -> Tensor:
    """(B, W * B) True where a column is the same item as the row but is not the row itself."""
    same = ids[:, None] == all_ids[None, :]
    same[torch.arange(len(ids), device=ids.device), own] = False
    return same


def clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, ids: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE between pictures and texts (Radford et al. 2021).

    L = 1/2 [CE(s I T', diagonal) + CE(s T I', diagonal)], in fp32.

    Args:
        image_features, text_features: (B, D) unit norm; row i of both is one item.
        logit_scale: the factor s itself, a scalar.
        ids: (B,) item of each row. Another row of the same item is not a negative and is left out.

    When to choose it: the default. It needs large batches; `siglip_loss` is milder on small ones.
    """
    image_features, text_features = image_features.float(), text_features.float()
    own = _own_columns(len(image_features), image_features.device)
    all_images, all_texts = gather_rows(image_features), gather_rows(text_features)
    by_image = logit_scale.float() * image_features @ all_texts.T  # (B, W * B)
    by_text = logit_scale.float() * text_features @ all_images.T
    if ids is not None:
        mask = _false_negatives(ids, gather_rows(ids), own)
        by_image, by_text = by_image.masked_fill(mask, -torch.inf), by_text.masked_fill(mask, -torch.inf)
    return (F.cross_entropy(by_image, own) + F.cross_entropy(by_text, own)) / 2


def siglip_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor, ids: Tensor | None = None
) -> Tensor:
    """Pairwise sigmoid loss between pictures and texts (Zhai et al. 2023, arXiv 2303.15343).

    L = -1/B sum_ij log sigmoid(z_ij (s x_i . y_j + b)), z = 1 on the diagonal and -1 elsewhere, in fp32. Other rows
    of the same item get weight 0. From scratch start at s = 10, b = -10.

    Args: as `clip_loss`, and logit_bias: the bias b, a scalar.
    """
    image_features, text_features = image_features.float(), text_features.float()
    own = _own_columns(len(image_features), image_features.device)
    logits = logit_scale.float() * image_features @ gather_rows(text_features).T + logit_bias.float()
    sign = -torch.ones_like(logits)
    sign[torch.arange(len(logits), device=logits.device), own] = 1
    terms = F.logsigmoid(sign * logits)
    if ids is not None:
        terms = terms.masked_fill(_false_negatives(ids, gather_rows(ids), own), 0)
    return -terms.sum() / len(logits)
