"""Deep Interest Evolution Network (Zhou et al., AAAI 2019, arXiv 1809.03672)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmctr.distributed import jagged_mean_over_processes
from mmctr.layers.jagged import linear_of_rows, pool_rows, row_dots, segment_softmax, take_rows
from mmctr.layers.mlp import MLP, Activation
from mmctr.layers.recurrence import Gate, Recurrence, TimeMajor
from mmctr.rankers.base import BaseRankerConfig, RankerInput, RankerOutput


class DIENConfig(BaseRankerConfig):
    """Deep Interest Evolution Network (Zhou et al. 2019): two recurrences over the behaviours."""

    name: Literal["dien"] = "dien"
    hidden_dim: int | None = Field(default=None, ge=1)
    """size of an interest state; None: that of the item vectors. Another size puts a learned linear map between states
    and item vectors in the auxiliary loss"""
    gate: Literal["augru", "augru_official", "agru", "aigru"] = "augru"
    """how attention steers the evolution of interest; see `Recurrence`. `aigru` scales the input of a plain GRU"""
    auxiliary_weight: float = Field(default=1.0, ge=0)
    """of the auxiliary loss; 0: none"""
    mlp: list[int] = [200, 80]
    """hidden sizes of the MLP on top"""
    activation: Activation = "dice"
    """of the hidden layers of the MLP"""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """of the hidden layers of the MLP"""

    @property
    def needs_negatives(self) -> bool:
        return self.auxiliary_weight > 0

    @property
    def hands_over(self) -> bool:
        return True

    def build(self, dim: int, context_dim: int, beside: Sequence[int] = ()) -> DIEN:
        return DIEN(self, dim, context_dim, beside)


class DIEN(nn.Module):
    """A GRU reads interest states off the behaviours; a second one, steered by attention to the target, follows how
    the interest in such items evolves.

    | | paper | official code | here |
    |---|---|---|---|
    | attention | softmax of h W e | softmax of the 80-40-1 unit of DIN | as the paper |
    | AUGRU | update gate a u: a = 0 keeps the state | 1 - (1 - a)(1 - u): a = 0 is a plain GRU step | `gate` |
    | auxiliary score | inner product of h_t, e_{t+1} | net 100-50-2 on both | inner product |
    | auxiliary mean | sum over steps, mean over samples | over padded steps too | mean over the steps there are |
    | negatives | not the item clicked next | from the review stream, may be a positive | never clicked by the user |
    | top MLP input | all concatenated | user, target, sum, target * sum, state | context, and as the code |
    | activation at test time | - | batch statistics | moving averages |

    The mean over steps keeps the weight of the auxiliary loss independent of how long histories are. An empty history
    has the zero state.
    """

    def __init__(self, config: DIENConfig, dim: int, context_dim: int, beside: Sequence[int] = ()):
        super().__init__()
        self.config = config
        hidden = config.hidden_dim or dim
        gate: Gate = "gru" if config.gate == "aigru" else config.gate
        self.extractor = Recurrence(dim, hidden)
        self.evolver = Recurrence(hidden, hidden, gate)
        self.query = nn.Linear(dim, hidden, bias=False)
        mapped = config.auxiliary_weight > 0 and hidden != dim
        self.next_item = nn.Linear(dim, hidden, bias=False) if mapped else None
        self.mlp = MLP(3 * dim + hidden + context_dim, config.mlp, 1, config.activation, config.dropout, beside)

    def forward(self, inputs: RankerInput) -> RankerOutput:
        target = take_rows(inputs.items, inputs.target)
        layout = TimeMajor.of(inputs.history_offsets, len(inputs.history))
        history = inputs.history[layout.order]
        first = self.extractor.input
        projected = linear_of_rows(inputs.items, history, first.weight, first.bias)
        interests = self.extractor(projected, layout)  # (H, hidden)
        losses = {}
        if self.training and self.config.auxiliary_weight and inputs.negatives is not None:
            auxiliary = self._auxiliary(interests, inputs.items, history, inputs.negatives[layout.order], layout)
            losses["auxiliary"] = self.config.auxiliary_weight * auxiliary

        each = torch.arange(len(interests), device=target.device)
        scores = row_dots(interests, each, self.query(target), layout.segments)
        attention = segment_softmax(scores, layout.segments, len(target))  # (H,)
        if self.config.gate == "aigru":
            evolved = self.evolver(self.evolver.input(interests * attention[:, None]), layout)
        else:
            evolved = self.evolver(self.evolver.input(interests), layout, attention)
        # the sum of at most one row: zero for an empty history
        reached = (inputs.history_offsets.diff() > 0).cumsum(0)
        state = pool_rows(evolved, layout.last[layout.last < len(evolved)], F.pad(reached, (1, 0)))

        total = pool_rows(inputs.items, inputs.history, inputs.history_offsets).to(target.dtype)
        top = torch.cat([inputs.context, target, total, total * target, state], dim=1)
        weights = None if self.training else attention.new_zeros(len(attention)).index_copy(0, layout.order, attention)
        out, layers = self.mlp.through(top, inputs.beside)
        return RankerOutput(out.squeeze(1), losses, weights, (target, state.to(target.dtype)), layers)

    def _auxiliary(
        self, interests: Tensor, items: Tensor, history: Tensor, negatives: Tensor, layout: TimeMajor
    ) -> Tensor:
        """Mean over all t with a next behaviour of -[log s(h_t e_{t+1}) + log(1 - s(h_t n_{t+1}))], equation 3."""
        first = len(history) - len(layout.previous)
        if self.next_item is not None and 2 * len(items) > len(history):
            # as many items as behaviours: map the states back instead, h M e = (M' h) e, and compare with items
            interests = F.linear(interests, self.next_item.weight.T)
        elif self.next_item is not None:
            items = self.next_item(items)
        clicked = row_dots(interests, layout.previous, items, history[first:])
        not_clicked = row_dots(interests, layout.previous, items, negatives[first:])
        return jagged_mean_over_processes(F.softplus(-clicked) + F.softplus(not_clicked))
