"""Deep Interest Network (Zhou et al., KDD 2018, arXiv 1706.06978)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmctr.config import Width
from mmctr.layers.activation_unit import ActivationUnit
from mmctr.layers.jagged import pool_rows, segment_ids, segment_softmax, take_rows
from mmctr.layers.mlp import MLP, Activation
from mmctr.rankers.base import BaseRankerConfig, RankerInput, RankerOutput


class DINConfig(BaseRankerConfig):
    """Deep Interest Network (Zhou et al. 2018): behaviours weighted by an activation unit."""

    name: Literal["din"] = "din"
    attention: list[Width] = Field(default=[80, 40], min_length=1)
    """hidden sizes of the activation unit"""
    mlp: list[Width] = [200, 80]
    """hidden sizes of the MLP on top"""
    activation: Activation = "dice"
    """activation of the hidden layers of the MLP and of the activation unit"""
    weights: Literal["intensity", "softmax"] = "intensity"
    """`intensity`: unnormalised attention weights, as in the paper, whose sum measures the strength of the interest;
    `softmax`: weights that sum to 1"""
    content_attention: bool = False
    """whether the softmax also reads the content similarity of behaviour and target (`ContentAttention`)"""
    multi_query: bool = False
    """two attentions over the behaviours instead of one: one compares contents, the other IDs (`DIN`)"""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """dropout of the hidden layers of the MLP"""

    @property
    def needs_columns(self) -> bool:
        """Whether `build` needs `columns`: for `multi_query`."""
        return self.multi_query

    @property
    def needs_similarity(self) -> bool:
        """Whether the ranker reads `RankerInput.similarity`: for `content_attention`."""
        return self.content_attention

    @property
    def reads_expert(self) -> bool:
        """True: DIN can read an expert of MAKE."""
        return True

    @model_validator(mode="after")
    def _content_attention_is_of_softmax(self) -> DINConfig:
        if self.content_attention and self.weights != "softmax":
            raise ValueError("content_attention enters a softmax; set weights: softmax")
        if self.content_attention and self.multi_query:
            raise ValueError("content_attention is of one attention and multi_query makes two; keep one of them")
        return self

    def build(
        self,
        dim: int,
        context_dim: int,
        expert_hidden_dims: Sequence[int] = (),
        columns: Mapping[str, slice] | None = None,
    ) -> DIN:
        """The ranker; the arguments are those of `DIN`."""
        return DIN(self, dim, context_dim, expert_hidden_dims, columns)


class ContentAttention(nn.Module):
    """Semantic-aware target attention (SA-TA; Wu et al. 2025, MUSE, arXiv 2512.07216).

    The softmax over behaviours gets the scores g1 a + g2 R + g3 a R, where a is the score of the activation unit and
    R = cosine / tau. tau starts at 0.1 and is learned as a logarithm, so that tau stays positive; the three g start
    at 1. A behaviour without a cosine has a learned cosine, initially 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gammas = nn.Parameter(torch.ones(3))
        self.log_tau = nn.Parameter(torch.tensor([math.log(0.1)]))
        self.unknown = nn.Parameter(torch.zeros(1))

    def forward(self, scores: Tensor, similarity: Tensor) -> Tensor:
        """Scores for the softmax.

        Args:
            scores: (H,) scores of the activation unit.
            similarity: (H,) cosines of behaviours and targets, NaN where one of the two has no content.

        Returns:
            (H,).
        """
        cosine = torch.where(similarity.isnan(), self.unknown, similarity)
        relevance = cosine / self.log_tau.exp()
        of_scores, of_relevance, of_product = self.gammas
        return of_scores * scores + of_relevance * relevance + of_product * scores * relevance


def some_columns(x: Tensor, columns: slice) -> Tensor:
    """x[..., columns] as a contiguous tensor; x itself where `columns` are all columns."""
    return x if columns == slice(0, x.shape[-1]) else x[..., columns].contiguous()


class DIN(nn.Module):
    """The interest of a user in the target is the sum of the behaviours, weighted by an activation unit.

    | | paper | official code | here |
    |---|---|---|---|
    | weights | no softmax: intensity | softmax of scores / sqrt(D) | `weights`: intensity, or unscaled softmax |
    | unit input | k, q, their "out product" | q, k, q - k, q * k | as the code (confirmed by the authors) |
    | unit activation | Dice or PReLU | sigmoid | `activation` |
    | Dice at test time | moving averages | batch statistics in some releases | moving averages |
    | top MLP input | concat of all | user, target, user * target | context, target, interest, interest * target |
    | L2 of embeddings | mini-batch aware | none | `mini_batch_l2` of the task |
    | user id | one of the features | made, unused | part of the context |

    `content_attention` is not in the paper; `ContentAttention` has the source.

    With `multi_query` there are two attentions with separate weights (multi-query attentive pooling: Ge et al. 2018,
    arXiv 1711.06505): one compares the contents of target and behaviours, the other compares the IDs. Each attention
    gives a weighted sum of the complete behaviour vectors, and the MLP reads both sums. In that paper behaviours are
    pictures, with which both queries are compared; here content is compared with content and ID with ID.

    Args:
        config: sizes and options.
        dim: size D of item vectors.
        context_dim: size C of the context.
        expert_hidden_dims: sizes of the hidden layers of an expert that are concatenated to the last hidden layers.
        columns: the columns of `content` and of `id` in the vector of an item, for `multi_query`.

    Raises:
        ValueError: `multi_query` without `columns`.
    """

    def __init__(
        self,
        config: DINConfig,
        dim: int,
        context_dim: int,
        expert_hidden_dims: Sequence[int] = (),
        columns: Mapping[str, slice] | None = None,
    ):
        super().__init__()
        self.config = config
        self.columns: list[slice] = [slice(0, dim)]
        if config.multi_query:
            if columns is None:
                raise ValueError("multi_query needs the columns of content and ID in the vectors of items")
            self.columns = [columns["content"], columns["id"]]
        sizes = [compared.stop - compared.start for compared in self.columns]
        self.unit = ActivationUnit(sizes[0], config.attention, config.activation)
        self.id_unit = ActivationUnit(sizes[1], config.attention, config.activation) if config.multi_query else None
        self.content = ContentAttention() if config.content_attention else None
        top_dim = (1 + 2 * len(self.columns)) * dim + context_dim
        self.mlp = MLP(top_dim, config.mlp, 1, config.activation, config.dropout, expert_hidden_dims)

    @property
    def channels(self) -> list[tuple[ActivationUnit, slice]]:
        """The activation units, each with the columns of item vectors that the unit compares."""
        units = [self.unit] if self.id_unit is None else [self.unit, self.id_unit]
        return list(zip(units, self.columns, strict=True))

    def forward(self, inputs: RankerInput) -> RankerOutput:
        """Logits (B,), in evaluation with attention weights (H,), the mean of both attentions with `multi_query`.

        Raises:
            ValueError: `content_attention` without `inputs.similarity`.
        """
        target, offsets = take_rows(inputs.items, inputs.target), inputs.history_offsets
        weights, interests = [], []
        for unit, columns in self.channels:
            query, items = some_columns(target, columns), some_columns(inputs.items, columns)
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
        out, hidden = self.mlp.through(top, inputs.expert_hidden)
        history_weights = None if self.training else torch.stack(weights).mean(0)
        return RankerOutput(out.squeeze(1), {}, history_weights, (target, *interests), hidden)
