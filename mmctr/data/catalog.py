"""Catalog: the items, raw id <-> row, their texts, and the cache of their pictures."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from mmctr.data.images import PictureError, decode_picture, read_picture
from mmctr.data.tables import as_ids, as_text, one_array, require_columns, rows_of
from mmctr.files import fingerprint, locked, read_json, replace_file, write_json

if TYPE_CHECKING:
    from datasets import Dataset

Resize = Literal["shortest", "longest", "squash"]


class Pictures:
    """Decoded pictures of a catalog in one memory-mapped uint8 file: (M, 3, S, S), and where each item's is."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.values = np.load(folder / "values.npy", mmap_mode="r", allow_pickle=False)
        self.index: np.ndarray = np.load(folder / "index.npy", allow_pickle=False)
        """(N,) int32 positions in `values`, -1 for items without a readable picture"""
        self.report: dict[str, Any] = read_json(folder / "report.json")

    def __reduce__(self) -> tuple[type[Pictures], tuple[Path]]:
        return Pictures, (self.folder,)  # a worker process maps the file anew: a pickled map is a copy of it all

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures of the given catalog rows: (n, 3, S, S) uint8, black where missing, and the (n,) bool mask."""
        position = self.index[rows.numpy()]
        there = position >= 0
        if there.all():
            images = self.values[position]
        else:
            images = np.zeros((len(position), *self.values.shape[1:]), np.uint8)
            images[there] = self.values[position[there]]
        return torch.from_numpy(images), torch.from_numpy(there)


class Catalog:
    """The items of a prepared dataset folder.

    `table` is a pyarrow table whose first column `item_id` is unique; rows are its positions. Build one from a
    folder with `mmctr.data.prepare.open_dataset`, or from any `datasets.Dataset` with `Catalog.from_dataset`.
    """

    def __init__(self, table: pa.Table, folder: Path, root: Path | None):
        self.table = table
        self.folder = folder
        """where caches of pictures and tokens are kept"""
        self.root = root
        """the dataset folder that relative picture paths start from"""
        self.item_ids: pa.Array = one_array(table.column("item_id"))

    def __len__(self) -> int:
        return len(self.item_ids)

    @property
    def items(self) -> Dataset:
        """The items as a `datasets.Dataset`, without their picture bytes."""
        from datasets import Dataset

        return Dataset(self.table.drop_columns(["image"]) if "image" in self.table.column_names else self.table)

    def rows(self, item_ids: Sequence[Any] | pa.Array) -> np.ndarray:
        """Catalog rows of raw ids: (n,) int64. Raises ValueError naming an id that is not in the catalog."""
        try:
            wanted = item_ids if isinstance(item_ids, pa.Array) else pa.array(item_ids)
        except pa.ArrowException as error:
            raise ValueError(f"item ids are all integers or all strings: {error}") from None
        wanted = as_ids(wanted, "item_id", "catalog")
        rows = rows_of(wanted, self.item_ids, "catalog")
        if (rows < 0).any():
            unknown = wanted[int(np.argmin(rows))].as_py()
            raise ValueError(f"item id {unknown!r} is not in the catalog of {len(self)} items")
        return rows

    def texts(self, columns: Sequence[str]) -> list[str]:
        """One text an item: its non-empty fields joined by ". "; "" where there is none."""
        require_columns(self.table, list(columns), "items")
        if not columns:
            return [""] * len(self)
        fields = [as_text(self.table.column(name)).to_pylist() for name in columns]
        return [". ".join(part for part in parts if part) for parts in zip(*fields, strict=True)]

    def tokens(
        self, columns: Sequence[str], tokenize: Callable[[list[str]], Tensor], key: str
    ) -> tuple[Tensor, Tensor]:
        """Token ids of every item, made once and cached: (N, T) int32 and the (N,) bool mask of items with text.

        `key` must change whenever the tokenizer does.
        """
        texts = self.texts(columns)
        path = self.folder / f"tokens-{fingerprint(key, chr(0).join(texts).encode())}.npy"
        if not path.is_file():
            starts = range(0, max(len(texts), 1), 4096)  # no items: a call tells how long a row is
            chunks = [tokenize(texts[start : start + 4096]).to(torch.int32) for start in starts]
            ids = torch.cat(chunks).numpy()

            def write(temporary: Path) -> None:
                with open(temporary, "wb") as handle:
                    np.save(handle, ids, allow_pickle=False)

            replace_file(path, write)
        ids = torch.from_numpy(np.load(path, allow_pickle=False))
        return ids, torch.tensor([bool(text) for text in texts])

    def pictures(self, size: int, resize: Resize, threads: int = 2) -> Pictures:
        """The picture cache for one size, built when it is not there yet; an interrupted build goes on.

        The cache is of these items: with others, or with other picture cells, it is built anew.
        """
        folder = self.folder / f"pictures-{size}-{resize}"
        key = self._pictures_key()
        with locked(folder):
            if not (folder / "report.json").is_file() or read_json(folder / "report.json").get("key") != key:
                self._build_pictures(folder, size, resize, threads, key)
        return Pictures(folder)

    def _sources(self) -> pa.ChunkedArray:
        if "image" in self.table.column_names:
            return self.table.column("image")
        return pa.chunked_array([pa.nulls(len(self), pa.string())])

    def _pictures_key(self) -> str:
        """Changes with the ids and the picture cells; of encoded pictures it looks at the sizes, not at all bytes."""
        cells = self._sources()
        if not pa.types.is_string(cells.type):
            cells = pc.binary_length(cells)  # type: ignore[attr-defined]
        digests = [fingerprint(str(part.to_pylist()).encode()) for part in (*cells.chunks, self.item_ids)]
        return fingerprint(digests)

    def _build_pictures(self, folder: Path, size: int, resize: Resize, threads: int, key: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").unlink(missing_ok=True)
        sources = self._sources()
        wanted = np.flatnonzero(np.asarray(sources.is_valid()))
        values_path, progress_path = folder / "values.npy", folder / "progress.json"
        progress = read_json(progress_path) if progress_path.is_file() else {}
        shape = (len(wanted), 3, size, size)
        if progress.get("key") == key and values_path.is_file():
            values = open_memmap(values_path, mode="r+")
        else:
            progress_path.unlink(missing_ok=True)
            progress = {"key": key, "done": 0, "rejected": []}
            values = _reserve(values_path, shape)

        def decode(position: int) -> str | None:
            source = sources[int(wanted[position])].as_py()
            try:
                values[position] = decode_picture(read_picture(source, self.root), size, resize).numpy()
            except PictureError as error:
                return error.reason
            return None

        chunk = 512
        with ThreadPoolExecutor(threads) as pool:
            for start in range(progress["done"], len(wanted), chunk):
                positions = range(start, min(start + chunk, len(wanted)))
                reasons = pool.map(decode, positions)
                progress["rejected"] += [
                    [int(p), reason] for p, reason in zip(positions, reasons, strict=True) if reason
                ]
                if isinstance(values, np.memmap):
                    values.flush()
                progress["done"] = positions.stop
                write_json(progress_path, progress)
        index = np.full(len(self), -1, np.int32)
        index[wanted] = np.arange(len(wanted))
        rejected = [int(wanted[position]) for position, _ in progress["rejected"]]
        index[rejected] = -1
        np.save(folder / "index.npy", index, allow_pickle=False)
        counts = Counter(reason for _, reason in progress["rejected"])
        examples: dict[str, list[Any]] = {}
        for (_, reason), row in zip(progress["rejected"], rejected, strict=True):
            if len(examples.setdefault(reason, [])) < 3:
                examples[reason].append(self.item_ids[row].as_py())
        report = {
            "key": key,
            "items": len(self),
            "pictures": int((index >= 0).sum()),
            "items without a picture": len(self) - len(wanted),
            "rejected": {reason: {"count": n, "examples": examples[reason]} for reason, n in counts.items()},
        }
        write_json(folder / "report.json", report)
        progress_path.unlink(missing_ok=True)

    @classmethod
    def from_dataset(cls, dataset: Dataset, folder: Path, root: Path | None = None) -> Catalog:
        """A catalog from any `datasets.Dataset` with an `item_id` column; an `Image` column may be called `image`."""
        from mmctr.data.prepare import clean_items

        folder = Path(folder)
        table, _ = clean_items(dataset_table(dataset), "dataset")
        folder.mkdir(parents=True, exist_ok=True)
        return cls(table, folder, root)


def _reserve(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A new mapped uint8 array on disk. Raises OSError now if the disk has no room: later it would kill the process."""
    try:
        if not np.prod(shape):  # an empty file cannot be mapped
            np.save(path, np.zeros(shape, np.uint8), allow_pickle=False)
            return np.zeros(shape, np.uint8)
        values = open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        if hasattr(os, "posix_fallocate"):
            with open(path, "r+b") as handle:
                os.posix_fallocate(handle.fileno(), 0, path.stat().st_size)
        return values
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(
            f"cannot write {path} of {np.prod(shape, dtype=np.int64):,} bytes: {error}. Free some space, keep the "
            f"dataset elsewhere ($MMCTR_CACHE, or `mmctr prepare --out`), or take smaller pictures"
        ) from error


def dataset_table(dataset: Dataset) -> pa.Table:
    """The rows of a `datasets.Dataset` as one pyarrow table, pictures left encoded."""
    from datasets import Image

    for name, feature in dataset.features.items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
    return dataset.with_format("arrow")[:]  # type: ignore[return-value]
