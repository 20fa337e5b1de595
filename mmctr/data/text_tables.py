"""Reading of CSV, TSV and JSON lines files, plain or compressed, with errors that name the file and the remedy."""

from __future__ import annotations

import logging
import re
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import csv, json

logger = logging.getLogger(__name__)

ID_COLUMNS = ("item_id", "user_id")
TEXT_COLUMNS = ("title", "description", "category", "brand", "shop", "image")
"""columns of a CSV file that are read as text, not as numbers: a title may be "1984", a brand "007" """
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""compression of CSV, TSV and JSON lines files by the ending"""
TO_UTF8 = "save the file as UTF-8 (iconv -f latin1 -t utf-8 OLD > NEW, for example)"
"""remedy for text in another encoding"""


def read_text_table(path: Path, form: str) -> pa.Table:
    """Read a CSV, TSV or JSON lines file, compressed or not, in blocks; as one block where rows need that.

    Args:
        path: the file. A name that ends in `.tsv`, before the ending of a compression, has tabs between the columns.
        form: "csv", for TSV as well, or "jsonl".

    Returns:
        The table; ids of CSV files and the columns of `TEXT_COLUMNS` are text.

    Raises:
        ValueError: the file cannot be read, or a column name repeats.
    """
    try:
        table = _read_blocks(path, form)
        require_distinct_columns(table, path)
        return table
    except UnicodeDecodeError as error:  # of the column names
        raise ValueError(f"{path}: the column names are not UTF-8 ({error}); {TO_UTF8}") from None
    except (pa.ArrowException, OSError, EOFError, zlib.error) as error:
        remedy = f"; {TO_UTF8}" if "UTF8" in str(error) else ""
        raise ValueError(f"{path}: cannot be read as {form}: {error}{remedy}") from None


def _read_blocks(path: Path, form: str) -> pa.Table:
    with open(path, "rb") as file:
        head = file.read(4)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{path}: the text is UTF-16; save the file as UTF-8")
    # the first bytes say whether the file is compressed: programs unpack files and keep the name, or the reverse
    compression = "gzip" if head[:2] == b"\x1f\x8b" else "zstd" if head == b"\x28\xb5\x2f\xfd" else None
    ending = path.suffix.lower()
    if compression is not None and COMPRESSIONS.get(ending) != compression:
        logger.warning(
            "%s: the file is compressed by %s, though the name ends in %s; read so", path, compression, ending
        )
    delimiter = "\t" if re.search(r"\.tsv(\.\w+)?$", path.name.lower()) else ","

    def read(stream: Any, block_size: int) -> pa.Table:
        return _read_csv(stream, block_size, delimiter) if form == "csv" else _read_json(stream, block_size)

    try:
        with pa.input_stream(str(path), compression=compression) as stream:
            return read(stream, 1 << 20)
    except pa.ArrowInvalid:
        # a row longer than a block, or a column that changes its type later on: the whole file as one block
        with pa.input_stream(str(path), compression=compression) as stream:
            data = stream.read()
        return read(pa.BufferReader(data), min(max(len(data) + 1, 1 << 20), 2**31 - 1))


def _read_csv(file: Any, block_size: int, delimiter: str) -> pa.Table:
    # ids are read as text, also by `read_table`: type inference would turn "007" into 7
    return csv.read_csv(
        file,
        read_options=csv.ReadOptions(block_size=block_size),
        convert_options=csv.ConvertOptions(
            column_types=dict.fromkeys((*ID_COLUMNS, *TEXT_COLUMNS), pa.string()),
            strings_can_be_null=True,
            null_values=["", "null", "NaN", "nan"],
        ),
        parse_options=csv.ParseOptions(newlines_in_values=True, delimiter=delimiter),
    )


def _read_json(file: Any, block_size: int) -> pa.Table:
    return json.read_json(file, read_options=json.ReadOptions(block_size=block_size))


def require_distinct_columns(table: pa.Table, path: Path) -> None:
    """Check that no column name of a table repeats.

    Raises:
        ValueError: a name repeats.
    """
    repeated = [name for name in table.column_names if table.column_names.count(name) > 1]
    if repeated:
        raise ValueError(f"{path}: column {repeated[0]!r} is there {repeated.count(repeated[0])} times; keep one")
