"""EmbeddingTable: item vectors by raw id, read from embedding folders and from files of other programs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file

from mmctr.data.arrow import pc
from mmctr.data.embedding_identity import EmbeddingIdentity
from mmctr.data.npz import read_npz
from mmctr.data.tables import as_ids, read_table, require_columns, rows_of
from mmctr.files import replace_file, user_path
from mmctr.manifests import read_manifest, require_types

FORMAT = 1
AGAIN = "delete the folder and run `mmctr embed` again"
NAMES = re.compile(r"(items|items-\d+)\.parquet|vectors-\d+\.safetensors")
"""names of the files of an embedding folder: a manifest that names another file was not written by mmctr"""
ITEMS = "items.parquet"


@dataclass(frozen=True)
class EmbeddingTable:
    """Vectors of n items by raw id. Items without any content have no row.

    Example:
        ```python
        table = mmctr.EmbeddingTable.read("demo/embeddings")
        item_ids = mmctr.open_dataset("demo/data").catalog.item_ids
        vectors, has_vector = table.aligned(item_ids)  # (N, table.dim) float32 and (N,) bool, in catalog order
        ```
    """

    ids: pa.Array
    """(n,) raw item ids"""
    vectors: np.ndarray
    """(n, D) float32, of unit norm when written by `mmctr embed` for a run without a head"""
    titles: list[str] | None = None
    """(n,) titles of the items; None where the catalog has no titles"""
    manifest: dict[str, Any] = field(default_factory=dict)
    """the file `manifest.json` of an embedding folder; empty for a file of another program"""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dim(self) -> int:
        """D, the number of dimensions of a vector."""
        return self.vectors.shape[1]

    @property
    def identity(self) -> EmbeddingIdentity:
        """The run, data and options that produced the vectors; all unknown for a file of another program."""
        return identity_of(self.manifest)

    def aligned(self, item_ids: pa.Array) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors in the order of some item ids.

        Args:
            item_ids: (N,) raw ids, of the same type as `ids`.

        Returns:
            (N, D) float32 vectors, zero for ids without a row in the table, and the (N,) bool mask of ids with a row.

        Raises:
            ValueError: one side has integer ids and the other side strings.

        Example:
            ```python
            import numpy as np
            import pyarrow as pa

            table = mmctr.EmbeddingTable(pa.array([7, 8]), np.eye(2, dtype=np.float32))
            vectors, has_vector = table.aligned(pa.array([8, 9]))
            assert vectors.tolist() == [[0, 1], [0, 0]] and has_vector.tolist() == [True, False]
            ```
        """
        rows = rows_of(item_ids, self.ids, "the embedding table and the catalog")
        has_vector = rows >= 0
        vectors = np.zeros((len(rows), self.dim), np.float32)
        vectors[has_vector] = self.vectors[rows[has_vector]]
        return torch.from_numpy(vectors), torch.from_numpy(has_vector)

    def without(self, item_ids: pa.Array) -> EmbeddingTable:
        """The table without the rows of some items.

        Args:
            item_ids: raw ids of the items to leave out; ids without a row in the table are ignored.

        Example:
            ```python
            table = mmctr.EmbeddingTable.read("demo/embeddings")
            assert len(table.without(table.ids[:10])) == len(table) - 10
            ```
        """
        rows = np.flatnonzero(rows_of(self.ids, item_ids, "items") < 0)
        titles = None if self.titles is None else [self.titles[row] for row in rows]
        return EmbeddingTable(self.ids.take(pa.array(rows)), self.vectors[rows], titles, self.manifest)

    @classmethod
    def read(cls, path: str | Path) -> EmbeddingTable:
        """Read vectors from disk.

        Args:
            path: an embedding folder of `mmctr embed`, a Parquet file (the column `item_id` and one list column), or
                an .npz or .safetensors file (the arrays `item_id` and `vectors`).

        Raises:
            ValueError: the file is missing, damaged or of another format, an id is repeated or null, or a vector holds
                a value that is not finite; the message names the file.

        Example:
            ```python
            table = mmctr.EmbeddingTable.read("demo/embeddings")
            print(len(table), table.dim, table.ids[0].as_py(), table.vectors[0])
            ```
        """
        path = user_path(path)
        if path.is_dir():
            return _read_folder(path)
        if not path.is_file():
            raise ValueError(f"{path}: no such embedding folder or file")
        if path.suffix == ".npz":
            return _read_npz(path)
        if path.suffix == ".parquet":
            return _read_parquet(path)
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        raise ValueError(
            f"{path}: an embedding table is a folder of `mmctr embed`, a .parquet, an .npz or a .safetensors file"
        )


def read_tables(paths: str | list[str], item_ids: pa.Array) -> tuple[torch.Tensor, torch.Tensor]:
    """Read one or several embedding tables and concatenate the vectors of every item.

    An item without a row in one of several tables gets the mean vector of that table.

    Args:
        paths: embedding folders or files, as `EmbeddingTable.read` takes.
        item_ids: (N,) raw ids that give the order of the rows.

    Returns:
        (N, sum of the dimensions) float32 vectors and the (N,) bool mask of items with a row in any table.

    Raises:
        ValueError: a table cannot be read, or the types of the ids differ.
    """
    blocks = [EmbeddingTable.read(path).aligned(item_ids) for path in ([paths] if isinstance(paths, str) else paths)]
    for vectors, has in blocks:
        if len(blocks) > 1 and has.any():
            vectors[~has] = vectors[has].mean(0)
    return torch.cat([vectors for vectors, _ in blocks], dim=1), torch.stack([has for _, has in blocks]).any(0)


def _checked(ids: pa.Array, vectors: np.ndarray, path: Path, **more: Any) -> EmbeddingTable:
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if vectors.ndim != 2 or len(vectors) != len(ids):
        raise ValueError(f"{path}: {len(ids)} ids but vectors of shape {vectors.shape}; one vector an item is needed")
    if ids.null_count or len(ids.unique()) != len(ids):
        raise ValueError(f"{path}: item ids repeat or are null; keep one vector an item")
    if not np.isfinite(vectors).all():
        bad = int(np.argmin(np.isfinite(vectors).all(1)))
        raise ValueError(f"{path}: the vector of item {ids[bad].as_py()!r} is not finite")
    return EmbeddingTable(ids, vectors, **more)


def read_items(folder: Path) -> tuple[dict[str, Any], pa.Table]:
    """The manifest of a finished embedding folder, and the table of the items that have a vector in the folder.

    Raises:
        ValueError: the folder is missing or unfinished, or one of the files is missing or damaged; the message names
            the file and the remedy.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such embedding folder or file")
    if not (folder / "manifest.json").is_file():
        begun = (folder / "begun.json").is_file()
        raise ValueError(
            f"{folder}: not a finished embedding folder (no manifest.json); "
            + ("run `mmctr embed` again, it goes on" if begun else "give a folder that `mmctr embed` has written")
        )
    manifest = read_manifest(folder / "manifest.json", AGAIN)
    values = manifest.values
    require_types(values, manifest.path, identity=dict, shards=list, items=int, vectors=int)
    names = [items_file(values), *values["shards"]]
    for name in names:
        if not isinstance(name, str) or not NAMES.fullmatch(name):
            raise ValueError(f"{manifest.path}: names the file {name!r}, which is none of an embedding folder; {AGAIN}")
    values["identity"] = EmbeddingIdentity.from_json(values["identity"], str(manifest.path), folder).to_json()
    manifest.check(*names)
    return values, read_table(folder / items_file(values), ("item_id",))


def read_shard(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The vectors (n, D) of a shard of an embedding folder, and the (n,) bool mask of items with content.

    Raises:
        ValueError: the file cannot be read, or holds other arrays; the message names the file.
    """
    try:
        arrays = load_file(path)
        vectors, has = arrays["vectors"], arrays["has_content"]
    except (KeyError, OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); {AGAIN}") from None
    if vectors.ndim != 2 or vectors.dtype != np.float32 or has.dtype != bool or has.shape != vectors.shape[:1]:
        raise ValueError(f"{path}: holds no vectors of items; {AGAIN}")
    return vectors, has


def _read_folder(folder: Path) -> EmbeddingTable:
    manifest, items = read_items(folder)
    shards = [read_shard(folder / name) for name in manifest["shards"]]
    if len({vectors.shape[1] for vectors, _ in shards}) > 1:
        raise ValueError(f"{folder}: the vectors of the shards differ in length; {AGAIN}")
    vectors = np.concatenate([np.zeros((0, 0), np.float32)] if not shards else [v[has] for v, has in shards])
    ids = as_ids(items.column("item_id"), "item_id", folder)
    titles = items.column("title").to_pylist() if "title" in items.column_names else None
    return _checked(ids, vectors, folder, titles=titles, manifest=manifest)


def _read_npz(path: Path) -> EmbeddingTable:
    try:
        arrays = read_npz(path, "item_id", "vectors")
    except ValueError as error:
        raise ValueError(f"{error}; an embedding table needs the arrays `item_id` and `vectors`") from None
    ids, vectors = arrays["item_id"], arrays["vectors"]
    if ids.ndim != 1 or ids.dtype.kind not in "iuUS" or vectors.dtype.kind not in "fiu":
        raise ValueError(f"{path}: `item_id` holds {ids.dtype} of shape {ids.shape}, `vectors` {vectors.dtype}")
    return _checked(as_ids(pa.chunked_array([pa.array(ids)]), "item_id", path), vectors, path)


def _read_safetensors(path: Path) -> EmbeddingTable:
    """Read a file of `mmctr export`: text ids are concatenated UTF-8 bytes with the offsets of every id."""
    try:
        arrays = load_file(path)
        ids, vectors = arrays["item_id"], arrays["vectors"]
    except (KeyError, OSError, SafetensorError) as error:
        raise ValueError(f"{path}: needs the tensors `item_id` and `vectors` ({error})") from None
    if "item_id_offsets" not in arrays:
        return _checked(as_ids(pa.array(ids.ravel()), "item_id", path), vectors, path)
    offsets = arrays["item_id_offsets"].astype(np.int64)
    sound = ids.dtype == np.uint8 and len(offsets) and offsets[0] == 0 and offsets[-1] == len(ids)
    if not sound or (np.diff(offsets) < 0).any():
        raise ValueError(
            f"{path}: `item_id_offsets` are not places in the bytes of `item_id`; export the vectors again"
        )
    try:
        texts = pa.LargeStringArray.from_buffers(len(offsets) - 1, pa.py_buffer(offsets), pa.py_buffer(ids))
        texts.validate(full=True)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: the ids in `item_id` are not UTF-8 ({error})") from None
    return _checked(as_ids(texts, "item_id", path), vectors, path)


def _read_parquet(path: Path) -> EmbeddingTable:
    table = read_table(path, ("item_id",))
    lists = [
        f.name
        for f in table.schema
        if pa.types.is_list(f.type) or pa.types.is_large_list(f.type) or pa.types.is_fixed_size_list(f.type)
    ]
    if len(lists) != 1:
        raise ValueError(f"{path}: needs exactly one list column of vectors, found {lists or 'none'}")
    require_columns(table, (lists[0],), path)
    column = table.column(lists[0])
    lengths = pc.list_value_length(column)
    if not len(table) or column.null_count or len(lengths.unique()) != 1:
        raise ValueError(f"{path}: the vectors in column {lists[0]!r} differ in length, or some are null")
    values = pa.concat_arrays([chunk.flatten() for chunk in column.chunks]).to_numpy(zero_copy_only=False)
    return _checked(as_ids(table.column("item_id"), "item_id", path), values.reshape(len(table), -1), path)


def located_identity(manifest: Path) -> EmbeddingIdentity:
    """The identity in `manifest.json` of an embedding folder, with the paths as seen from here.

    Raises:
        ValueError: the file is damaged.
    """
    values = read_manifest(manifest, AGAIN).values
    return EmbeddingIdentity.from_json(values.get("identity", {}), str(manifest), manifest.parent)


def identity_of(manifest: dict[str, Any], source: str = "manifest.json") -> EmbeddingIdentity:
    """The identity of the vectors that a manifest describes; all facts are unknown for vectors of another program.

    Args:
        manifest: the manifest of the vectors.
        source: name of the file, for the error message.

    Raises:
        ValueError: the entry `identity` is malformed.
    """
    return EmbeddingIdentity.from_json(manifest.get("identity", {}), source)


def read_identity(path: str | Path) -> EmbeddingIdentity:
    """The identity of an embedding folder, without reading the vectors; all facts are unknown for a file of another
    program."""
    manifest = Path(path) / "manifest.json"
    return located_identity(manifest) if manifest.is_file() else EmbeddingIdentity()


def items_file(manifest: dict[str, Any]) -> str:
    """The name of the items file. Appending writes another file, so that readers get the old state of the folder until
    the manifest names the new file."""
    return manifest.get("items_file", ITEMS)


def require_suffix(out: Path, *suffixes: str) -> None:
    """Check the suffix of an output file.

    Args:
        out: path of the file.
        suffixes: allowed suffixes, such as ".npz".

    Raises:
        ValueError: the path ends in another suffix.
    """
    if out.suffix not in suffixes:
        raise ValueError(
            f"--out {out}: this format is read by its ending; give a name that ends in {' or '.join(suffixes)}"
        )


def write_npz(table: EmbeddingTable, out: Path) -> None:
    """Write an .npz file with the arrays `item_id` (n,) and `vectors` (n, D).

    Raises:
        ValueError: `out` has another suffix, or NumPy cannot represent an id.
    """
    require_suffix(out, ".npz")
    save_arrays(out, item_id=numpy_ids(table.ids, out), vectors=table.vectors)


def save_arrays(out: Path, **arrays: np.ndarray) -> None:
    """Write arrays by name to an .npz file that is either whole or absent.

    Args:
        out: path of the file, with any suffix.
        arrays: array by name.
    """
    named: dict[str, Any] = arrays

    def write(path: Path) -> None:
        with open(path, "wb") as handle:  # given a name, savez would add a suffix
            np.savez(handle, **named)

    replace_file(out, write)


def numpy_ids(ids: pa.Array, out: Path) -> np.ndarray:
    """Ids as an int64 or text array, which NumPy stores without pickle.

    Args:
        ids: (n,) raw ids.
        out: path of the file to be written, for the error message.

    Raises:
        ValueError: an id ends in a zero character, which NumPy would drop.
    """
    if pa.types.is_integer(ids.type):
        return ids.to_numpy()
    array = np.array(ids.to_pylist(), dtype=np.str_)
    changed = np.asarray(pc.not_equal(pa.array(array, type=pa.string()), ids))
    if changed.any():
        raise ValueError(
            f"{out}: NumPy cannot hold the id {ids[int(changed.argmax())].as_py()!r}, which ends in a zero character; "
            f"export as parquet"
        )
    return array
