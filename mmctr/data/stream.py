"""Items streamed from shards, for pretraining on catalogs larger than memory and the disk cache.

A row number counts through all shards in the order of their names, whatever is wrong with a row. What a step takes
follows from (seed, epoch, step, rank) and the sizes of the groups: resuming needs no state.
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
    """Groups of a process whose rows are mixed; `start` rows of the epoch it takes before."""

    epoch: int
    number: int
    start: int
    groups: list[int]


@dataclass(frozen=True)
class StreamPlan:
    """Which rows each training step takes; `group_rows` are those of `ShardedItems`, the rest is as in `BatchPlan`.

    An epoch deals the groups in random order, each to the process with the fewest rows so far. A process reads only its
    own and mixes the rows of consecutive groups, a window. (So another number of processes means other batches.)
    `buffer_rows` are the rows of a window at least, but for an epoch's last. Memory holds one window, encoded: less
    than `buffer_rows` and the largest group together. `validation` is the share of the rows held out, chosen by their
    numbers alone: other seeds, and shards added at the end, change none.

    Every epoch has the same steps in every process, which gets at least a `world_size`-th of the training rows less the
    largest group. What it gets beyond is left out; other rows are in the next epoch. Raises ValueError when a batch
    does not fit the rows or the processes, and for fewer groups than processes.
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
        """(G + 1,) int64: the number of each group's first row, then the number of all rows."""
        return np.cumsum((0, *self.group_rows))

    @cached_property
    def train_rows(self) -> np.ndarray:
        """(G,) int64: rows of each group that are not held out."""
        return np.array([len(self.rows_of(group)) for group in range(len(self.group_rows))], np.int64)

    @cached_property
    def steps_per_epoch(self) -> int:
        # dealing leaves no process more than one group behind another
        sure = int(self.train_rows.sum()) - (self.world_size - 1) * int(self.train_rows.max(initial=0))
        return max(0, -(-sure // self.world_size) // (self.batch_size // self.world_size))

    def rows_of(self, group: int, validation: bool = False) -> np.ndarray:
        """(n,) int64 numbers of the rows of a group to train on, or of those held out."""
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
        """This process's rows of a step of the whole run, given its epoch's order, as slices of `shuffled` windows."""
        size = self.batch_size // self.world_size
        start = (step % self.steps_per_epoch) * size
        first, end = (bisect_right(order, place, key=lambda w: w.start) for place in (start, start + size - 1))
        return [(w, slice(max(0, start - w.start), start + size - w.start)) for w in order[first - 1 : end]]

    def shuffled(self, window: Window) -> np.ndarray:
        """(n,) int64 row numbers of a window, in the order they are taken."""
        rows = np.concatenate([self.rows_of(group) for group in window.groups])
        seed = stream_seed(self.seed, "order in a window", window.epoch, self.rank, window.number)
        return np.random.default_rng(seed).permutation(rows)


class StreamContent:
    """Content of streamed items by row number, read when it is asked for: what `mmctr.data.content.ItemContent` is for
    a catalog on disk. Rows near each other are read together; one group is kept.

    A text is the non-empty `text` columns of an item joined by ". "; `tokenize` makes (n, T) token ids of n; `threads`
    decode pictures.
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
        """of the rows read, each once: reason -> {"count", "examples"}; a null cell is "no picture" """
        self._seen: dict[str, bytearray] = {}
        self._kept: dict[int, pa.Table] = {}

    def batch(self, rows: torch.Tensor) -> ItemBatch:
        """`row` (n,) int64, `image` (n, 3, S, S), `has_image`, `input_ids` (n, T) int64 and `has_text`."""
        groups = np.unique(np.searchsorted(self.first_row, rows.numpy(), side="right") - 1).tolist()
        tables = {group: self._kept.get(group) for group in groups}
        self._kept = {}
        tables = {group: self.items.read(group) if table is None else table for group, table in tables.items()}
        batch, problems = self.collate(self.take(rows.numpy(), tables))
        self._kept = {groups[-1]: tables[groups[-1]]}
        self.count(problems)
        return batch

    def take(self, rows: np.ndarray, tables: dict[int, pa.Table]) -> Samples:
        groups = np.searchsorted(self.first_row, rows, side="right") - 1
        where = zip(rows.tolist(), groups.tolist(), (rows - self.first_row[groups]).tolist(), strict=True)
        shards = self.items.groups
        return [(row, shards[group][0].parent, tables[group].slice(at, 1).to_pylist()[0]) for row, group, at in where]

    def collate(self, samples: Samples) -> tuple[ItemBatch, Problems]:
        pixels = np.zeros((len(samples), 3, self.image_size, self.image_size), np.uint8)

        def decode(place: int) -> str | None:
            _, folder, cells = samples[place]
            try:
                data = read_picture(cells["image"], folder)
                pixels[place] = decode_picture(data, self.image_size, self.resize).numpy()
            except PictureError as error:
                return "no picture" if cells["image"] is None else error.reason

        with ThreadPoolExecutor(self.threads) as pool:  # each time: forked workers would lack the threads of an old one
            reasons = list(pool.map(decode, range(len(samples))))
        problems: Problems = []
        for (row, _, cells), reason in zip(samples, reasons, strict=True):
            problems += [(row, what, cells["item_id"]) for what in (reason, cells[PROBLEM]) if what]
        texts = [joined_text(cells[name] for name in self.text) for *_, cells in samples]
        row, has_text = torch.tensor([row for row, *_ in samples]), torch.tensor([text != "" for text in texts])
        has_image, input_ids = torch.tensor([reason is None for reason in reasons]), self.tokenize(texts).long()
        image = torch.from_numpy(pixels)
        return ItemBatch(row, image=image, has_image=has_image, input_ids=input_ids, has_text=has_text), problems

    def count(self, problems: Problems) -> None:
        for row, reason, item_id in problems:
            seen = self._seen.setdefault(reason, bytearray(int(self.first_row[-1]) // 8 + 1))
            if not seen[row >> 3] >> (row & 7) & 1:
                seen[row >> 3] |= 1 << (row & 7)
                entry = self.report.setdefault(reason, {"count": 0, "examples": []})
                entry["count"] += 1
                entry["examples"] += [item_id] * (len(entry["examples"]) < 3)


@dataclass(frozen=True)
class StoredItems:
    """Items in memory, asked for by their place: content for what is held out of a stream."""

    items: ItemBatch

    def batch(self, rows: torch.Tensor) -> ItemBatch:
        names = ("row", "image", "has_image", "input_ids", "has_text")
        return ItemBatch(**{name: getattr(self.items, name)[rows] for name in names})


class StreamBatches(TrainBatches[PairBatch]):
    """`TrainBatches` of streamed items: from any step on, the same whatever `num_workers`.

    Equal pictures and equal texts of a batch have equal keys. Each of the `num_workers` processes holds a window of its
    own and reads all windows of this rank.
    """

    def __init__(self, content: StreamContent, stream: StreamPlan, num_workers: int = 0):
        super().__init__(stream, self._collate, num_workers)  # type: ignore[arg-type]  # rows are windows
        self.content, self.stream = content, stream
        self._window: Window | None = None
        self._tables: dict[int, pa.Table] = {}

    @property
    def report(self) -> dict[str, dict[str, Any]]:
        return self.content.report

    def iterate(self, start: int, stop: int) -> Iterator[tuple[int, PairBatch]]:
        for step, (batch, problems) in super().iterate(start, stop):  # type: ignore[misc]
            self.content.count(problems)
            yield step, batch

    def validation_items(self, limit: int) -> tuple[pa.Table, ItemBatch]:
        """At most `limit` validation rows, of as few groups (in an order all processes and seeds share) as it takes: a
        table of `item_id` and the columns, and their batch. Raises ValueError when nothing is held out."""
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
        for window, places in pieces:
            if self._window != window:
                self._window, self._tables = None, {}  # first, so that there are never two windows in memory
                self._tables = {group: self.content.items.read(group) for group in window.groups}
                self._window, self._rows = window, self.stream.shuffled(window)
            samples += self.content.take(self._rows[places], self._tables)
        batch, problems = self.content.collate(samples)
        return PairBatch(items=batch, anchor=torch.arange(len(batch)), keys=content_keys(batch)), problems


def content_keys(items: ItemBatch) -> torch.Tensor:
    """(n, 3) int64: the row, a hash of the text and one of the picture; one of its own for an item without."""
    alone = -1 - items.row
    columns = [items.row]
    for values, has in ((items.input_ids, items.has_text), (items.image, items.has_image)):
        assert values is not None and has is not None
        columns.append(torch.where(has, torch.from_numpy(row_hashes(values.numpy())), alone))
    return torch.stack(columns, dim=1)
