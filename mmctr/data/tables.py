"""Reading the tables of a dataset folder: Parquet, CSV or JSON lines, with ids kept as given."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

ID_COLUMNS = ("item_id", "user_id")
SUFFIXES = (".parquet", ".csv", ".jsonl")


def find_table(folder: Path, stem: str) -> Path | None:
    """The file `stem.parquet`, `stem.csv` or `stem.jsonl` of a folder; ValueError when there are several."""
    found = [folder / (stem + suffix) for suffix in SUFFIXES if (folder / (stem + suffix)).is_file()]
    if len(found) > 1:
        raise ValueError(f"{folder}: both {found[0].name} and {found[1].name} are there; keep one")
    return found[0] if found else None


def read_table(path: Path, required: tuple[str, ...] = ()) -> pa.Table:
    """Read one table. Raises ValueError naming the file and, for a missing column, the nearest one there is."""
    try:
        if path.suffix == ".parquet":
            table = pa.parquet.read_table(path)
        elif path.suffix == ".csv":
            # ids are read as text first: type inference would turn "007" into 7
            options = pa.csv.ConvertOptions(
                column_types=dict.fromkeys(ID_COLUMNS, pa.string()),
                strings_can_be_null=True,
                null_values=["", "null", "NaN", "nan"],
            )
            table = pa.csv.read_csv(
                path, convert_options=options, parse_options=pa.csv.ParseOptions(newlines_in_values=True)
            )
            for name in ID_COLUMNS:
                if name in table.column_names:
                    index = table.column_names.index(name)
                    table = table.set_column(index, name, _integers_if_exact(table.column(name)))
        else:
            table = pa.json.read_json(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as {path.suffix[1:]}: {error}") from None
    require_columns(table, required, path)
    return table


def require_columns(table: pa.Table, required: tuple[str, ...] | list[str], path: Path | str) -> None:
    for name in required:
        if name not in table.column_names:
            near = difflib.get_close_matches(name, table.column_names, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"columns there: {', '.join(table.column_names)}"
            raise ValueError(f"{path}: column {name!r} is missing; {hint}")


def _integers_if_exact(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text ids as int64 when every one is written just as the integer would be, else unchanged."""
    try:
        numbers = column.cast(pa.int64())
    except pa.ArrowInvalid:
        return column
    same = pc.all(pc.equal(numbers.cast(pa.string()), column)).as_py()  # type: ignore[attr-defined]
    return numbers if same in (True, None) else column


def as_ids(column: pa.ChunkedArray | pa.Array, name: str, path: Path | str) -> pa.Array:
    """Ids as one int64 or string array, nulls kept. Raises ValueError for other types and inexact floats."""
    array = pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) and column.num_chunks else column
    if isinstance(array, pa.ChunkedArray):
        array = pa.array([], type=array.type)
    kind = array.type
    if pa.types.is_dictionary(kind):
        array = array.dictionary_decode()
        kind = array.type
    if pa.types.is_integer(kind):
        try:
            return array.cast(pa.int64())
        except pa.ArrowInvalid:
            raise ValueError(f"{path}: column {name!r} holds integers above 2^63; store these ids as strings") from None
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return array.cast(pa.string())
    if pa.types.is_floating(kind):
        # pandas turns integer ids with a gap into floats: NaN is the gap
        values = array.to_numpy(zero_copy_only=False)
        missing = np.isnan(values)
        whole = values[~missing]
        if len(whole) and (np.abs(whole).max() > 2**53 or (whole != np.round(whole)).any()):
            raise ValueError(
                f"{path}: column {name!r} holds floats that are not exact ids; store them as integers or strings"
            )
        return pa.array(np.where(missing, 0, values).astype(np.int64), mask=missing)
    if pa.types.is_null(kind):
        return array.cast(pa.int64())
    raise ValueError(f"{path}: column {name!r} has type {kind}; ids are integers or strings")


def as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Any column as strings: numbers are written out, lists joined by spaces, blank text becomes null."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = pa.chunked_array([chunk.dictionary_decode() for chunk in column.chunks], type=kind.value_type)
        kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        column = pc.binary_join(column.cast(pa.list_(pa.string())), " ")  # type: ignore[attr-defined]
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        texts = [None if value is None else value.decode("utf-8", errors="replace") for value in column.to_pylist()]
        column = pa.chunked_array([pa.array(texts, type=pa.string())])
    elif pa.types.is_nested(kind):
        texts = [None if value is None else str(value) for value in column.to_pylist()]
        column = pa.chunked_array([pa.array(texts, type=pa.string())])
    column = column.cast(pa.string())
    trimmed = pc.utf8_trim_whitespace(column)  # type: ignore[attr-defined]
    return pc.if_else(pc.equal(pc.utf8_length(trimmed), 0), None, trimmed)  # type: ignore[attr-defined]


def rows_of(wanted: pa.Array, known: pa.Array, what: str) -> np.ndarray:
    """Position of each wanted id in `known`, -1 for unknown or null: (n,) int64.

    Raises ValueError when one side holds integers and the other strings: "1" and 1 are different ids.
    """
    if len(wanted) and len(known) and wanted.type != known.type:
        raise ValueError(
            f"{what}: ids are {wanted.type} on one side and {known.type} on the other "
            f"({wanted[0].as_py()!r} and {known[0].as_py()!r}); store both as integers or both as strings"
        )
    if not len(wanted) or not len(known):
        return np.full(len(wanted), -1, dtype=np.int64)
    index = pc.index_in(wanted, value_set=known, skip_nulls=True)  # type: ignore[attr-defined]
    return index.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)


def examples(values: pa.Array | np.ndarray | list[Any], count: int = 3) -> list[Any]:
    """A few values to show in a report."""
    head = values[:count]
    return head.to_pylist() if isinstance(head, pa.Array) else [v.item() if hasattr(v, "item") else v for v in head]
