"""Interactions: the click log in columns, sorted by (user, time); histories are slices; splits and cold items.

A history is not stored with its impression. All positives (clicks) stand in one array sorted by (user, time); an
impression holds where its history begins and ends there. So an impression costs about 30 bytes whatever the length
of its history, and the arrays can be memory-mapped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Interactions:
    """n interactions sorted by (user, time). Rows of users and items, not raw ids."""

    user: np.ndarray
    """(n,) int32"""
    item: np.ndarray
    """(n,) int32 rows of the catalog"""
    time: np.ndarray
    """(n,) int64, in the unit the log came in"""
    label: np.ndarray
    """(n,) uint8, 0 or 1"""

    NAMES = ("user", "item", "time", "label")

    def __len__(self) -> int:
        return len(self.user)

    @classmethod
    def from_columns(
        cls, user: np.ndarray, item: np.ndarray, time: np.ndarray, label: np.ndarray
    ) -> tuple[Interactions, np.ndarray]:
        """Sort by (user, time), equal times in the given order. Also returns the (n,) order applied."""
        order = np.lexsort((time, user))
        columns = (user.astype(np.int32), item.astype(np.int32), time.astype(np.int64), label.astype(np.uint8))
        return cls(*(column[order] for column in columns)), order

    def save(self, folder: Path) -> None:
        for name in self.NAMES:
            np.save(folder / f"{name}.npy", getattr(self, name), allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> Interactions:
        """Memory-mapped: nothing is read before it is used."""
        return cls(*(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in cls.NAMES))

    def user_position(self) -> tuple[np.ndarray, np.ndarray]:
        """For each row its place (0, 1, ...) among its user's rows, and how many rows that user has: (n,), (n,)."""
        first = _group_start(self.user[1:] != self.user[:-1])
        _, size = np.unique(self.user, return_counts=True)
        return np.arange(len(self)) - first, np.repeat(size, size)

    def clicked_before(self, user: int, time: int | None = None) -> np.ndarray:
        """(h,) catalog rows of what a user clicked strictly before a time, or ever; oldest first."""
        first, after = np.searchsorted(self.user, [user, user + 1])
        if time is not None:
            after = first + int(np.searchsorted(self.time[first:after], time))
        return np.asarray(self.item[first:after])[np.asarray(self.label[first:after]) == 1]

    def histories(self, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positives where `keep` (n,) is True, and each row's slice of them: what its user clicked strictly earlier.

        Returns `values` (P,) int32 item rows sorted by (user, time), `start` (n,) and `end` (n,) int64, such that the
        history of row i is `values[start[i]:end[i]]`. Clicks at the very same time are not "before" and stay out.
        """
        clicked = (self.label == 1) & keep
        before = np.cumsum(clicked) - clicked
        new_user = self.user[1:] != self.user[:-1]
        new_moment = new_user | (self.time[1:] != self.time[:-1])
        start = before[_group_start(new_user)]
        end = before[_group_start(new_moment)]
        return self.item[clicked], start, end


def _group_start(changed: np.ndarray) -> np.ndarray:
    """(n,) index of the first row of each row's group, from the (n - 1,) marks of where a new group begins."""
    index = np.arange(len(changed) + 1)
    begins = np.concatenate([np.ones(min(1, len(index)), bool), changed])
    return np.maximum.accumulate(np.where(begins, index, 0))


@dataclass(frozen=True)
class Impressions:
    """The rows of one split with their histories: what a loader draws from."""

    user: np.ndarray
    """(n,) user rows"""
    item: np.ndarray
    """(n,) catalog rows"""
    label: np.ndarray
    """(n,) 0 or 1"""
    source: np.ndarray
    """(n,) rows of the interactions, for context columns"""
    history: np.ndarray
    """(P,) catalog rows of positives, shared by all impressions of the split"""
    history_start: np.ndarray
    history_end: np.ndarray
    """(n,) the slice of `history` that happened before the impression"""

    def __len__(self) -> int:
        return len(self.item)

    def take(self, rows: np.ndarray) -> Impressions:
        """The given rows, with their whole histories."""
        names = ("user", "item", "label", "source", "history_start", "history_end")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})
