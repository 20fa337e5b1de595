"""Times of a click log: one unit for the log and for requests about it, and notes on times that look wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

FRACTIONS = 1_000_000
"""factor by which times with fractions are multiplied, so that millionths of the unit order rows"""
_EPOCHS = {
    "seconds": (1e8, 1e11),
    "milliseconds": (1e11, 1e14),
    "microseconds": (1e14, 1e17),
    "nanoseconds": (1e17, 1e20),
}
"""range of the times since 1970 in each unit, of the years 1973 to 5138"""


@dataclass(frozen=True)
class Times:
    """The times of n rows."""

    values: np.ndarray
    """(n,) int64, 0 where missing"""
    valid: np.ndarray
    """(n,) bool, the rows with a time"""
    scale: int
    """number by which the times of the column were multiplied: 1, or `FRACTIONS` for times with fractions"""
    notes: list[str]
    """one line for each peculiarity that a reader of the report should know"""


def read_times(column: pa.ChunkedArray, path: Path) -> Times:
    """The times of a log as integers.

    Integers and timestamps keep the unit of the column; dates become milliseconds. Floats with fractions become
    millionths, so that the order of the rows is preserved.

    Args:
        column: the column `timestamp`.
        path: the file, for error messages.

    Raises:
        ValueError: the column holds text, or values that are not times.
    """
    kind = column.type
    if pa.types.is_string(kind):
        raise ValueError(f"{path}: column 'timestamp' holds text; store seconds as integers, or a timestamp type")
    valid = np.asarray(column.is_valid())
    try:
        if not pa.types.is_floating(kind):
            if pa.types.is_date(kind):
                column = column.cast(pa.timestamp("ms"))
            # gaps are filled first: NumPy would turn integers with gaps into floats, inexact beyond 2^53
            values = column.cast(pa.int64()).fill_null(0).to_numpy()
            return Times(values, valid, 1, _notes(values[valid], kind))
        values = column.cast(pa.float64()).to_numpy()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise ValueError(
            f"{path}: column 'timestamp' has type {kind}; store seconds as integers, or a timestamp type"
        ) from None
    valid = valid & (np.abs(values) < 2.0**62)
    values = np.where(valid, values, 0.0)
    notes = _notes(values[valid], kind)
    has_fractions = bool((values != np.floor(values)).any()) and np.abs(values).max() < 2.0**42
    scale = FRACTIONS if has_fractions else 1
    return Times(np.floor(values * scale).astype(np.int64), valid, scale, notes)


def _notes(values: np.ndarray, kind: pa.DataType) -> list[str]:
    """Notes on the times (n,) of a column: constant, too coarse for the type, or in several units."""
    if len(values) < 2:
        return []
    notes = []
    low, high = values.min(), values.max()
    if low == high:
        notes.append(
            f"all {len(values)} times are {low}: nothing happened before anything else, so that no row has a history"
        )
    if pa.types.is_float32(kind) or pa.types.is_float16(kind):
        step = float(np.spacing(np.float32(high) if pa.types.is_float32(kind) else np.float16(high)))
        if step > 1:
            notes.append(
                f"times are stored as {kind}, which rounds them to multiples of {step:g}; store integers or float64"
            )
    counts = {
        unit: number
        for unit, (begin, end) in _EPOCHS.items()
        if (number := int(np.count_nonzero((values >= begin) & (values < end))))
    }
    if len(counts) > 1:
        parts = ", ".join(f"{number} like {unit}" for unit, number in counts.items())
        notes.append(f"times look like several units since 1970: {parts}; write all times in one unit")
    return notes


def scaled_time(at: float, scale: int) -> int:
    """A time in the unit of the column `timestamp` as an integer of the prepared log.

    Args:
        at: the time, as in the column.
        scale: `Times.scale` of the log.

    Raises:
        ValueError: the time is not finite or too large.
    """
    if not math.isfinite(at) or abs(at) * scale >= 2**63:
        raise ValueError(f"at: {at!r} is no time; write it in the unit of the column timestamp of the log")
    return int(at) * scale if isinstance(at, int) else math.floor(at * scale)
