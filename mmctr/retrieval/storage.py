"""The folder of an ItemIndex: `index.faiss`, which any FAISS can read, `items.parquet`, `rows.npz` and `index.json`."""
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false
# the type stubs of FAISS describe the C++ layer, not the Python layer

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet

from mmctr.data.embedding_identity import EmbeddingIdentity
from mmctr.data.embeddings import EmbeddingTable, identity_of
from mmctr.data.npz import read_npz
from mmctr.data.plain_tables import plain_table
from mmctr.data.tables import as_ids, one_array, read_table, rows_of
from mmctr.files import replace_folder
from mmctr.manifests import read_manifest, require_replaceable, require_types, write_manifest

logger = logging.getLogger(__name__)

FORMAT = 2
FILES = ("index.faiss", "items.parquet", "rows.npz")
"""files of an index folder, described by the manifest `index.json`"""
AGAIN = "run `mmctr index` again"


def is_index(folder: Path) -> bool:
    """Whether a folder holds an index."""
    return (folder / "index.json").is_file()


def save(folder: Path, index: Any, items: pa.Table, rows: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
    """Write an index folder, completely or not at all.

    Args:
        folder: the index folder, which may hold an older index.
        index: a FAISS index of n vectors.
        items: n rows of items.
        rows: arrays of length n by name.
        facts: further entries of `index.json`.

    Raises:
        ValueError: the folder holds other files.
    """
    arrays: dict[str, Any] = dict(rows)

    def write(temporary: Path) -> None:
        faiss.write_index(index, str(temporary / "index.faiss"))
        pyarrow.parquet.write_table(items, temporary / "items.parquet")
        np.savez(temporary / "rows.npz", **arrays)
        embeddings = dict(facts["embeddings"])
        if "identity" in embeddings:
            embeddings["identity"] = identity_of(embeddings).to_json(folder)
        write_manifest(temporary / "index.json", {"format": FORMAT, **facts, "embeddings": embeddings}, FILES)

    require_replaceable(folder, "index.json", FILES, "index")
    replace_folder(folder, write)


def load(folder: Path, mmap: bool) -> tuple[Any, pa.Table, dict[str, np.ndarray], dict[str, Any]]:
    """Read an index folder.

    Args:
        folder: the index folder.
        mmap: whether to leave the vectors on disk.

    Returns:
        The FAISS index, the table of items, the arrays by name, and the entries of `index.json`.

    Raises:
        ValueError: a file is missing, damaged or of another version; the message names the file.
    """
    manifest = read_manifest(folder / "index.json", AGAIN)
    facts = manifest.values
    if facts.get("format") != FORMAT:
        raise ValueError(f"{manifest.path}: not an index of this version; {AGAIN}")
    require_types(facts, manifest.path, factory=str, dim=int, count=int, removed=int, embeddings=dict)
    if "identity" in facts["embeddings"]:
        identity = EmbeddingIdentity.from_json(facts["embeddings"]["identity"], str(manifest.path), folder)
        facts["embeddings"]["identity"] = identity.to_json()
    # a memory-mapped index is left on disk: reading all of it for the digest would be what mapping avoids
    manifest.check(*(name for name in FILES if not (mmap and name == "index.faiss")))
    index = _read(folder / "index.faiss", facts, mmap)
    items = read_table(folder / "items.parquet", ("item_id",))
    position = items.column_names.index("item_id")
    items = items.set_column(position, "item_id", as_ids(items.column("item_id"), "item_id", folder))
    try:
        rows = read_npz(folder / "rows.npz")
    except ValueError as error:
        raise ValueError(f"{error}; {AGAIN}") from None
    if "removed" not in rows or any(len(values) != len(items) for values in rows.values()):
        raise ValueError(f"{folder / 'rows.npz'}: not of these {len(items)} items; {AGAIN}")
    return index, items, rows, facts


def _read(file: Path, facts: dict[str, Any], mmap: bool) -> Any:
    # FAISS maps inverted lists by one flag and whatever lies in one block by another
    flag = faiss.IO_FLAG_MMAP if facts["factory"].startswith("IVF") else faiss.IO_FLAG_MMAP_IFC
    try:
        index = faiss.read_index(str(file), flag if mmap else 0)
    except (RuntimeError, MemoryError) as error:
        raise ValueError(f"{file}: not a readable FAISS index ({error}); {AGAIN}") from None
    if index.ntotal != facts["count"]:
        raise ValueError(f"{file}: holds {index.ntotal} vectors where {facts['count']} were written; {AGAIN}")
    if index.metric_type != faiss.METRIC_INNER_PRODUCT or index.d != facts["dim"]:
        raise ValueError(
            f"{file}: an index of {index.d} dimensions and metric {index.metric_type}; {facts['dim']} dimensions by "
            f"inner product are expected; {AGAIN}"
        )
    return index


def items_of(table: EmbeddingTable, columns: pa.Table | None) -> pa.Table:
    """The table of items of an index: `item_id`, `title` where the embeddings have titles, and further columns.

    Args:
        table: n item vectors.
        columns: n rows of catalog columns in the order of the table; None: no further columns.
    """
    items = {"item_id": table.ids}
    if table.titles is not None:
        items["title"] = pa.array(table.titles, type=pa.string())
    if columns is not None:
        items |= {name: one_array(columns.column(name)) for name in columns.column_names}
    return pa.table(items)


def columns_of(catalog: pa.Table, catalog_ids: pa.Array, ids: pa.Array, names: Sequence[str] | None) -> pa.Table:
    """Catalog columns in the order of some ids, null for an item that is missing from the catalog.

    Args:
        catalog: the items table.
        catalog_ids: (N,) raw ids of the catalog.
        ids: (n,) raw ids that give the order of the rows.
        names: names of the columns; None: every column of numbers, booleans or texts, or lists of numbers, booleans or
            texts, except for ids, titles, descriptions and pictures. Columns of other types are left out with a
            warning.

    Raises:
        ValueError: the catalog lacks a column, or the values of a column are structures.
    """
    catalog = plain_table(catalog)
    if names is None:
        fields = [field for field in catalog.schema if field.name not in _NO_CONDITIONS]
        taken = [field.name for field in fields if _can_filter(field.type)]
        others = [f"{field.name!r} ({field.type})" for field in fields if field.name not in taken]
        if others:
            logger.warning(
                "columns of other types are left out of the index: %s; name those you need", ", ".join(others)
            )
    else:
        taken = list(names)
        for name in taken:
            if name not in catalog.column_names:
                raise ValueError(f"items table: no column {name!r}; there are {', '.join(catalog.column_names)}")
            kind = catalog.schema.field(name).type
            if pa.types.is_nested(_inner(kind)) or pa.types.is_large_binary(_inner(kind)):
                raise ValueError(
                    f"items table: no condition can be written on column {name!r} of type {kind}; store numbers, "
                    f"booleans, texts or lists of these"
                )
    rows = rows_of(ids, catalog_ids, "the embeddings and the catalog")
    positions = pa.array(rows, mask=rows < 0)
    return pa.table({name: one_array(catalog.column(name)).take(positions) for name in taken if name != "title"})


_NO_CONDITIONS = ("item_id", "title", "description", "image")


def _can_filter(kind: pa.DataType) -> bool:
    """Whether a column of this plain type is taken where no columns are named."""
    inner = _inner(kind)
    is_number = pa.types.is_integer(inner) or pa.types.is_floating(inner)
    return is_number or pa.types.is_boolean(inner) or pa.types.is_string(inner)


def _inner(kind: pa.DataType) -> pa.DataType:
    """The type of the values of a list type; another type itself."""
    return kind.value_type if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) else kind
