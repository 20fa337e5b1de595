"""Logistic regression and the piecewise linear model LS-PLM (MLR), over IDs, side features, crosses and content.

Both models add one weight vector for each feature value. Under a config with a `weight_dim`, the tables of the embedder
hold weight vectors of that size instead of embeddings, and the embedder adds the weight vectors.
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
    """Logistic regression; behaviours are read only by crosses, such as `history.item_id` with `item_id`."""

    name: Literal["lr"] = "lr"

    @property
    def weight_dim(self) -> int:
        """One weight for each feature value."""
        return 1

    def build(self, dim: int, context_dim: int) -> LR:
        """The ranker, for weights of size `dim` = 1 and a context of size `context_dim`."""
        return LR(dim, context_dim)


class LSPLMConfig(BaseRankerConfig):
    """Piecewise linear model LS-PLM, also called MLR (Gai et al. 2017)."""

    name: Literal["ls_plm"] = "ls_plm"
    pieces: int = Field(default=12, ge=1)
    """number m of regions into which the gate divides the space; 1 is logistic regression"""

    @property
    def weight_dim(self) -> int:
        """2 m weights for each feature value: m of the gate and m of the pieces."""
        return 2 * self.pieces

    def build(self, dim: int, context_dim: int) -> LSPLM:
        """The ranker, for weights of size `dim` = 2 m and a context of size `context_dim`."""
        return LSPLM(dim, context_dim)


def total_weights(inputs: RankerInput) -> Tensor:
    """The sums (B, weight_dim) of the weight vectors of all features of B impressions.

    The context of a linear ranker is a concatenation of weight vectors.
    """
    target = take_rows(inputs.items, inputs.target)
    return target + inputs.context.reshape(len(target), -1, target.shape[1]).sum(1)


class LR(nn.Module):
    """Logistic regression, p = sigmoid(w x + b).

    Args:
        dim: size of the weights, 1.
        context_dim: size of the context.
    """

    def __init__(self, dim: int, context_dim: int):
        super().__init__()
        assert dim == 1, "logistic regression has one weight for each feature value"
        self.bias = nn.Parameter(torch.zeros(1))

    def logits(self, weights: Tensor) -> Tensor:
        """Logits (B,) from the summed weights (B, 1) of B impressions."""
        return (weights + self.bias).squeeze(1)

    def forward(self, inputs: RankerInput) -> RankerOutput:
        """Logits (B,), without auxiliary losses."""
        return RankerOutput(self.logits(total_weights(inputs)), losses={})


class LSPLM(nn.Module):
    """p = sum_i softmax_i(u x) sigmoid(w_i x), with m pieces i (Gai et al. 2017, arXiv 1704.05194, equation 2).

    The first m weights of a feature value belong to u, the last m to w. The logit of p is computed from logarithms,
    without p.

    Args:
        dim: size of the weights, 2 m.
        context_dim: size of the context.
    """

    def __init__(self, dim: int, context_dim: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(dim))

    def logits(self, weights: Tensor) -> Tensor:
        """Logits (B,) from the summed weights (B, 2 m) of B impressions."""
        gates, pieces = (weights + self.bias).float().chunk(2, dim=1)
        gates = F.log_softmax(gates, dim=1)
        log_p = torch.logsumexp(gates + F.logsigmoid(pieces), dim=1)
        log_not_p = torch.logsumexp(gates + F.logsigmoid(-pieces), dim=1)
        return log_p - log_not_p

    def forward(self, inputs: RankerInput) -> RankerOutput:
        """Logits (B,), without auxiliary losses."""
        return RankerOutput(self.logits(total_weights(inputs)), losses={})
