"""Reading of the tables of a dataset folder: Parquet, CSV, TSV or JSON lines, in one file or in parts, with ids as they
are written."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from mmctr.data.arrow import pc
from mmctr.data.plain_tables import plain_table
from mmctr.data.text_tables import COMPRESSIONS, ID_COLUMNS, TO_UTF8, read_text_table, require_distinct_columns
from mmctr.errors import UnknownId

SUFFIXES = (".parquet", *(f".{form}{end}" for form in ("csv", "tsv", "jsonl") for end in ("", *COMPRESSIONS)))
"""endings of the files that are read as tables, in lower or upper case"""
_OTHERS = re.compile(
    r"\.(txt|json|ndjson|xlsx?|ods|feather|arrow|ipc|orc|avro|pq|pkl|pickle|npz|h5|db|sqlite|sql"
    r"|zip|tar|gz|tgz|bz2|xz|zst|7z)$"
)
"""endings of tables in formats that are not read"""


def find_table(folder: Path, stem: str) -> Path | None:
    """The file of one table of a dataset folder: `stem` with an ending of `SUFFIXES`, or a folder of that name with the
    parts of the table, as Spark writes it.

    Args:
        folder: the dataset folder.
        stem: name of the table, such as "items".

    Returns:
        None when there is no such folder, or the folder has none of these files.

    Raises:
        ValueError: the folder has several of these files, or only a file of that name in another format: a table that
            is there must not be taken for absent.
    """
    if not folder.is_dir():
        return None
    names = [folder / name for name in sorted(os.listdir(folder)) if name.lower().startswith(stem)]
    found = [path for path in names if path.name.lower() in [stem + suffix for suffix in SUFFIXES] and path.exists()]
    if len(found) > 1:
        raise ValueError(f"{folder}: both {found[0].name} and {found[1].name} are there; keep one")
    if found:
        return found[0]
    other = [path for path in names if _is_other_table(path, stem)]
    if other:
        raise ValueError(
            f"{other[0]}: a table in a form that is not read; write it as {stem}.parquet, {stem}.csv, {stem}.tsv or "
            f"{stem}.jsonl (a file, or a folder of that name with files of that form; all but Parquet plain, as .gz or "
            f"as .zst), or rename it"
        )
    return None


def _is_other_table(path: Path, stem: str) -> bool:
    """Whether a file is a table of another format: `interactions.xlsx`, or a folder `interactions` of table files."""
    name = path.name.lower()
    if path.is_dir():
        return name == stem and any(table_format(part) is not None for part in path.iterdir())
    return name.startswith(f"{stem}.") and _OTHERS.search(name) is not None


def table_format(path: Path) -> Literal["parquet", "csv", "jsonl"] | None:
    """The format of a table by the ending of the name: "csv" for TSV as well; None for a name with another ending."""
    name = path.name.lower()
    if name.endswith(".parquet"):
        return "parquet"
    if not name.endswith(SUFFIXES):
        return None
    return "jsonl" if ".jsonl" in name[-len(".jsonl.zst") :] else "csv"


def read_table(path: Path, required: tuple[str, ...] = ()) -> pa.Table:
    """Read one table, with plain types (`mmctr.data.plain_tables`).

    Args:
        path: a file with an ending of `SUFFIXES`, or a folder with such an ending that holds the parts of the table in
            the order of the names, all with the same columns.
        required: columns that the table must have.

    Raises:
        ValueError: a file cannot be read, the columns of two parts differ, a column name repeats, or a required column
            is missing; the message names the file and the column name most similar to the missing one.
    """
    form = table_format(path)
    if form is None:
        raise ValueError(f"{path}: a table is a file that ends in {', '.join(SUFFIXES)}")
    try:
        if form == "parquet":
            table = parquet.read_table(path)
        else:
            table = joined_parts([(part, read_text_table(part, form)) for part in parts_of_table(path, form)])
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as {form}: {error}") from None
    require_distinct_columns(table, path)
    if form == "csv":
        for index, name in enumerate(table.column_names):
            if name in ID_COLUMNS:
                table = table.set_column(index, name, integers_if_exact(table.column(index)))
        require_utf8(table, path)
    require_columns(table, required, path)
    return plain_table(table)


def require_utf8(table: pa.Table, path: Path) -> None:
    """Check that pyarrow has read no column of a CSV file as bytes, which text that is not UTF-8 becomes.

    Raises:
        ValueError: a column holds bytes.
    """
    binary = [field.name for field in table.schema if pa.types.is_binary(field.type)]
    if binary:
        raise ValueError(f"{path}: column {binary[0]!r} holds text that is not UTF-8; {TO_UTF8}")


def parts_of_table(path: Path, form: str, any_ending: bool = False) -> list[Path]:
    """The files of a table: the file, or the files of a folder in the order of the names. Hidden files, and files like
    `_SUCCESS`, are no parts.

    Args:
        path: a file, or a folder of files.
        form: the format of the files, as of `table_format`.
        any_ending: take files of any ending for files of this format.

    Raises:
        ValueError: the folder holds a file of another form, or no file.
    """
    if not path.is_dir():
        return [path]
    parts = sorted(part for part in path.rglob("*") if part.is_file() and not part.name.startswith((".", "_")))
    for part in parts:
        if table_format(part) != form and not any_ending:
            raise ValueError(f"{part}: a file of another form in a table of {form} files; move it elsewhere")
    if not parts:
        raise ValueError(f"{path}: the folder holds no {form} file; put the parts of the table there")
    return parts


def joined_parts(parts: list[tuple[Path, pa.Table]]) -> pa.Table:
    """The rows of the parts of a table one after the other.

    Args:
        parts: the file and the rows of each part, one part at least.

    Raises:
        ValueError: the columns of two parts differ, or a column holds text in one part and numbers in another.
    """
    first_path, first = parts[0]
    if len(parts) == 1:
        return first
    for path, table in parts[1:]:
        differ = sorted(set(table.column_names) ^ set(first.column_names))
        if differ:
            raise ValueError(
                f"{path}: the columns differ from those of {first_path.name} ({', '.join(differ)}); give all parts of "
                f"a table the same columns"
            )
    try:
        return pa.concat_tables([table for _, table in parts], promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(
            f"{first_path.parent}: a column has types that do not fit each other in different parts ({error}); write "
            f"it in one type"
        ) from None


def typed_id(item_id: Any, ids: pa.Array) -> Any:
    """An id with the type of some ids: text is converted where the ids are integers.

    Args:
        item_id: a raw id, maybe written as text, as in a command or in JSON.
        ids: the ids.

    Raises:
        UnknownId: the ids are integers, and the text is not an integer.
    """
    if not pa.types.is_integer(ids.type) or not isinstance(item_id, str):
        return item_id
    try:
        return int(item_id)
    except ValueError:
        like = f", like {ids[0].as_py()}" if len(ids) else ""
        raise UnknownId(f"item {item_id!r}: ids here are integers{like}") from None


def same_kind(table: pa.Table, ids_from_text: bool, name: str, kind: pa.DataType) -> pa.Table:
    """A table of a file without types, with integer ids converted to text where the ids of the other table are text.

    A CSV file has no types: "8" is the text "8" when the ids of the catalog include "007".

    Args:
        table: the table.
        ids_from_text: whether the types of the ids were guessed from text; other tables are not changed.
        name: name of the id column.
        kind: type of the ids of the other table.
    """
    index = table.column_names.index(name)
    if not ids_from_text or not _is_text(kind) or _is_text(table.schema.field(index).type):
        return table
    return table.set_column(index, name, table.column(index).cast(pa.string()))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


class MissingColumns(ValueError):
    """A table lacks columns."""


def require_columns(table: pa.Table, required: tuple[str, ...] | list[str], path: Path | str) -> None:
    """Check that a table has some columns.

    Args:
        table: the table.
        required: names of the columns.
        path: name of the file or table, for the error message.

    Raises:
        MissingColumns: the message names all of them and the most similar column names.
    """
    missing = [name for name in required if name not in table.column_names]
    if not missing:
        return
    near = {
        name: found[0] for name in missing if (found := difflib.get_close_matches(name, table.column_names, 1, 0.5))
    }
    there = f"columns there: {', '.join(table.column_names)}"
    if len(missing) == 1:
        hint = f"did you mean {near[missing[0]]!r}?" if near else there
        raise MissingColumns(f"{path}: column {missing[0]!r} is missing; {hint}")
    meant = [f"did you mean {found!r} for {name!r}?" for name, found in near.items()]
    listed = ", ".join(map(repr, missing))
    raise MissingColumns(f"{path}: columns {listed} are missing; {'; '.join([*meant, there])}")


def integers_if_exact(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text ids as int64 when every id is written exactly as the integer would be written, or every id as the float
    `7.0`, which pandas makes of integers in a column with gaps; else unchanged."""
    if pc.all(pc.match_substring_regex(column, r"^(-?[1-9][0-9]{0,15}|0)\.0$")).as_py():
        column = pc.utf8_slice_codeunits(column, 0, -2)
    try:
        numbers = column.cast(pa.int64())
    except pa.ArrowInvalid:
        return column
    same = pc.all(pc.equal(numbers.cast(pa.string()), column)).as_py()
    return numbers if same in (True, None) else column


def one_array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """A column as one array. (`combine_chunks` of pyarrow returns an array for some types and a chunked array for
    others.)"""
    if isinstance(column, pa.Array):
        return column
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], type=column.type)


def as_ids(column: pa.ChunkedArray | pa.Array, name: str, path: Path | str) -> pa.Array:
    """A column of ids as one int64 or string array; nulls stay nulls.

    Args:
        column: integers, strings, floats that hold exact integers, or dictionaries of these.
        name: name of the column, for error messages.
        path: name of the file or table, for error messages.

    Raises:
        ValueError: the ids have another type, or are floats that are not exact integers.
    """
    array = one_array(column)
    kind = array.type
    if pa.types.is_dictionary(kind):
        array = array.dictionary_decode()
        kind = array.type
    if pa.types.is_integer(kind):
        try:
            return array.cast(pa.int64())
        except pa.ArrowInvalid:
            raise ValueError(f"{path}: column {name!r} holds integers above 2^63; store these ids as strings") from None
    if _is_text(kind):
        return array.cast(pa.string())
    if pa.types.is_floating(kind):
        # pandas turns integer ids with a gap into floats: NaN is the gap
        values = array.to_numpy(zero_copy_only=False)
        missing = np.isnan(values)
        whole = values[~missing]
        exact = 2 ** (np.finfo(values.dtype).nmant + 1)  # from this value on neighbouring integers are rounded together
        if len(whole) and (np.abs(whole).max() >= exact or (whole != np.round(whole)).any()):
            raise ValueError(
                f"{path}: column {name!r} holds floats that are not exact ids; store them as integers or strings"
            )
        return pa.array(np.where(missing, 0, values).astype(np.int64), mask=missing)
    if pa.types.is_null(kind):
        return array.cast(pa.int64())
    raise ValueError(f"{path}: column {name!r} has type {kind}; ids are integers or strings")


def as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of any type as trimmed strings: numbers are written out, the values of a list are joined by spaces, and
    blank text becomes null."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = pa.chunked_array([chunk.dictionary_decode() for chunk in column.chunks], type=kind.value_type)
        kind = column.type
    if pa.types.is_floating(kind):
        column = pc.if_else(pc.is_nan(column), None, column)
    if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        column = pa.chunked_array([pa.array([_written(value) for value in column.to_pylist()], type=pa.string())])
    column = column.cast(pa.string())
    try:
        trimmed = pc.utf8_trim_whitespace(column)
    except pa.ArrowInvalid:  # bytes that are no UTF-8, declared as text by the program that wrote them
        texts = [_written(value) for value in column.cast(pa.binary()).to_pylist()]
        trimmed = pc.utf8_trim_whitespace(pa.chunked_array([pa.array(texts, type=pa.string())]))
    return pc.if_else(pc.equal(pc.utf8_length(trimmed), 0), None, trimmed)


def _written(value: Any) -> str | None:
    if isinstance(value, list):
        return " ".join(text for part in value if (text := _written(part)) is not None)
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return None if value is None else str(value)


def rows_of(wanted: pa.Array, known: pa.Array, what: str) -> np.ndarray:
    """Positions of ids in an array of known ids.

    Args:
        wanted: (n,) ids.
        known: ids without repetition.
        what: names of the two sides, for the error message.

    Returns:
        (n,) int64 positions in `known`, -1 for an unknown or null id.

    Raises:
        ValueError: one side holds integers and the other side strings: "1" and 1 are different ids.
    """
    if wanted.null_count == len(wanted) or not len(known):
        return np.full(len(wanted), -1, dtype=np.int64)
    if wanted.type != known.type:
        first = [array.drop_null()[0].as_py() if array.null_count < len(array) else None for array in (wanted, known)]
        raise ValueError(
            f"{what}: ids are {wanted.type} on one side and {known.type} on the other "
            f"({first[0]!r} and {first[1]!r}); store both as integers or both as strings"
        )
    index = pc.index_in(wanted, value_set=known, skip_nulls=True)
    return index.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)


def examples(values: pa.Array | np.ndarray | list[Any], count: int = 3) -> list[Any]:
    """The first `count` values as plain Python objects, for a report."""
    head = values[:count]
    return [v.as_py() if isinstance(v, pa.Scalar) else v.item() if hasattr(v, "item") else v for v in head]


def value_codes(table: pa.Table, column: str, source: Any) -> tuple[np.ndarray, list[str]]:
    """Encode the values of a column as numbers.

    Args:
        table: a table of N rows.
        column: name of the column.
        source: name of the file or table, for the error message.

    Returns:
        (N,) int64 number of the value of each row, -1 for a row without a value, and the values by number.

    Raises:
        ValueError: the column is missing.
    """
    require_columns(table, [column], source)
    encoded = one_array(as_text(table.column(column))).dictionary_encode()
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    return codes, encoded.dictionary.to_pylist()
