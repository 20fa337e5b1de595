"""What pretraining minimises: any weighted sum of objectives, each a module that reads the views of a batch.

To add one: a config above its module, a field of `ObjectivesConfig`, and a loss in `losses.py`.
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
    """What a batch looks like to an objective, all of unit norm. Rows without content mean nothing."""

    image: Tensor | None
    """(U, D)"""
    has_image: Tensor
    """(U,) bool"""
    text: Tensor | None
    """(U, D)"""
    has_text: Tensor
    item: Tensor
    """(U, D or 2 D) the item's vector"""
    has_item: Tensor
    query_item: Tensor | None = None
    """(B, D or 2 D) the vectors of items that have nothing but the query as their text"""


@dataclass(frozen=True)
class QueuedViews:
    """Views of items of earlier steps."""

    views: Views
    keys: Tensor

    def candidates(self, vectors: Tensor | None, valid: Tensor) -> QueuedCandidates:
        assert vectors is not None
        # they were anchors, which are all drawn alike
        return QueuedCandidates(vectors, self.keys, valid, log_q=vectors.new_zeros(len(vectors)))


class ObjectiveConfig(Config):
    """What all objectives have."""

    weight: float = Field(default=1.0, gt=0)
    """factor on the term of the objective in the loss"""


class Objective(nn.Module):
    """Base: a learned temperature, kept within [1/100, 1] as CLIP did.

    Args:
        logit_scale: the logarithm of the factor to start from; None: that of temperature 0.07.
    """

    def __init__(self, logit_scale: float | None = None):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07) if logit_scale is None else logit_scale))

    @torch.no_grad()
    def after_step(self) -> None:
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def forward(self, views: Views, batch: PairBatch, queue: QueuedViews | None) -> Tensor:
        raise NotImplementedError


class ClipConfig(ObjectiveConfig):
    """Picture against text of the same item (`losses.clip_loss`)."""


class Clip(Objective):
    def forward(self, views: Views, batch: PairBatch, queue: QueuedViews | None) -> Tensor:
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
    """Picture against text of the same item, each pair a yes or no (`losses.siglip_loss`)."""


class SigLip(Objective):
    """Starts at s = 10, b = -10 (Zhai et al. 2023) unless the encoder brings its own."""

    def __init__(self, logit_scale: float | None = None, logit_bias: float | None = None):
        super().__init__(math.log(10) if logit_scale is None else logit_scale)
        self.logit_bias = nn.Parameter(torch.tensor(-10.0 if logit_bias is None else logit_bias))

    def forward(self, views: Views, batch: PairBatch, queue: QueuedViews | None) -> Tensor:
        image, text, valid = _pairs(views, batch)
        text_queue = queue and queue.candidates(queue.views.text, queue.views.has_text)
        scale, keys = self.logit_scale.exp(), batch.keys[batch.anchor]
        return siglip_loss(image, text, scale, self.logit_bias, keys, valid, text_queue)


def _pairs(views: Views, batch: PairBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures and texts of the anchors, (B, D) each, and the (B,) mask of those that have both."""
    if views.image is None or views.text is None:
        raise ValueError("task.objectives: clip and siglip need pictures and texts, and this dataset lacks one of them")
    anchor = batch.anchor
    return views.image[anchor], views.text[anchor], views.has_image[anchor] & views.has_text[anchor]


class BehaviorConfig(ObjectiveConfig):
    """Items that one user clicked near each other (`losses.pair_loss`); the log must have clicks."""

    window: int = Field(default=5, ge=1)
    """how many clicks before and after are near"""
    max_gap: int | None = Field(default=None, ge=0)
    """longest time between the two, in the unit of the log"""
    log_q: bool = True
    """correct for popular items being drawn more often"""
    hard_negatives: bool = False
    """an item shown near the click and not clicked, beside the other items of the batch"""
    shown_window: int = Field(default=10, ge=1)
    """how many impressions before and after the click are looked at for it"""


class Behavior(Objective):
    def __init__(self, config: BehaviorConfig):
        super().__init__()
        self.config = config

    def forward(self, views: Views, batch: PairBatch, queue: QueuedViews | None) -> Tensor:
        clicked = batch.partners["clicked"]
        valid = clicked.has_partner & views.has_item[batch.anchor] & views.has_item[clicked.item]
        negatives = has_negative = None
        if self.config.hard_negatives:
            shown = batch.partners["shown"]
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
            queue=queue and queue.candidates(queue.views.item, queue.views.has_item),
        )


class QueryConfig(ObjectiveConfig):
    """A query against the item clicked for it (`losses.pair_loss`); the log must have a column of queries."""

    column: str = "query"
    """column of the interactions table"""


class Query(Objective):
    def __init__(self, config: QueryConfig):
        super().__init__()
        self.config = config

    def forward(self, views: Views, batch: PairBatch, queue: QueuedViews | None) -> Tensor:
        assert views.query_item is not None and batch.has_query is not None and batch.query is not None
        # the query is a key: the same one asked for two items makes neither a negative of the other
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
    """Items that share the value of a column, all of them positives (`losses.multi_positive_loss`)."""

    column: str
    """column of the items table"""


class Group(Objective):
    def __init__(self, config: GroupConfig):
        super().__init__()
        self.config = config

    def forward(self, views: Views, batch: PairBatch, queue: QueuedViews | None) -> Tensor:
        mate = batch.partners["group"]
        rows = torch.cat([batch.anchor, mate.item])
        valid = torch.cat([torch.ones_like(mate.has_partner), mate.has_partner]) & views.has_item[rows]
        groups, keys = batch.groups[self.config.column][rows], batch.keys[rows]
        return multi_positive_loss(views.item[rows], self.logit_scale.exp(), groups, keys, valid)


class DistillationConfig(ObjectiveConfig):
    """Similarities within the batch as a table of vectors has them (`losses.similarity_distillation_loss`)."""

    path: str
    """an embedding folder, or a Parquet or .npz file of vectors by item id"""
    temperature: float = Field(default=0.1, gt=0)
    """of the teacher's similarities"""


class Distillation(Objective):
    def __init__(self, config: DistillationConfig):
        super().__init__(math.log(1 / config.temperature))
        self.config = config

    def forward(self, views: Views, batch: PairBatch, queue: QueuedViews | None) -> Tensor:
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
    """One field an objective; those that are given are added up."""

    clip: ClipConfig | None = None
    """contrast of picture and text of an item; null: the objective is not used"""
    siglip: SigLipConfig | None = None
    """pairwise yes or no on picture and text; null: the objective is not used"""
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
        pairs = ((name, getattr(self, name)) for name in type(self).model_fields)
        return {name: config for name, config in pairs if config is not None}

    @property
    def read_behavior(self) -> bool:
        """Whether the log of clicks is needed."""
        return self.behavior is not None or self.query is not None

    def build(self, logit_scale: float | None, logit_bias: float | None) -> nn.ModuleDict:
        """The modules by name. Temperature and bias, where an encoder brings them, are those of pictures and texts."""
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
