"""Further columns of the items from separate files: the config key `data.item_tables`.

The columns are joined in memory after the catalog is opened, so that the prepared dataset is unchanged. The names of
the caches of pictures and tokens depend on the cells from which a cache is computed, so the caches remain valid for a
catalog with more columns.
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
from mmctr.data.tables import SUFFIXES, as_ids, examples, read_table, rows_of, same_kind, table_format
from mmctr.files import replace_file
from mmctr.run_folder import RunFolder


def join_item_tables(dataset: Dataset, paths: list[str]) -> Dataset:
    """Join the columns of files to the items of a dataset, by `item_id`.

    Items without a row in a file get nulls, and rows of unknown items are left out; both are counted in
    `report["item_tables"]["tables"]` of the result, and `report["item_tables"]["columns"]` names the joined columns.

    Args:
        dataset: a prepared dataset.
        paths: Parquet, CSV or JSON lines files with a column `item_id`.

    Raises:
        ValueError: a file is missing or empty, ids repeat or have another type than the ids of the catalog, or the
            items already have a column of that name; the message names the file.
    """
    catalog, table = dataset.catalog, dataset.catalog.table
    report: dict[str, Any] = {}
    for name in paths:
        path = Path(name)
        if not path.exists() or table_format(path) is None:
            raise ValueError(f"data.item_tables: {path}: no such file; give files that end in {', '.join(SUFFIXES)}")
        other = read_table(path, ("item_id",))
        other = same_kind(other, table_format(path) == "csv", "item_id", catalog.item_ids.type)
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
    """The column with nulls for NaN, which some programs write for a missing value."""
    if not pa.types.is_floating(column.type):
        return column
    return pc.if_else(pc.is_nan(column), None, column)


def described(report: dict[str, Any]) -> list[str]:
    """One line of text for every joined table.

    Args:
        report: report of a dataset from `join_item_tables`.
    """
    return [
        f"{path}: {entry['rows']} rows, {entry['items without a row']} items without one, "
        f"{entry['unknown ids']['count']} of unknown items"
        + (f" ({entry['unknown ids']['examples'][0]!r})" if entry["unknown ids"]["count"] else "")
        for path, entry in report.get("item_tables", {}).get("tables", {}).items()
    ]


def keep_item_tables(joined: Dataset, run_dir: Path) -> None:
    """Write the joined columns into a run folder, or check that the run folder holds equal columns.

    Args:
        joined: a dataset from `join_item_tables`.
        run_dir: folder of the run.

    Raises:
        ValueError: the run folder holds other columns: the run would continue with features of another meaning.
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
