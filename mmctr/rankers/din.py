"""Deep Interest Network (Zhou et al., KDD 2018, arXiv 1706.06978)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmctr.layers.activation_unit import ActivationUnit
from mmctr.layers.jagged import pool_rows, segment_ids, segment_softmax, take_rows
from mmctr.layers.mlp import MLP, Activation
from mmctr.rankers.base import BaseRankerConfig, RankerInput, RankerOutput


class DINConfig(BaseRankerConfig):
    """Deep Interest Network (Zhou et al. 2018): behaviours weighted by an activation unit."""

    name: Literal["din"] = "din"
    attention: list[int] = Field(default=[80, 40], min_length=1)
    """hidden sizes of the activation unit"""
    mlp: list[int] = [200, 80]
    """hidden sizes of the MLP on top"""
    activation: Activation = "dice"
    """of the hidden layers of the MLP and of the activation unit"""
    weights: Literal["intensity", "softmax"] = "intensity"
    """`intensity` keeps the unnormalised weights of the paper, whose sum says how strong the interest is"""
    content_attention: bool = False
    """the softmax also sees how like the contents of behaviour and target are; see `ContentAttention`"""
    multi_query: bool = False
    """two attentions over the behaviours instead of one, by the target's content and by its ID; see `DIN`"""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """of the hidden layers of the MLP"""

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
