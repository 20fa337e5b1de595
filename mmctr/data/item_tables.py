"""Further columns of the items from tables of their own: `data.item_tables`.

They are joined in memory after the catalog is opened, so that the prepared dataset stays what it was. Caches of
pictures and tokens are named after what they are made of, and hold for a catalog with more columns as well.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from mmctr.data.arrow import pc
from mmctr.data.catalog import Catalog
from mmctr.data.prepare import Dataset
from mmctr.data.tables import SUFFIXES, as_ids, examples, read_table, rows_of, same_kind
from mmctr.files import replace_file
from mmctr.run_folder import RunFolder


def join_item_tables(dataset: Dataset, paths: list[str]) -> Dataset:
    """The dataset with the columns of Parquet, CSV or JSON lines files added to its items, by `item_id`.

    Items a file lacks have nulls there, rows of unknown items are left out; both are counted in
    `report["item_tables"]["tables"]`, and `["columns"]` names what was added. Raises ValueError naming the file for ids
    that repeat or are of another kind, and for a column that is there already.
    """
    catalog, table = dataset.catalog, dataset.catalog.table
    report: dict[str, Any] = {}
    for name in paths:
        path = Path(name)
        if not path.is_file() or path.suffix not in SUFFIXES:
            raise ValueError(f"data.item_tables: {path}: no such file; give files that end in {', '.join(SUFFIXES)}")
        other = same_kind(read_table(path, ("item_id",)), path, "item_id", catalog.item_ids.type)
        taken = [column for column in other.column_names if column != "item_id" and column in table.column_names]
        if taken:
            raise ValueError(
                f"{path}: the items have a column {taken[0]!r} already, their own or that of an earlier table; "
                f"rename one of them"
            )
        ids = as_ids(other.column("item_id"), "item_id", path)
        if not len(ids):
            raise ValueError(f"{path}: holds no rows")
        counts = pc.value_counts(ids.drop_null())
        if len(counts) < len(ids) - ids.null_count:
            often = counts.field("counts").to_numpy().argmax()
            raise ValueError(
                f"{path}: item id {counts.field('values')[int(often)].as_py()!r} repeats; keep one row an item"
            )
        what = f"{path} and the catalog"
        rows = rows_of(catalog.item_ids, ids, what)
        unknown = ids.filter(pa.array(rows_of(ids, catalog.item_ids, what) < 0))
        index = pa.array(np.where(rows < 0, 0, rows), mask=rows < 0)
        for column in other.column_names:
            if column != "item_id":
                table = table.append_column(column, _without_nan(other.column(column).take(index)))
        report[str(path)] = {
            "rows": len(ids),
            "items without a row": int((rows < 0).sum()),
            "unknown ids": {"count": len(unknown), "examples": examples(unknown)},
        }
    return replace(
        dataset,
        catalog=Catalog(table, catalog.folder, catalog.root),
        report=dataset.report
        | {"item_tables": {"columns": table.column_names[catalog.table.num_columns :], "tables": report}},
    )


def _without_nan(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """NaN is how others write a gap."""
    if not pa.types.is_floating(column.type):
        return column
    return pc.if_else(pc.is_nan(column), None, column)


def described(report: dict[str, Any]) -> list[str]:
    """One line a joined table."""
    return [
        f"{path}: {entry['rows']} rows, {entry['items without a row']} items without one, "
        f"{entry['unknown ids']['count']} of unknown items"
        + (f" ({entry['unknown ids']['examples'][0]!r})" if entry["unknown ids"]["count"] else "")
        for path, entry in report.get("item_tables", {}).get("tables", {}).items()
    ]


def keep_item_tables(joined: Dataset, run_dir: Path) -> None:
    """Write the joined columns into a run folder, or check that those there are the same.

    Raises ValueError when they are others: the run would go on with features that mean something else.
    """
    table = joined.catalog.table.select(["item_id", *joined.report["item_tables"]["columns"]])
    path = RunFolder(run_dir).item_tables
    if not path.is_file():
        replace_file(path, lambda temporary: pyarrow.parquet.write_table(table, temporary))
    elif not read_table(path).equals(table):
        raise ValueError(
            f"{run_dir}: holds a run with other item tables ({path.name} there differs from data.item_tables now); "
            f"choose another run_dir=, or delete the folder"
        )
