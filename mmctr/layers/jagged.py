"""Layers shared by rankers: gathers and sums over jagged histories, Dice, MLP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mmctr.config import Config
from mmctr.layers import native

Activation = Literal["relu", "prelu", "dice", "sigmoid"]


class BaseRankerConfig(Config):
    """What training has to know of a ranker."""

    @property
    def needs_negatives(self) -> bool:
        """Whether training reads `RankerInput.negatives`."""
        return False

    @property
    def needs_similarity(self) -> bool:
        """Whether the ranker reads `RankerInput.similarity`."""
        return False

    @property
    def hands_over(self) -> bool:
        """Whether the output has what MAKE hands over (`vectors` and `hidden`) and `build` takes `beside`, the sizes of
        what an expert hands to the hidden layers; see `mmctr.tasks.expert`."""
        return False

    @property
    def needs_columns(self) -> bool:
        """Whether `build` takes `columns`: where ID and content stand in the vector of an item."""
        return False

    @property
    def weight_dim(self) -> int | None:
        """For linear rankers the size of the one weight vector a feature value has; None: the ranker reads embeddings
        of the sizes configured."""
        return None


@dataclass(frozen=True)
class RankerInput:
    """What a ranker sees of B impressions: vectors of the U distinct items in them, never ids or pixels.

    Positions say where an item stands among these, so what depends on an item alone can be computed once an item
    (`linear_of_rows`) instead of once a behaviour.
    """

    items: Tensor
    """(U, D)"""
    target: Tensor
    """(B,) positions in `items`"""
    history: Tensor
    """(H,) positions in `items`, jagged, newest last"""
    history_offsets: Tensor
    """(B + 1,)"""
    context: Tensor
    """(B, C): user vector, user and context features"""
    negatives: Tensor | None = None
    """(H,) positions in `items`"""
    similarity: Tensor | None = None
    """(H,) cosine of the content of each behaviour and its target, NaN where one of them has none"""
    beside: Sequence[Tensor] = ()
    """(B, width) each: what an expert hands to the last hidden layers, the last one's at the end"""


@dataclass(frozen=True)
class RankerOutput:
    logits: Tensor
    """(B,)"""
    losses: dict[str, Tensor]
    """auxiliary losses by name, already weighted"""
    history_weights: Tensor | None = None
    """(H,) what each behaviour counts for; of rankers with attention, when they do not train"""
    vectors: Sequence[Tensor] = ()
    """(B, width) each: the target and what the user's interest in it was found to be, before the MLP"""
    hidden: Sequence[Tensor] = ()
    """(B, width) each: the hidden layers of the MLP, first to last"""


CHUNK = 4096
"""rows taken at a time where they are used at once and not kept: they then stay in the cache of a CPU"""


def chunks(total: int, device: torch.device) -> Iterator[slice]:
    """Slices of `total` rows; one alone where there is no cache to stay in."""
    size = CHUNK if device.type == "cpu" else max(total, 1)
    return (slice(begin, min(begin + size, total)) for begin in range(0, total, size))


def by_row(index: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """(n,) places of `index` ordered by the row they name, and (num_rows,) where each row's places begin."""
    ordered, order = torch.sort(index, stable=True)
    return order, torch.searchsorted(ordered, torch.arange(num_rows, device=index.device))


class _TakeRows(torch.autograd.Function):
    """`x[index]` whose gradient is a gather-and-sum over the sorted order instead of a scatter.

    On a CPU `embedding_bag` sums runs of rows in parallel; the backward of indexing adds them one by one.
    """

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(index)
        ctx.num_rows = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        order, begins = by_row(index, ctx.num_rows)
        return F.embedding_bag(order, grad.contiguous(), begins, mode="sum"), None


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """`x[index]`: (n, D) from (U, D) and (n,)."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and len(index):
        return _TakeRows.apply(x, index)  # type: ignore[return-value]
    return x.index_select(0, index)


def segment_ids(offsets: Tensor, total: int) -> Tensor:
    """(H,) the impression each history value belongs to, from (B + 1,) offsets."""
    return torch.repeat_interleave(
        torch.arange(len(offsets) - 1, device=offsets.device), offsets.diff(), output_size=total
    )


class _PoolRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x if weights is not None else x[:0], index, offsets, weights)
        ctx.num_rows = len(x)
        return F.embedding_bag(index, x, offsets[:-1], mode="sum", per_sample_weights=weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, Tensor | None]:  # type: ignore[override]
        x, index, offsets, weights = ctx.saved_tensors
        grad, segments = grad.contiguous(), segment_ids(offsets, len(index))
        order, begins = by_row(index, ctx.num_rows)
        d_weights = None
        if weights is not None:
            d_weights = _dots(grad, segments, x, index)
            weights = weights[order]
        # a row's gradient is again a weighted sum: of the gradients of the segments it stands in
        d_x = F.embedding_bag(segments[order], grad, begins, mode="sum", per_sample_weights=weights)
        return d_x, None, None, d_weights


def pool_rows(x: Tensor, index: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sums of `x[index]` by segment, fp32, without keeping these rows: (B, D) from (U, D), (H,) and (B + 1,) offsets.

    With weights (H,) each row counts so much; they get a gradient too.
    """
    return _PoolRows.apply(x.float(), index, offsets, None if weights is None else weights.float())  # type: ignore[return-value]


def _dots(x: Tensor, i: Tensor, y: Tensor, j: Tensor) -> Tensor:
    parts = [x.index_select(0, i[k]).mul_(y.index_select(0, j[k])).sum(1) for k in chunks(len(i), x.device)]
    return torch.cat(parts) if parts else x.new_zeros(0)


class _RowDots(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, i: Tensor, y: Tensor, j: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, i, y, j)
        return _dots(x, i, y, j)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, Tensor, None]:  # type: ignore[override]
        x, i, y, j = ctx.saved_tensors
        result = []
        for a, mine, b, other in ((x, i, y, j), (y, j, x, i)):
            order, begins = by_row(mine, len(a))
            result += [F.embedding_bag(other[order], b, begins, mode="sum", per_sample_weights=grad[order]), None]
        return tuple(result)  # type: ignore[return-value]


def row_dots(x: Tensor, i: Tensor, y: Tensor, j: Tensor) -> Tensor:
    """Inner products of the rows x[i] and y[j], fp32: (n,) from (X, D), (n,), (Y, D), (n,); no (n, D) is kept."""
    return _RowDots.apply(x.float(), i, y.float(), j)  # type: ignore[return-value]


class _LinearOfRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, index, weight)
        ctx.has_bias = bias is not None
        out = x.new_empty((len(index), len(weight)))
        for k in chunks(len(index), x.device):
            rows = x.index_select(0, index[k])
            torch.mm(rows, weight.T, out=out[k]) if bias is None else torch.addmm(bias, rows, weight.T, out=out[k])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, Tensor, Tensor | None]:  # type: ignore[override]
        x, index, weight = ctx.saved_tensors
        d_weight = torch.zeros_like(weight)
        for k in chunks(len(index), x.device):
            d_weight.addmm_(grad[k].T, x.index_select(0, index[k]))
        order, begins = by_row(index, len(x))
        d_x = F.embedding_bag(order, grad @ weight, begins, mode="sum")
        return d_x, None, d_weight, grad.sum(0) if ctx.has_bias else None


def linear_of_rows(x: Tensor, index: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x[index], weight, bias)`: (n, out) from (U, D) and (n,), computed on x where that is clearly less."""
    # half: taking rows of the result, and summing its gradient over them, has a price too when it is the wider one
    if 2 * len(x) <= len(index):
        return take_rows(F.linear(x, weight, bias), index)
    if torch.is_autocast_enabled(x.device.type):
        return F.linear(take_rows(x, index), weight, bias)
    return _LinearOfRows.apply(x, index, weight, bias)  # type: ignore[return-value]


def segment_softmax(scores: Tensor, segments: Tensor, num_segments: int) -> Tensor:
    """Softmax within each segment, fp32: (H,) from (H,)."""
    scores = scores.float()
    low = torch.full((num_segments,), -torch.inf, device=scores.device)
    top = low.scatter_reduce(0, segments, scores.detach(), "amax")
    powers = torch.exp(scores - top[segments])
    total = torch.zeros(num_segments, device=scores.device).index_add(0, segments, powers)
    return powers / total[segments]


def _sum_over_processes(x: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(x)
    return x


def mean_over_processes(x: Tensor) -> Tensor:
    """Mean of x (n,) over the values of all processes, as far as this one contributes: averaged over processes, as
    data-parallel training averages gradients, it is the mean over all values. 0 where there are none."""
    size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    count = _sum_over_processes(x.new_tensor([float(len(x))])).clamp(min=1)
    return x.sum() * (size / count).squeeze()


class _DiceFunction(torch.autograd.Function):
    """Dice on batch statistics, by hand: fewer memory passes than the same formula left to autograd, and a chunk of
    rows goes through all of them while it is in the cache.

    With u = (s - mean) * r, r = 1 / sqrt(var + eps), p = sigmoid(u): f = s (alpha + (1 - alpha) p). Mean and variance
    are over the rows of all processes, so their gradients are summed over processes too.
    """

    @staticmethod
    def forward(ctx, s: Tensor, alpha: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # type: ignore[override]
        rows = _sum_over_processes(s.new_tensor([float(len(s))]))
        count = rows.clamp(min=1)
        mean = _sum_over_processes(s.sum(0)) / count
        ctx.native = s.shape[1] <= native.MAX_CHANNELS and s.is_contiguous() and native.usable(s, alpha)
        if ctx.native:
            squares = native.dice_squares(s, mean)
        else:
            squares = torch.zeros_like(mean)
            for part in chunks(len(s), s.device):
                squares += (s[part] - mean).square_().sum(0)
        var = _sum_over_processes(squares) / count
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
    def backward(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        s, alpha, mean, r, count = ctx.saved_tensors
        if ctx.native:
            out, sums = native.dice_backward(s, grad.contiguous(), mean, r, alpha)
        else:
            out, sums = _DiceFunction._fixed_statistics(s, grad, mean, r, alpha)
        # through the statistics, as in batch norm
        du, du_u = _sum_over_processes(sums[2:].clone()) * (1 - alpha) / count
        factor, constant = -r * r * du_u, -r * du
        if ctx.native:
            native.dice_finish(out, s, mean, factor, constant)
        else:
            for part in chunks(len(s), s.device):
                out[part].addcmul_(s[part] - mean, factor).add_(constant)
        return out, sums[0] - sums[1], None

    @staticmethod
    def _fixed_statistics(s: Tensor, grad: Tensor, mean: Tensor, r: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of s with the statistics held fixed, and the sums (4, channels) of grad s, grad s p,
        dL/du / (1 - alpha) and that times u."""
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
            # through the direct factor s, and through u with the statistics held fixed
            torch.addcmul(alpha, p, keep, out=out[part]).mul_(grad[part]).addcmul_(d, keep * r)
        return out, sums


class Dice(nn.Module):
    """Data-adaptive activation of DIN (Zhou et al. 2018, section 5.3): f(s) = p(s) s + (1 - p(s)) alpha s,
    p(s) = sigmoid((s - E[s]) / sqrt(Var[s] + eps)), alpha learned per channel.

    Training uses the statistics of the mini-batch over all processes and keeps their moving average; evaluation uses
    the moving average alone. Histories are jagged, so no padding can reach the statistics.
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
        """(n, channels) -> (n, channels)."""
        s = x.float()
        if self.training:
            out, mean, var, rows = _DiceFunction.apply(s, self.alpha, self.eps)  # type: ignore[misc]
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


def activation(name: Activation, num_channels: int) -> nn.Module:
    if name == "dice":
        return Dice(num_channels)
    return {"relu": nn.ReLU, "prelu": nn.PReLU, "sigmoid": nn.Sigmoid}[name]()


class MLP(nn.Sequential):
    """Linear, activation, dropout for each hidden size, then a linear layer to `out_dim`; with `beside`, the sizes of
    what is concatenated to the last hidden layers (as many, or fewer), it is called by `through`."""

    def __init__(
        self,
        in_dim: int,
        hidden: Sequence[int],
        out_dim: int,
        act: Activation,
        dropout: float = 0.0,
        beside: Sequence[int] = (),
    ):
        layers: list[nn.Module] = []
        added = [0] * (len(hidden) - len(beside)) + list(beside)
        for width, more in zip(hidden, added, strict=True):
            layers += [nn.Linear(in_dim, width), activation(act, width)]
            if dropout:
                layers.append(nn.Dropout(dropout))
            in_dim = width + more
        super().__init__(*layers, nn.Linear(in_dim, out_dim))

    def through(self, x: Tensor, beside: Sequence[Tensor] = ()) -> tuple[Tensor, list[Tensor]]:
        """(n, out_dim) and the hidden layers (n, width), first to last, as they are before what stands beside them."""
        places = [place for place, layer in enumerate(self) if isinstance(layer, nn.Linear)][1:]
        added = dict(zip(places[len(places) - len(beside) :], beside, strict=True))
        hidden = []
        for place, layer in enumerate(self):
            if place in places:
                hidden.append(x)
            x = layer(torch.cat([x, added[place]], dim=1) if place in added else x)
        return x, hidden
