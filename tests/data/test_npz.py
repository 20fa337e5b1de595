"""Files of arrays that announce what they do not hold."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mmctr.data.embeddings import EmbeddingTable
from mmctr.data.npz import read_npz


def header(shape: tuple[int, ...], length: int = 0) -> bytes:
    """The head of an .npy file, with spaces up to a length."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(length).encode() + b"\n"
    return b"\x93NUMPY\x02\x00" + len(text).to_bytes(4, "little") + text


def write(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def test_sound_files_are_read(tmp_path):
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "v.npz", item_id=np.array(["a", "b"]), vectors=np.eye(2, dtype="f4"), more=np.zeros((3, 0)))
        arrays = read_npz(tmp_path / "v.npz")
        assert arrays["item_id"].tolist() == ["a", "b"] and arrays["more"].shape == (3, 0)
        assert EmbeddingTable.read(tmp_path / "v.npz").dim == 2


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("item_id.npy", header((1,)) + bytes(4))
        with archive.open("vectors.npy", "w", force_zip64=True) as member:
            member.write(header((300, 262144)))
            for _ in range(300):
                member.write(bytes(1 << 20))
    with pytest.raises(ValueError, match=r"bomb\.npz: the array 'vectors' would unpack .* to 314,5"):
        EmbeddingTable.read(tmp_path / "bomb.npz")


def test_announced_sizes_are_checked(tmp_path):
    ids = io.BytesIO()
    np.save(ids, np.arange(2))
    for content, message in (
        (header((10**9, 10**6)) + bytes(64), "cut, or announced"),
        (header((2, 4), 2_000_000) + bytes(32), "'vectors' is no array"),
        (header((-1, 4)) + bytes(32), "cut, or announced|is no array"),
        (b"hello", "'vectors' is no array"),
        (b"", "'vectors' is no array"),
    ):
        with pytest.raises(ValueError, match=rf"v\.npz: .*{message}"):
            EmbeddingTable.read(write(tmp_path / "v.npz", item_id=ids.getvalue(), vectors=content))
    np.savez(tmp_path / "o.npz", item_id=np.array([{}], object), vectors=np.eye(1))
    with pytest.raises(ValueError, match="holds Python objects"):
        EmbeddingTable.read(tmp_path / "o.npz")
    np.savez(tmp_path / "m.npz", item_id=np.arange(2))
    with pytest.raises(ValueError, match=r"has no array 'vectors', only item_id; an embedding table needs"):
        EmbeddingTable.read(tmp_path / "m.npz")
    for broken in (b"", b"PK\x03\x04 no zip"):
        (tmp_path / "b.npz").write_bytes(broken)
        with pytest.raises(ValueError, match="not a readable"):
            EmbeddingTable.read(tmp_path / "b.npz")
