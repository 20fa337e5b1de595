"""What every ranker reads (RankerInput) and gives (RankerOutput), and the config fields all rankers share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mmctr.config import Config


class BaseRankerConfig(Config):
    """What training has to know of a ranker."""

    @property
    def needs_negatives(self) -> bool:
        """Whether training reads `RankerInput.negatives`."""
        return False

    @property
    def needs_similarity(self) -> bool:
        """Whether the ranker reads `RankerInput.similarity`."""
        return False

    @property
    def hands_over(self) -> bool:
        """Whether the output has what MAKE hands over (`vectors` and `hidden`) and `build` takes `beside`, the sizes of
        what an expert hands to the hidden layers; see `mmctr.tasks.expert`."""
        return False

    @property
    def needs_columns(self) -> bool:
        """Whether `build` takes `columns`: where ID and content stand in the vector of an item."""
        return False

    @property
    def weight_dim(self) -> int | None:
        """For linear rankers the size of the one weight vector a feature value has; None: the ranker reads embeddings
        of the sizes configured."""
        return None


@dataclass(frozen=True)
class RankerInput:
    """What a ranker sees of B impressions: vectors of the U distinct items in them, never ids or pixels.

    Positions say where an item stands among these, so what depends on an item alone can be computed once an item
    (`linear_of_rows`) instead of once a behaviour.
    """

    items: Tensor
    """(U, D)"""
    target: Tensor
    """(B,) positions in `items`"""
    history: Tensor
    """(H,) positions in `items`, jagged, newest last"""
    history_offsets: Tensor
    """(B + 1,)"""
    context: Tensor
    """(B, C): user vector, user and context features"""
    negatives: Tensor | None = None
    """(H,) positions in `items`"""
    similarity: Tensor | None = None
    """(H,) cosine of the content of each behaviour and its target, NaN where one of them has none"""
    beside: Sequence[Tensor] = ()
    """(B, width) each: what an expert hands to the last hidden layers, the last one's at the end"""


@dataclass(frozen=True)
class RankerOutput:
    logits: Tensor
    """(B,)"""
    losses: dict[str, Tensor]
    """auxiliary losses by name, already weighted"""
    history_weights: Tensor | None = None
    """(H,) what each behaviour counts for; of rankers with attention, when they do not train"""
    vectors: Sequence[Tensor] = ()
    """(B, width) each: the target and what the user's interest in it was found to be, before the MLP"""
    hidden: Sequence[Tensor] = ()
    """(B, width) each: the hidden layers of the MLP, first to last"""
