"""Training batches as a pure function of (seed, epoch, step): resuming needs no state, and the number of loader workers
or processes changes no batch.

A global batch is cut into equal slices, one per process, so that two processes together read the rows that a single
process would read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from mmctr.data.hashing import stream_seed

BatchT = TypeVar("BatchT")


@dataclass(frozen=True)
class BatchPlan:
    """The training rows that every step reads.

    The last, incomplete batch of an epoch is left out; other rows are left out in every epoch.

    Args:
        num_rows: number of training rows.
        batch_size: rows of a step over all processes together.
        seed: seed of the run.
        rank: number of this process.
        world_size: number of processes.

    Raises:
        ValueError: `batch_size` is less than 1, more than `num_rows`, or not a multiple of `world_size`.
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
        """Number of complete batches in an epoch."""
        return self.num_rows // self.batch_size

    def order(self, epoch: int) -> np.ndarray:
        """The (num_rows,) permutation of the training rows in an epoch."""
        return np.random.default_rng(stream_seed(self.seed, "order of rows", epoch)).permutation(self.num_rows)

    def rows(self, step: int, order: np.ndarray) -> np.ndarray:
        """The rows that this process reads in a step.

        Args:
            step: step of the whole run, from 0.
            order: result of `order` for the epoch of the step.

        Returns:
            (batch_size / world_size,) training rows.
        """
        size = self.batch_size // self.world_size
        start = (step % self.steps_per_epoch) * self.batch_size + self.rank * size
        return order[start : start + size]


class Plan(Protocol):
    """The rows that every training step reads, in a form that the collate function of `TrainBatches` understands."""

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in an epoch."""
        ...

    def order(self, epoch: int) -> Any:
        """The order of the rows in an epoch."""
        ...

    def rows(self, step: int, order: Any) -> Any:
        """The rows of a step, given the order of the epoch."""
        ...


class TrainBatches(Generic[BatchT]):
    """Training batches from any step on: `for step, batch in batches.iterate(start, stop)`.

    Args:
        plan: the rows of every step, a `BatchPlan` or another `Plan`.
        collate: `collate(rows, step)` returns the batch, a pure function of both arguments.
        num_workers: processes that collate in advance; 0 collates in the training loop.
    """

    def __init__(self, plan: Plan, collate: Callable[[Any, int], BatchT], num_workers: int = 0):
        self.plan = plan
        self.steps_per_epoch = plan.steps_per_epoch
        self._steps = _Steps(plan, collate)
        self._num_workers = num_workers

    def iterate(self, start: int, stop: int) -> Iterator[tuple[int, BatchT]]:
        """Pairs of step and batch for the steps `start` to `stop - 1` of the whole run.

        Args:
            start: first step.
            stop: step after the last one.
        """
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
    """A torch dataset whose item `step` is the whole batch of a step; the order of the current epoch is stored."""

    def __init__(self, plan: Plan, collate: Callable[[Any, int], Any]):
        self.plan, self.collate = plan, collate
        self._epoch = -1
        self._order: Any = None

    def __getitem__(self, step: int) -> Any:
        epoch = step // self.plan.steps_per_epoch
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self.plan.order(epoch)
        return self.collate(self.plan.rows(step, self._order), step)
