"""The dataset of a run, opened and prepared, and the pictures and texts of the items for an encoder."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from accelerate import Accelerator
from torch import Tensor

from mmctr.data.content import ItemContent, PictureField, TextField
from mmctr.data.embeddings import read_tables
from mmctr.data.item_tables import described, join_item_tables, keep_item_tables
from mmctr.data.prepare import Dataset, open_dataset
from mmctr.data.tables import require_columns
from mmctr.embedders.item_embedder import ContentConfig, ContentEncoder, ContentTable
from mmctr.evaluation.predict import embed_catalog
from mmctr.runs.config import DataConfig
from mmctr.runs.frozen_features import with_frozen_features
from mmctr.tasks import PretrainTask, RankingTask
from mmctr.training.context import RunContext

logger = logging.getLogger(__name__)

MAX_PICTURES = 32


def open_data(config: DataConfig, accelerator: Accelerator) -> Dataset:
    """Open the dataset, its item tables joined; the main process prepares it first where that is needed."""
    with accelerator.main_process_first():
        return joined_dataset(config)


def joined_dataset(config: DataConfig) -> Dataset:
    """The same in a single process."""
    dataset = open_dataset(config.path, config.items)
    return join_item_tables(dataset, config.item_tables) if config.item_tables else dataset


def open_run_data(config: DataConfig, context: RunContext) -> Dataset:
    """`open_data` for a training run, which keeps the columns of its item tables in the run folder."""
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
    """The content that a new ranker reads: none, a frozen table, or an encoder and the vectors it gives at first.

    Args:
        table: (N, C) vectors in the order of the catalog, and the (N,) bool mask of items that have one.
        encoder: the pretrained encoder, where content comes from one.
        items: pictures and texts of the catalog, where the encoder trains inside the ranker; else no step encodes.
        config: the section `task.embedder.content`.
    """

    config: ContentConfig
    table: tuple[Tensor, Tensor] | None = None
    encoder: PretrainTask | None = None
    items: ItemContent | None = None

    @property
    def frozen_table(self) -> tuple[Tensor, Tensor] | None:
        """`table`, where the vectors are those of a file and so stay as they are."""
        return self.table if isinstance(self.config, ContentTable) else None

    @property
    def encodes_history(self) -> bool:
        """Whether a training step encodes behaviours as well as targets."""
        return isinstance(self.config, ContentEncoder) and self.config.encodes_history

    @property
    def max_encoded(self) -> int | None:
        """Distinct items a training step encodes at most; None: all."""
        return self.config.max_encoded if isinstance(self.config, ContentEncoder) else None

    def refresh(self, task: RankingTask, accelerator: Accelerator) -> dict[str, float]:
        """Encode the catalog anew where the encoder trains, for evaluation; all processes take part.

        Returns how stale the vectors of a memory bank were, see `MemoryBank.renew`; empty without one.
        """
        if self.encoder is None or self.items is None:
            return {}
        num_items = len(self.table[0]) if self.table is not None else 0
        return task.embedder.refresh(*embed_catalog(self.encoder.eval(), self.items, num_items, accelerator))


def open_content(config: ContentConfig, dataset: Dataset, data: DataConfig, context: RunContext) -> RankingContent:
    """Read the table of vectors, or load the encoder and encode the catalog. Raises ValueError for a missing or
    damaged table or run."""
    accelerator, num_items = context.accelerator, len(dataset.catalog)
    content = RankingContent(config)
    if isinstance(config, ContentTable):
        content = RankingContent(config, read_tables(config.path, dataset.catalog.item_ids))
    elif isinstance(config, ContentEncoder):
        encoder = PretrainTask.load(config.run).to(accelerator.device)
        items = item_content(dataset, data, encoder, accelerator)
        table = embed_catalog(encoder, items, num_items, accelerator)
        content = RankingContent(config, table, encoder, None if config.frozen else items)
    if content.table is not None:
        vectors, has = content.table
        logger.info(f"content: {int(has.sum())} of {num_items} items, {vectors.shape[1]} dimensions")
    return content


def item_content(dataset: Dataset, config: DataConfig, task: PretrainTask, accelerator: Accelerator) -> ItemContent:
    """Pictures and tokens of the catalog for an encoder, cached; the main process builds the caches.

    Frozen towers read each picture and text once: from then on their features stand in for them, which all processes
    make together.
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
            for place in range(count):
                kept = catalog.pictures(size, config.image_resize, column=name, position=place)
                pictures.append(PictureField(kept, config.images[name]))
        texts = []
        for columns, weight in ((config.text, 1.0), *(([name], weight) for name, weight in config.text_fields.items())):
            input_ids, has_text = catalog.tokens(columns, encoder.tokenize, encoder.tokenizer_key)
            texts.append(TextField(input_ids, has_text, weight))
    return with_frozen_features(task.encoder, ItemContent(tuple(pictures), tuple(texts)), catalog, accelerator)


def pair_rows(content: ItemContent, validation: float, source: str) -> tuple[np.ndarray, np.ndarray]:
    """Catalog rows of items with both picture and text, in two parts: to train on, and held out.

    Which are held out depends on their number alone, so that seeds are compared on the same items. Raises ValueError
    when there is nothing to hold out.
    """
    if content.has_image is None or content.has_text is None:
        raise ValueError(f"{source}: image-text pretraining needs an `image` column in the items table")
    pairs = np.flatnonzero(content.has_image & content.has_text)
    shuffled = np.random.default_rng(len(pairs)).permutation(pairs)
    num_validation = round(len(pairs) * validation)
    if num_validation < 2:
        raise ValueError(f"{source}: {len(pairs)} items have both picture and text; that is too few to hold some out")
    return np.sort(shuffled[num_validation:]), np.sort(shuffled[:num_validation])
