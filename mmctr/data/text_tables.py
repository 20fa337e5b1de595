"""Reading of CSV, TSV and JSON lines files, plain or compressed, with errors that name the file and the remedy."""

from __future__ import annotations

import logging
import re
import zlib
from dataclasses import dataclass
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


@dataclass(frozen=True)
class TextFormat:
    """How the text of a CSV or TSV file is cut into rows and columns."""

    separator: str | None = None
    """text between two columns; None: a tab in a file that ends in `.tsv`, else a comma"""
    encoding: str = "utf8"
    """encoding of the text, by the names of Python"""
    columns: tuple[str, ...] | None = None
    """names of the columns of a file whose first row is a row of data; None: the first row holds the names"""
    quotes: bool = True
    """whether a value may stand in double quotes, and then hold separators and line ends"""
    text: frozenset[str] = frozenset()
    """further columns that are read as text, not as numbers or times"""


def read_text_table(path: Path, form: str, text_format: TextFormat | None = None) -> pa.Table:
    """Read a CSV, TSV or JSON lines file, compressed or not, in blocks; as one block where rows need that.

    Args:
        path: the file. A name that ends in `.tsv`, before the ending of a compression, has tabs between the columns.
        form: "csv", for TSV as well, or "jsonl".
        text_format: how a CSV file is written; None: as its name says.

    Returns:
        The table; ids of CSV files and the columns of `TEXT_COLUMNS` are text.

    Raises:
        ValueError: the file cannot be read, or a column name repeats.
    """
    text_format = text_format or TextFormat()
    try:
        table = _read_blocks(path, form, text_format)
        require_distinct_columns(table, path)
        return table
    except UnicodeDecodeError as error:  # of the column names
        raise ValueError(f"{path}: the column names are not UTF-8 ({error}); {TO_UTF8}") from None
    except (pa.ArrowException, OSError, EOFError, zlib.error, LookupError) as error:
        remedy = f"; {TO_UTF8}" if "UTF8" in str(error) else ""
        raise ValueError(f"{path}: cannot be read as {form}: {error}{remedy}") from None


def _read_blocks(path: Path, form: str, text_format: TextFormat) -> pa.Table:
    with open(path, "rb") as file:
        head = file.read(4)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") and not text_format.encoding.lower().startswith("utf-16"):
        raise ValueError(f"{path}: the text is UTF-16; save the file as UTF-8")
    # the first bytes say whether the file is compressed: programs unpack files and keep the name, or the reverse
    compression = "gzip" if head[:2] == b"\x1f\x8b" else "zstd" if head == b"\x28\xb5\x2f\xfd" else None
    ending = path.suffix.lower()
    if compression is not None and COMPRESSIONS.get(ending) != compression:
        logger.warning(
            "%s: the file is compressed by %s, though the name ends in %s; read so", path, compression, ending
        )
    separator = text_format.separator or ("\t" if re.search(r"\.tsv(\.\w+)?$", path.name.lower()) else ",")
    if form == "csv" and len(separator) > 1:
        return _read_long_separator(path, compression, separator, text_format)

    def read(stream: Any, block_size: int) -> pa.Table:
        return (
            _read_csv(stream, block_size, separator, text_format) if form == "csv" else _read_json(stream, block_size)
        )

    try:
        with pa.input_stream(str(path), compression=compression) as stream:
            return read(stream, 1 << 20)
    except pa.ArrowInvalid:
        # a row longer than a block, or a column that changes its type later on: the whole file as one block
        data = _unpacked(path, compression)
        return read(pa.BufferReader(data), min(max(len(data) + 1, 1 << 20), 2**31 - 1))


def _unpacked(path: Path, compression: str | None) -> bytes:
    with pa.input_stream(str(path), compression=compression) as stream:
        return stream.read()


def _read_long_separator(path: Path, compression: str | None, separator: str, text_format: TextFormat) -> pa.Table:
    """Read a file whose separator has several characters: pyarrow takes one, so the whole text is read and a character
    that occurs nowhere is put in the place of the separator."""
    data = _unpacked(path, compression)
    free = next((number for number in range(1, 32) if number not in (9, 10, 13) and bytes([number]) not in data), None)
    if free is None:
        raise ValueError(f"{path}: a separator of several characters needs a control character that the text lacks")
    data = data.replace(separator.encode(text_format.encoding), bytes([free]))
    return _read_csv(pa.BufferReader(data), min(max(len(data) + 1, 1 << 20), 2**31 - 1), chr(free), text_format)


def _read_csv(file: Any, block_size: int, separator: str, text_format: TextFormat) -> pa.Table:
    # ids are read as text, also by `read_table`: type inference would turn "007" into 7
    return csv.read_csv(
        file,
        read_options=csv.ReadOptions(
            block_size=block_size, column_names=text_format.columns, encoding=text_format.encoding
        ),
        convert_options=csv.ConvertOptions(
            column_types=dict.fromkeys((*ID_COLUMNS, *TEXT_COLUMNS, *text_format.text), pa.string()),
            strings_can_be_null=True,
            null_values=["", "null", "NaN", "nan"],
        ),
        parse_options=csv.ParseOptions(
            newlines_in_values=text_format.quotes,
            delimiter=separator,
            quote_char='"' if text_format.quotes else False,
        ),
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
