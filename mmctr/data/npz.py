"""Arrays from .npz files of unknown origin: an announced size that the file cannot hold is refused before memory is
taken."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

BOMB_BYTES, BOMB_RATIO = 1 << 28, 100
"""an array of more bytes than the first that is packed more tightly than the second is refused: vectors and ids are
packed by less than 20"""


def read_npz(path: Path, *names: str) -> dict[str, np.ndarray]:
    """Arrays of an .npz file, without pickle.

    Args:
        path: the file.
        names: names of the arrays that must be there; none: all arrays.

    Raises:
        ValueError: the file is no .npz file, an array is missing, of Python objects, cut or announced larger than the
            file can hold; the message names the file and the array.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            chosen = names or tuple(members)
            for name in chosen:
                if name not in members:
                    raise ValueError(f"{path}: has no array {name!r}, only {', '.join(sorted(members)) or 'none'}")
                _check_member(archive, members[name], path)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in chosen}
    except (zipfile.BadZipFile, OSError, EOFError, KeyError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{path}: not a readable .npz file ({error})") from None


def _check_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> None:
    """Raise ValueError where an array is none, or cannot be as large as announced."""
    name = info.filename.removesuffix(".npy")
    if info.file_size > BOMB_BYTES and info.file_size > BOMB_RATIO * info.compress_size:
        raise ValueError(
            f"{path}: the array {name!r} would unpack {info.compress_size:,} bytes to {info.file_size:,}; store the "
            f"arrays with numpy.savez"
        )
    with archive.open(info) as member:
        try:
            version = npy.read_magic(member)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, _, kind = read(member, max_header_size=10_000)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path}: {name!r} is no array ({' '.join(str(error).split())[:200]})") from None
        if kind.hasobject:
            raise ValueError(f"{path}: the array {name!r} holds Python objects; store numbers or text")
        if math.prod(shape) * kind.itemsize != info.file_size - member.tell():
            raise ValueError(f"{path}: the array {name!r} is cut, or announced as {shape} of {kind} and holds less")
