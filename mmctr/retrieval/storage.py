"""The folder of an ItemIndex: `index.faiss`, which any FAISS can read, `items.parquet`, `rows.npz` and `index.json`."""
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false
# FAISS's stubs know nothing of its Python layer.

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet

from mmctr.data.embeddings import EmbeddingTable
from mmctr.data.tables import as_ids, one_array, read_table, rows_of
from mmctr.files import read_json, replace_folder, write_json

FORMAT = 2
AGAIN = "run `mmctr index` again"


def is_index(folder: Path) -> bool:
    return (folder / "index.json").is_file()


def save(folder: Path, index: Any, items: pa.Table, rows: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
    """Write all of it or nothing. Raises ValueError for a folder that holds something else."""

    def write(temporary: Path) -> None:
        faiss.write_index(index, str(temporary / "index.faiss"))
        pyarrow.parquet.write_table(items, temporary / "items.parquet")
        np.savez(temporary / "rows.npz", **rows)  # type: ignore[arg-type]
        size = (temporary / "index.faiss").stat().st_size
        write_json(temporary / "index.json", {"format": FORMAT, "bytes": size, **facts})

    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not is_index(folder))):
        raise ValueError(f"{folder}: the folder is not empty and holds no index; choose another --out")
    replace_folder(folder, write)


def load(folder: Path, mmap: bool) -> tuple[Any, pa.Table, dict[str, np.ndarray], dict[str, Any]]:
    """The FAISS index, items, arrays by row, and facts. Raises ValueError naming the file that is not as written."""
    facts = read_json(folder / "index.json")
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise ValueError(f"{folder / 'index.json'}: not an index of this version; {AGAIN}")
    index = _read(folder / "index.faiss", facts, mmap)
    items = read_table(folder / "items.parquet", ("item_id",))
    place = items.column_names.index("item_id")
    items = items.set_column(place, "item_id", as_ids(items.column("item_id"), "item_id", folder))
    try:
        with np.load(folder / "rows.npz", allow_pickle=False) as arrays:
            rows = {name: arrays[name] for name in arrays.files}
    except Exception as error:
        raise ValueError(f"{folder / 'rows.npz'}: cannot be read ({error}); {AGAIN}") from None
    if "removed" not in rows or any(len(values) != len(items) for values in rows.values()):
        raise ValueError(f"{folder / 'rows.npz'}: not of these {len(items)} items; {AGAIN}")
    return index, items, rows, facts


def _read(file: Path, facts: dict[str, Any], mmap: bool) -> Any:
    size = file.stat().st_size if file.is_file() else -1
    if size != facts["bytes"]:
        what = "missing" if size < 0 else f"of {size} bytes where {facts['bytes']} were written"
        raise ValueError(f"{file}: not a readable FAISS index ({what}); {AGAIN}")
    # FAISS maps inverted lists by one flag and whatever lies in one block by another
    flag = faiss.IO_FLAG_MMAP if facts["factory"].startswith("IVF") else faiss.IO_FLAG_MMAP_IFC
    try:
        index = faiss.read_index(str(file), flag if mmap else 0)
    except (RuntimeError, MemoryError) as error:
        raise ValueError(f"{file}: not a readable FAISS index ({error}); {AGAIN}") from None
    if index.metric_type != faiss.METRIC_INNER_PRODUCT or index.d != facts["dim"]:
        raise ValueError(
            f"{file}: an index of {index.d} dimensions and metric {index.metric_type}; {facts['dim']} dimensions by "
            f"inner product are expected; {AGAIN}"
        )
    return index


def items_of(table: EmbeddingTable, columns: pa.Table | None) -> pa.Table:
    """What an index says of the items of a table: `item_id`, titles, and columns in its order."""
    items = {"item_id": table.ids}
    if table.titles is not None:
        items["title"] = pa.array(table.titles, type=pa.string())
    for name in () if columns is None else columns.column_names:
        items[name] = one_array(columns.column(name))  # type: ignore[union-attr]
    return pa.table(items)


def columns_of(catalog: pa.Table, catalog_ids: pa.Array, ids: pa.Array, names: Sequence[str] | None) -> pa.Table:
    """Catalog columns in the order of `ids`, null for items the catalog lacks.

    Args:
        names: None takes every column of numbers, truth values or texts, or lists of them, but ids, titles, pictures.
    """
    if names is None:
        taken = [field.name for field in catalog.schema if _can_filter(field)]
    else:
        taken = list(names)
        for name in taken:
            if name not in catalog.column_names:
                raise ValueError(f"items table: no column {name!r}; there are {', '.join(catalog.column_names)}")
    rows = rows_of(ids, catalog_ids, "the embeddings and the catalog")
    positions = pa.array(rows, mask=rows < 0)
    return pa.table({name: one_array(catalog.column(name)).take(positions) for name in taken if name != "title"})


def _can_filter(field: pa.Field) -> bool:
    kind = field.type.value_type if pa.types.is_list(field.type) else field.type
    plain = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    return (plain or pa.types.is_string(kind) or pa.types.is_large_string(kind)) and field.name not in (
        "item_id",
        "title",
        "description",
        "image",
    )
