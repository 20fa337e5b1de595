"""Reading of the tables that a `dataset.yaml` describes, as tables with the columns of a dataset folder."""

from __future__ import annotations

import re
import string
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from mmctr.data.arrow import pc
from mmctr.data.description import (
    IdSource,
    ImpressionsSource,
    InteractionsDescription,
    ItemsDescription,
    PictureSource,
    TableDescription,
    TimeSource,
    UsersDescription,
    WeightSource,
)
from mmctr.data.expressions import columns_of, evaluate
from mmctr.data.plain_tables import plain_table
from mmctr.data.tables import (
    as_ids,
    as_text,
    integers_if_exact,
    joined_parts,
    one_array,
    parts_of_table,
    require_columns,
    require_utf8,
    table_format,
)
from mmctr.data.text_tables import TEXT_COLUMNS, TextFormat, read_text_table
from mmctr.data.times import described_times

_PARTITION = re.compile(r"^([A-Za-z_]\w*)=(.+)$")


def described_files(description: TableDescription, folder: Path, source: str) -> list[tuple[Path, str | None]]:
    """The files of a described table, in the order in which they are read, each with the part of the split that the
    description names for the file.

    Args:
        description: the description of the table.
        folder: the dataset folder, which the files lie in.
        source: name of the table in the description, for error messages.

    Raises:
        ValueError: a pattern leads out of the folder, or no file fits a pattern.
    """
    files: list[tuple[Path, str | None]] = []
    for split, pattern in description.patterns:
        parts = PurePosixPath(pattern).parts
        if not parts or PurePosixPath(pattern).is_absolute() or ".." in parts or "\\" in pattern:
            raise ValueError(
                f"{source}.files: {pattern!r}: files are named relative to the folder of the dataset and lie in it; "
                f"put the files, or a link to their folder, into {folder}"
            )
        found = sorted(folder.glob(pattern)) if re.search(r"[*?\[]", pattern) else [folder / pattern]
        found = [path for path in found if path.exists() and not path.name.startswith((".", "_"))]
        if not found:
            raise ValueError(f"{source}.files: no file fits {pattern!r} in {folder}")
        for path in found:
            form = _format(description, path, source)
            files += [(file, split) for file in parts_of_table(path, form, description.format is not None)]
    return files


def _format(description: TableDescription, path: Path, source: str) -> str:
    """ "parquet", "csv" (for TSV as well) or "jsonl"."""
    if description.format is not None:
        return "csv" if description.format == "tsv" else description.format
    named = table_format(path)
    if named is None and path.is_dir():
        named = next((form for part in sorted(path.rglob("*")) if (form := table_format(part))), None)
    if named is None:
        raise ValueError(f"{source}: {path.name}: the ending names no format that is read; add `format: csv`")
    return named


def read_described(
    description: TableDescription, folder: Path, source: str, needed: set[str], text: set[str]
) -> pa.Table:
    """The rows of all files of a described table, with the renamed and the constant columns.

    Args:
        description: the description of the table.
        folder: the dataset folder.
        source: name of the table in the description, for error messages.
        needed: columns that the description names, by the names in the files or the new names.
        text: those of the needed columns that are read as text from CSV files.

    Raises:
        ValueError: a file is missing or cannot be read, or columns are missing.
    """
    files = described_files(description, folder, source)
    separator = description.separator or ("\t" if description.format == "tsv" else None)
    text_format = TextFormat(
        separator,
        description.encoding,
        tuple(description.columns) if description.columns else None,
        description.quotes,
        frozenset(description.rename.get(name, name) for name in (*text, *TEXT_COLUMNS)),
    )
    parts = []
    for file, split in files:
        form = _format(description, file, source)
        part = _read_parquet(file) if form == "parquet" else read_text_table(file, form, text_format)
        part = _with_partitions(part, file, folder)
        if split is not None:
            part = _set(part, "split", pa.chunked_array([pa.repeat(pa.scalar(split), len(part))]))
        parts.append((file, part))
    table = joined_parts(parts)
    if _format(description, files[0][0], source) == "csv":
        require_utf8(table, files[0][0])
    old = list(description.rename.values())
    in_files = {description.rename.get(name, name) for name in needed - description.constants.keys()}
    require_columns(table, sorted(in_files | set(old)), f"{source} ({files[0][0].name})")
    table = plain_table(table)
    for new, column in description.rename.items():
        if new in table.column_names:
            raise ValueError(f"{source}.rename: a column {new!r} is there already; choose another name")
        table = table.append_column(new, table.column(column))
    table = table.drop_columns(list(set(old)))
    for name, value in description.constants.items():
        if name in table.column_names:
            raise ValueError(f"{source}.constants: a column {name!r} is there already; choose another name")
        table = table.append_column(name, pa.repeat(pa.scalar(value), len(table)))
    return table


def _read_parquet(path: Path) -> pa.Table:
    try:
        return pyarrow.parquet.ParquetFile(path).read()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as parquet: {error}") from None


def _with_partitions(table: pa.Table, file: Path, folder: Path) -> pa.Table:
    """A part with a column of text for each folder on the way to the file that is named `column=value`."""
    for name in file.relative_to(folder).parts[:-1]:
        found = _PARTITION.match(name)
        if found and found[1] not in table.column_names:
            table = table.append_column(found[1], pa.repeat(pa.scalar(found[2]), len(table)))
    return table


def read_items(description: ItemsDescription, folder: Path, source: str) -> pa.Table:
    """The described catalog: `item_id`, `image` where the items have pictures, and all other columns.

    Raises:
        ValueError: files or columns are missing or malformed.
    """
    needed, text = _of_ids(description.item_id)
    if isinstance(description.image, PictureSource):
        needed |= _fields(description.image.pattern, source)
    elif description.image is not None:
        needed.add(description.image)
    table = read_described(description, folder, source, needed, text)
    pattern = description.image.pattern if isinstance(description.image, PictureSource) else None
    old_ids = _column_of(description.item_id)
    table = _with_ids(table, "item_id", description.item_id, source)
    if pattern is not None:
        table = _set(table, "image", _paths(pattern, table, old_ids))
    elif description.image is not None:
        table = _moved(table, "image", str(description.image))
    return table


def read_interactions(description: InteractionsDescription, folder: Path, source: str) -> pa.Table:
    """The described click log: `user_id`, `item_id`, `timestamp`, `label`, the further labels, and all other columns.

    Raises:
        ValueError: files or columns are missing or malformed.
    """
    time = description.timestamp
    time = TimeSource(column=time) if isinstance(time, str) else time
    needed = {time.column} if time.column is not None else set()
    text = set(needed) if time.format else set()
    for ids in [description.user_id] if description.impressions else [description.user_id, description.item_id]:
        columns, as_read = _of_ids(ids)
        needed, text = needed | columns, text | as_read
    expressions = dict(description.labels)
    if description.impressions is not None:
        needed, text = needed | {description.impressions.column}, text | {description.impressions.column}
    elif isinstance(description.label, str):
        expressions["label"] = description.label
    for expression in expressions.values():
        needed |= columns_of(expression)
    weight = description.weight
    if weight is not None:
        needed.add(weight.column if isinstance(weight, WeightSource) else weight)
    table = read_described(description, folder, source, needed, text)

    values = {name: _label(evaluate(text_of, table, source)) for name, text_of in expressions.items()}
    if isinstance(weight, WeightSource):
        values["weight"] = _weights(weight, table)
    if time.column is None:
        values["timestamp"] = pa.chunked_array([pa.array(np.arange(len(table)))])
    else:
        values["timestamp"] = described_times(table.column(time.column), time, f"{source}: column {time.column!r}")
        table = table.drop_columns([time.column])
    table = _with_ids(table, "user_id", description.user_id, source)
    if isinstance(weight, str):
        table = _moved(table, "weight", weight)
    for name, value in values.items():
        table = _set(table, name, value)
    if description.impressions is not None:
        return _rows_of_impressions(table, description.impressions, source)
    if not isinstance(description.label, str):
        table = _set(table, "label", pa.chunked_array([pa.repeat(pa.scalar(description.label), len(table))]))
    return _with_ids(table, "item_id", description.item_id, source)


def _rows_of_impressions(table: pa.Table, impressions: ImpressionsSource, source: str) -> pa.Table:
    """A row for each item of each impression, with `item_id`, `label` and the columns of the impression."""
    column = as_text(table.column(impressions.column))
    if "impression_id" not in table.column_names:
        table = table.append_column("impression_id", pa.array(np.arange(len(table))))
    lists = one_array(pc.split_pattern(column, impressions.separator))
    pairs, rows = pc.list_flatten(lists), pc.list_parent_indices(lists)
    filled = pc.greater(pc.utf8_length(pairs), 0)  # two separators after each other hold nothing
    pairs, rows = pairs.filter(filled), rows.filter(filled)
    cut = pc.split_pattern(pairs, impressions.label_separator, max_splits=1, reverse=True)
    whole = pc.equal(pc.list_value_length(cut), 2)
    if not pc.all(whole).as_py():
        example = pairs.filter(pc.invert(whole))[0].as_py()
        raise ValueError(
            f"{source}.impressions: column {impressions.column!r} holds {example!r}, which is not an item, "
            f"{impressions.label_separator!r} and a label"
        )
    labels = pc.list_element(cut, 1)
    try:
        labels = labels.cast(pa.int8())
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{source}.impressions: column {impressions.column!r}: a label is no number: {error}"
        ) from None
    items = integers_if_exact(pa.chunked_array([pc.list_element(cut, 0)]))
    result = table.drop_columns([impressions.column]).take(rows)
    return _set(_set(result, "item_id", items), "label", pa.chunked_array([labels]))


def read_users(description: UsersDescription, folder: Path, source: str) -> pa.Table:
    """The described users: `user_id` and all other columns.

    Raises:
        ValueError: files or columns are missing or malformed.
    """
    table = read_described(description, folder, source, *_of_ids(description.user_id))
    return _with_ids(table, "user_id", description.user_id, source)


def _column_of(ids: str | IdSource) -> str:
    return ids if isinstance(ids, str) else ids.column


def _of_ids(ids: str | IdSource) -> tuple[set[str], set[str]]:
    """The column of ids, as one that is needed and as one that is read as text."""
    return {_column_of(ids)}, {_column_of(ids)}


def _set(table: pa.Table, name: str, column: pa.ChunkedArray) -> pa.Table:
    """The table with a column under a name, in the place of a column that has the name already."""
    if name in table.column_names:
        return table.set_column(table.column_names.index(name), name, column)
    return table.append_column(name, column)


def _moved(table: pa.Table, name: str, old: str) -> pa.Table:
    """The table with the column `old` under another name."""
    column = table.column(old)
    return _set(table.drop_columns([old]) if old != name else table, name, column)


def _with_ids(table: pa.Table, name: str, ids: str | IdSource, source: str) -> pa.Table:
    """The table with a column of ids under `name`, padded and in lower case as described."""
    old = _column_of(ids)
    column = table.column(old)
    if isinstance(ids, IdSource) and (ids.zero_pad or ids.lower):
        # as text: integers of Parquet, and floats that pandas makes of integers with gaps, are written out first
        text = as_ids(column, old, source).cast(pa.string())
        text = pc.utf8_trim_whitespace(text)
        text = pc.utf8_lower(text) if ids.lower else text
        text = pc.utf8_lpad(text, ids.zero_pad, "0") if ids.zero_pad else text
        column = pa.chunked_array([text])
    elif pa.types.is_string(column.type):
        column = integers_if_exact(column)
    return _set(table.drop_columns([old]) if old != name else table, name, column)


def _label(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The value of an expression as a label: bools become 0 and 1, numbers stay."""
    return column.cast(pa.int8()) if pa.types.is_boolean(column.type) else column


def _weights(weight: WeightSource, table: pa.Table) -> pa.ChunkedArray:
    values = as_text(table.column(weight.column))
    position = pc.index_in(values, value_set=pa.array(list(weight.values)))
    weights = pa.array(list(weight.values.values()), pa.float64())
    return pa.chunked_array([pc.fill_null(weights.take(one_array(position)), 1.0)])


def _fields(pattern: str, source: str) -> set[str]:
    """The columns that a pattern of paths names."""
    try:
        parts = list(string.Formatter().parse(pattern))
    except ValueError as error:
        raise ValueError(f"{source}.image.pattern: {pattern!r}: {error}") from None
    for _, name, spec, conversion in parts:
        if name is not None and (not name or conversion or not re.fullmatch(r"(\.\d+)?", spec or "")):
            raise ValueError(
                f"{source}.image.pattern: {pattern!r}: braces hold a column, such as {{item_id}}, or a column and a "
                f"number of characters, such as {{item_id:.3}}"
            )
    return {name for _, name, _, _ in parts if name is not None}


def _paths(pattern: str, table: pa.Table, id_column: str) -> pa.ChunkedArray:
    """The path of the picture of each item; null where a column of the pattern is null."""
    pieces: list[pa.ChunkedArray | str] = []
    for literal, name, spec, _ in string.Formatter().parse(pattern):
        pieces.append(literal)
        if name is not None:
            column = as_text(table.column("item_id" if name == id_column else name))
            pieces.append(pc.utf8_slice_codeunits(column, 0, int(spec[1:])) if spec else column)
    return pc.binary_join_element_wise(*pieces, "")
