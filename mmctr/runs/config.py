"""Config keys that the recipes share: where data comes from and how it is read."""

from __future__ import annotations

from pydantic import Field, model_validator

from mmctr.config import Config
from mmctr.data.catalog import Resize


class StreamConfig(Config):
    """Read items from shards as training goes on, instead of preparing the dataset."""

    buffer_rows: int = Field(default=16_384, ge=1)
    """rows, of consecutive groups, that are mixed; a process holds one such window, encoded"""
    held_out: int = Field(default=2048, ge=2)
    """held-out items that are read and evaluated, at most"""


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
