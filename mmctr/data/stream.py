"""Items streamed from shards, for pretraining on catalogs larger than memory and the disk cache.

Row numbers count all rows of all shards, damaged rows included, in the order of the shard names. The rows of a step are
a function of (seed, epoch, step, rank) and the sizes of the groups, so resuming needs no state.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from mmctr.data.batches import ItemBatch, PairBatch
from mmctr.data.catalog import joined_text
from mmctr.data.hashing import hashed_uniform, row_hashes, stream_seed
from mmctr.data.images import PictureError, Resize, decode_picture, read_picture
from mmctr.data.loaders import BatchPlan, TrainBatches
from mmctr.data.shards import PROBLEM, ShardedItems

_VALIDATION = 0x5EED  # not the seed of a run: all runs are compared on the same rows
Samples = list[tuple[int, Path, dict[str, Any]]]  # row number, folder of the shard, cells
Problems = list[tuple[int, str, Any]]  # row number, reason, item id


class Window(NamedTuple):
    """Consecutive groups of one process whose rows are shuffled together."""

    epoch: int
    """epoch of the window, from 0"""
    number: int
    """number of the window within the epoch, from 0"""
    start: int
    """number of rows that the process reads in the epoch before this window"""
    groups: list[int]
    """positions of the groups in `ShardedItems.groups`"""


@dataclass(frozen=True)
class StreamPlan:
    """The rows of a stream that every training step reads.

    In every epoch the groups are dealt in random order, each group to the process with the fewest rows so far. A
    process reads the groups dealt to that process alone, and shuffles the rows of consecutive groups together, a
    window. Another number of processes therefore means other batches. Memory holds the encoded pictures of one window:
    fewer rows than `buffer_rows` and the largest group together.

    Every process has the same number of steps in every epoch. A process gets at least `1 / world_size` of the training
    rows less the largest group; rows beyond the common number of steps are left out, other rows in every epoch.

    Args:
        group_rows: number of rows of each group, `ShardedItems.group_rows`.
        batch_size: rows of a step over all processes together.
        seed: seed of the run.
        rank: number of this process.
        world_size: number of processes.
        buffer_rows: least number of rows of a window, except for the last window of an epoch.
        validation: fraction of the rows for validation, chosen by row number alone, so that other seeds, and shards
            appended at the end, do not change the choice.

    Raises:
        ValueError: `batch_size` does not fit the number of rows or processes, there are fewer groups than processes,
            or `buffer_rows` or `validation` is out of range.
    """

    group_rows: tuple[int, ...]
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    buffer_rows: int = 16_384
    validation: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.validation < 1 or self.buffer_rows < 1:
            raise ValueError(f"validation={self.validation} is in [0, 1) and buffer_rows={self.buffer_rows} at least 1")
        BatchPlan(int(self.train_rows.sum()), self.batch_size, self.seed, self.rank, self.world_size)  # its ValueErrors
        if np.count_nonzero(self.train_rows) < self.world_size or not self.steps_per_epoch:
            few = f"{len(self.group_rows)} groups of up to {max(self.group_rows)} rows for {self.world_size} processes"
            raise ValueError(f"{few}: too few for batch_size={self.batch_size}; lower it or write smaller row groups")

    @cached_property
    def first_row(self) -> np.ndarray:
        """(G + 1,) int64: the row number of the first row of each group, then the total number of rows."""
        return np.cumsum((0, *self.group_rows))

    @cached_property
    def train_rows(self) -> np.ndarray:
        """(G,) int64: number of training rows of each group."""
        return np.array([len(self.rows_of(group)) for group in range(len(self.group_rows))], np.int64)

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps of every process in an epoch."""
        # dealing leaves no process more than one group behind another
        sure = int(self.train_rows.sum()) - (self.world_size - 1) * int(self.train_rows.max(initial=0))
        return max(0, -(-sure // self.world_size) // (self.batch_size // self.world_size))

    def rows_of(self, group: int, validation: bool = False) -> np.ndarray:
        """(n,) int64 row numbers of the training rows of a group, or with `validation` of the validation rows."""
        rows = np.arange(self.first_row[group], self.first_row[group + 1])
        return rows[(hashed_uniform(_VALIDATION, 0, rows) < self.validation) == validation]

    def order(self, epoch: int) -> list[Window]:
        """The windows of this process in an epoch."""
        windows: list[Window] = []
        dealt = np.zeros(self.world_size, np.int64)
        rng = np.random.default_rng(stream_seed(self.seed, "order of groups", epoch))
        groups = rng.permutation(np.flatnonzero(self.train_rows))
        for group in groups.tolist():
            rank = int(dealt.argmin())
            if rank == self.rank:
                if not windows or dealt[rank] - windows[-1].start >= self.buffer_rows:
                    windows.append(Window(epoch, len(windows), int(dealt[rank]), []))
                windows[-1].groups.append(group)
            dealt[rank] += self.train_rows[group]
        return windows

    def rows(self, step: int, order: list[Window]) -> list[tuple[Window, slice]]:
        """The rows that this process reads in a step.

        Args:
            step: step of the whole run, from 0.
            order: result of `order` for the epoch of the step.

        Returns:
            Windows, and the slice of the shuffled rows of each window: the slices hold `batch_size / world_size` rows
            together.
        """
        size = self.batch_size // self.world_size
        start = (step % self.steps_per_epoch) * size
        first, end = (bisect_right(order, row, key=lambda w: w.start) for row in (start, start + size - 1))
        return [(w, slice(max(0, start - w.start), start + size - w.start)) for w in order[first - 1 : end]]

    def shuffled(self, window: Window) -> np.ndarray:
        """(n,) int64 row numbers of a window in random order, in which the steps read the rows."""
        rows = np.concatenate([self.rows_of(group) for group in window.groups])
        seed = stream_seed(self.seed, "order in a window", window.epoch, self.rank, window.number)
        return np.random.default_rng(seed).permutation(rows)


class StreamContent:
    """Pictures and texts of streamed items by row number, read from the shards on demand.

    The counterpart for shards of `mmctr.data.content.ItemContent`. Rows of one group are read together, and the group
    read last stays in memory.

    Args:
        items: the shards.
        text: names of the columns whose non-empty values, joined by ". ", are the text of an item.
        tokenize: maps n texts to (n, T) token ids.
        image_size: side of a picture in pixels.
        resize: how a picture is made square; the choices of `mmctr.data.images.decode_picture`.
        threads: number of threads that decode pictures.
    """

    def __init__(
        self,
        items: ShardedItems,
        text: Sequence[str],
        tokenize: Callable[[list[str]], torch.Tensor],
        image_size: int,
        resize: Resize = "shortest",
        threads: int = 2,
    ):
        self.items, self.text, self.tokenize = items, list(text), tokenize
        self.image_size, self.threads = image_size, threads
        self.resize: Resize = resize
        self.first_row = np.cumsum((0, *items.group_rows))
        self.report: dict[str, dict[str, Any]] = {}
        """reason -> {"count", "examples"} of the damaged rows among the rows read so far, each row counted once; a null
        picture cell has the reason "no picture" """
        self._counted: dict[str, bytearray] = {}
        self._latest: dict[int, pa.Table] = {}

    def batch(self, rows: torch.Tensor) -> ItemBatch:
        """Read and decode some items.

        Args:
            rows: (n,) row numbers.

        Returns:
            `row` (n,) int64, `image` (n, 3, S, S) uint8, `has_image` (n,), `input_ids` (n, T) int64, `has_text` (n,).

        Raises:
            ValueError: a shard is damaged or has changed.
        """
        groups = np.unique(np.searchsorted(self.first_row, rows.numpy(), side="right") - 1).tolist()
        cached = {group: self._latest.get(group) for group in groups}
        self._latest = {}
        tables = {group: self.items.read(group) if table is None else table for group, table in cached.items()}
        batch, problems = self.collate(self.take(rows.numpy(), tables))
        self._latest = {groups[-1]: tables[groups[-1]]}
        self.count(problems)
        return batch

    def take(self, rows: np.ndarray, tables: dict[int, pa.Table]) -> Samples:
        """The cells of some rows.

        Args:
            rows: (n,) row numbers.
            tables: rows of every group that holds one of the row numbers, by group.

        Returns:
            n triples of row number, folder of the shard, and cells by column.
        """
        groups = np.searchsorted(self.first_row, rows, side="right") - 1
        where = zip(rows.tolist(), groups.tolist(), (rows - self.first_row[groups]).tolist(), strict=True)
        shards = self.items.groups
        return [(row, shards[group][0].parent, tables[group].slice(at, 1).to_pylist()[0]) for row, group, at in where]

    def collate(self, samples: Samples) -> tuple[ItemBatch, Problems]:
        """Decode the pictures and tokenize the texts of n samples.

        Returns:
            The batch of n items, and the problems: row number, reason and item id of every damaged row.
        """
        pixels = np.zeros((len(samples), 3, self.image_size, self.image_size), np.uint8)

        def decode(position: int) -> str | None:
            _, folder, cells = samples[position]
            try:
                data = read_picture(cells["image"], folder)
                pixels[position] = decode_picture(data, self.image_size, self.resize).numpy()
            except PictureError as error:
                return "no picture" if cells["image"] is None else error.reason

        with ThreadPoolExecutor(self.threads) as pool:  # each time: forked workers would lack the threads of an old one
            reasons = list(pool.map(decode, range(len(samples))))
        problems: Problems = []
        for (row, _, cells), reason in zip(samples, reasons, strict=True):
            problems += [(row, problem, cells["item_id"]) for problem in (reason, cells[PROBLEM]) if problem]
        texts = [joined_text(cells[name] for name in self.text) for *_, cells in samples]
        row, has_text = torch.tensor([row for row, *_ in samples]), torch.tensor([text != "" for text in texts])
        has_image, input_ids = torch.tensor([reason is None for reason in reasons]), self.tokenize(texts).long()
        image = torch.from_numpy(pixels)
        return ItemBatch(row, image=image, has_image=has_image, input_ids=input_ids, has_text=has_text), problems

    def count(self, problems: Problems) -> None:
        """Add problems to `report`; a row that was counted before for the same reason is not counted again."""
        for row, reason, item_id in problems:
            counted = self._counted.setdefault(reason, bytearray(int(self.first_row[-1]) // 8 + 1))
            if not counted[row >> 3] >> (row & 7) & 1:
                counted[row >> 3] |= 1 << (row & 7)
                entry = self.report.setdefault(reason, {"count": 0, "examples": []})
                entry["count"] += 1
                entry["examples"] += [item_id] * (len(entry["examples"]) < 3)


@dataclass(frozen=True)
class StoredItems:
    """Content of items that are in memory already, such as the validation items of a stream."""

    items: ItemBatch
    """n items with the content of every item"""

    def batch(self, rows: torch.Tensor) -> ItemBatch:
        """The content of the items at the (m,) positions `rows` among the n items."""
        names = ("row", "image", "has_image", "input_ids", "has_text")
        return ItemBatch(**{name: getattr(self.items, name)[rows] for name in names})


class StreamBatches(TrainBatches[PairBatch]):
    """Training batches of streamed items from any step on; the number of workers changes no batch.

    Items of a batch with equal pictures or equal texts have equal keys. Every worker process reads all windows of this
    rank and holds one window in memory.

    Args:
        content: pictures and texts of the shards.
        stream: the rows of every step.
        num_workers: processes that collate in advance; 0 collates in the training loop.
    """

    def __init__(self, content: StreamContent, stream: StreamPlan, num_workers: int = 0):
        super().__init__(stream, lambda windows, step: self._collate(windows, step)[0])
        self._batches = TrainBatches(stream, self._collate, num_workers)  # problems are counted in this process
        self.content, self.stream = content, stream
        self._window: Window | None = None
        self._tables: dict[int, pa.Table] = {}

    @property
    def report(self) -> dict[str, dict[str, Any]]:
        """reason -> {"count", "examples"} of the damaged rows among the rows read so far."""
        return self.content.report

    def iterate(self, start: int, stop: int) -> Iterator[tuple[int, PairBatch]]:
        """Pairs of step and batch for the steps `start` to `stop - 1` of the whole run.

        Args:
            start: first step.
            stop: step after the last one.
        """
        for step, (batch, problems) in self._batches.iterate(start, stop):
            self.content.count(problems)
            yield step, batch

    def validation_items(self, limit: int) -> tuple[pa.Table, ItemBatch]:
        """Read validation items, from the first groups of an order that is equal in all processes and for all seeds.

        Args:
            limit: largest number of items.

        Returns:
            A table of `item_id` and the text columns, and the batch of these items.

        Raises:
            ValueError: the stream has no validation rows.
        """
        items, samples = self.content.items, []
        for group in np.argsort(hashed_uniform(_VALIDATION, 1, np.arange(len(items.groups)))).tolist():
            if len(rows := self.stream.rows_of(group, validation=True)[: limit - len(samples)]):
                samples += self.content.take(rows, {group: items.read(group)})
        if not samples:
            raise ValueError(f"none of {self.stream.first_row[-1]} rows is held out; raise validation")
        samples.sort(key=lambda sample: sample[0])
        batch, problems = self.content.collate(samples)
        self.content.count(problems)
        return pa.Table.from_pylist([cells for *_, cells in samples]).select(["item_id", *items.columns]), batch

    def _collate(self, pieces: list[tuple[Window, slice]], step: int) -> tuple[PairBatch, Problems]:
        samples: Samples = []
        for window, positions in pieces:
            if self._window != window:
                self._window, self._tables = None, {}  # first, so that there are never two windows in memory
                self._tables = {group: self.content.items.read(group) for group in window.groups}
                self._window, self._rows = window, self.stream.shuffled(window)
            samples += self.content.take(self._rows[positions], self._tables)
        batch, problems = self.content.collate(samples)
        return PairBatch(items=batch, anchor=torch.arange(len(batch)), keys=content_keys(batch)), problems


def content_keys(items: ItemBatch) -> torch.Tensor:
    """Keys by which losses distinguish the items of a batch: two items that agree in any column are not negatives.

    Args:
        items: n items with pictures and texts.

    Returns:
        (n, 3) int64: the row, a hash of the token ids and a hash of the pixels; an item without a text or a picture
        gets a unique negative value instead of the hash.
    """
    alone = -1 - items.row
    columns = [items.row]
    for values, has in ((items.input_ids, items.has_text), (items.image, items.has_image)):
        assert values is not None and has is not None
        columns.append(torch.where(has, torch.from_numpy(row_hashes(values.numpy())), alone))
    return torch.stack(columns, dim=1)
