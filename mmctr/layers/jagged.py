"""Operations on jagged histories for rankers: gathers, sums, softmax and linear layers over segments."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 4096
"""number of rows of a chunk of intermediate results, so small that a chunk fits into the cache of a CPU"""


def chunks(total: int, device: torch.device) -> Iterator[slice]:
    """Slices that cover `total` rows: of `CHUNK` rows on a CPU, and one slice of all rows on another device."""
    size = CHUNK if device.type == "cpu" else max(total, 1)
    return (slice(begin, min(begin + size, total)) for begin in range(0, total, size))


def by_row(index: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Invert an index.

    Args:
        index: (n,) rows in 0 ... `num_rows` - 1.
        num_rows: number of rows.

    Returns:
        (n,) positions of `index` sorted by row, and the (num_rows,) offset of the positions of each row.
    """
    ordered, order = torch.sort(index, stable=True)
    return order, torch.searchsorted(ordered, torch.arange(num_rows, device=index.device))


class _TakeRows(torch.autograd.Function):
    """`x[index]` whose gradient is a gather-and-sum over the sorted order instead of a scatter.

    On a CPU `embedding_bag` sums runs of rows in parallel; the backward pass of indexing adds row by row.
    """

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        order, begins = by_row(index, ctx.num_rows)
        return F.embedding_bag(order, grad.contiguous(), begins, mode="sum"), None


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """`x[index]` with a fast gradient on a CPU.

    Args:
        x: (U, D) rows.
        index: (n,) positions in `x`.

    Returns:
        (n, D).
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and len(index):
        return _TakeRows.apply(x, index)
    return x.index_select(0, index)


def segment_ids(offsets: Tensor, total: int) -> Tensor:
    """The impression of every history value.

    Args:
        offsets: (B + 1,) offsets of the impressions.
        total: H, number of history values.

    Returns:
        (H,) int64 in 0 ... B - 1.
    """
    return torch.repeat_interleave(
        torch.arange(len(offsets) - 1, device=offsets.device), offsets.diff(), output_size=total
    )


class _PoolRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if weights is not None else x[:0], index, offsets, weights)
        ctx.num_rows = len(x)
        return F.embedding_bag(index, x, offsets[:-1], mode="sum", per_sample_weights=weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
        x, index, offsets, weights = ctx.saved_tensors
        grad, segments = grad.contiguous(), segment_ids(offsets, len(index))
        order, begins = by_row(index, ctx.num_rows)
        d_weights = None
        if weights is not None:
            d_weights = _dots(grad, segments, x, index)
            weights = weights[order]
        # the gradient of a row is a weighted sum of the gradients of the segments that contain the row
        d_x = F.embedding_bag(segments[order], grad, begins, mode="sum", per_sample_weights=weights)
        return d_x, None, None, d_weights


def pool_rows(x: Tensor, index: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sums of `x[index]` by segment, in fp32, without storing `x[index]`.

    Args:
        x: (U, D) rows.
        index: (H,) positions in `x`.
        offsets: (B + 1,) offsets of the segments in `index`.
        weights: (H,) weight of every row in the sum, differentiable; None: 1.

    Returns:
        (B, D).
    """
    return _PoolRows.apply(x.float(), index, offsets, None if weights is None else weights.float())


def _dots(x: Tensor, i: Tensor, y: Tensor, j: Tensor) -> Tensor:
    parts = [x.index_select(0, i[k]).mul_(y.index_select(0, j[k])).sum(1) for k in chunks(len(i), x.device)]
    return torch.cat(parts) if parts else x.new_zeros(0)


class _RowDots(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, i: Tensor, y: Tensor, j: Tensor) -> Tensor:
        ctx.save_for_backward(x, i, y, j)
        return _dots(x, i, y, j)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, Tensor, None]:
        x, i, y, j = ctx.saved_tensors
        result = []
        for a, mine, b, other in ((x, i, y, j), (y, j, x, i)):
            order, begins = by_row(mine, len(a))
            result += [F.embedding_bag(other[order], b, begins, mode="sum", per_sample_weights=grad[order]), None]
        return tuple(result)


def row_dots(x: Tensor, i: Tensor, y: Tensor, j: Tensor) -> Tensor:
    """Inner products of the rows `x[i]` and `y[j]`, in fp32, without storing a tensor of shape (n, D).

    Args:
        x: (X, D) rows.
        i: (n,) positions in `x`.
        y: (Y, D) rows.
        j: (n,) positions in `y`.

    Returns:
        (n,).
    """
    return _RowDots.apply(x.float(), i, y.float(), j)


class _LinearOfRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, index, weight)
        ctx.has_bias = bias is not None
        out = x.new_empty((len(index), len(weight)))
        for k in chunks(len(index), x.device):
            rows = x.index_select(0, index[k])
            torch.mm(rows, weight.T, out=out[k]) if bias is None else torch.addmm(bias, rows, weight.T, out=out[k])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, Tensor, Tensor | None]:
        x, index, weight = ctx.saved_tensors
        d_weight = torch.zeros_like(weight)
        for k in chunks(len(index), x.device):
            d_weight.addmm_(grad[k].T, x.index_select(0, index[k]))
        order, begins = by_row(index, len(x))
        d_x = F.embedding_bag(order, grad @ weight, begins, mode="sum")
        return d_x, None, d_weight, grad.sum(0) if ctx.has_bias else None


def linear_of_rows(x: Tensor, index: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x[index], weight, bias)`, computed on `x` where `x` has at most half as many rows as `index`.

    Args:
        x: (U, D) rows.
        index: (n,) positions in `x`.
        weight: (out, D) weight of the linear layer.
        bias: (out,) bias of the linear layer; None: no bias.

    Returns:
        (n, out).
    """
    # half: a gather of rows of the result, and the sum of the gradient over the gathered rows, have a cost too
    if 2 * len(x) <= len(index):
        return take_rows(F.linear(x, weight, bias), index)
    if torch.is_autocast_enabled(x.device.type):
        return F.linear(take_rows(x, index), weight, bias)
    return _LinearOfRows.apply(x, index, weight, bias)


def segment_softmax(scores: Tensor, segments: Tensor, num_segments: int) -> Tensor:
    """Softmax within each segment, in fp32.

    Args:
        scores: (H,) logits.
        segments: (H,) segment of every logit.
        num_segments: number of segments.

    Returns:
        (H,) probabilities that sum to 1 in each segment.
    """
    scores = scores.float()
    low = torch.full((num_segments,), -torch.inf, device=scores.device)
    top = low.scatter_reduce(0, segments, scores.detach(), "amax")
    powers = torch.exp(scores - top[segments])
    total = torch.zeros(num_segments, device=scores.device).index_add(0, segments, powers)
    return powers / total[segments]
