"""Embedding & MLP, also called GwEN: the base model of Zhou et al. (KDD 2018, arXiv 1706.06978, section 4.2)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from mmctr.rankers.layers import MLP, Activation, BaseRankerConfig, RankerInput, RankerOutput, segment_ids, segment_sum


class EmbeddingMLPConfig(BaseRankerConfig):
    name: Literal["embedding_mlp"] = "embedding_mlp"
    pooling: Literal["sum", "mean"] = "mean"
    """of the behaviours; the paper names both"""
    mlp: list[int] = [200, 80]
    activation: Activation = "prelu"
    dropout: float = Field(default=0.0, ge=0, lt=1)

    def build(self, dim: int, context_dim: int) -> EmbeddingMLP:
        return EmbeddingMLP(self, dim, context_dim)


class EmbeddingMLP(nn.Module):
    """The history is pooled to one vector whatever the target is; an MLP reads it beside target and context."""

    def __init__(self, config: EmbeddingMLPConfig, dim: int, context_dim: int):
        super().__init__()
        self.config = config
        self.mlp = MLP(2 * dim + context_dim, config.mlp, 1, config.activation, config.dropout)

    def forward(self, inputs: RankerInput) -> RankerOutput:
        segments = segment_ids(inputs.history_offsets, len(inputs.history))
        weights = inputs.history.new_ones(len(inputs.history))
        if self.config.pooling == "mean":
            weights = weights / inputs.history_offsets.diff()[segments]
        pooled = segment_sum(inputs.history, weights, segments, len(inputs.target)).to(inputs.target.dtype)
        return RankerOutput(self.mlp(torch.cat([inputs.context, inputs.target, pooled], dim=1)).squeeze(1), losses={})
