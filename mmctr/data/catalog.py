"""Catalog: the items of a dataset, the mapping of raw ids to rows, item texts, and the cache of item pictures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from torch import Tensor

from mmctr.data.arrow import pc
from mmctr.data.images import Resize
from mmctr.data.picture_building import PictureSources, build_pictures, look_again
from mmctr.data.picture_cache import CACHE_FORMAT, Pictures
from mmctr.data.plain_tables import plain_table
from mmctr.data.tables import (
    as_ids,
    as_text,
    examples,
    one_array,
    require_columns,
    rows_of,
)
from mmctr.errors import UnknownId
from mmctr.files import cache_folder, fingerprint, is_writable, read_json, replace_file
from mmctr.locks import locked

if TYPE_CHECKING:
    from datasets import Dataset


logger = logging.getLogger(__name__)


class Catalog:
    """The N items of a prepared dataset folder. A catalog row is the position of an item in the table.

    Build a catalog from a folder with `mmctr.data.prepare.open_dataset`, or from any `datasets.Dataset` with
    `Catalog.from_dataset`.

    Args:
        table: items, with unique values in the column `item_id`.
        folder: folder of the caches of pictures and tokens.
        root: the dataset folder that relative picture paths start from; None where no picture is a path.
    """

    def __init__(self, table: pa.Table, folder: Path, root: Path | None):
        self.table = table
        self.folder = folder
        """folder of the caches of pictures and tokens"""
        self.root = root
        """the dataset folder that relative picture paths start from"""
        self.item_ids: pa.Array = one_array(table.column("item_id"))

    def __len__(self) -> int:
        return len(self.item_ids)

    @property
    def items(self) -> Dataset:
        """The items as a `datasets.Dataset`, without the column `image`."""
        from datasets import Dataset

        return Dataset(self.table.drop_columns(["image"]) if "image" in self.table.column_names else self.table)

    def rows(self, item_ids: Sequence[Any] | pa.Array) -> np.ndarray:
        """Catalog rows of raw ids.

        Args:
            item_ids: n raw ids, all integers or all strings.

        Returns:
            (n,) int64 rows.

        Raises:
            UnknownId: an id is not in the catalog; the message names the id.
        """
        try:
            wanted = item_ids if isinstance(item_ids, pa.Array) else pa.array(item_ids)
            wanted = as_ids(wanted, "item_id", "catalog")
            rows = rows_of(wanted, self.item_ids, "catalog")
        except (pa.ArrowException, OverflowError) as error:
            raise UnknownId(f"item ids are all integers or all strings: {error}") from None
        except ValueError as error:
            raise UnknownId(str(error)) from None
        if (rows < 0).any():
            unknown = wanted[int(np.argmin(rows))].as_py()
            raise UnknownId(f"item id {unknown!r} is not in the catalog of {len(self)} items")
        return rows

    def texts(self, columns: Sequence[str]) -> list[str]:
        """One text per item: the non-empty values of some columns joined by ". "; "" where all values are empty.

        Args:
            columns: names of the columns, in the order of the text.

        Raises:
            ValueError: the items table lacks a column.
        """
        require_columns(self.table, list(columns), "items")
        if not columns:
            return [""] * len(self)
        fields = [as_text(self.table.column(name)).to_pylist() for name in columns]
        return [joined_text(parts) for parts in zip(*fields, strict=True)]

    def tokens(
        self, columns: Sequence[str], tokenize: Callable[[list[str]], Tensor], key: str
    ) -> tuple[Tensor, Tensor]:
        """Token ids of every item, computed once and cached in a file.

        Args:
            columns: names of the columns that make up a text.
            tokenize: maps n texts to (n, T) token ids.
            key: identifies the tokenizer in the name of the cache file; must change whenever the tokenizer changes.

        Returns:
            (N, T) int32 token ids and the (N,) bool mask of items with a text.
        """
        texts = self.texts(columns)
        path = self.cache_path(f"tokens-{fingerprint(key, chr(0).join(texts).encode())}.npy")
        ids = _read_tokens(path, len(texts))
        if ids is None:
            ids = tokenized(texts, tokenize).numpy()

            def write(temporary: Path) -> None:
                with open(temporary, "wb") as handle:
                    np.save(handle, ids, allow_pickle=False)

            replace_file(path, write)
        return torch.from_numpy(ids), torch.tensor([bool(text) for text in texts])

    def pictures(
        self, size: int, resize: Resize, threads: int = 2, column: str = "image", position: int = 0
    ) -> Pictures:
        """The cache of decoded pictures of one size; a missing cache is built, an interrupted build is continued.

        A cache that was built for other items or other picture cells is built anew. Pictures that were refused are
        looked at again once their files have appeared or changed.

        Args:
            size: side of a picture in pixels.
            resize: how a picture is made square; the choices of `mmctr.data.images.decode_picture`.
            threads: number of threads that decode pictures.
            column: name of the column with the pictures.
            position: index of the picture within each cell, for a column of lists.

        Raises:
            OSError: the disk has no room for the cache.
        """
        name = "pictures" if column == "image" else f"pictures-{fingerprint(column)[:8]}"
        name = f"{name}-{size}-{resize}{f'-{position}' if position else ''}"
        folder = self.cache_path(name, "report.json")
        cells = self._sources(column, position)
        sources = PictureSources(cells, self.item_ids, self.root, size, resize, threads, self._pictures_key(cells))
        with locked(folder):
            if not (folder / "report.json").is_file() or read_json(folder / "report.json").get("key") != sources.key:
                build_pictures(folder, sources)
            elif is_writable(folder):
                look_again(folder, sources)
        return Pictures(folder)

    def cache_path(self, name: str, last: str = "") -> Path:
        """The place of a cache: in the folder of the catalog, or, where that is read-only and lacks the whole cache, in
        the cache folder of the user.

        Args:
            name: name of the file or folder.
            last: the file that is written last into a folder.
        """
        path = self.folder / name
        if (path / last if last else path).is_file() or is_writable(self.folder):
            return path
        return cache_folder() / f"{self.folder.name}-{fingerprint(str(self.folder.resolve()))}" / name

    def part(self, rows: np.ndarray) -> Catalog:
        """A catalog of some items, whose caches are in a folder of their own within the folder of this catalog.

        Args:
            rows: (n,) catalog rows.
        """
        table = self.table.take(pa.array(rows))
        ids = one_array(table.column("item_id"))
        return Catalog(table, self.cache_path(f"features-of-part-{fingerprint(ids.to_pylist())}"), self.root)

    def picture_cell(self, row: int) -> str | bytes | None:
        """The first picture of the item in a catalog row.

        Returns:
            A path relative to `root`, the encoded bytes, or None for an item without a picture.
        """
        cells = self.table.column("image")
        cell = cells.slice(row, 1)
        if _is_list(cell.type):
            values = cell[0].values if cell[0].is_valid else None
            if values is None or not len(values):
                return None
            cell = pa.chunked_array([values.slice(0, 1)])
        return picture_sources(cell, "items table")[0].as_py()

    def pictures_per_item(self, column: str) -> int:
        """Number of pictures in the longest cell of a column; 1 for a column without lists."""
        cells = self.table.column(column)
        if not _is_list(cells.type):
            return 1
        return max(1, pc.max(pc.list_value_length(cells)).as_py() or 0)

    def _sources(self, column: str, position: int) -> pa.ChunkedArray:
        if column not in self.table.column_names:
            return pa.chunked_array([pa.nulls(len(self), pa.string())])
        cells = self.table.column(column)
        if _is_list(cells.type):
            long_enough = pc.greater(pc.list_value_length(cells), position)
            present = np.flatnonzero(np.asarray(pc.fill_null(long_enough, False)))
            picked = one_array(pc.list_element(cells.take(pa.array(present)), position))
            index = np.zeros(len(self), np.int64)
            index[present] = np.arange(len(present))
            mask = np.ones(len(self), bool)
            mask[present] = False
            cells = pa.chunked_array([picked.take(pa.array(index, mask=mask))])
        return picture_sources(cells, "items table", column)

    def _pictures_key(self, cells: pa.ChunkedArray) -> str:
        """Changes with the ids and the picture cells; of encoded pictures it looks at the sizes, not at all bytes."""
        if not pa.types.is_string(cells.type):
            cells = pc.binary_length(cells)
        digests = [fingerprint(str(part.to_pylist()).encode()) for part in (*cells.chunks, self.item_ids)]
        return fingerprint(CACHE_FORMAT, digests)

    @classmethod
    def from_dataset(cls, dataset: Dataset, folder: Path, root: Path | None = None) -> Catalog:
        """A catalog from any `datasets.Dataset`.

        Args:
            dataset: items with a column `item_id`; pictures are read from an `Image` column named `image`.
            folder: folder for the caches of pictures and tokens; created where it does not exist.
            root: folder that relative picture paths start from.

        Raises:
            ValueError: the dataset has no column `item_id`, or no item is left after the checks.
        """
        folder = Path(folder)
        table, _ = clean_items(dataset_table(dataset), "dataset")
        folder.mkdir(parents=True, exist_ok=True)
        return cls(table, folder, root)


def _read_tokens(path: Path, num_texts: int) -> np.ndarray | None:
    """The cached token ids (N, T); None where the cache is missing or damaged, and the tokens are made again."""
    if not path.is_file():
        return None
    try:
        ids = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        logger.warning("%s: damaged (%s); the texts are tokenized again", path, error)
        return None
    return ids if ids.dtype == np.int32 and ids.ndim == 2 and len(ids) == num_texts else None


def tokenized(texts: list[str], tokenize: Callable[[list[str]], Tensor]) -> Tensor:
    """(n, T) int32 token ids of n texts; the tokenizer is called on 4,096 texts at a time."""
    starts = range(0, max(len(texts), 1), 4096)  # no texts: a call tells how long a row is
    return torch.cat([tokenize(texts[start : start + 4096]).to(torch.int32) for start in starts])


def joined_text(parts: Iterable[str | None]) -> str:
    """The text of an item: the non-empty parts joined by ". "."""
    return ". ".join(part for part in parts if part)


def picture_sources(column: pa.ChunkedArray, source: Any, name: str = "image") -> pa.ChunkedArray:
    """Picture cells as relative paths (string) or encoded pictures (large_binary).

    Args:
        column: paths, bytes, nulls, or the structs of `bytes` and `path` that `datasets` writes.
        source: name of the file or table, for error messages.
        name: name of the column, for error messages.

    Raises:
        ValueError: the column has another type, or mixes paths and bytes.
    """
    kind = column.type
    if pa.types.is_struct(kind):
        data, path = pc.struct_field(column, "bytes"), pc.struct_field(column, "path")
        if not pc.any(pc.and_(pc.is_null(data), pc.is_valid(path))).as_py():
            return data.cast(pa.large_binary())
        if data.null_count == len(data):
            return path.cast(pa.string())
        raise ValueError(f"{source}: column {name!r} mixes paths and bytes; use one of them for all items")
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return column.cast(pa.large_binary())
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind):
        return column.cast(pa.string())
    raise ValueError(f"{source}: column {name!r} has type {kind}; it holds relative paths, bytes or nulls")


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def dataset_table(dataset: Dataset) -> pa.Table:
    """The rows of a `datasets.Dataset` as one pyarrow table, pictures left encoded."""
    from datasets import Image

    for name, feature in dataset.features.items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
    return dataset.with_format("arrow")[:]


def clean_items(table: pa.Table, name: str) -> tuple[pa.Table, dict[str, Any]]:
    """Check an items table: rows without an id and rows with a repeated id are set aside.

    Args:
        table: items as read from a file.
        name: name of the file, for error messages.

    Returns:
        The table with unique ids and plain columns, and a report that counts the rows set aside.

    Raises:
        ValueError: no row is left, the column `item_id` is missing, or the ids are not integers or strings.
    """
    require_columns(table, ("item_id",), name)
    table = plain_table(table)
    ids = as_ids(table.column("item_id"), "item_id", name)
    valid = np.asarray(ids.is_valid())
    order = np.flatnonzero(valid)
    first = np.zeros(len(ids), bool)
    _, where = np.unique(ids.filter(pa.array(valid)).dictionary_encode().indices.to_numpy(), return_index=True)
    first[order[where]] = True
    if not first.any():
        raise ValueError(f"{name}: no items (of {len(ids)} rows, {int((~valid).sum())} have no item_id)")
    repeated = ids.filter(pa.array(valid & ~first))
    unique = table.filter(pa.array(first))
    columns = {"item_id": ids.filter(pa.array(first))}
    for column_name in unique.column_names:
        if column_name == "item_id":
            continue
        column = unique.column(column_name)
        if column_name == "image" and not _is_list(column.type):
            column = picture_sources(column, name)
        columns[column_name] = column
    report: dict[str, Any] = {
        "rows": len(ids),
        "kept": int(first.sum()),
        "set aside": {
            "no item_id": int((~valid).sum()),
            "repeated item_id (the first one is kept)": {"count": len(repeated), "examples": examples(repeated)},
        },
    }
    if "title" in columns:
        titles = as_text(columns["title"])
        columns["title"] = titles
        report["without title"] = titles.null_count
    return pa.table(columns), report
