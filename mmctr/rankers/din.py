"""Deep Interest Network (Zhou et al., KDD 2018, arXiv 1706.06978)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmctr.layers import native
from mmctr.layers.jagged import (
    MLP,
    Activation,
    BaseRankerConfig,
    RankerInput,
    RankerOutput,
    activation,
    by_row,
    chunks,
    pool_rows,
    segment_ids,
    segment_softmax,
    take_rows,
)


class DINConfig(BaseRankerConfig):
    name: Literal["din"] = "din"
    attention: list[int] = Field(default=[80, 40], min_length=1)
    """hidden sizes of the activation unit"""
    mlp: list[int] = [200, 80]
    activation: Activation = "dice"
    weights: Literal["intensity", "softmax"] = "intensity"
    """`intensity` keeps the unnormalised weights of the paper, whose sum says how strong the interest is"""
    content_attention: bool = False
    """the softmax also sees how like the contents of behaviour and target are; see `ContentAttention`"""
    multi_query: bool = False
    """two attentions over the behaviours instead of one, by the target's content and by its ID; see `DIN`"""
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @property
    def needs_columns(self) -> bool:
        return self.multi_query

    @property
    def needs_similarity(self) -> bool:
        return self.content_attention

    @property
    def hands_over(self) -> bool:
        return True

    @model_validator(mode="after")
    def _content_attention_is_of_softmax(self) -> DINConfig:
        if self.content_attention and self.weights != "softmax":
            raise ValueError("content_attention enters a softmax; set weights: softmax")
        if self.content_attention and self.multi_query:
            raise ValueError("content_attention is of one attention and multi_query makes two; keep one of them")
        return self

    def build(
        self, dim: int, context_dim: int, beside: Sequence[int] = (), columns: Mapping[str, slice] | None = None
    ) -> DIN:
        return DIN(self, dim, context_dim, beside, columns)


class ActivationUnit(nn.Module):
    """a(k, q) = MLP([q, k, q - k, q * k]) for every history value, without ever building the concatenation.

    The first layer is W [q, k, q - k, q * k] = (Wq + Wd) q + (Wk - Wd) k + Wp (q * k): the part of q is computed once
    an impression, the part of k once a distinct item, and the 4D-wide input does not exist.
    """

    def __init__(self, dim: int, hidden: list[int], act: Activation):
        super().__init__()
        self.first = nn.Linear(4 * dim, hidden[0])
        self.act = activation(act, hidden[0])
        self.rest = MLP(hidden[0], hidden[1:], 1, act)

    def forward(self, query: Tensor, items: Tensor, history: Tensor, offsets: Tensor) -> Tensor:
        """Weights (H,) of the keys items[history] for queries (B, D).

        Args:
            items, history: (U, D) distinct item vectors and (H,) positions in them.
            offsets: (B + 1,) where the keys of each query begin.
        """
        wq, wk, wd, wp = self.first.weight.chunk(4, dim=1)
        query_part = F.linear(query, wq + wd, self.first.bias)
        hidden: Tensor = _Interaction.apply(query.float(), items.float(), wp, query_part, wk - wd, history, offsets)  # type: ignore[assignment]
        with torch.autocast(query.device.type, enabled=False):
            # a tenth of the work; in bf16 its narrow matrices, of another height each step, cost oneDNN 20 ms
            return self.rest(self.act(hidden)).squeeze(1)


class _Interaction(torch.autograd.Function):
    """query_part[b] + Wk k + W (q_b * k) with k = items[history[h]], for each history value h, fp32: (H, hidden).

    Products are made a few thousand values at a time, so that they stay in the cache, and made again in the backward
    pass instead of being kept. In fp32 on a CPU a compiled function does the same with one matrix product for two.
    """

    @staticmethod
    def forward(ctx, query, items, weight, query_part, key_weight, history, offsets):  # type: ignore[override]
        device = query.device.type
        ctx.low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        ctx.save_for_backward(query, items, weight, key_weight, history, offsets)
        ctx.part_dtype, query_part = query_part.dtype, query_part.float()
        fits = ctx.low == torch.float32 and len(weight) <= native.MAX_HIDDEN
        ctx.native = fits and native.usable(query, items, weight, key_weight)
        if ctx.native:
            return native.unit_forward(query, items, weight, query_part, key_weight, history, offsets)
        segments = segment_ids(offsets, len(history))
        out = query.new_empty((len(history), len(weight)))
        with torch.autocast(device, enabled=False):
            key_part, by = (items.to(ctx.low) @ key_weight.T.to(ctx.low)).float(), weight.T.to(ctx.low)
            for part in chunks(len(history), query.device):
                product = query.index_select(0, segments[part]).mul_(items.index_select(0, history[part]))
                own = out[part].copy_(product.to(ctx.low) @ by)
                own += query_part.index_select(0, segments[part])
                own += key_part.index_select(0, history[part])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        query, items, weight, key_weight, history, offsets = ctx.saved_tensors
        grad = grad.contiguous()
        order, begins = by_row(history, len(items))
        if ctx.native:
            d_query, d_query_part, d_keys, d_weight, d_key_weight = native.unit_backward(
                query, items, weight, key_weight, history, offsets, grad
            )
            d_items = F.embedding_bag(order, d_keys.contiguous(), begins, mode="sum")
            return d_query, d_items, d_weight, d_query_part.to(ctx.part_dtype), d_key_weight, None, None
        segments = segment_ids(offsets, len(history))
        weight_low = weight.to(ctx.low)
        d_weight, d_query = torch.zeros_like(weight), torch.zeros_like(query)
        d_keys = items.new_empty((len(history), items.shape[1]))
        for part in chunks(len(history), grad.device):
            low = grad[part].to(ctx.low)
            q = query.index_select(0, segments[part])
            k = items.index_select(0, history[part])
            d_product = (low @ weight_low).float()
            torch.mul(d_product, q, out=d_keys[part])
            d_weight += low.T @ q.mul_(k).to(ctx.low)
            # the impressions with behaviours in this chunk, the first of which may have begun before it
            own = slice(int(segments[part.start]), int(segments[part.stop - 1]) + 1)
            d_query[own] += _sums(d_product.mul_(k), (offsets[:-1][own] - part.start).clamp(min=0))
        d_key_part = F.embedding_bag(order, grad, begins, mode="sum").to(ctx.low)
        d_key_weight = (d_key_part.T @ items.to(ctx.low)).float()
        d_items = F.embedding_bag(order, d_keys, begins, mode="sum")
        d_items += d_key_part @ key_weight.to(ctx.low)
        return d_query, d_items, d_weight, _sums(grad, offsets[:-1]).to(ctx.part_dtype), d_key_weight, None, None


def _sums(values: Tensor, begins: Tensor) -> Tensor:
    """Sums of rows (n, D) between one begin and the next: (len(begins), D)."""
    return F.embedding_bag(torch.arange(len(values), device=values.device), values, begins, mode="sum")


class ContentAttention(nn.Module):
    """Semantic-aware target attention (SA-TA; Wu et al. 2025, MUSE, arXiv 2512.07216): scores that the softmax over
    behaviours takes, g1 a + g2 R + g3 a R, with a the score of the activation unit and R = cosine / tau.

    tau starts at 0.1 and is learned as its logarithm, so that it stays positive; the three g start at 1. A behaviour
    that cannot be compared has a learned cosine, at first 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gammas = nn.Parameter(torch.ones(3))
        self.log_tau = nn.Parameter(torch.tensor([math.log(0.1)]))
        self.unknown = nn.Parameter(torch.zeros(1))

    def forward(self, scores: Tensor, similarity: Tensor) -> Tensor:
        """Scores and cosines of one shape, NaN where there is none -> scores of that shape."""
        cosine = torch.where(similarity.isnan(), self.unknown, similarity)
        relevance = cosine / self.log_tau.exp()
        own, content, both = self.gammas
        return own * scores + content * relevance + both * scores * relevance


def some_columns(x: Tensor, columns: slice) -> Tensor:
    """x[..., columns], x itself where these are all."""
    return x if columns == slice(0, x.shape[-1]) else x[..., columns].contiguous()


class DIN(nn.Module):
    """The user's interest in the target is the sum of his history weighted by an activation unit.

    | | paper | official code | here |
    |---|---|---|---|
    | weights | no softmax: intensity | softmax of scores / sqrt(D) | `weights`: intensity, or unscaled softmax |
    | unit input | k, q, their "out product" | q, k, q - k, q * k | as the code (confirmed by the authors) |
    | unit activation | Dice or PReLU | sigmoid | `activation` |
    | Dice at test time | moving averages | batch statistics in some releases | moving averages |
    | top MLP input | concat of all | user, target, user * target | context, target, interest, interest * target |
    | L2 of embeddings | mini-batch aware | none | `mini_batch_l2` of the task |
    | user id | one of the features | made, unused | part of the context |

    `content_attention` is not of the paper: see `ContentAttention`.

    With `multi_query` there are two attentions with weights of their own (multi-query attentive pooling: Ge et al.
    2018, arXiv 1711.06505): one compares the content of target and behaviours, the other one their IDs. Each gives a
    weighted sum of the whole behaviours, and both sums go on. In the paper behaviours are images alone, which both
    queries are compared with; here each query is compared with its own like.

    Args:
        beside: see `MLP`.
        columns: where `content` and `id` stand among the `dim` of an item, for `multi_query`.
    """

    def __init__(
        self,
        config: DINConfig,
        dim: int,
        context_dim: int,
        beside: Sequence[int] = (),
        columns: Mapping[str, slice] | None = None,
    ):
        super().__init__()
        self.config = config
        self.columns: list[slice] = [slice(0, dim)]
        if config.multi_query:
            if columns is None:
                raise ValueError("multi_query needs the columns of content and ID in the vectors of items")
            self.columns = [columns["content"], columns["id"]]
        sizes = [own.stop - own.start for own in self.columns]
        self.unit = ActivationUnit(sizes[0], config.attention, config.activation)
        self.id_unit = ActivationUnit(sizes[1], config.attention, config.activation) if config.multi_query else None
        self.content = ContentAttention() if config.content_attention else None
        read = (1 + 2 * len(self.columns)) * dim + context_dim
        self.mlp = MLP(read, config.mlp, 1, config.activation, config.dropout, beside)

    @property
    def channels(self) -> list[tuple[ActivationUnit, slice]]:
        """The attentions, and the columns each compares."""
        units = [self.unit] if self.id_unit is None else [self.unit, self.id_unit]
        return list(zip(units, self.columns, strict=True))

    def forward(self, inputs: RankerInput) -> RankerOutput:
        target, offsets = take_rows(inputs.items, inputs.target), inputs.history_offsets
        weights, interests = [], []
        for unit, own in self.channels:
            query, items = some_columns(target, own), some_columns(inputs.items, own)
            scores = unit(query, items, inputs.history, offsets)  # (H,)
            if self.content is not None:
                if inputs.similarity is None:
                    raise ValueError("DIN with content_attention needs the similarity of behaviours and targets")
                scores = self.content(scores, inputs.similarity)
            if self.config.weights == "softmax":
                scores = segment_softmax(scores, segment_ids(offsets, len(scores)), len(target))
            weights.append(scores)
            interests.append(pool_rows(inputs.items, inputs.history, offsets, scores).to(target.dtype))  # (B, D)
        products = [interest * target for interest in interests]
        top = torch.cat([inputs.context, target, *interests, *products], dim=1)
        out, hidden = self.mlp.through(top, inputs.beside)
        read = None if self.training else torch.stack(weights).mean(0)
        return RankerOutput(out.squeeze(1), {}, read, (target, *interests), hidden)
