"""The data of `pretrain.train`: training items with partners, and validation items, prepared or read from shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from mmctr.data.batches import PairBatch
from mmctr.data.catalog import Catalog, tokenized
from mmctr.data.content import ItemContent
from mmctr.data.embeddings import read_tables
from mmctr.data.hashing import row_hashes
from mmctr.data.loaders import BatchPlan, TrainBatches
from mmctr.data.pairs import ClickedQueries, CoClicks, GroupMates, PairCollator, PartnerSampler, ShownNotClicked
from mmctr.data.prepare import Dataset
from mmctr.data.shards import ShardedItems
from mmctr.data.splits import GivenSplit, SplitConfig, Splits
from mmctr.data.stream import StoredItems, StreamBatches, StreamContent, StreamPlan
from mmctr.data.tables import as_text, require_columns, value_codes
from mmctr.evaluation.pretraining import ValidationCoClicks, ValidationItems
from mmctr.files import cache_folder, fingerprint
from mmctr.runs.behavior_splits import behavior_splits
from mmctr.runs.config import DataConfig, PretrainConfig
from mmctr.runs.content import item_content, open_run_data, pair_rows
from mmctr.tasks import PretrainTask
from mmctr.training.context import RunContext


@dataclass(frozen=True)
class PartnerSources:
    """The input of objectives besides pictures and texts: partners of items, queries, groups, and teacher vectors."""

    samplers: dict[str, PartnerSampler] = field(default_factory=dict)
    """samplers of partner items by the role of the partner: "clicked", "shown" or "group" """
    queries: ClickedQueries | None = None
    """sampler of search queries with a click on an item"""
    groups: dict[str, Tensor] = field(default_factory=dict)
    """(N,) group numbers of the items by column"""
    teacher: tuple[Tensor, Tensor] | None = None
    """(N, C) unit-norm teacher vectors and the (N,) bool mask of items with a vector, for distillation"""

    @classmethod
    def make(
        cls, dataset: Dataset, splits: Splits | None, task: PretrainTask, allowed: np.ndarray, source: str, seed: int
    ) -> PartnerSources:
        """The sources that the objectives of a task need.

        Args:
            dataset: the dataset.
            splits: the split of the log; not None where an objective reads behaviour.
            task: the task.
            allowed: (N,) bool, the items that may be partners.
            source: name of the dataset for errors.
            seed: seed of the samplers.

        Raises:
            ValueError: the dataset lacks the data of an objective.
        """
        objectives, catalog, num_items = task.config.objectives, dataset.catalog, len(dataset.catalog)
        samplers: dict[str, PartnerSampler] = {}
        queries, groups, teacher = None, {}, None
        if objectives.behavior is not None and splits is not None:
            behavior = objectives.behavior
            clicked = CoClicks(
                splits.train,
                dataset.interactions,
                num_items,
                behavior.window,
                dataset.time(behavior.max_gap),
                seed,
                allowed,
            )
            if not clicked.num_pairs:
                raise ValueError(
                    f"{source}: no user has two training clicks near each other: there are no pairs of items"
                )
            samplers["clicked"] = clicked
            if behavior.hard_negatives:
                samplers["shown"] = ShownNotClicked(splits.train, num_items, behavior.shown_window, seed, allowed)
        if objectives.query is not None and splits is not None:
            queries = _queries(dataset, splits, objectives.query.column, task, num_items, seed)
        if objectives.group is not None:
            column = objectives.group.column
            codes = value_codes(catalog.table, column, "items table")[0]
            groups[column] = torch.from_numpy(codes)
            samplers["group"] = GroupMates(codes, allowed, seed)
        if objectives.distillation is not None:
            vectors, has_vector = read_tables(objectives.distillation.path, catalog.item_ids)
            if not has_vector.any():
                raise ValueError(f"{objectives.distillation.path}: holds none of the items of {source}")
            teacher = torch.nn.functional.normalize(vectors, dim=1), has_vector
        return cls(samplers, queries, groups, teacher)


@dataclass(frozen=True)
class PretrainData:
    """Training items with partners, and validation items, of a prepared dataset."""

    content: ItemContent
    """pictures and texts of the catalog"""
    train_rows: np.ndarray
    """(n,) catalog rows of the anchors of training steps"""
    validation: ValidationItems
    """items and clicks for evaluations"""
    keys: Tensor
    """(N, K) int64; two items that share a key are not negatives of each other"""
    partners: PartnerSources = PartnerSources()
    """partners, queries, groups and teacher vectors"""
    counts: dict[str, Any] = field(default_factory=dict)
    """numbers of items by use, for metrics.json"""
    seed: int = 0
    """seed of batches and partners"""

    @classmethod
    def make(
        cls,
        dataset: Dataset,
        content: ItemContent,
        task: PretrainTask,
        split: SplitConfig,
        *,
        validation: float,
        same: Sequence[str],
        attributes: Sequence[str],
        source: str,
        seed: int,
    ) -> PretrainData:
        """The data that the objectives of a task need.

        Args:
            dataset: the dataset.
            content: pictures and texts of the catalog.
            task: the task.
            split: how the log is split.
            validation: fraction of the items with picture and text that are validation items.
            same: `text`, `image` and columns; two items that agree in one are not negatives of each other.
            attributes: columns of the items table that evaluations read.
            source: name of the dataset for errors.
            seed: seed of batches and partners.

        Raises:
            ValueError: the dataset lacks the data of an objective, or an attribute.
        """
        objectives, catalog = task.config.objectives, dataset.catalog
        require_columns(catalog.table, list(attributes), "items table")
        pairs, validation_rows = pair_rows(content, validation, source)
        is_validation = np.zeros(len(catalog), bool)
        is_validation[validation_rows] = True
        assert content.has_image is not None and content.has_text is not None
        has_content = content.has_image | content.has_text
        allowed = ~is_validation & has_content
        # where pictures are only compared with texts, an item without picture or text is of no use
        both = set(objectives.given) <= {"clip", "siglip"}

        splits = None
        try:
            splits = dataset.split(split)
        except ValueError:  # no log, or a log too small to split: only objectives on behaviour need the log
            if objectives.read_behavior or isinstance(split, GivenSplit):  # a column that is named must be there
                raise
        values = {
            name: as_text(catalog.table.column(name)).take(pa.array(validation_rows)).to_pylist() for name in attributes
        }
        coclicks = None if splits is None else ValidationCoClicks.make(splits, has_content)
        train_rows = pairs if both else np.flatnonzero(allowed)
        counts: dict[str, Any] = {
            "train_items": len(train_rows),
            "validation_items": len(validation_rows),
            "without_content": int((~has_content).sum()),
            "without_pair": len(catalog) - len(pairs) - len(validation_rows),
            "items_set_aside": dataset.report["items"]["set aside"],
        }
        for number, picture in enumerate(content.pictures):
            rejected = {reason: entry["count"] for reason, entry in picture.pictures.report["rejected"].items()}
            counts[f"rejected_pictures{f'_{number}' if number else ''}"] = rejected
        return cls(
            content=content,
            train_rows=train_rows,
            validation=ValidationItems(content, validation_rows, values, coclicks),
            keys=item_keys(catalog, content, same),
            partners=PartnerSources.make(dataset, splits, task, allowed, source, seed),
            counts=counts,
            seed=seed,
        )

    @property
    def num_keys(self) -> int:
        """Number K of keys of an item."""
        return self.keys.shape[1]

    @property
    def num_train_items(self) -> int:
        """Number of training items."""
        return len(self.train_rows)

    def batches(self, batch_size: int, num_workers: int, rank: int, world_size: int) -> TrainBatches[PairBatch]:
        """The training batches of a process.

        Args:
            batch_size: anchors of a step over all processes together.
            num_workers: number of worker processes that prepare batches.
            rank: number of the process.
            world_size: number of processes.
        """
        plan = BatchPlan(len(self.train_rows), batch_size, self.seed, rank, world_size)
        return TrainBatches(plan, self.collator(), num_workers)

    def collator(self) -> PairCollator:
        """The collator of training batches."""
        p = self.partners
        return PairCollator(
            self.content, self.train_rows, self.keys, p.samplers, p.queries, p.groups, p.teacher, self.seed
        )

    def summary(self) -> str:
        """Lines for the log: numbers of training and validation items, and of rejected items and pictures."""
        lines = [
            f"{self.counts['train_items']} items to train on, {self.counts['validation_items']} for validation, "
            f"{self.counts['without_pair']} lack picture or text"
        ]
        for reason, entry in self.counts["items_set_aside"].items():
            count = entry if isinstance(entry, int) else entry["count"]
            if count:
                lines.append(f"items set aside: {count}, {reason}")
        for picture in self.content.pictures:
            for reason, entry in picture.pictures.report["rejected"].items():
                lines.append(f"pictures rejected as {reason}: {entry['count']}, for example items {entry['examples']}")
        return "\n".join(lines)


@dataclass(frozen=True)
class StreamData:
    """Training items that are read from shards, and validation items."""

    content: StreamContent
    """the shards"""
    plan: StreamPlan
    """the order of the rows, with one row per step"""
    validation: ValidationItems
    """items for evaluations"""
    num_keys: int = 3
    """number K of keys of an item"""

    @classmethod
    def make(
        cls, config: DataConfig, task: PretrainTask, *, validation: float, attributes: Sequence[str], seed: int
    ) -> StreamData:
        """The data of a task with `data.stream`.

        Args:
            config: the section `data`.
            task: the task.
            validation: fraction of validation items.
            attributes: columns of the shards that evaluations read.
            seed: seed of the batches.

        Raises:
            ValueError: an objective needs more than the items of a batch, or too few validation items have picture and
                text.
        """
        assert config.stream is not None
        more = set(task.config.objectives.given) - {"clip", "siglip"}
        if more:
            raise ValueError(
                f"task.objectives.{min(more)}: needs the whole catalog at hand, and data.stream reads it in shards; "
                f"prepare the dataset instead, or leave the objective out"
            )
        content = stream_content(config, task, attributes)
        rows = content.items.group_rows
        plan = StreamPlan(rows, 1, seed, buffer_rows=config.stream.buffer_rows, validation=validation)
        table, items = StreamBatches(content, plan).validation_items(config.stream.validation_items)
        assert items.has_image is not None and items.has_text is not None
        picked = np.flatnonzero((items.has_image & items.has_text).numpy())
        if len(picked) < 2:
            raise ValueError(f"{config.path}: {len(picked)} validation items have picture and text; raise validation")
        values = {name: as_text(table[name]).take(pa.array(picked)).to_pylist() for name in attributes}
        return cls(content, plan, ValidationItems(StoredItems(items), picked, values))

    @property
    def num_train_items(self) -> int:
        """Number of training items."""
        return int(self.plan.train_rows.sum())

    @property
    def counts(self) -> dict[str, Any]:
        """Numbers of items, and of pictures that the first process has rejected so far."""
        rejected = {reason: entry["count"] for reason, entry in self.content.report.items()}
        return {
            "items": int(self.plan.first_row[-1]),
            "validation_items": len(self.validation.rows),
            "rejected_pictures": rejected,
        }

    def batches(self, batch_size: int, num_workers: int, rank: int, world_size: int) -> TrainBatches[PairBatch]:
        """The training batches of a process; the arguments are those of `PretrainData.batches`."""
        plan = replace(self.plan, batch_size=batch_size, rank=rank, world_size=world_size)
        return StreamBatches(self.content, plan, num_workers)

    def summary(self) -> str:
        """A line for the log: numbers of items, row groups and validation items."""
        return (
            f"{self.plan.first_row[-1]} items in {len(self.plan.group_rows)} groups of rows, "
            f"{self.plan.train_rows.sum()} to train on, {len(self.validation.rows)} evaluated"
        )


def open_pretrain_data(config: PretrainConfig, task: PretrainTask, context: RunContext) -> PretrainData | StreamData:
    """The data of a pretraining run, prepared or streamed from shards (`data.stream`).

    Args:
        config: the config of the run.
        task: the task.
        context: run folder and processes.

    Raises:
        ValueError: the dataset lacks the data of an objective.
    """
    options: dict[str, Any] = {
        "validation": config.validation,
        "attributes": config.attributes,
        "seed": config.seed,
    }
    if config.data.stream is not None:
        return StreamData.make(config.data, task, **options)
    dataset = open_run_data(config.data, context)
    content = item_content(dataset, config.data, task, context.accelerator)
    made = PretrainData.make(dataset, content, task, config.split, same=config.same, source=config.data.path, **options)
    log_folder = str(dataset.catalog.root or dataset.report["source"])
    return replace(made, counts=made.counts | {"behavior_splits": behavior_splits(config, log_folder)})


def stream_content(config: DataConfig, task: PretrainTask, attributes: Sequence[str] = ()) -> StreamContent:
    """The shards at `data.path`, with pictures and tokens for an encoder.

    Args:
        config: the section `data`.
        task: the task with the encoder.
        attributes: further columns to read.
    """
    columns = list(dict.fromkeys([*config.text, *attributes]))
    items = ShardedItems(config.path, columns, cache_folder() / f"shards-{fingerprint(config.path)}")
    size = config.image_size or task.encoder.image_size
    return StreamContent(items, config.text, task.encoder.tokenize, size, config.image_resize)


def item_keys(catalog: Catalog, content: ItemContent, same: Sequence[str]) -> Tensor:
    """The keys of items: two items that share a key are not negatives of each other.

    Args:
        catalog: the catalog.
        content: pictures and texts of the catalog.
        same: `text`, `image` and columns of the items table.

    Returns:
        (N, K) int64: the catalog row, then for each of `same` a number that is equal for items that agree, and unique
        for an item without a value.
    """
    num_items = len(catalog)
    alone = -1 - np.arange(num_items)
    columns = [np.arange(num_items)]
    for name in same:
        if name == "image":
            for picture in content.pictures:
                index = picture.pictures.index
                hashes = picture.pictures.hashes[np.maximum(index, 0)] if len(picture.pictures.hashes) else alone
                codes = np.unique(hashes, return_inverse=True)[1].reshape(-1)
                columns.append(np.where(index >= 0, codes, alone))
        elif name == "text":
            for text in content.texts:
                columns.append(np.where(text.has, row_hashes(text.input_ids.numpy()), alone))
        else:
            codes = value_codes(catalog.table, name, "items table")[0]
            columns.append(np.where(codes >= 0, codes, alone))
    return torch.from_numpy(np.stack(columns, axis=1).astype(np.int64))


def _queries(
    dataset: Dataset, splits: Splits, column: str, task: PretrainTask, num_items: int, seed: int
) -> ClickedQueries:
    """The sampler of search queries, from a text column of the log."""
    number, words = value_codes(dataset.context, column, "interactions table")
    # the last entry is for the number -1, a row without a query
    blank = np.array([*(not word.strip() for word in words), True])
    number = np.where(blank[number], -1, number)
    if not (number[splits.train.source[splits.train.label == 1]] >= 0).any():
        raise ValueError(f"interactions table: no training click has a text in column {column!r}")
    input_ids = tokenized(words, task.encoder.tokenize)
    return ClickedQueries(splits.train, num_items, number, input_ids, seed)
