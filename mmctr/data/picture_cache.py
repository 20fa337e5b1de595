"""Decoded, resized pictures of a catalog in one memory-mapped file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from mmctr.files import read_json

if TYPE_CHECKING:
    pass


CACHE_FORMAT = 2


class Pictures:
    """Decoded pictures of a catalog in one memory-mapped uint8 file: (M, 3, S, S), and where each item's is."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.values = np.load(folder / "values.npy", mmap_mode="r", allow_pickle=False)
        self.index: np.ndarray = np.load(folder / "index.npy", allow_pickle=False)
        """(N,) int32 positions in `values`, -1 for items without a readable picture"""
        self.hashes: np.ndarray = np.load(folder / "hashes.npy", allow_pickle=False)
        """(M,) int64 of the pixels: equal for equal pictures"""
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


def reserve(path: Path, shape: tuple[int, ...], dtype: type[np.integer] = np.uint8) -> np.ndarray:
    """A new mapped array on disk. Raises OSError now if the disk has no room: later it would kill the process."""
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
            f"cannot write {path} of {num_bytes:,} bytes: {error}. Free some space, keep the "
            f"dataset elsewhere ($MMCTR_CACHE, or `mmctr prepare --out`), or take smaller pictures"
        ) from error
