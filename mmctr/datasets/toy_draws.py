"""Array functions that draw a ToyWorld and write the tables of the world."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def write_parquet(tables: Iterator[pa.Table], path: Path) -> None:
    """Write tables of one schema into a Parquet file, one row group a table."""
    first = next(tables)
    with pq.ParquetWriter(path, first.schema) as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)


def word_at(words: Sequence[str], uniform: float) -> str:
    """The word that a number in [0, 1) selects, each word with the same probability."""
    return words[min(int(uniform * len(words)), len(words) - 1)]


def row_numbers(ids: np.ndarray, base: int) -> np.ndarray:
    """(n,) row numbers from raw ids: integers that count from `base`, or texts that end in `-ROW`."""
    ids = np.asarray(ids)
    if ids.dtype.kind in "iu":
        return ids - base
    return np.array([int(name.rpartition("-")[2]) for name in ids.tolist()], dtype=np.int64)


def count_up(counts: np.ndarray) -> np.ndarray:
    """(sum of counts,) the numbers 0, 1, ..., count - 1 for each count, concatenated."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), without overflow."""
    return np.exp(-np.logaddexp(0.0, -x))
