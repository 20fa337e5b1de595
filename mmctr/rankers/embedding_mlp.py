"""Embedding & MLP, also called GwEN: the base model of Zhou et al. (KDD 2018, arXiv 1706.06978, section 4.2)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from mmctr.config import Width
from mmctr.layers.jagged import pool_rows, take_rows
from mmctr.layers.mlp import MLP, Activation
from mmctr.rankers.base import BaseRankerConfig, RankerInput, RankerOutput


class EmbeddingMLPConfig(BaseRankerConfig):
    """Embedding&MLP, the base model of Zhou et al. 2018: the pooling of behaviours does not depend on the target."""

    name: Literal["embedding_mlp"] = "embedding_mlp"
    pooling: Literal["sum", "mean"] = "mean"
    """pooling of the behaviours; the paper names both"""
    mlp: list[Width] = [200, 80]
    """hidden sizes of the MLP on top"""
    activation: Activation = "prelu"
    """activation of the hidden layers of the MLP"""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """dropout of the hidden layers of the MLP"""

    def build(self, dim: int, context_dim: int) -> EmbeddingMLP:
        """The ranker, for item vectors of size `dim` and a context of size `context_dim`."""
        return EmbeddingMLP(self, dim, context_dim)


class EmbeddingMLP(nn.Module):
    """An MLP over context, target and the pooled history, which does not depend on the target.

    Args:
        config: sizes and options.
        dim: size D of item vectors.
        context_dim: size C of the context.
    """

    def __init__(self, config: EmbeddingMLPConfig, dim: int, context_dim: int):
        super().__init__()
        self.config = config
        self.mlp = MLP(2 * dim + context_dim, config.mlp, 1, config.activation, config.dropout)

    def forward(self, inputs: RankerInput) -> RankerOutput:
        """Logits (B,), without auxiliary losses."""
        target = take_rows(inputs.items, inputs.target)
        pooled = pool_rows(inputs.items, inputs.history, inputs.history_offsets)
        if self.config.pooling == "mean":
            pooled = pooled / inputs.history_offsets.diff().clamp(min=1)[:, None]
        top = torch.cat([inputs.context, target, pooled.to(target.dtype)], dim=1)
        return RankerOutput(self.mlp(top).squeeze(1), losses={})
