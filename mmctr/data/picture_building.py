"""Building of a cache of decoded pictures, and a second look at pictures that were refused."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.lib.format import open_memmap

from mmctr.data.images import REMEDIES, PictureError, Resize, decode_picture, read_picture
from mmctr.data.picture_cache import reserve
from mmctr.files import read_json, replace_file, write_json

CHUNK = 512
"""pictures that are decoded between two notes of the progress"""
REFUSED = "refused.json"
"""file of the refused pictures: position, reason, and state of the file at that time"""

FileState = list[int] | None
Refused = list[tuple[int, str, FileState]]


@dataclass(frozen=True)
class PictureSources:
    """The pictures of N items, and how to decode the pictures."""

    cells: pa.ChunkedArray
    """(N,) relative paths or encoded pictures, null for an item without a picture"""
    item_ids: pa.Array
    """(N,) raw ids, for examples in the report"""
    root: Path | None
    """folder that relative paths start from"""
    size: int
    resize: Resize
    threads: int
    key: str
    """changes with the ids and the cells"""

    @cached_property
    def rows(self) -> np.ndarray:
        """(M,) catalog rows of the items with a cell, in the order of the arrays of the cache."""
        return np.flatnonzero(np.asarray(self.cells.is_valid()))

    def state(self, row: int) -> FileState:
        """Time and size of the file of a picture; None for a file that does not exist, and for encoded pictures."""
        cell = self.cells[row].as_py()
        if not isinstance(cell, str) or self.root is None:
            return None
        try:
            status = (self.root / cell).stat()
        except (OSError, ValueError):
            return None
        return [status.st_mtime_ns, status.st_size]

    def decode(self, positions: Iterable[int], values: np.ndarray, hashes: np.ndarray) -> Refused:
        """Decode the pictures at some positions of the cache into (M, 3, S, S) `values` and (M,) `hashes`.

        Returns:
            The pictures that cannot be used.
        """
        rows = self.rows

        def one(position: int) -> tuple[int, str, FileState] | None:
            row = int(rows[position])
            state = self.state(row)
            try:
                pixels = decode_picture(
                    read_picture(self.cells[row].as_py(), self.root), self.size, self.resize
                ).numpy()
            except PictureError as error:
                return position, error.reason, state
            values[position] = pixels
            hashes[position] = int.from_bytes(blake2b(pixels.tobytes(), digest_size=8).digest(), signed=True)
            return None

        with ThreadPoolExecutor(self.threads) as pool:
            return [refused for refused in pool.map(one, positions) if refused is not None]


def build_pictures(folder: Path, sources: PictureSources) -> None:
    """Build a cache, or continue an interrupted build of the same pictures.

    Args:
        folder: folder of the cache.
        sources: the pictures.

    Raises:
        OSError: the disk has no room for the cache.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").unlink(missing_ok=True)
    values_path, hashes_path, progress_path = folder / "values.npy", folder / "hashes.npy", folder / "progress.json"
    progress = read_json(progress_path) if progress_path.is_file() else {}
    shape = (len(sources.rows), 3, sources.size, sources.size)
    if progress.get("key") == sources.key and values_path.is_file() and hashes_path.is_file():
        values, hashes = open_memmap(values_path, mode="r+"), open_memmap(hashes_path, mode="r+")
    else:
        progress_path.unlink(missing_ok=True)
        progress = {"key": sources.key, "done": 0, "refused": []}
        values, hashes = reserve(values_path, shape), reserve(hashes_path, shape[:1], np.int64)
    for start in range(progress["done"], shape[0], CHUNK):
        stop = min(start + CHUNK, shape[0])
        progress["refused"] += sources.decode(range(start, stop), values, hashes)
        _flush(values, hashes)
        progress["done"] = stop
        write_json(progress_path, progress)
    _finish(folder, sources, progress["refused"], 0)
    progress_path.unlink(missing_ok=True)


def look_again(folder: Path, sources: PictureSources) -> None:
    """Decode the refused pictures of a finished cache whose files have appeared or changed since.

    Args:
        folder: folder of the cache.
        sources: the pictures, of the same key as the cache.
    """
    refused: Refused = [(position, reason, state) for position, reason, state in read_json(folder / REFUSED)]
    rows = sources.rows
    changed = [position for position, _, state in refused if sources.state(int(rows[position])) != state]
    if not changed:
        return
    values, hashes = open_memmap(folder / "values.npy", mode="r+"), open_memmap(folder / "hashes.npy", mode="r+")
    again = sources.decode(changed, values, hashes)
    _flush(values, hashes)
    kept = [one for one in refused if one[0] not in set(changed)]
    revision = read_json(folder / "report.json")["revision"] + 1
    _finish(folder, sources, sorted([*kept, *again]), revision)


def _flush(*arrays: np.ndarray) -> None:
    for array in arrays:
        if isinstance(array, np.memmap):
            array.flush()


def _finish(folder: Path, sources: PictureSources, refused: Refused, revision: int) -> None:
    """Write the index of pictures by item, the refused pictures and, last, the report."""
    rows = sources.rows
    index = np.full(len(sources.cells), -1, np.int32)
    index[rows] = np.arange(len(rows))
    refused_rows = [int(rows[position]) for position, _, _ in refused]
    index[refused_rows] = -1

    def write(path: Path) -> None:
        with open(path, "wb") as handle:
            np.save(handle, index, allow_pickle=False)

    replace_file(folder / "index.npy", write)
    write_json(folder / REFUSED, refused)
    rejected: dict[str, dict[str, Any]] = {}
    for (_, reason, _), row in zip(refused, refused_rows, strict=True):
        entry = rejected.setdefault(reason, {"count": 0, "examples": [], "remedy": REMEDIES[reason]})
        entry["count"] += 1
        if len(entry["examples"]) < 3:
            entry["examples"].append(sources.item_ids[row].as_py())
    report = {
        "key": sources.key,
        "revision": revision,
        "items": len(sources.cells),
        "pictures": int((index >= 0).sum()),
        "items without a picture": len(sources.cells) - len(rows),
        "rejected": rejected,
    }
    write_json(folder / "report.json", report)
