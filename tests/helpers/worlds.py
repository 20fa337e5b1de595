"""Small datasets for tests: a folder from plain Python columns, pictures, and a log drawn at random."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from PIL import Image

from mmctr.data.interactions import Interactions

Columns = dict[str, Any]


def write_dataset(
    folder: Path,
    items: Columns | None,
    interactions: Columns | None = None,
    users: Columns | None = None,
    format="parquet",
) -> Path:
    """Write a dataset folder from columns (lists, arrays or pyarrow arrays), None is a gap; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, columns in (("items", items), ("interactions", interactions), ("users", users)):
        if columns is not None:
            write_table(folder / f"{stem}.{format}", columns)
    return folder


def write_table(path: Path, columns: Columns) -> Path:
    """Write one table as its suffix says."""
    table = pa.table(
        {name: values if isinstance(values, pa.Array) else pa.array(values) for name, values in columns.items()}
    )
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
        return path
    with open(path, "w", newline="", encoding="utf-8") as handle:
        if path.suffix == ".csv":
            writer = csv.writer(handle)
            writer.writerow(table.column_names)
            writer.writerows([["" if v is None else v for v in row.values()] for row in table.to_pylist()])
        else:
            handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist())
    return path


def log_columns(rows: list[tuple[Any, Any, Any, Any]]) -> Columns:
    """The columns of interactions from (user, item, time, label) rows."""
    return dict(zip(("user_id", "item_id", "timestamp", "label"), map(list, zip(*rows, strict=True)), strict=True))


def picture(colour: tuple[int, int, int] = (200, 30, 60), size: int = 20, kind: str = "PNG") -> bytes:
    """An encoded picture of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(buffer, kind)
    return buffer.getvalue()


def random_log(num_users=40, num_items=30, num_rows=900, num_times=60, seed=0) -> Interactions:
    """Rows in sorted order; few distinct times, so that many rows of a user tie. The last users have one row each."""
    rng = np.random.default_rng(seed)
    user = np.concatenate([rng.integers(0, num_users - 5, num_rows - 5), np.arange(num_users - 5, num_users)])
    columns = (user, *(rng.integers(0, n, num_rows) for n in (num_items, num_times, 2)))
    return Interactions.from_columns(*columns)[0]


def in_processes(count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What a function returns in each of some processes that run at the same time; an exception is passed on."""
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("fork")) as pool:
        futures = [pool.submit(function, *args) for _ in range(count)]
        return [future.result(timeout=120) for future in futures]


def log_of(rows: list[tuple[int, int, int, int]]) -> Interactions:
    return Interactions.from_columns(*(np.array(column) for column in zip(*rows, strict=True)))[0]


def clicks_before(log: Interactions, i: int, keep: np.ndarray) -> list[int]:
    """By the definition: what the same user clicked strictly earlier, in the order of the log."""
    earlier = [j for j in range(len(log)) if log.user[j] == log.user[i] and log.time[j] < log.time[i]]
    return [int(log.item[j]) for j in earlier if keep[j] and log.label[j] == 1]
