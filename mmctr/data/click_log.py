"""The click log of a dataset: rows are checked, sorted by user and time, and written with the users."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from mmctr.data.arrow import pc
from mmctr.data.dataset_files import SourceTable
from mmctr.data.interactions import Interactions
from mmctr.data.split_checks import log_notes
from mmctr.data.tables import as_ids, examples, one_array, rows_of, same_kind
from mmctr.data.times import read_times


def write_log(source: SourceTable, users_table: SourceTable | None, items: pa.Table, folder: Path) -> dict[str, Any]:
    """Check, sort and write a click log: `interactions/`, `context.parquet` and `users.parquet`.

    Args:
        source: the log as read, with `user_id`, `item_id`, `timestamp`, `label` and further columns.
        users_table: the users; None where the dataset has none.
        items: the items of the catalog, with `item_id`.
        folder: the folder to write into.

    Returns:
        The report of the log: counts of the rows, and of the rejected rows by reason.

    Raises:
        ValueError: a column is malformed, or no row is left; the message names the file, the column and the remedy.
    """
    log, log_path = source.table, source.name
    users = as_ids(log.column("user_id"), "user_id", log_path)
    item_ids = as_ids(log.column("item_id"), "item_id", log_path)
    item = rows_of(item_ids, one_array(items.column("item_id")), f"{log_path} and the items table")
    times = read_times(log.column("timestamp"), log_path)
    time, time_ok = times.values, times.valid
    label, label_ok = _labels(log.column("label"), log_path)

    reasons = {
        "no user_id": ~np.asarray(users.is_valid()),
        "no item_id": ~np.asarray(item_ids.is_valid()),
        "item_id not in the catalog": item < 0,
        "no label": ~label_ok,
        "no timestamp": ~time_ok,
        "negative timestamp": time_ok & (time < 0),
    }
    ok = np.ones(len(log), bool)
    aside: dict[str, Any] = {}
    for reason, bad in reasons.items():
        aside[reason] = {"count": int((ok & bad).sum())}
        if reason == "item_id not in the catalog" and bad.any():
            aside[reason]["examples"] = examples(item_ids.filter(pa.array(bad & ok)))
        ok &= ~bad

    known_users = pc.unique(users.filter(pa.array(ok)))
    known_users = known_users.take(pc.sort_indices(known_users))
    user = rows_of(users, known_users, log_path)
    picked = np.flatnonzero(ok)
    # the same user, item and moment twice: one impression, clicked if either was
    order = picked[np.lexsort((-label[picked].astype(np.int64), item[picked], time[picked], user[picked]))]
    same = np.zeros(len(order), bool)
    if len(order):
        same[1:] = (np.diff(user[order]) == 0) & (np.diff(item[order]) == 0) & (np.diff(time[order]) == 0)
    aside["repeated (same user, item and time)"] = {"count": int(same.sum())}
    rows = np.sort(order[~same])
    if not len(rows):
        raise ValueError(f"{log_path}: no interaction is left of {len(log)}; set aside: {_counts(aside)}")

    interactions, sorting = Interactions.from_columns(user[rows], item[rows], time[rows], label[rows])
    (folder / "interactions").mkdir()
    interactions.save(folder / "interactions")
    extra = log.drop_columns(["user_id", "item_id", "timestamp", "label"]).take(pa.array(rows[sorting]))
    pyarrow.parquet.write_table(extra, folder / "context.parquet")
    known_table, strangers = _known_users(users_table, known_users, source.ids_from_text)
    pyarrow.parquet.write_table(known_table, folder / "users.parquet")
    positives = int(interactions.label.sum())
    notes = list(times.notes)
    if users_table is not None and len(strangers) == len(known_users):
        notes.append(
            f"no user of the log is in {users_table.name}: all columns of users are empty; ids of the log look like "
            f"{known_users[0].as_py()!r}"
        )
    return {
        "rows": len(log),
        "kept": len(interactions),
        "positives": positives,
        "users": len(known_users),
        **({} if users_table is None else {"users without a row in the users table": _counted(strangers)}),
        "time scale": times.scale,
        "items with interactions": len(np.unique(interactions.item)),
        "set aside": aside,
        "notes": notes + log_notes(interactions),
    }


def _counts(aside: dict[str, Any]) -> str:
    return ", ".join(f"{reason}: {entry['count']}" for reason, entry in aside.items() if entry["count"]) or "nothing"


def _counted(ids: pa.Array) -> dict[str, Any]:
    return {"count": len(ids), "examples": examples(ids)}


def _known_users(
    users: SourceTable | None, known_users: pa.Array, log_ids_from_text: bool
) -> tuple[pa.Table, pa.Array]:
    """The columns of the users of the log, and the ids of users that the users table lacks."""
    if users is None:
        return pa.table({"user_id": known_users}), known_users[:0]
    table = same_kind(users.table, users.ids_from_text, "user_id", known_users.type)
    ids = as_ids(table.column("user_id"), "user_id", users.name)
    if pa.types.is_integer(known_users.type) and pa.types.is_string(ids.type) and log_ids_from_text:
        known_users = known_users.cast(pa.string())
    # of a repeated user the first row counts; users that are missing from the table get nulls
    rows = rows_of(known_users, ids, f"{users.name} and the interactions table")
    index = pa.array(np.where(rows < 0, 0, rows), mask=rows < 0)
    columns = {name: table.column(name).take(index) for name in table.column_names if name != "user_id"}
    return pa.table({"user_id": known_users, **columns}), known_users.filter(pa.array(rows < 0))


def _labels(column: pa.ChunkedArray, path: str) -> tuple[np.ndarray, np.ndarray]:
    """(n,) uint8 labels and the (n,) bool mask of rows with a label. Raises ValueError for labels but 0 and 1."""
    try:
        values = column.cast(pa.float64()).to_numpy()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise ValueError(f"{path}: column 'label' has type {column.type}; labels are 0 or 1") from None
    valid = np.isfinite(values)
    wrong = valid & (values != 0) & (values != 1)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(
            f"{path}: column 'label' holds {values[row]:g} (row {row}; {int(wrong.sum())} such rows); labels are "
            f"0 or 1: make them so first, for example label = rating >= 4"
        )
    return np.where(valid, values, 0).astype(np.uint8), valid
