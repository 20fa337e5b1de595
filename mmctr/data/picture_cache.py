"""Decoded, resized pictures of a catalog in one memory-mapped file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from mmctr.files import read_json, remedy_of

CACHE_FORMAT = 3


class Pictures:
    """Decoded pictures of a catalog in one memory-mapped (M, 3, S, S) uint8 file, and the index of pictures by item.

    Args:
        folder: folder of a cache that `Catalog.pictures` has built.

    Raises:
        ValueError: a file of the cache is missing or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.values = _read(folder, "values.npy", mmap_mode="r")
        self.index: np.ndarray = _read(folder, "index.npy")
        """(N,) int32 positions in `values`, -1 for an item without a readable picture"""
        self.hashes: np.ndarray = _read(folder, "hashes.npy")
        """(M,) int64 hashes of the pixels, equal for equal pictures"""
        self.report: dict[str, Any] = read_json(folder / "report.json")
        if len(self.hashes) != len(self.values) or self.index.max(initial=-1) >= len(self.values):
            raise ValueError(f"{folder}: the files do not fit each other; delete the folder, it is made again")

    def __reduce__(self) -> tuple[type[Pictures], tuple[Path]]:
        return Pictures, (self.folder,)  # a worker process maps the file anew: a pickled map copies the whole file

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The pictures of some items.

        Args:
            rows: (n,) catalog rows.

        Returns:
            (n, 3, S, S) uint8 pictures, black for an item without a picture, and the (n,) bool mask of items with a
            picture.
        """
        position = self.index[rows.numpy()]
        has_image = position >= 0
        if has_image.all():
            images = self.values[position]
        else:
            images = np.zeros((len(position), *self.values.shape[1:]), np.uint8)
            images[has_image] = self.values[position[has_image]]
        return torch.from_numpy(images), torch.from_numpy(has_image)


def _read(folder: Path, name: str, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    try:
        return np.load(folder / name, mmap_mode=mmap_mode, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder / name}: damaged ({reason}); delete the folder, it is made again") from None


def reserve(path: Path, shape: tuple[int, ...], dtype: type[np.integer] = np.uint8) -> np.ndarray:
    """Create a memory-mapped array on disk with all disk blocks allocated, since a disk that becomes full while the
    array is written would kill the process.

    Args:
        path: path of the .npy file.
        shape: shape of the array.
        dtype: type of the array.

    Raises:
        OSError: the disk has no room for the array.
    """
    try:
        if not np.prod(shape):  # an empty file cannot be mapped
            np.save(path, np.zeros(shape, dtype), allow_pickle=False)
            return np.zeros(shape, dtype)
        values = open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):
            with open(path, "r+b") as handle:
                os.posix_fallocate(handle.fileno(), 0, path.stat().st_size)
        return values
    except OSError as error:
        path.unlink(missing_ok=True)
        num_bytes = np.prod(shape, dtype=np.int64) * np.dtype(dtype).itemsize
        raise OSError(
            f"cannot write {path} of {num_bytes:,} bytes: {error}. {remedy_of(error)} for the dataset ($MMCTR_CACHE "
            f"or `mmctr prepare --out`), or take smaller pictures"
        ) from error
