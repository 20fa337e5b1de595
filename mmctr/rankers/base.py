"""RankerInput and RankerOutput, the input and the output of every ranker, and the base class of ranker configs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mmctr.config import Config


class BaseRankerConfig(Config):
    """Base class of ranker configs: the properties by which training prepares the input of a ranker."""

    @property
    def needs_negatives(self) -> bool:
        """Whether training reads `RankerInput.negatives`."""
        return False

    @property
    def needs_similarity(self) -> bool:
        """Whether the ranker reads `RankerInput.similarity`."""
        return False

    @property
    def reads_expert(self) -> bool:
        """Whether the ranker can read an expert of MAKE (`mmctr.tasks.expert`): the output has `vectors` and `hidden`,
        and `build` takes `expert_hidden_dims`, the sizes of the hidden layers of the expert."""
        return False

    @property
    def needs_columns(self) -> bool:
        """Whether `build` takes `columns`, the columns of ID and content in the vector of an item."""
        return False

    @property
    def weight_dim(self) -> int | None:
        """For linear rankers the size of the weight vector of a feature value; None: the ranker reads embeddings of the
        configured sizes."""
        return None


@dataclass(frozen=True)
class RankerInput:
    """The input of a ranker for B impressions: vectors of the U distinct items, never ids or pixels.

    Targets and behaviours are positions in `items`, so a function of a single item can be computed once for each
    distinct item (`linear_of_rows`) instead of once for each behaviour.
    """

    items: Tensor
    """(U, D) vectors of the distinct items"""
    target: Tensor
    """(B,) positions in `items`"""
    history: Tensor
    """(H,) positions in `items`, jagged, newest last"""
    history_offsets: Tensor
    """(B + 1,) offsets of the histories in `history`"""
    context: Tensor
    """(B, C): user vector, user and context features"""
    negatives: Tensor | None = None
    """(H,) positions in `items`, one item without a click for each behaviour"""
    similarity: Tensor | None = None
    """(H,) cosines of the contents of each behaviour and the target, NaN where one of the two has no content"""
    expert_hidden: Sequence[Tensor] = ()
    """hidden layers of an expert, each (B, width), which are concatenated to the last hidden layers of the ranker in
    the same order"""


@dataclass(frozen=True)
class RankerOutput:
    """The output of a ranker for B impressions."""

    logits: Tensor
    """(B,) logits of a click"""
    losses: dict[str, Tensor]
    """auxiliary losses by name, scalars, already weighted"""
    history_weights: Tensor | None = None
    """(H,) attention weights of the behaviours; None for rankers without attention, and in training"""
    vectors: Sequence[Tensor] = ()
    """input of the MLP without the context, each (B, width): the target vector and the interest vectors"""
    hidden: Sequence[Tensor] = ()
    """hidden layers of the MLP, each (B, width), first to last"""
