"""Shards of items: Parquet files or WebDataset tars, read in groups of rows."""

from __future__ import annotations

import glob
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
from pyarrow.parquet import ParquetFile, write_table
from pyarrow.parquet import read_table as read_parquet

from mmctr.data.catalog import picture_sources
from mmctr.data.plain_tables import plain_table
from mmctr.data.tables import as_ids, as_text, require_columns
from mmctr.files import fingerprint, replace_file
from mmctr.locks import locked

SAMPLES = 1024  # samples of a tar per group
PROBLEM = "__problem"  # column with the reason why a row is damaged, apart from the picture
_KINDS = dict.fromkeys((".jpg", ".jpeg", ".png", ".webp"), "image") | {".txt": "txt", ".json": "json"}


class ShardedItems:
    """The shards of a folder or a glob, read in groups of rows: Parquet row groups, or blocks of samples of a tar.

    Parquet shards have the columns `item_id`, text columns, and `image`: bytes, paths relative to the folder of the
    shard, or structs of bytes and path. Tar shards (WebDataset, uncompressed) have the members
    `KEY.jpg|jpeg|png|webp`, `KEY.txt` (the column `text`) and `KEY.json` (one text column per field); `item_id` is the
    field of that name in the JSON file, else KEY. A second picture, txt or json with the same KEY begins a new sample.

    Only schemas are read when the shards are opened, and every tar is indexed once.

    Args:
        pattern: a folder, or a glob of .parquet, .tar or .tgz files.
        columns: names of the text columns to read.
        cache_folder: folder for the index of every tar: texts and positions of the pictures. An index is rebuilt when
            the path, size or modification time of the tar changes.

    Raises:
        ValueError: there are no rows, a file cannot be read, or a column is missing; the message names the pattern, or
            the file and the column.
    """

    def __init__(self, pattern: str | Path, columns: Sequence[str], cache_folder: Path):
        if reserved := {"item_id", "image", PROBLEM}.intersection(columns):
            raise ValueError(f"column {min(reserved)!r} cannot be a text column; leave it out")
        self.columns, self.cache_folder = list(columns), Path(cache_folder)
        names = glob.glob(f"{glob.escape(str(pattern))}/*" if Path(pattern).is_dir() else str(pattern), recursive=True)
        shards = sorted(path for path in map(Path, names) if {".parquet", ".tar", ".tgz"}.intersection(path.suffixes))
        self.groups = [group for path in shards for group in self._open(path)]  # (shard, group in it, rows)
        self.group_rows = tuple(num_rows for _, _, num_rows in self.groups)
        if not self.groups:
            raise ValueError(f"{pattern}: no rows in {len(shards)} shards; name a folder or glob of .parquet or .tar")

    def read(self, group: int) -> pa.Table:
        """Read one group of rows.

        Args:
            group: position in `groups`.

        Returns:
            A table of `item_id` (int64 or string), the text columns (string, null for blank), `image` (large_binary,
            or string for paths) and `PROBLEM` (string, null for a sound row).

        Raises:
            ValueError: the file is damaged, or has changed since the shards were opened; the message names the file.
        """
        path, number, num_rows = self.groups[group]
        try:
            with ParquetFile(self._file(path)) as file, open(path, "rb") as shard:
                wanted = {"item_id", *self.columns, "image", PROBLEM}.intersection(file.schema_arrow.names)
                table = self._plain(file.read_row_group(number, list(wanted), use_threads=False), path)
                if path.suffix != ".parquet":
                    spans = [span and [int(part) for part in span.split()] for span in table["image"].to_pylist()]
                    images = [span and (shard.seek(span[0]), shard.read(span[1]))[1] for span in spans]
                    table = table.set_column(len(self.columns) + 1, "image", pa.array(images, pa.large_binary()))
            if len(table) != num_rows:
                raise OSError("another number of rows")
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}: group {number} is damaged, or has changed since the start: {error}") from None
        return table

    def item_ids(self) -> pa.Array:
        """The (number of rows,) raw ids of all shards, null for a row without an id.

        Raises:
            ValueError: some ids are integers and others strings, or an id repeats.
        """
        parts = []
        for path in dict.fromkeys(path for path, _, _ in self.groups):
            ids = read_parquet(self._file(path), columns=["item_id"])["item_id"]
            parts.append(as_ids(ids, "item_id", path))
        kinds = {part.type for part in parts}
        if len(kinds) > 1:
            raise ValueError(f"{self.groups[0][0].parent}: item_id is {' and '.join(map(str, kinds))}; use one of them")
        ids = pa.concat_arrays(parts)
        known = ids.drop_null()
        if len(known.unique()) < len(known):
            repeated = next(entry["values"] for entry in known.value_counts().to_pylist() if entry["counts"] > 1)
            raise ValueError(f"{self.groups[0][0].parent}: item_id {repeated!r} is there twice; keep one row an item")
        return ids

    def _open(self, path: Path) -> list[tuple[Path, int, int]]:
        try:
            with locked(file := self._file(path)):
                if not file.is_file():
                    _index_tar(path, file)
            with ParquetFile(file) as opened:
                metadata, empty = opened.metadata, opened.schema_arrow.empty_table()
            require_columns(empty, ["item_id", "image", *self.columns], path)
            self._plain(empty, path)
        except (pa.ArrowException, OSError, KeyError) as error:
            raise ValueError(f"{path}: cannot be read as {path.suffix[1:]}: {error}") from None
        return [(path, at, size) for at in range(metadata.num_row_groups) if (size := metadata.row_group(at).num_rows)]

    def _file(self, path: Path) -> Path:
        """The Parquet file of a shard: for a tar the index of texts and picture positions."""
        stat = path.stat()
        index = f"tar-{fingerprint(SAMPLES, str(path.resolve()), stat.st_size, stat.st_mtime_ns)}.parquet"
        return path if path.suffix == ".parquet" else self.cache_folder / index

    def _plain(self, table: pa.Table, path: Path) -> pa.Table:
        table = plain_table(table)
        ids, image = as_ids(table["item_id"], "item_id", path), picture_sources(table["image"], path)
        texts = {name: as_text(table[name]) for name in self.columns}
        problem = table[PROBLEM] if PROBLEM in table.column_names else pa.nulls(len(table), pa.string())
        return pa.table({"item_id": ids, **texts, "image": image, PROBLEM: problem})


def _index_tar(path: Path, out: Path) -> None:
    """Write the texts and the picture positions of the samples of a tar. Raises ValueError for a damaged, compressed or
    concatenated tar."""
    samples: list[dict[str, Any]] = []
    latest: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(path, "r:") as tar, open(path, "rb") as file:
            while (member := tar.next()) is not None:
                cast(Any, tar).members.clear()  # the object would keep every member in memory
                folder, slash, name = member.name.rpartition("/")
                stem, dot, suffix = name.partition(".")
                key, kind = folder + slash + stem, _KINDS.get(dot + suffix.lower())
                if kind is None or not stem or member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise ValueError(f"{path}: member {member.name!r} is a link or sparse; write it as a plain file")
                if key not in latest or kind in latest[key]:
                    latest[key] = {"key": key}
                    samples.append(latest[key])
                file.seek(start := member.offset_data)
                latest[key][kind] = f"{start} {member.size}" if kind == "image" else file.read(member.size)
            # tarfile takes a damaged header for the end, and does not notice a second archive after the first
            file.seek(tar.offset)
            if len(tail := file.read(20_480)) < 512 or any(tail):
                raise tarfile.ReadError("damaged, cut off or two in one")
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not one whole, uncompressed tar ({error}); unpack it or write it again") from None
    rows = [_texts(sample) for sample in samples]
    names = sorted({"item_id", "image", PROBLEM}.union(*rows))
    table = pa.Table.from_pylist(rows, pa.schema(dict.fromkeys(names, pa.string())))
    replace_file(out, lambda temporary: write_table(table, temporary, row_group_size=SAMPLES))


def _texts(sample: dict[str, Any]) -> dict[str, Any]:
    """The row of a sample, with the fields that can be read."""
    try:
        fields = json.loads(sample.get("json", b"{}")).items()
        row: dict[str, Any] = {_written(name): _written(value) for name, value in fields} | {PROBLEM: None}
    except (ValueError, AttributeError, RecursionError):  # broken, or no object
        row = {PROBLEM: "broken json"}
    if "txt" in sample:
        row["text"] = sample["txt"].decode("utf-8", "replace")
    return row | {"item_id": row.get("item_id") or _written(sample["key"]), "image": sample.get("image")}


def _written(value: Any) -> Any:
    value = " ".join(str(part) for part in value if part is not None) if isinstance(value, list) else value
    return None if value is None else str(value).encode("utf-8", "replace").decode()  # json may hold half surrogates
