"""Deep Interest Network (Zhou et al., KDD 2018, arXiv 1706.06978)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmctr.rankers.layers import (
    MLP,
    Activation,
    BaseRankerConfig,
    RankerInput,
    RankerOutput,
    activation,
    segment_ids,
    segment_softmax,
    segment_sum,
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
    dropout: float = Field(default=0.0, ge=0, lt=1)

    def build(self, dim: int, context_dim: int) -> DIN:
        return DIN(self, dim, context_dim)


class ActivationUnit(nn.Module):
    """a(k, q) = MLP([q, k, q - k, q * k]) for every history value, without ever building the concatenation.

    The first layer is W [q, k, q - k, q * k] = (Wq + Wd) q + (Wk - Wd) k + Wp (q * k): the part of q is computed once
    an impression instead of once a history value, and the 4D-wide input does not exist.
    """

    def __init__(self, dim: int, hidden: list[int], act: Activation):
        super().__init__()
        self.first = nn.Linear(4 * dim, hidden[0])
        self.act = activation(act, hidden[0])
        self.rest = MLP(hidden[0], hidden[1:], 1, act)

    def forward(self, query: Tensor, keys: Tensor, segments: Tensor) -> Tensor:
        """Weights (H,) of keys (H, D) for queries (B, D); segments (H,) says whose history a key is in."""
        wq, wk, wd, wp = self.first.weight.chunk(4, dim=1)
        query_part = F.linear(query, wq + wd, self.first.bias)
        product = take_rows(query, segments) * keys
        hidden = take_rows(query_part, segments) + F.linear(keys, wk - wd) + F.linear(product, wp)
        return self.rest(self.act(hidden)).squeeze(1)


class DIN(nn.Module):
    """The user's interest in the target is the sum of his history weighted by an activation unit.

    | | paper | official code | here |
    |---|---|---|---|
    | weights | no softmax: intensity | softmax of scores / sqrt(D) | `weights`: intensity, or unscaled softmax |
    | unit input | k, q, their "out product" | q, k, q - k, q * k | as the code (confirmed by the authors) |
    | unit activation | Dice or PReLU | sigmoid | `activation` |
    | Dice at test time | moving averages | batch statistics in some releases | moving averages |
    | top MLP input | concat of all | user, target, user * target | context, target, interest, interest * target |
    | user id | one of the features | made, unused | part of the context |
    """

    def __init__(self, config: DINConfig, dim: int, context_dim: int):
        super().__init__()
        self.config = config
        self.unit = ActivationUnit(dim, config.attention, config.activation)
        self.mlp = MLP(3 * dim + context_dim, config.mlp, 1, config.activation, config.dropout)

    def forward(self, inputs: RankerInput) -> RankerOutput:
        segments = segment_ids(inputs.history_offsets, len(inputs.history))
        weights = self.unit(inputs.target, inputs.history, segments)  # (H,)
        if self.config.weights == "softmax":
            weights = segment_softmax(weights, segments, len(inputs.target))
        interest = segment_sum(inputs.history, weights, segments, len(inputs.target))  # (B, D)
        interest = interest.to(inputs.target.dtype)
        top = torch.cat([inputs.context, inputs.target, interest, interest * inputs.target], dim=1)
        return RankerOutput(logits=self.mlp(top).squeeze(1), losses={})
