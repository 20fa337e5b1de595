"""Interactions: the click log as columns sorted by (user, time), and impressions whose histories are slices of the log.

A history is not stored with the impression. All positives (clicks) are stored in one array sorted by (user, time), and
an impression stores the start and the end of a slice of that array. An impression therefore takes about 30 bytes
whatever the length of the history, and the arrays can be memory-mapped.

Rows of a user at one moment have no known order: files often list the clicks of a day before the other impressions of
the day, and a cut in the order of the file would put clicks into training and the rest into the test. Rows with equal
times are therefore in the order of a hash of (user, item, time), which depends neither on the file nor on the labels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mmctr.data.hashing import tie_hashes

AGAIN = "run `mmctr prepare` again"
"""what to do about a damaged file, for messages"""


@dataclass(frozen=True)
class Interactions:
    """n interactions sorted by (user, time), rows with equal user and time by a hash. Users and items are given as
    rows, not as raw ids."""

    user: np.ndarray
    """(n,) int32 rows of the users table"""
    item: np.ndarray
    """(n,) int32 rows of the catalog"""
    time: np.ndarray
    """(n,) int64, in the unit of the raw log"""
    label: np.ndarray
    """(n,) uint8, 0 or 1"""

    NAMES = ("user", "item", "time", "label")

    def __len__(self) -> int:
        return len(self.user)

    @classmethod
    def from_columns(
        cls, user: np.ndarray, item: np.ndarray, time: np.ndarray, label: np.ndarray
    ) -> tuple[Interactions, np.ndarray]:
        """Sort columns by (user, time), and rows with equal user and time by a hash of (user, item, time).

        Rows that agree in user, item and time keep the given order; `mmctr.data.prepare` merges such rows before.

        Args:
            user: (n,) rows of the users table.
            item: (n,) rows of the catalog.
            time: (n,) integer times.
            label: (n,) 0 or 1.

        Returns:
            The sorted interactions, and the (n,) int64 positions of the sorted rows in the given columns.
        """
        order = np.lexsort((tie_hashes(user, item, time), time, user))
        columns = (user.astype(np.int32), item.astype(np.int32), time.astype(np.int64), label.astype(np.uint8))
        return cls(*(column[order] for column in columns)), order

    def save(self, folder: Path) -> None:
        """Write one .npy file per column into an existing folder."""
        for name in self.NAMES:
            np.save(folder / f"{name}.npy", getattr(self, name), allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> Interactions:
        """Open the files of `save` as memory-mapped arrays.

        Raises:
            ValueError: a file is damaged, or the files do not fit each other.
        """
        columns = []
        for name, kind in zip(cls.NAMES, (np.int32, np.int32, np.int64, np.uint8), strict=True):
            path = folder / f"{name}.npy"
            try:
                column = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise ValueError(f"{path}: cannot be read ({' '.join(str(error).split())}); {AGAIN}") from None
            if column.dtype != kind or column.ndim != 1 or (columns and len(column) != len(columns[0])):
                raise ValueError(
                    f"{path}: holds {column.dtype} of shape {column.shape}, not a column of the log; {AGAIN}"
                )
            columns.append(column)
        return cls(*columns)

    def user_position(self) -> tuple[np.ndarray, np.ndarray]:
        """Position (0, 1, ...) of every row among the rows of the same user.

        Returns:
            (n,) positions and the (n,) number of rows of the user.
        """
        first = _group_start(self.user[1:] != self.user[:-1])
        _, size = np.unique(self.user, return_counts=True)
        return np.arange(len(self)) - first, np.repeat(size, size)

    def clicked_before(self, user: int, time: int | None = None) -> np.ndarray:
        """The items that a user has clicked, oldest first.

        Args:
            user: row of the users table.
            time: only clicks strictly before this time, in the unit of the log; None: all clicks.

        Returns:
            (h,) catalog rows.
        """
        first, after = np.searchsorted(self.user, [user, user + 1])
        if time is not None:
            after = first + int(np.searchsorted(self.time[first:after], time))
        return np.asarray(self.item[first:after])[np.asarray(self.label[first:after]) == 1]

    def histories(self, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The history of every row: clicks of the same user at a strictly earlier time.

        Args:
            keep: (n,) bool: whether a row may appear in a history.

        Returns:
            `values` (P,) int32 item rows of the clicks where `keep` is True, sorted by (user, time), and `start` (n,)
            and `end` (n,) int64: the history of row i is `values[start[i]:end[i]]`.
        """
        clicked = (self.label == 1) & keep
        before = np.cumsum(clicked) - clicked
        new_user = self.user[1:] != self.user[:-1]
        new_moment = new_user | (self.time[1:] != self.time[:-1])
        start = before[_group_start(new_user)]
        end = before[_group_start(new_moment)]
        return self.item[clicked], start, end


def _group_start(changed: np.ndarray) -> np.ndarray:
    """(n,) index of the first row of the group of each row, from the (n - 1,) marks of rows that begin a new group."""
    index = np.arange(len(changed) + 1)
    begins = np.concatenate([np.ones(min(1, len(index)), bool), changed])
    return np.maximum.accumulate(np.where(begins, index, 0))


@dataclass(frozen=True)
class Impressions:
    """The n rows of one split with the history of every row."""

    user: np.ndarray
    """(n,) user rows"""
    item: np.ndarray
    """(n,) catalog rows of the targets"""
    label: np.ndarray
    """(n,) 0 or 1"""
    source: np.ndarray
    """(n,) rows of the interactions, by which context columns are looked up"""
    history: np.ndarray
    """(P,) catalog rows of positives, shared by all impressions of the split"""
    history_start: np.ndarray
    """(n,) start of the slice of `history` that happened before the impression"""
    history_end: np.ndarray
    """(n,) end of the slice of `history` that happened before the impression"""

    def __len__(self) -> int:
        return len(self.item)

    def take(self, rows: np.ndarray) -> Impressions:
        """The impressions of some rows of the split, with the whole histories of these impressions.

        Args:
            rows: (m,) positions among the n rows.
        """
        names = ("user", "item", "label", "source", "history_start", "history_end")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})
