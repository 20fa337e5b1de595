"""EmbeddingTable: item vectors by raw id, on disk; written in shards by any number of processes, resumable."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from mmctr.data.arrow import pc
from mmctr.data.embedding_identity import EmbeddingIdentity
from mmctr.data.tables import as_ids, read_table, require_columns, rows_of
from mmctr.files import read_json, replace_file, write_json

FORMAT = 1
ITEMS = "items.parquet"
_FACTS = "facts"


@dataclass(frozen=True)
class EmbeddingTable:
    """Vectors of items.

    `ids` (n,) raw item ids and `vectors` (n, D) float32, unit norm when written by `mmctr embed`. Items without any
    content have no row.
    """

    ids: pa.Array
    vectors: np.ndarray
    titles: list[str] | None = None
    manifest: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dim(self) -> int:
        return self.vectors.shape[1]

    @property
    def identity(self) -> EmbeddingIdentity:
        """What made the vectors; nothing is known of a file of another program."""
        return identity_of(self.manifest)

    def aligned(self, item_ids: pa.Array) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors in the order of `item_ids`: (N, D) float32 and the (N,) bool mask of ids that are in the table."""
        rows = rows_of(item_ids, self.ids, "the embedding table and the catalog")
        there = rows >= 0
        vectors = np.zeros((len(rows), self.dim), np.float32)
        vectors[there] = self.vectors[rows[there]]
        return torch.from_numpy(vectors), torch.from_numpy(there)

    def without(self, item_ids: pa.Array) -> EmbeddingTable:
        """The items that are not among `item_ids`."""
        rows = np.flatnonzero(rows_of(self.ids, item_ids, "items") < 0)
        titles = None if self.titles is None else [self.titles[row] for row in rows]
        return EmbeddingTable(self.ids.take(pa.array(rows)), self.vectors[rows], titles, self.manifest)

    @classmethod
    def read(cls, path: str | Path) -> EmbeddingTable:
        """An embedding folder, a Parquet file (`item_id` and one list column), or an .npz or .safetensors file
        (`item_id` and `vectors`).

        Raises ValueError naming the file and what is wrong with it.
        """
        path = Path(path)
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
    """One or several tables side by side, aligned with `item_ids`: (N, sum of D) and the (N,) mask of items in any.

    Where an item lacks one of several tables, the mean vector of that table stands in: it carries no opinion.
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


def _read_items(folder: Path) -> tuple[dict[str, Any], pa.Table]:
    """The manifest of a finished folder, and the items that have a vector there."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such embedding folder or file")
    if not (folder / "manifest.json").is_file():
        raise ValueError(
            f"{folder}: not a finished embedding folder (no manifest.json); run `mmctr embed` again, it goes on"
        )
    manifest = read_json(folder / "manifest.json")
    return manifest, read_table(folder / _items_file(manifest), ("item_id",))


def _read_folder(folder: Path) -> EmbeddingTable:
    manifest, items = _read_items(folder)
    try:
        shards = [load_file(folder / name) for name in manifest["shards"]]
    except Exception as error:
        raise ValueError(
            f"{folder}: a shard cannot be read ({error}); delete the folder and run `mmctr embed` again"
        ) from None
    vectors = np.concatenate([shard["vectors"][shard["has_content"]] for shard in shards])
    ids = as_ids(items.column("item_id"), "item_id", folder)
    titles = items.column("title").to_pylist() if "title" in items.column_names else None
    return _checked(ids, vectors, folder, titles=titles, manifest=manifest)


def _read_npz(path: Path) -> EmbeddingTable:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            ids, vectors = arrays["item_id"], arrays["vectors"]
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: needs the arrays `item_id` and `vectors` ({error})") from None
    return _checked(as_ids(pa.chunked_array([pa.array(ids)]), "item_id", path), vectors, path)


def _read_safetensors(path: Path) -> EmbeddingTable:
    """As `mmctr export` writes it: text ids are bytes on end, with offsets into them."""
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


def identity_of(manifest: dict[str, Any]) -> EmbeddingIdentity:
    """What made the vectors that a manifest is of; nothing is known of vectors of another program."""
    return EmbeddingIdentity.from_json(manifest.get("identity", {}))


def begun_identity(folder: Path) -> tuple[EmbeddingIdentity | None, dict[str, Any] | None]:
    """The identity and the facts with which a folder was begun, finished or not; None where there are none."""
    if (folder / "manifest.json").is_file():
        manifest = read_json(folder / "manifest.json")
        return EmbeddingIdentity.from_json(manifest["identity"], str(folder)), manifest.get(_FACTS)
    if (folder / "begun.json").is_file():
        values = read_json(folder / "begun.json")
        facts = values.pop(_FACTS, None)
        return EmbeddingIdentity.from_json(values, str(folder / "begun.json")), facts
    return None, None


def write_embeddings(
    folder: Path,
    item_ids: pa.Array,
    titles: list[str | None] | None,
    encode: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    identity: EmbeddingIdentity,
    *,
    append: bool = False,
    facts: dict[str, Any] | None = None,
    shard_size: int = 8192,
    rank: int = 0,
    world_size: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> EmbeddingTable | None:
    """Encode a catalog shard by shard; shards that are there already are kept, so a killed export goes on.

    Args:
        encode: catalog rows (n,) -> vectors (n, D) and the (n,) bool mask of items with content.
        identity: what the vectors are made of (model, data). A folder begun with another identity is refused.
        append: the catalog has grown: encode the items a finished folder has no vector of, into further shards. Until
            the last moment the folder reads as it was. The catalog, its folder and that of the run may be others.
        facts: more to say of them in the manifest; those of whoever began the folder are kept.
        wait: barrier between processes; shard s is written by process s % world_size.

    Returns:
        With `append`, for rank 0, the items that are new.
    """

    def write_shards(names: list[str], rows: np.ndarray) -> None:
        wait()
        for number, name in enumerate(names):
            if number % world_size != rank or (folder / name).is_file():
                continue
            vectors, has = encode(rows[number * shard_size : (number + 1) * shard_size])
            arrays = {"vectors": np.ascontiguousarray(vectors, np.float32), "has_content": np.ascontiguousarray(has)}
            replace_file(folder / name, lambda path, arrays=arrays: save_file(arrays, path))
        wait()

    write = _write_further if append else _write_all
    new = write(folder, item_ids, titles, identity, facts, shard_size, rank == 0, write_shards)
    wait()
    return new


WriteShards = Callable[[list[str], np.ndarray], None]
"""(names, catalog rows) -> all processes have written these rows into shards of these names"""


def _write_all(
    folder: Path,
    item_ids: pa.Array,
    titles: list[str | None] | None,
    identity: EmbeddingIdentity,
    facts: dict[str, Any] | None,
    shard_size: int,
    is_main: bool,
    write_shards: WriteShards,
) -> None:
    names = [_shard(start // shard_size) for start in range(0, len(item_ids), shard_size)]
    begun = folder / "begun.json"
    if is_main:
        folder.mkdir(parents=True, exist_ok=True)
        old, kept = begun_identity(folder)
        # a killed export may leave a hidden temporary file
        if old is None and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise ValueError(f"{folder}: the folder is not empty and holds no embeddings; choose another --out")
        if old is not None and old != identity:
            raise ValueError(
                f"{folder}: holds embeddings of another run or dataset; choose another --out or delete it (--append "
                f"adds items that are new in the same dataset)"
            )
        facts = facts if old is None else kept
        write_json(begun, identity.to_json() | ({_FACTS: facts} if facts else {}))
    write_shards(names, np.arange(len(item_ids)))
    if is_main:
        has = np.concatenate([load_file(folder / name)["has_content"] for name in names])
        items = _item_rows(item_ids, titles, np.flatnonzero(has))
        replace_file(folder / ITEMS, lambda path: pyarrow.parquet.write_table(items, path))
        _write_manifest(folder, identity, names, ITEMS, len(has), int(has.sum()), facts)
        begun.unlink(missing_ok=True)


def _write_further(
    folder: Path,
    item_ids: pa.Array,
    titles: list[str | None] | None,
    identity: EmbeddingIdentity,
    facts: dict[str, Any] | None,
    shard_size: int,
    is_main: bool,
    write_shards: WriteShards,
) -> EmbeddingTable | None:
    manifest, known = _read_items(folder)
    old = EmbeddingIdentity.from_json(manifest["identity"], str(folder))
    key = old.change_of_encoder(identity)
    if key is not None:
        raise ValueError(
            f"{folder}: its vectors are of {key} {getattr(old, key)!r}, not {getattr(identity, key)!r}; append with "
            f"the run and the options they were made with"
        )
    known_ids = as_ids(known.column("item_id"), "item_id", folder)
    rows = np.flatnonzero((rows_of(item_ids, known_ids, "catalog") < 0) & np.asarray(item_ids.is_valid()))
    done = list(manifest["shards"])
    names = [_shard(len(done) + start // shard_size) for start in range(0, len(rows), shard_size)]
    begun = folder / "appending.json"
    if is_main:
        mark = replace(identity, shard_size=shard_size).to_json()
        if not begun.is_file() or read_json(begun) != mark:
            # shards of a call that was killed, for another state of the catalog
            for path in folder.glob("vectors-*.safetensors"):
                if path.name not in done:
                    path.unlink()
            write_json(begun, mark)
    write_shards(names, rows)
    if not is_main:
        return None
    shards = [load_file(folder / name) for name in names]
    has = np.concatenate([np.zeros(0, bool), *(shard["has_content"] for shard in shards)])
    new = _item_rows(item_ids, titles if "title" in known.column_names else None, rows[has])
    items = pa.concat_tables([known.cast(new.schema), new])
    before = _items_file(manifest)
    name = f"items-{len(done) + len(names):05d}.parquet" if names else before
    replace_file(folder / name, lambda path: pyarrow.parquet.write_table(items, path))
    facts = facts or manifest.get(_FACTS)
    _write_manifest(folder, old.after_appending(identity), done + names, name, len(item_ids), len(items), facts)
    if name != before:
        (folder / before).unlink()
    begun.unlink(missing_ok=True)
    vectors = [shard["vectors"][shard["has_content"]] for shard in shards]
    return EmbeddingTable(
        new.column("item_id").combine_chunks(),
        np.concatenate(vectors) if vectors else np.zeros((0, 0), np.float32),
        new.column("title").to_pylist() if "title" in new.column_names else None,
        read_json(folder / "manifest.json"),
    )


def _shard(number: int) -> str:
    return f"vectors-{number:05d}.safetensors"


def _item_rows(item_ids: pa.Array, titles: list[str | None] | None, rows: np.ndarray) -> pa.Table:
    columns: dict[str, Any] = {"item_id": item_ids.take(pa.array(rows))}
    if titles is not None:
        columns["title"] = pa.array(titles, type=pa.string()).take(pa.array(rows))
    return pa.table(columns)


def _items_file(manifest: dict[str, Any]) -> str:
    """Items get another file when some are appended, so that the folder reads as it was until the manifest names it."""
    return manifest.get("items_file", ITEMS)


def _write_manifest(
    folder: Path,
    identity: EmbeddingIdentity,
    shards: list[str],
    items_file: str,
    items: int,
    vectors: int,
    facts: dict[str, Any] | None,
) -> None:
    manifest: dict[str, Any] = {"format": FORMAT, "identity": identity.to_json(), "shards": shards}
    if items_file != ITEMS:
        manifest["items_file"] = items_file
    counts = {"items": items, "vectors": vectors, "without content": items - vectors}
    write_json(folder / "manifest.json", manifest | counts | ({_FACTS: facts} if facts else {}))


def require_suffix(out: Path, *suffixes: str) -> None:
    if out.suffix not in suffixes:
        raise ValueError(
            f"--out {out}: this format is read by its ending; give a name that ends in {' or '.join(suffixes)}"
        )


def write_npz(table: EmbeddingTable, out: Path) -> None:
    """The arrays `item_id` (n,) and `vectors` (n, D)."""
    require_suffix(out, ".npz")
    save_arrays(out, item_id=numpy_ids(table.ids, out), vectors=table.vectors)


def save_arrays(out: Path, **arrays: np.ndarray) -> None:
    def write(path: Path) -> None:
        with open(path, "wb") as handle:  # given a name, savez would add an ending to it
            np.savez(handle, **arrays)  # type: ignore[arg-type]

    replace_file(out, write)


def numpy_ids(ids: pa.Array, out: Path) -> np.ndarray:
    """Ids as an int64 or text array, which need no pickle. Raises ValueError for texts NumPy would shorten."""
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
