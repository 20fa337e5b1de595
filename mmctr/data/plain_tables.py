"""Plain Arrow types: the types of pandas, polars, DuckDB and Spark as the few that the other modules read."""

from __future__ import annotations

import pyarrow as pa


def plain_table(table: pa.Table) -> pa.Table:
    """A table whose columns are strings, binaries and lists of 32-bit offsets, without views and dictionaries.

    A column that is too large for 32-bit offsets, or of a type without a plain equivalent, stays unchanged.

    Args:
        table: a table as read from a file.
    """
    for number, column in enumerate(table.columns):
        kind = plain_type(column.type)
        if kind != column.type:
            table = table.set_column(number, table.field(number).name, _cast(column, kind))
    return table


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The plain type for a type, nested types included: categories, views and 64-bit offsets of strings and lists."""
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_string_view(kind) or pa.types.is_large_string(kind):
        return pa.string()
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind) or pa.types.is_large_list(kind):
        return pa.list_(plain_type(kind.value_type))
    if pa.types.is_list(kind):
        inner = plain_type(kind.value_type)
        return kind if inner == kind.value_type else pa.list_(inner)
    if pa.types.is_fixed_size_list(kind):
        inner = plain_type(kind.value_type)
        return kind if inner == kind.value_type else pa.list_(inner, kind.list_size)
    return kind


def _cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """A column with the plain type `kind`; the column itself where 32-bit offsets are too few."""
    parts = []
    for chunk in column.chunks:
        if pa.types.is_dictionary(chunk.type):
            chunk = _decoded(chunk)
        try:
            parts.append(chunk if chunk.type == kind else chunk.cast(kind))
        except pa.ArrowInvalid:
            return column
        except pa.ArrowNotImplementedError:  # pyarrow casts no lists of dictionaries
            parts.append(pa.array(chunk.to_pylist(), kind))
    return pa.chunked_array(parts, type=kind)


def _decoded(chunk: pa.DictionaryArray) -> pa.Array:
    """The values of a dictionary array; pyarrow takes from a dictionary of views only after a cast."""
    values = chunk.dictionary
    kind = plain_type(values.type)
    return (values if values.type == kind else values.cast(kind)).take(chunk.indices)
