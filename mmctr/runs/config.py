"""The root configs of the two recipes, and the section on data that both have."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mmctr.config import Config
from mmctr.data.catalog import Resize
from mmctr.data.splits import ColdItemsSplit, SplitConfig, StagedSplit
from mmctr.tasks import PretrainTaskConfig, RankingTaskConfig
from mmctr.training.fit import FitConfig
from mmctr.training.stages import StagesConfig, check_stages


class StreamConfig(Config):
    """Read items from shards as training goes on, instead of preparing the dataset."""

    buffer_rows: int = Field(default=16_384, ge=1)
    """rows, of consecutive groups, that are mixed; a process holds one such window, encoded"""
    validation_items: int = Field(default=2048, ge=2)
    """items of the validation part that are read and evaluated, at most"""


class DataConfig(Config):
    """Where the dataset is and how its pictures and texts are read."""

    path: str
    """a dataset folder, or a folder made by `mmctr prepare`"""
    items: str | None = None
    """a `datasets` dataset to take the catalog from instead of `path/items.*`"""
    item_tables: list[str] = []
    """Parquet, CSV or JSON lines files whose columns are joined to the items by `item_id`"""
    text: list[str] = Field(default=["title"], min_length=1)
    """columns joined to the text of an item"""
    text_fields: dict[str, float] = {}
    """columns that are texts of their own, and their weights beside `text`, which has 1; a step shows one of them"""
    images: dict[str, float] = {"image": 1.0}
    """columns of pictures, and their weights; a cell may hold a list. A step shows one of them"""
    image_size: int | None = Field(default=None, ge=8)
    """side of the cached pictures; None: what the encoder takes"""
    image_resize: Resize = "shortest"
    """`shortest`: centre crop (CLIP's way); `longest`: padded; `squash`: both sides"""
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
    """The config of `pretrain.train`."""

    data: DataConfig
    """dataset, and how pictures and texts are read"""
    split: SplitConfig = ColdItemsSplit()
    """objectives on behaviour see the training part of this split alone: give the one the ranker has"""
    task: PretrainTaskConfig
    """model and objectives"""
    init_from: str | None = None
    """a run folder: its encoder and projections are what this run starts from. With both towers frozen a head or an
    objective on behaviour is then trained behind them, on features made once"""
    fit: FitConfig = FitConfig()
    """training: length, batches, optimiser, evaluations"""
    validation: float = Field(default=0.1, gt=0, lt=1)
    """fraction of the items with picture and text held out for retrieval"""
    same: list[str] = ["text", "image"]
    """items that share one of these are no negatives of each other: `text` and `image` mean equal ones, other names are
    columns of the items table"""
    attributes: list[str] = []
    """columns of the items table: how often neighbours among validation items share them is reported"""
    primary: str | None = None
    """the validation metric that chooses the best weights; None: `coclick_recall` with an objective on behaviour, else
    `mean_recall`; with `group` alone how often neighbours share its column, where that is one of `attributes`; where a
    head alone is trained its `head_elbo`"""
    run_dir: str
    """the run folder to write"""
    seed: int = Field(default=0, ge=0)
    """of initial weights, batches, partners and the validation items"""

    @property
    def primary_metric(self) -> str:
        """The validation metric that chooses the best weights: `primary`, or the one that fits the objectives."""
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
    """The config of `finetune.train`."""

    data: DataConfig
    """dataset, and how pictures and texts are read"""
    split: SplitConfig = ColdItemsSplit()
    """how the log is cut into training, validation and test rows"""
    task: RankingTaskConfig = RankingTaskConfig()
    """features, embeddings and ranker"""
    fit: FitConfig = FitConfig()
    """training: length, batches, optimiser, evaluations"""
    primary: Literal["gauc", "auc", "gauc_warm", "gauc_cold"] = "gauc"
    """what early stopping looks at, on the validation rows"""
    cold_fit: FitConfig = FitConfig()
    """how `task.embedder.cold_ids` are learned, after `fit`"""
    stages: StagesConfig = StagesConfig()
    """how new items of a `staged` split are warmed up, after that"""
    run_dir: str
    """the run folder to write"""
    seed: int = Field(default=0, ge=0)
    """of initial weights, batches and dropout; `split.seed` chooses the rows"""

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
