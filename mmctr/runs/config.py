"""The configs of the two recipes, PretrainConfig and FinetuneConfig, and the section `data` of both."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mmctr.config import Config
from mmctr.data.images import Resize
from mmctr.data.splits import ColdItemsSplit, SplitConfig, StagedSplit
from mmctr.tasks import PretrainTaskConfig, RankingTaskConfig
from mmctr.training.fit import FitConfig
from mmctr.training.stages import StagesConfig, check_stages


class StreamConfig(Config):
    """Reading of items from shards during training, without preparing the dataset."""

    buffer_rows: int = Field(default=16_384, ge=1)
    """number of rows, of consecutive row groups, that are shuffled together; each process holds this many encoded
    rows"""
    validation_items: int = Field(default=2048, ge=2)
    """largest number of validation items that are read and evaluated"""


class DataConfig(Config):
    """The dataset, and how pictures and texts are read."""

    path: str
    """a dataset folder, or a folder made by `mmctr prepare`"""
    items: str | None = None
    """a dataset of the library `datasets` that holds the items, instead of `path/items.*`"""
    item_tables: list[str] = []
    """Parquet, CSV or JSON lines files whose columns are joined to the items by `item_id`"""
    text: list[str] = Field(default=["title"], min_length=1)
    """columns that are joined to the text of an item"""
    text_fields: dict[str, float] = {}
    """columns that are further, separate texts of an item, with weights; `text` has the weight 1. A training step reads
    one text of an item"""
    images: dict[str, float] = {"image": 1.0}
    """columns of pictures, with weights; a cell may hold a list of pictures. A training step reads one picture of an
    item"""
    image_size: int | None = Field(default=None, ge=8)
    """side of the cached pictures in pixels; None: the side that the encoder reads"""
    image_resize: Resize = "shortest"
    """`shortest`: resize the shorter side and crop the centre, as CLIP; `longest`: resize the longer side and pad;
    `squash`: resize both sides"""
    stream: StreamConfig | None = None
    """for catalogs larger than the disk: `path` is then a folder or a glob of Parquet or tar shards"""

    @model_validator(mode="after")
    def _one_field_in_a_stream(self) -> DataConfig:
        if self.stream is not None and (self.text_fields or self.items or self.images != {"image": 1.0}):
            raise ValueError("stream reads one picture and one text an item: leave items, text_fields and images out")
        if self.stream is not None and self.item_tables:
            raise ValueError("stream reads items as they come: put the columns of item_tables into the shards")
        return self


class PretrainConfig(Config):
    """The config of `pretrain.train`.

    Example:
        ```python
        changes = ["data.path=demo/data", "run_dir=runs/pretrain", "fit.epochs=1"]
        config = mmctr.PretrainConfig.load("configs/pretrain/toy.yaml", changes)
        print(config.task.encoder.name, config.primary_metric)
        ```
    """

    data: DataConfig
    """dataset, and how pictures and texts are read"""
    split: SplitConfig = ColdItemsSplit()
    """split of the log; objectives on behaviour read only the training part, so the ranker should have the same
    split"""
    task: PretrainTaskConfig
    """model and objectives"""
    init_from: str | None = None
    """a pretraining run whose encoder and projections are the initial weights. With both towers frozen, a head or an
    objective on behaviour is trained on features that are computed once"""
    fit: FitConfig = FitConfig()
    """training: length, batches, optimizer, evaluations"""
    validation: float = Field(default=0.1, gt=0, lt=1)
    """fraction of the items with picture and text that are validation items, excluded from training"""
    same: list[str] = ["text", "image"]
    """two items that agree in one of these are not negatives of each other: `text` and `image` compare text and
    pictures, other names are columns of the items table"""
    attributes: list[str] = []
    """columns of the items table for which evaluations measure how often neighbouring validation items agree"""
    primary: str | None = None
    """the validation metric that chooses the best weights. None: `coclick_recall` with an objective on behaviour;
    `neighbours_share_COLUMN` with the objective `group` alone, where the column of `group` is one of `attributes`;
    `head_elbo` where only a head is trained; else `mean_recall`"""
    run_dir: str
    """the run folder to write"""
    seed: int = Field(default=0, ge=0)
    """seed of initial weights, batches and partners"""

    @property
    def primary_metric(self) -> str:
        """The validation metric that chooses the best weights: `primary`, or the default of the objectives."""
        objectives = self.task.objectives
        if self.primary is not None:
            return self.primary
        if not objectives.given:
            return "head_elbo"
        if objectives.read_behavior:
            return "coclick_recall"
        if objectives.group is not None and len(objectives.given) == 1 and objectives.group.column in self.attributes:
            return f"neighbours_share_{objectives.group.column}"
        return "mean_recall"


class FinetuneConfig(Config):
    """The config of `finetune.train`.

    Example:
        ```python
        changes = ["data.path=demo/data", "run_dir=runs/din", "seed=1"]
        config = mmctr.FinetuneConfig.load("configs/finetune/toy_din_id.yaml", changes)
        print(config.task.ranker.name, config.fit.batch_size)
        ```
    """

    data: DataConfig
    """dataset, and how pictures and texts are read"""
    split: SplitConfig = ColdItemsSplit()
    """how the log is split into training, validation and test rows"""
    task: RankingTaskConfig = RankingTaskConfig()
    """features, embeddings and ranker"""
    fit: FitConfig = FitConfig()
    """training: length, batches, optimizer, evaluations"""
    primary: Literal["gauc", "auc", "gauc_warm", "gauc_cold"] = "gauc"
    """the validation metric that chooses the best weights and stops early"""
    cold_fit: FitConfig = FitConfig()
    """training of the generator `task.embedder.cold_ids`, after `fit`"""
    stages: StagesConfig = StagesConfig()
    """training of the stages of a `staged` split, after `fit` and `cold_fit`"""
    run_dir: str
    """the run folder to write"""
    seed: int = Field(default=0, ge=0)
    """seed of initial weights, batches and dropout; `split.seed` chooses the rows"""

    @model_validator(mode="after")
    def _one_accelerator(self) -> FinetuneConfig:
        for name in ("tracker", "mixed_precision"):
            value = getattr(self.cold_fit, name)
            if value not in (None, getattr(self.fit, name)):
                raise ValueError(f"cold_fit.{name}: {value!r}, but it is that of the whole run; set fit.{name} instead")
        return self

    @model_validator(mode="after")
    def _new_items_can_be_warmed_up(self) -> FinetuneConfig:
        if isinstance(self.split, StagedSplit):
            check_stages(self.task, self.stages)
        return self
