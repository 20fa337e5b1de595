"""The dataset of a run, opened and prepared, and the pictures and texts of the items for an encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from accelerate import Accelerator

from mmctr.data.content import ItemContent, PictureField, TextField
from mmctr.data.item_tables import described, join_item_tables, keep_item_tables
from mmctr.data.prepare import Dataset, open_dataset
from mmctr.data.tables import require_columns
from mmctr.runs.config import DataConfig
from mmctr.runs.frozen_features import with_frozen_features
from mmctr.tasks import PretrainTask

MAX_PICTURES = 32


def open_data(config: DataConfig, accelerator: Accelerator) -> Dataset:
    """Open the dataset, its item tables joined; the main process prepares it first where that is needed."""
    with accelerator.main_process_first():
        return joined_dataset(config)


def joined_dataset(config: DataConfig) -> Dataset:
    """The same in a single process."""
    dataset = open_dataset(config.path, config.items)
    return join_item_tables(dataset, config.item_tables) if config.item_tables else dataset


def open_run_data(config: DataConfig, run_dir: Path, accelerator: Accelerator) -> Dataset:
    """`open_data` for a training run, which keeps the columns of its item tables in the run folder."""
    dataset = open_data(config, accelerator)
    if config.item_tables:
        for line in described(dataset.report):
            accelerator.print(line)
        with accelerator.main_process_first():
            keep_item_tables(dataset, run_dir)
    return dataset


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
                kept = catalog.pictures(size, config.image_resize, column=name, place=place)
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
    num_held_out = round(len(pairs) * validation)
    if num_held_out < 2:
        raise ValueError(f"{source}: {len(pairs)} items have both picture and text; that is too few to hold some out")
    return np.sort(shuffled[num_held_out:]), np.sort(shuffled[:num_held_out])
