"""Objectives of pretraining: the loss is a weighted sum of modules that read the vectors of a batch.

A new objective needs a loss function in `mmctr.losses`, a config class with a module below, and a field of
`ObjectivesConfig`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from mmctr.config import Config
from mmctr.data.batches import PairBatch
from mmctr.losses.contrastive import (
    QueuedCandidates,
    clip_loss,
    multi_positive_loss,
    pair_loss,
    siglip_loss,
    similarity_distillation_loss,
)

MAX_LOGIT_SCALE = math.log(100)  # CLIP's bounds of the temperature: [1/100, 1]


@dataclass(frozen=True)
class Views:
    """The unit-norm vectors of a batch that objectives read. Rows without content hold arbitrary vectors."""

    image: Tensor | None
    """(U, D) vectors of the pictures; None for a dataset without pictures"""
    has_image: Tensor
    """(U,) bool"""
    text: Tensor | None
    """(U, D) vectors of the texts; None for a dataset without texts"""
    has_text: Tensor
    """(U,) bool"""
    item: Tensor
    """(U, D or 2 D) vectors of the items"""
    has_item: Tensor
    """(U,) bool: whether the item has a picture or a text"""
    query_item: Tensor | None = None
    """(B, D or 2 D) vectors of items whose only content is the query as a text"""


@dataclass(frozen=True)
class QueuedViews:
    """Views of M items of earlier steps."""

    views: Views
    """vectors of the items"""
    keys: Tensor
    """(M, K) int keys of the items"""

    def candidates(self, vectors: Tensor | None, valid: Tensor) -> QueuedCandidates:
        """The items as candidates of a loss.

        Args:
            vectors: (M, D) vectors of one view.
            valid: (M,) bool: whether an item has the view.
        """
        assert vectors is not None
        # the items were anchors, which are drawn uniformly
        return QueuedCandidates(vectors, self.keys, valid, log_q=vectors.new_zeros(len(vectors)))


class ObjectiveConfig(Config):
    """The keys that the configs of all objectives have."""

    weight: float = Field(default=1.0, gt=0)
    """factor on the term of the objective in the loss"""


class Objective(nn.Module):
    """Base class of objectives, with a learned temperature within [1/100, 1] as in CLIP.

    Args:
        logit_scale: initial logarithm of the factor s, the inverse temperature; None: temperature 0.07.
    """

    def __init__(self, logit_scale: float | None = None):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07) if logit_scale is None else logit_scale))

    @torch.no_grad()
    def after_step(self) -> None:
        """Limit the temperature to [1/100, 1]; called after every optimizer step."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def forward(self, views: Views, batch: PairBatch, queue: QueuedViews | None) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            views: vectors of the U items of the batch.
            batch: the B anchors and the partners.
            queue: vectors of items of earlier steps; None: no queue.
        """
        raise NotImplementedError


class ClipConfig(ObjectiveConfig):
    """Contrast of the picture and the text of an item: `mmctr.losses.contrastive.clip_loss`."""


class Clip(Objective):
    """Picture against text by the symmetric InfoNCE loss."""

    def forward(self, views: Views, batch: PairBatch, queue: QueuedViews | None) -> Tensor:
        """The loss of a batch, a scalar; the arguments are documented in `Objective.forward`."""
        image, text, valid = _pairs(views, batch)
        return clip_loss(
            image,
            text,
            self.logit_scale.exp(),
            batch.keys[batch.anchor],
            valid,
            queue and queue.candidates(queue.views.image, queue.views.has_image),
            queue and queue.candidates(queue.views.text, queue.views.has_text),
        )


class SigLipConfig(ObjectiveConfig):
    """Binary classification of pairs of a picture and a text: `mmctr.losses.contrastive.siglip_loss`."""


class SigLip(Objective):
    """Picture against text by the pairwise sigmoid loss.

    Args:
        logit_scale: initial logarithm of the factor s; None: log 10 (Zhai et al. 2023).
        logit_bias: initial bias b; None: -10 (Zhai et al. 2023).
    """

    def __init__(self, logit_scale: float | None = None, logit_bias: float | None = None):
        super().__init__(math.log(10) if logit_scale is None else logit_scale)
        self.logit_bias = nn.Parameter(torch.tensor(-10.0 if logit_bias is None else logit_bias))

    def forward(self, views: Views, batch: PairBatch, queue: QueuedViews | None) -> Tensor:
        """The loss of a batch, a scalar; the arguments are documented in `Objective.forward`."""
        image, text, valid = _pairs(views, batch)
        text_queue = queue and queue.candidates(queue.views.text, queue.views.has_text)
        scale, keys = self.logit_scale.exp(), batch.keys[batch.anchor]
        return siglip_loss(image, text, scale, self.logit_bias, keys, valid, text_queue)


def _pairs(views: Views, batch: PairBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors of pictures and texts of the anchors, (B, D) each, and the (B,) mask of anchors with both."""
    if views.image is None or views.text is None:
        raise ValueError("task.objectives: clip and siglip need pictures and texts, and this dataset lacks one of them")
    anchor = batch.anchor
    return views.image[anchor], views.text[anchor], views.has_image[anchor] & views.has_text[anchor]


class BehaviorConfig(ObjectiveConfig):
    """Pairs of items that one user clicked near each other: `mmctr.losses.contrastive.pair_loss`. The dataset needs a
    log with clicks."""

    window: int = Field(default=5, ge=1)
    """largest distance of the two clicks, in clicks of the user"""
    max_gap: int | None = Field(default=None, ge=0)
    """longest time between the two clicks, in the unit of the column `timestamp`; null: any time"""
    log_q: bool = True
    """whether the loss corrects for popular items being drawn more often"""
    hard_negatives: bool = False
    """whether an item that was shown near the click and not clicked is a further negative. The positive itself is none,
    nor an item that agrees with anchor or positive in text, picture or a column of `same`"""
    shown_window: int = Field(default=10, ge=1)
    """largest distance of a hard negative from the click, in impressions"""


class Behavior(Objective):
    """Co-clicked items against the other items of the batch."""

    def __init__(self, config: BehaviorConfig):
        super().__init__()
        self.config = config

    def forward(self, views: Views, batch: PairBatch, queue: QueuedViews | None) -> Tensor:
        """The loss of a batch, a scalar; the arguments are documented in `Objective.forward`."""
        clicked = batch.partners["clicked"]
        valid = clicked.has_partner & views.has_item[batch.anchor] & views.has_item[clicked.item]
        negatives = has_negative = negative_keys = None
        if self.config.hard_negatives:
            shown = batch.partners["shown"]
            negative_keys = batch.keys[shown.item]
            negatives, has_negative = views.item[shown.item], shown.has_partner & views.has_item[shown.item]
        return pair_loss(
            views.item[batch.anchor],
            views.item[clicked.item],
            self.logit_scale.exp(),
            anchor_keys=batch.keys[batch.anchor],
            positive_keys=batch.keys[clicked.item],
            valid=valid,
            log_q=clicked.log_q if self.config.log_q else None,
            negatives=negatives,
            has_negative=has_negative,
            negative_keys=negative_keys,
            queue=queue and queue.candidates(queue.views.item, queue.views.has_item),
        )


class QueryConfig(ObjectiveConfig):
    """A search query against the item that was clicked for the query: `mmctr.losses.contrastive.pair_loss`. The log
    needs a column of queries."""

    column: str = "query"
    """column of the interactions table that holds the queries"""


class Query(Objective):
    """Search queries against clicked items."""

    def __init__(self, config: QueryConfig):
        super().__init__()
        self.config = config

    def forward(self, views: Views, batch: PairBatch, queue: QueuedViews | None) -> Tensor:
        """The loss of a batch, a scalar; the arguments are documented in `Objective.forward`."""
        assert views.query_item is not None and batch.has_query is not None and batch.query is not None
        # the query is a key: two items that were clicked for the same query are not negatives of each other
        keys = torch.cat([batch.keys[batch.anchor], batch.query[:, None]], 1)
        return pair_loss(
            views.query_item,
            views.item[batch.anchor],
            self.logit_scale.exp(),
            anchor_keys=keys,
            positive_keys=keys,
            valid=batch.has_query & views.has_item[batch.anchor],
        )


class GroupConfig(ObjectiveConfig):
    """Items with the same value of a column as positives: `mmctr.losses.contrastive.multi_positive_loss`."""

    column: str
    """column of the items table that holds the groups"""


class Group(Objective):
    """Items of a group against the other items of the batch."""

    def __init__(self, config: GroupConfig):
        super().__init__()
        self.config = config

    def forward(self, views: Views, batch: PairBatch, queue: QueuedViews | None) -> Tensor:
        """The loss of a batch, a scalar; the arguments are documented in `Objective.forward`."""
        mate = batch.partners["group"]
        rows = torch.cat([batch.anchor, mate.item])
        valid = torch.cat([torch.ones_like(mate.has_partner), mate.has_partner]) & views.has_item[rows]
        groups, keys = batch.groups[self.config.column][rows], batch.keys[rows]
        return multi_positive_loss(views.item[rows], self.logit_scale.exp(), groups, keys, valid)


class DistillationConfig(ObjectiveConfig):
    """Distillation of the similarities of a table of vectors:
    `mmctr.losses.contrastive.similarity_distillation_loss`."""

    path: str
    """the vectors of the teacher: an embedding folder, or a Parquet or .npz file of vectors by item id"""
    temperature: float = Field(default=0.1, gt=0)
    """temperature of the similarities of the teacher"""


class Distillation(Objective):
    """Similarities within the batch against the similarities of a teacher."""

    def __init__(self, config: DistillationConfig):
        super().__init__(math.log(1 / config.temperature))
        self.config = config

    def forward(self, views: Views, batch: PairBatch, queue: QueuedViews | None) -> Tensor:
        """The loss of a batch, a scalar; the arguments are documented in `Objective.forward`."""
        assert batch.teacher is not None and batch.has_teacher is not None
        rows = batch.anchor
        return similarity_distillation_loss(
            views.item[rows],
            batch.teacher[rows],
            self.logit_scale.exp(),
            1 / self.config.temperature,
            batch.keys[rows],
            views.has_item[rows] & batch.has_teacher[rows],
        )


class ObjectivesConfig(Config):
    """The objectives of pretraining, one field per objective; the loss is the weighted sum of the given objectives."""

    clip: ClipConfig | None = None
    """contrast of the picture and the text of an item; null: the objective is not used"""
    siglip: SigLipConfig | None = None
    """binary classification of pairs of a picture and a text; null: the objective is not used"""
    behavior: BehaviorConfig | None = None
    """items one user clicked near each other; null: the objective is not used"""
    query: QueryConfig | None = None
    """a search query and the item clicked for it; null: the objective is not used"""
    group: GroupConfig | None = None
    """items with the same value of a column; null: the objective is not used"""
    distillation: DistillationConfig | None = None
    """similarities of a table of vectors; null: the objective is not used"""

    @property
    def given(self) -> dict[str, ObjectiveConfig]:
        """The configs of the objectives that are used, by name."""
        pairs = ((name, getattr(self, name)) for name in type(self).model_fields)
        return {name: config for name, config in pairs if config is not None}

    @property
    def read_behavior(self) -> bool:
        """Whether an objective needs the log of clicks."""
        return self.behavior is not None or self.query is not None

    def build(self, logit_scale: float | None, logit_bias: float | None) -> nn.ModuleDict:
        """Build the modules of the given objectives, by name.

        Args:
            logit_scale: initial logarithm of the factor s of `clip` and `siglip`; None: the default.
            logit_bias: initial bias of `siglip`; None: the default.
        """
        made: dict[str, nn.Module] = {}
        for name, config in self.given.items():
            match config:
                case ClipConfig():
                    made[name] = Clip(logit_scale)
                case SigLipConfig():
                    made[name] = SigLip(logit_scale, logit_bias)
                case BehaviorConfig():
                    made[name] = Behavior(config)
                case QueryConfig():
                    made[name] = Query(config)
                case GroupConfig():
                    made[name] = Group(config)
                case DistillationConfig():
                    made[name] = Distillation(config)
        return nn.ModuleDict(made)
