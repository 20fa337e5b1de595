"""Deep Interest Evolution Network (Zhou et al., AAAI 2019, arXiv 1809.03672)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmctr.config import Width
from mmctr.distributed import jagged_mean_over_processes
from mmctr.layers.jagged import linear_of_rows, pool_rows, row_dots, segment_softmax, take_rows
from mmctr.layers.mlp import MLP, Activation
from mmctr.layers.recurrence import Gate, Recurrence, TimeMajor
from mmctr.rankers.base import BaseRankerConfig, RankerInput, RankerOutput


class DIENConfig(BaseRankerConfig):
    """Deep Interest Evolution Network (Zhou et al. 2019): two recurrences over the behaviours."""

    name: Literal["dien"] = "dien"
    hidden_dim: int | None = Field(default=None, ge=1)
    """size of an interest state; None: the size of the item vectors. With another size the auxiliary loss has a learned
    linear map between states and item vectors"""
    gate: Literal["augru", "augru_official", "agru", "aigru"] = "augru"
    """how attention changes the GRU of interest evolution: gates of `Recurrence`, or `aigru`, a plain GRU with inputs
    scaled by attention"""
    auxiliary_weight: float = Field(default=1.0, ge=0)
    """weight of the auxiliary loss; 0: no auxiliary loss"""
    mlp: list[Width] = [200, 80]
    """hidden sizes of the MLP on top"""
    activation: Activation = "dice"
    """activation of the hidden layers of the MLP"""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """dropout of the hidden layers of the MLP"""

    @property
    def needs_negatives(self) -> bool:
        """Whether training reads `RankerInput.negatives`: for the auxiliary loss."""
        return self.auxiliary_weight > 0

    @property
    def reads_expert(self) -> bool:
        """True: DIEN can read an expert of MAKE."""
        return True

    def build(self, dim: int, context_dim: int, expert_hidden_dims: Sequence[int] = ()) -> DIEN:
        """The ranker; the arguments are those of `DIEN`."""
        return DIEN(self, dim, context_dim, expert_hidden_dims)


class DIEN(nn.Module):
    """Two recurrences: a GRU extracts interest states from the behaviours, and a second GRU, whose gate depends on the
    attention to the target, models the evolution of the interest in the target.

    | | paper | official code | here |
    |---|---|---|---|
    | attention | softmax of h W e | softmax of the 80-40-1 unit of DIN | as the paper |
    | AUGRU | update gate a u: a = 0 keeps the state | 1 - (1 - a)(1 - u): a = 0 is a plain GRU step | `gate` |
    | auxiliary score | inner product of h_t, e_{t+1} | net 100-50-2 on both | inner product |
    | auxiliary mean | sum over steps, mean over samples | over padded steps too | mean over the steps there are |
    | negatives | not the item clicked next | from the review stream, may be a positive | never clicked by the user |
    | top MLP input | all concatenated | user, target, sum, target * sum, state | context, and as the code |
    | activation at test time | - | batch statistics | moving averages |

    The mean over steps makes the weight of the auxiliary loss independent of the length of histories. An empty history
    has the zero state.

    Args:
        config: sizes and options.
        dim: size D of item vectors.
        context_dim: size C of the context.
        expert_hidden_dims: sizes of the hidden layers of an expert that are concatenated to the last hidden layers.
    """

    def __init__(self, config: DIENConfig, dim: int, context_dim: int, expert_hidden_dims: Sequence[int] = ()):
        super().__init__()
        self.config = config
        hidden = config.hidden_dim or dim
        gate: Gate = "gru" if config.gate == "aigru" else config.gate
        self.extractor = Recurrence(dim, hidden)
        self.evolver = Recurrence(hidden, hidden, gate)
        self.query = nn.Linear(dim, hidden, bias=False)
        mapped = config.auxiliary_weight > 0 and hidden != dim
        self.next_item = nn.Linear(dim, hidden, bias=False) if mapped else None
        top_dim = 3 * dim + hidden + context_dim
        self.mlp = MLP(top_dim, config.mlp, 1, config.activation, config.dropout, expert_hidden_dims)

    def forward(self, inputs: RankerInput) -> RankerOutput:
        """Logits (B,), in training with the auxiliary loss, in evaluation with attention weights (H,)."""
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
        num_states = (inputs.history_offsets.diff() > 0).cumsum(0)
        state = pool_rows(evolved, layout.last[layout.last < len(evolved)], F.pad(num_states, (1, 0)))

        total = pool_rows(inputs.items, inputs.history, inputs.history_offsets).to(target.dtype)
        top = torch.cat([inputs.context, target, total, total * target, state], dim=1)
        weights = None if self.training else attention.new_zeros(len(attention)).index_copy(0, layout.order, attention)
        out, layers = self.mlp.through(top, inputs.expert_hidden)
        return RankerOutput(out.squeeze(1), losses, weights, (target, state.to(target.dtype)), layers)

    def _auxiliary(
        self, interests: Tensor, items: Tensor, history: Tensor, negatives: Tensor, layout: TimeMajor
    ) -> Tensor:
        """The auxiliary loss (equation 3), a scalar: the mean of -[log s(h_t e_{t+1}) + log(1 - s(h_t n_{t+1}))] over
        all steps t with a next behaviour.

        Args:
            interests: (H, hidden) states, in the order of `layout`.
            items: (U, D) vectors of the distinct items.
            history: (H,) positions of the behaviours in `items`.
            negatives: (H,) positions of the negatives in `items`.
            layout: the time-major order of the behaviours.
        """
        first = len(history) - len(layout.previous)
        if self.next_item is not None and 2 * len(items) > len(history):
            # few behaviours for the number of items: map the states instead of the items, h M e = (M' h) e
            interests = F.linear(interests, self.next_item.weight.T)
        elif self.next_item is not None:
            items = self.next_item(items)
        clicked = row_dots(interests, layout.previous, items, history[first:])
        not_clicked = row_dots(interests, layout.previous, items, negatives[first:])
        return jagged_mean_over_processes(F.softplus(-clicked) + F.softplus(not_clicked))
