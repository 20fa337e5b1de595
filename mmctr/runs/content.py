"""The dataset of a run, and the content of the items: pictures and texts for an encoder, or a table of vectors."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from accelerate import Accelerator
from torch import Tensor

from mmctr.data.content import ItemContent, PictureField, TextField
from mmctr.data.embeddings import read_tables
from mmctr.data.item_tables import described, join_item_tables, keep_item_tables
from mmctr.data.picture_cache import Pictures
from mmctr.data.prepare import Dataset, open_dataset
from mmctr.data.splits import Splits
from mmctr.data.tables import require_columns
from mmctr.embedders.item_embedder import ContentConfig, ContentEncoder, ContentTable
from mmctr.evaluation.predict import embed_catalog
from mmctr.runs.behavior_splits import check_content
from mmctr.runs.config import DataConfig
from mmctr.runs.frozen_features import with_frozen_features
from mmctr.tasks import PretrainTask, RankingTask
from mmctr.training.context import RunContext

logger = logging.getLogger(__name__)

MAX_PICTURES = 32
"""largest number of pictures of an item in one column"""


def open_data(config: DataConfig, accelerator: Accelerator) -> Dataset:
    """The dataset of a config with the item tables joined; the main process prepares the dataset where needed.

    Raises:
        ValueError: the dataset or an item table cannot be read.
    """
    with accelerator.main_process_first():
        return joined_dataset(config)


def joined_dataset(config: DataConfig) -> Dataset:
    """As `open_data`, for a single process."""
    dataset = open_dataset(config.path, config.items)
    return join_item_tables(dataset, config.item_tables) if config.item_tables else dataset


def open_run_data(config: DataConfig, context: RunContext) -> Dataset:
    """As `open_data`, for a training run: the columns of the item tables are saved in the run folder."""
    accelerator = context.accelerator
    dataset = open_data(config, accelerator)
    if config.item_tables:
        for line in described(dataset.report):
            logger.info(line)
        with accelerator.main_process_first():
            keep_item_tables(dataset, context.folder.path)
    return dataset


@dataclass(frozen=True)
class RankingContent:
    """The content of a new ranker: none, a frozen table, or an encoder with the initial vectors of the encoder.

    Args:
        config: the section `task.embedder.content`.
        table: (N, C) vectors in the order of the catalog, and the (N,) bool mask of items with a vector; None without
            content.
        encoder: the pretrained task; None for other content.
        items: pictures and texts of the catalog, where the encoder trains inside the ranker; None otherwise.
    """

    config: ContentConfig
    table: tuple[Tensor, Tensor] | None = None
    encoder: PretrainTask | None = None
    items: ItemContent | None = None

    @property
    def frozen_table(self) -> tuple[Tensor, Tensor] | None:
        """`table`, where the vectors come from a file and so do not change in training; None otherwise."""
        return self.table if isinstance(self.config, ContentTable) else None

    @property
    def encodes_history(self) -> bool:
        """Whether a training step encodes behaviours as well as targets."""
        return isinstance(self.config, ContentEncoder) and self.config.encodes_history

    @property
    def max_encoded(self) -> int | None:
        """Largest number of distinct items that a training step encodes; None: all items."""
        return self.config.max_encoded if isinstance(self.config, ContentEncoder) else None

    def refresh(self, task: RankingTask, accelerator: Accelerator) -> dict[str, float]:
        """Encode the catalog for an evaluation where the encoder is being trained; all processes call this.

        Args:
            task: the ranker, whose content vectors are replaced.
            accelerator: processes and device.

        Returns:
            How stale the vectors of a memory bank were, as `MemoryBank.renew` measures it; empty without a bank.
        """
        if self.encoder is None or self.items is None:
            return {}
        num_items = len(self.table[0]) if self.table is not None else 0
        return task.embedder.refresh(*embed_catalog(self.encoder.eval(), self.items, num_items, accelerator))


def open_content(
    config: ContentConfig, dataset: Dataset, data: DataConfig, splits: Splits, context: RunContext
) -> RankingContent:
    """Read the table of vectors, or load the encoder and encode the catalog.

    Args:
        config: the section `task.embedder.content`.
        dataset: the dataset of the run.
        data: the section `data`.
        splits: the split of the log.
        context: processes of the run.

    Raises:
        ValueError: the table or the pretraining run is missing or damaged, or pretraining on behaviour has read test
            rows of `splits`.
    """
    accelerator, num_items = context.accelerator, len(dataset.catalog)
    content = RankingContent(config)
    if isinstance(config, ContentTable):
        content = RankingContent(config, read_tables(config.path, dataset.catalog.item_ids))
        paths = [config.path] if isinstance(config.path, str) else config.path
        check_content(paths, None, dataset, splits)
    elif isinstance(config, ContentEncoder):
        encoder = PretrainTask.load(config.run).to(accelerator.device)
        check_content([], config.run, dataset, splits)
        items = item_content(dataset, data, encoder, accelerator)
        table = embed_catalog(encoder, items, num_items, accelerator)
        content = RankingContent(config, table, encoder, None if config.frozen else items)
    if content.table is not None:
        vectors, has = content.table
        logger.info(f"content: {int(has.sum())} of {num_items} items, {vectors.shape[1]} dimensions")
    return content


def item_content(dataset: Dataset, config: DataConfig, task: PretrainTask, accelerator: Accelerator) -> ItemContent:
    """Pictures and tokens of the catalog for an encoder, from caches that the main process builds.

    Frozen towers encode each picture and text once: the content then has features in place of pictures and texts. All
    processes compute the features together.

    Args:
        dataset: the dataset.
        config: the section `data`.
        task: the pretrained task.
        accelerator: processes and device.

    Raises:
        ValueError: a column is missing, or an item has too many pictures.
    """
    encoder, catalog = task.encoder, dataset.catalog
    size = config.image_size or encoder.image_size
    given = [name for name in config.images if name != "image" or "image" in catalog.table.column_names]
    require_columns(catalog.table, [*given, *config.text_fields], "items table")
    with accelerator.main_process_first():
        pictures = []
        for name in given:
            count = catalog.pictures_per_item(name)
            if count > MAX_PICTURES:
                raise ValueError(
                    f"items table: an item has {count} pictures in {name!r}, more than {MAX_PICTURES}; shorten the list"
                )
            for number in range(count):
                cached = catalog.pictures(size, config.image_resize, column=name, position=number)
                pictures.append(PictureField(cached, config.images[name]))
                if accelerator.is_main_process:
                    _warn_of_refused(name, cached)
        texts = []
        for columns, weight in ((config.text, 1.0), *(([name], weight) for name, weight in config.text_fields.items())):
            input_ids, has_text = catalog.tokens(columns, encoder.tokenize, encoder.tokenizer_key)
            texts.append(TextField(input_ids, has_text, weight))
    return with_frozen_features(task.encoder, ItemContent(tuple(pictures), tuple(texts)), catalog, accelerator)


def _warn_of_refused(name: str, pictures: Pictures) -> None:
    """Log a warning for each reason for which pictures of a column are refused."""
    report = pictures.report
    given = report["items"] - report["items without a picture"]
    for reason, entry in report["rejected"].items():
        logger.warning(
            f"{name}: {entry['count']} of {given} pictures refused as {reason}, like those of items "
            f"{entry['examples']}: {entry['remedy']}"
        )


def pair_rows(content: ItemContent, validation: float, source: str) -> tuple[np.ndarray, np.ndarray]:
    """Catalog rows of the items with picture and text: training rows and validation rows.

    The choice of validation rows depends on the number of items alone, so that runs with different seeds are evaluated
    on the same items.

    Args:
        content: pictures and texts of the catalog.
        validation: fraction of validation rows.
        source: name of the dataset for errors.

    Raises:
        ValueError: the dataset has no pictures or texts, or fewer than two validation rows.
    """
    if content.has_image is None or content.has_text is None:
        raise ValueError(f"{source}: image-text pretraining needs an `image` column in the items table")
    pairs = np.flatnonzero(content.has_image & content.has_text)
    shuffled = np.random.default_rng(len(pairs)).permutation(pairs)
    num_validation = round(len(pairs) * validation)
    if num_validation < 2:
        raise ValueError(f"{source}: {len(pairs)} items have both picture and text; that is too few to hold some out")
    return np.sort(shuffled[num_validation:]), np.sort(shuffled[:num_validation])
