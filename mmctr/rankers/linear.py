"""Logistic regression and the piecewise linear model LS-PLM (MLR), over IDs, side features, crosses and content.

Both are sums of one weight vector a feature value. The embedder gives just that: under a config with a `weight_dim`
every table holds weight vectors of that size instead of embeddings, and all of them are added up.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmctr.layers.jagged import take_rows
from mmctr.rankers.base import BaseRankerConfig, RankerInput, RankerOutput


class LRConfig(BaseRankerConfig):
    """Behaviours enter through crosses alone, such as `history.item_id` with `item_id`."""

    name: Literal["lr"] = "lr"

    @property
    def weight_dim(self) -> int:
        return 1

    def build(self, dim: int, context_dim: int) -> LR:
        return LR(dim, context_dim)


class LSPLMConfig(BaseRankerConfig):
    """Piece-wise linear model LS-PLM, also called MLR (Gai et al. 2017)."""

    name: Literal["ls_plm"] = "ls_plm"
    pieces: int = Field(default=12, ge=1)
    """regions m that the gate divides the space into; 1 is logistic regression"""

    @property
    def weight_dim(self) -> int:
        return 2 * self.pieces

    def build(self, dim: int, context_dim: int) -> LSPLM:
        return LSPLM(dim, context_dim)


def total_weights(inputs: RankerInput) -> Tensor:
    """(B, weights): what all features of an impression add up to; the context holds several vectors side by side."""
    target = take_rows(inputs.items, inputs.target)
    return target + inputs.context.reshape(len(target), -1, target.shape[1]).sum(1)


class LR(nn.Module):
    """p = sigmoid(w x + b)."""

    def __init__(self, dim: int, context_dim: int):
        super().__init__()
        assert dim == 1, "one weight a feature"
        self.bias = nn.Parameter(torch.zeros(1))

    def logits(self, weights: Tensor) -> Tensor:
        """(B,) from the total weights (B, 1) of impressions."""
        return (weights + self.bias).squeeze(1)

    def forward(self, inputs: RankerInput) -> RankerOutput:
        return RankerOutput(self.logits(total_weights(inputs)), losses={})


class LSPLM(nn.Module):
    """p = sum_i softmax_i(u x) sigmoid(w_i x), with m pieces i (Gai et al. 2017, arXiv 1704.05194, equation 2).

    The first m weights of a feature are its u, the last m its w. The logit of p is taken without ever forming p.
    """

    def __init__(self, dim: int, context_dim: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(dim))

    def logits(self, weights: Tensor) -> Tensor:
        """(B,) from the total weights (B, 2 m) of impressions."""
        gates, pieces = (weights + self.bias).float().chunk(2, dim=1)
        gates = F.log_softmax(gates, dim=1)
        yes = torch.logsumexp(gates + F.logsigmoid(pieces), dim=1)
        no = torch.logsumexp(gates + F.logsigmoid(-pieces), dim=1)
        return yes - no

    def forward(self, inputs: RankerInput) -> RankerOutput:
        return RankerOutput(self.logits(total_weights(inputs)), losses={})
