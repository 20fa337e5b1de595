"""Batches as a pure function of (seed, epoch, step): resuming needs no state, and workers or processes change nothing.

A global batch is cut into equal slices, one a process, so two processes see the rows one process would see.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from mmctr.data.hashing import stream_seed

BatchT = TypeVar("BatchT")


@dataclass(frozen=True)
class BatchPlan:
    """Which rows each training step takes.

    Args:
        num_rows: training rows.
        batch_size: rows of a step over all processes together.
        rank, world_size: this process and how many there are.

    The last, incomplete batch of an epoch is left out: other rows fall into it each epoch. Raises ValueError when
    a batch does not fit the rows or the processes.
    """

    num_rows: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} is not a number of rows; raise it")
        if self.batch_size > self.num_rows:
            raise ValueError(f"batch_size={self.batch_size} is more than the {self.num_rows} training rows; lower it")
        if self.batch_size % self.world_size:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of the {self.world_size} processes; change it"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.num_rows // self.batch_size

    def order(self, epoch: int) -> np.ndarray:
        """(num_rows,) the permutation of an epoch."""
        return np.random.default_rng(stream_seed(self.seed, "order of rows", epoch)).permutation(self.num_rows)

    def rows(self, step: int, order: np.ndarray) -> np.ndarray:
        """This process's rows of a step of the whole run, given its epoch's order."""
        size = self.batch_size // self.world_size
        start = (step % self.steps_per_epoch) * self.batch_size + self.rank * size
        return order[start : start + size]


class TrainBatches(Generic[BatchT]):
    """Training batches from any step on: `for step, batch in batches.iterate(start, stop)`.

    Args:
        collate: `(rows, step) -> batch`, a pure function of both.
        num_workers: processes that collate ahead; 0 collates in the loop.
    """

    def __init__(self, plan: BatchPlan, collate: Callable[[np.ndarray, int], BatchT], num_workers: int = 0):
        self.plan = plan
        self.steps_per_epoch = plan.steps_per_epoch
        self._steps = _Steps(plan, collate)
        self._num_workers = num_workers

    def iterate(self, start: int, stop: int) -> Iterator[tuple[int, BatchT]]:
        loader = DataLoader(
            self._steps,
            batch_size=None,
            sampler=range(start, stop),
            num_workers=self._num_workers,
            # a forked worker shares memory-mapped pictures and logs; pickling would copy them into each
            multiprocessing_context="fork" if self._num_workers and sys.platform == "linux" else None,
            pin_memory=torch.cuda.is_available(),
        )
        yield from zip(range(start, stop), loader, strict=True)


class _Steps(TorchDataset):
    """Item `step` is the whole batch of that step; the order of the current epoch is kept between steps."""

    def __init__(self, plan: BatchPlan, collate: Callable[[np.ndarray, int], Any]):
        self.plan, self.collate = plan, collate
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __getitem__(self, step: int) -> Any:
        epoch = step // self.plan.steps_per_epoch
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self.plan.order(epoch)
        return self.collate(self.plan.rows(step, self._order), step)
