"""Times of a click log: one unit for the log and for requests about it, and notes on times that look wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from mmctr.data.arrow import pc
from mmctr.data.description import TimeSource

FRACTIONS = 1_000_000
"""factor by which times with fractions are multiplied, so that millionths of the unit order rows"""
_ISO = r"^\d{4}-\d\d-\d\d([ T]\d\d:\d\d(:\d\d(\.\d{1,9})?)?)?(Z|[+-]\d\d(:?\d\d)?)?$"
EPOCHS = {
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


def read_times(column: pa.ChunkedArray, path: Path | str) -> Times:
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
    counts = unit_counts(values)
    if len(counts) > 1:
        parts = ", ".join(f"{number} like {unit}" for unit, number in counts.items())
        notes.append(f"times look like several units since 1970: {parts}; write all times in one unit")
    return notes


def unit_counts(values: np.ndarray) -> dict[str, int]:
    """The number of times that look like each unit since 1970; units without a time are left out.

    Args:
        values: (n,) numbers.
    """
    return {
        unit: number
        for unit, (begin, end) in EPOCHS.items()
        if (number := int(np.count_nonzero((values >= begin) & (values < end))))
    }


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


def described_times(column: pa.ChunkedArray, time: TimeSource, what: str) -> pa.ChunkedArray:
    """A column of times as numbers or timestamps.

    Args:
        column: numbers, timestamps, dates or text.
        time: how the times are written.
        what: name of the column, for error messages.

    Returns:
        Text, dates and timestamps as timestamps in microseconds, UTC; numbers with a unit as timestamps of the unit;
        other numbers as they are. Text that does not fit the format is null, and so is set aside and counted.

    Raises:
        ValueError: no text fits the format, or numbers are of several units.
    """
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):  # pyarrow finds such text in CSV files
        zone = column.type.tz if pa.types.is_timestamp(column.type) else None
        return _in_utc(column.cast(pa.timestamp("us", zone), safe=False), time.time_zone, what)
    if pa.types.is_string(column.type):
        return _times_of_text(column, time, what)
    if time.format:
        column = column.cast(pa.string())  # such as 20191112 for %Y%m%d
        return _times_of_text(column, time, what)
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        counts = unit_counts(column.drop_null().to_numpy())
        if len(counts) > 1:
            parts = ", ".join(f"{number} like {unit}" for unit, number in counts.items())
            raise ValueError(f"{what}: times of several units since 1970: {parts}; write all times in one unit")
        if time.unit:
            wanted = dict(zip(("s", "ms", "us", "ns"), EPOCHS, strict=True))[time.unit]
            if counts and wanted not in counts:
                raise ValueError(
                    f"{what}: the unit is said to be {time.unit}, but times look like {next(iter(counts))}"
                )
            whole = pc.floor(column) if pa.types.is_floating(column.type) else column
            return whole.cast(pa.int64()).cast(pa.timestamp(time.unit, "UTC"))
    return column


def _times_of_text(column: pa.ChunkedArray, time: TimeSource, what: str) -> pa.ChunkedArray:
    text = pc.utf8_trim_whitespace(column)
    if time.format:
        times = pc.strptime(text, format=time.format, unit="us", error_is_null=True)
        wanted = f"the format {time.format!r}"
    else:
        wanted = "ISO 8601, such as 2020-09-16T12:30:00"
        text = pc.if_else(pc.match_substring_regex(text, _ISO), text, None)
        zoned = pc.match_substring_regex(text, r"(Z|:\d\d[+-]\d\d(:?\d\d)?)$")
        if pc.any(zoned).as_py():
            plain = pc.if_else(zoned, None, text)
            return pc.coalesce(
                _cast(pc.if_else(zoned, text, None), pa.timestamp("us", "UTC"), what),
                _in_utc(_cast(plain, pa.timestamp("us"), what), time.time_zone, what),
            )
        times = _cast(text, pa.timestamp("us"), what)
    if times.null_count == len(times) > column.null_count:
        example = column.drop_null()[0].as_py()
        raise ValueError(f"{what}: no text is written in {wanted}; the first one is {example!r}; say `format` and such")
    return _in_utc(times, time.time_zone, what)


def _cast(text: pa.ChunkedArray, kind: pa.DataType, what: str) -> pa.ChunkedArray:
    try:
        return text.cast(kind)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{what}: {error}") from None


def _in_utc(times: pa.ChunkedArray, time_zone: str, what: str) -> pa.ChunkedArray:
    """Local times as times in UTC; the hour that a clock shows twice is the first, one that is skipped the later."""
    if isinstance(times.type, pa.TimestampType) and times.type.tz is not None:
        return times.cast(pa.timestamp("us", "UTC"))
    try:
        local = pc.assume_timezone(times, time_zone, ambiguous="earliest", nonexistent="latest")
    except (pa.ArrowException, KeyError) as error:
        raise ValueError(f"{what}: time zone {time_zone!r}: {error}") from None
    return local.cast(pa.timestamp("us", "UTC"))
