"""Checks of a click log and of a split: both labels, even shares of positives, times that tell an order."""

from __future__ import annotations

import logging

import numpy as np

from mmctr.data.interactions import Interactions
from mmctr.data.splits import Splits

logger = logging.getLogger(__name__)

MIN_LOG_ODDS = 0.5
"""difference of the log odds of a positive label above which shares of positives are called different"""
MIN_Z = 5.0
"""difference of shares of positives in standard errors above which the difference is no chance"""
LATEST = 0.2
"""fraction of the rows of each user that `log_notes` compares with the earlier rows"""


def check_labels(splits: Splits, source: str) -> None:
    """Check the labels of a split before training, and log a warning where the share of positives differs.

    Args:
        splits: the split of a log.
        source: name of the dataset, for the messages.

    Raises:
        ValueError: all training labels are equal, so that nothing can be learned.
    """
    if len(np.unique(splits.train.label)) < 2:
        raise ValueError(
            f"{source}: all training labels are {splits.train.label[0]}; a ranker needs clicks and impressions without "
            f"a click"
        )
    parts = {name: splits.report[name] for name in ("train", "validation", "test")}
    note = share_note({f"{name} rows": (part["rows"], part["positives"]) for name, part in parts.items()})
    if note:
        logger.warning(f"{source}: {note}")


def log_notes(log: Interactions) -> list[str]:
    """What makes a log doubtful for training and evaluation: sentences for the report of `mmctr prepare`.

    Args:
        log: a click log of at least one row.

    Returns:
        One sentence each for equal labels, for users whose rows have equal times, and for a share of positives that
        differs between the latest rows of the users and the rows before; empty for a sound log.
    """
    positives = int(log.label.sum())
    if positives in (0, len(log)):
        return [f"all labels are {int(positives > 0)}: a ranker needs both clicks and impressions without a click"]
    notes = []
    position, size = log.user_position()
    first = np.flatnonzero(position == 0)
    several = size[first] > 1
    one_moment = several & (log.time[first] == log.time[first + size[first] - 1])
    all_equal = log.time.min() == log.time.max()  # then the notes on the times say so
    if several.any() and not all_equal and one_moment.sum() * 10 >= several.sum():
        notes.append(
            f"all rows of a user have one time for {int(one_moment.sum())} of the {int(several.sum())} users with "
            f"several rows: these users have no history, and splits cut their rows at random; give exact times "
            f"where they are known"
        )
    late = position >= np.ceil(size * (1 - LATEST) - 1e-9)
    counts = {
        name: (int(rows.sum()), int(log.label[rows].sum()))
        for name, rows in (
            ("the earlier rows of the users", ~late),
            (f"the latest {LATEST:.0%} of the rows of each user", late),
        )
    }
    note = share_note(counts)
    return [*notes, note] if note else notes


def share_note(counts: dict[str, tuple[int, int]]) -> str | None:
    """A sentence about parts of a log whose shares of positives differ clearly.

    A difference is clear when it is at least `MIN_LOG_ODDS` in log odds and more than `MIN_Z` standard errors of
    independent rows.

    Args:
        counts: (number of rows, number of positives) by the name of the part; the first part is compared with the
            others.

    Returns:
        None where no part differs clearly from the first.
    """
    given = {name: count for name, count in counts.items() if count[0]}
    first, *others = given.values() or [(0, 0)]
    if not any(_differ(first, other) for other in others):
        return None
    shares = ", ".join(f"{positives / rows:.1%} of {name}" for name, (rows, positives) in given.items())
    return (
        f"the share of positives differs: {shares}; metrics then measure another task than training. Look for times "
        f"that depend on the label, or rows that were sampled differently over time"
    )


def _differ(first: tuple[int, int], second: tuple[int, int]) -> bool:
    """Whether two shares of positives, given as (rows, positives), differ clearly."""
    (rows, positives), (other_rows, other_positives) = first, second
    share = (positives + other_positives) / (rows + other_rows)
    error = (share * (1 - share) * (1 / rows + 1 / other_rows)) ** 0.5
    # half a row of either label is added: a part without positives has finite log odds
    odds, other_odds = (np.log((p + 0.5) / (n - p + 0.5)) for n, p in (first, second))
    return (
        abs(odds - other_odds) >= MIN_LOG_ODDS and abs(positives / rows - other_positives / other_rows) > MIN_Z * error
    )
