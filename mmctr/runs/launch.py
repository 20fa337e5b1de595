"""What both recipes do around training: the data section, the run folder, the accelerator, the command line."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration
from pydantic import Field, model_validator

from mmctr.config import Config
from mmctr.data.catalog import Resize
from mmctr.data.content import ItemContent, PictureField, TextField
from mmctr.data.item_tables import described, join_item_tables, keep_item_tables
from mmctr.data.prepare import Dataset, open_dataset
from mmctr.data.tables import require_columns
from mmctr.errors import exit_on_error
from mmctr.files import fingerprint
from mmctr.runs.frozen_features import with_frozen_features
from mmctr.tasks import PretrainTask
from mmctr.training.fit import FitConfig
from mmctr.training.sharding import set_up_sharding

MAX_PICTURES = 32


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


def make_accelerator(config: FitConfig, run_dir: Path) -> Accelerator:
    """One accelerator for CPU or GPU, one or many processes. Buffers are equal by construction, so not broadcast."""
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=config.tracker,
        project_config=ProjectConfiguration(project_dir=str(run_dir), logging_dir=str(run_dir / "tracker")),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    set_up_sharding(accelerator)
    keep_heap()
    if accelerator.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // accelerator.num_processes))
    if config.tracker:
        accelerator.init_trackers("mmctr", init_kwargs={})
    return accelerator


def keep_heap() -> None:
    """Tell glibc to keep large blocks mapped: on a CPU each big temporary would be page-faulted anew otherwise.

    Measured 1.3 times the training rate of DIN on ml-1m. Costs memory that was used once anyway. No-op elsewhere.
    """
    if sys.platform == "linux":
        try:
            mallopt = ctypes.CDLL("libc.so.6").mallopt
        except (OSError, AttributeError):  # another C library
            return
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, 0x7FFFFFFF)  # M_TRIM_THRESHOLD


def begin_run(config: Config, run_dir: Path, accelerator: Accelerator) -> str:
    """Create the run folder with its `config.yaml`, or check that the one there is of the same config.

    Returns the identity of the run, for its checkpoints. Raises ValueError naming the first key that differs.
    """
    values = config.model_dump(mode="json")
    if accelerator.is_main_process:
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "config.yaml"
        if path.is_file():
            old = type(config).load(path).model_dump(mode="json")
            differing = first_difference(old, values)
            if differing:
                key, before, now = differing
                raise ValueError(
                    f"{run_dir}: holds a run of another config ({key}: {before!r} there, {now!r} now); "
                    f"choose another run_dir=, or delete the folder"
                )
        else:
            config.save(path)
    accelerator.wait_for_everyone()
    return fingerprint({key: value for key, value in values.items() if key != "run_dir"})


def end_run(accelerator: Accelerator) -> None:
    """Finish trackers and leave the process group, all processes together.

    The main process still writes when the others are done. One that leaves alone is now and then aborted by gloo, and
    the launcher then stops the main one as well: 3 of 24 runs of two processes, 1 of 102 since they wait.
    """
    accelerator.wait_for_everyone()
    accelerator.end_training()


def first_difference(old: Any, new: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """(key, old value, new value) of the first difference between two dumped configs, None when they agree.

    `run_dir` does not count.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(n for n in new if n not in old)]:
            if key == "" and name == "run_dir":
                continue  # the folder may have been moved
            found = first_difference(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))
            if found:
                return found
        return None
    return None if old == new else (key, old, new)


ConfigT = TypeVar("ConfigT", bound=Config)


def run_recipe(main: Callable[[ConfigT], Any], config_class: type[ConfigT], argv: list[str] | None = None) -> None:
    """`python -m RECIPE CONFIG.yaml [key=value ...]`. A user's mistake is one line on stderr, not a traceback."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        module = sys.modules[main.__module__]
        print((module.__doc__ or "").strip())
        sys.exit(0 if arguments else 2)
    with exit_on_error():
        main(config_class.load(arguments[0], arguments[1:]))
