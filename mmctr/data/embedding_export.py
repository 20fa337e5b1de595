"""Export of item vectors into an embedding folder: shards written by any number of processes, resumable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from safetensors.numpy import save_file

from mmctr.data.embedding_identity import EmbeddingIdentity
from mmctr.data.embeddings import AGAIN, FORMAT, ITEMS, EmbeddingTable, items_file, read_items, read_shard
from mmctr.data.tables import as_ids, rows_of
from mmctr.files import read_json, replace_file, write_json
from mmctr.manifests import read_manifest, require_types, write_manifest

_FACTS = "facts"


def begun_identity(folder: Path) -> tuple[EmbeddingIdentity | None, dict[str, Any] | None]:
    """The identity and the facts with which an export into a folder was started, whether or not the export finished.

    Returns:
        The identity, None where the folder holds no embeddings, and the facts, None where none were given.
    """
    if (folder / "manifest.json").is_file():
        path = folder / "manifest.json"
    elif (folder / "begun.json").is_file():
        path = folder / "begun.json"
    else:
        return None, None
    values = read_manifest(path, AGAIN).values
    require_types(values, path, identity=dict)
    return EmbeddingIdentity.from_json(values["identity"], str(path), folder), values.get(_FACTS)


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
    """Encode a catalog shard by shard. Existing shards are not encoded again, so an interrupted export can continue.

    Args:
        folder: the embedding folder to write.
        item_ids: (N,) raw ids of the catalog.
        titles: (N,) titles of the catalog; None for a catalog without titles.
        encode: maps catalog rows (n,) to vectors (n, D) and the (n,) bool mask of items with content.
        identity: run, data and options that produce the vectors. A folder with another identity is refused.
        append: encode the items without a vector in a finished folder into further shards, because the catalog has
            grown. Readers of the folder get the old state until the last file is written. The catalog may be stored
            in another folder than before, and so may the run.
        facts: further entries of the manifest; the facts with which the export was started take precedence.
        shard_size: number of items per shard.
        rank: number of this process; shard s is written by process s % world_size.
        world_size: number of processes.
        wait: barrier between the processes.

    Returns:
        With `append`, on rank 0, the table of the new items; None otherwise.

    Raises:
        ValueError: the folder holds other files or embeddings with another identity.
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
"""`write_shards(names, rows)` writes the (n,) catalog rows into shards with the given names and waits until all
processes have done so"""


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
        old, old_facts = begun_identity(folder)
        # a killed export may leave a hidden temporary file
        if old is None and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise ValueError(f"{folder}: the folder is not empty and holds no embeddings; choose another --out")
        if old is not None and old != identity:
            raise ValueError(
                f"{folder}: holds embeddings of another run or dataset; choose another --out or delete it (--append "
                f"adds items that are new in the same dataset)"
            )
        facts = facts if old is None else old_facts
        if (folder / "manifest.json").is_file():  # a damaged shard is encoded again
            finished = read_manifest(folder / "manifest.json", AGAIN)
            for name in names:
                if name in finished.digests and finished.problem(name) is not None:
                    (folder / name).unlink(missing_ok=True)
        write_manifest(begun, {"identity": identity.to_json(folder)} | ({_FACTS: facts} if facts else {}), [])
    write_shards(names, np.arange(len(item_ids)))
    if is_main:
        has = np.concatenate([np.zeros(0, bool), *(read_shard(folder / name)[1] for name in names)])
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
    manifest, known = read_items(folder)
    old = EmbeddingIdentity.from_json(manifest["identity"], str(folder))
    key = old.change_of_encoder(identity)
    if key is not None:
        raise ValueError(
            f"{folder}: its vectors are of {key} {getattr(old, key)!r}, not {getattr(identity, key)!r}; append with "
            f"the run and the options they were made with"
        )
    rows = new_rows(folder, item_ids)
    done = list(manifest["shards"])
    names = [_shard(len(done) + start // shard_size) for start in range(0, len(rows), shard_size)]
    begun = folder / "appending.json"
    if is_main:
        mark = replace(identity, shard_size=shard_size).to_json(folder)
        if not begun.is_file() or read_json(begun) != mark:
            # shards of a call that was killed, for another state of the catalog
            for path in folder.glob("vectors-*.safetensors"):
                if path.name not in done:
                    path.unlink()
            write_json(begun, mark)
    write_shards(names, rows)
    if not is_main:
        return None
    shards = [read_shard(folder / name) for name in names]
    has = np.concatenate([np.zeros(0, bool), *(has for _, has in shards)])
    new = _item_rows(item_ids, titles if "title" in known.column_names else None, rows[has])
    items = pa.concat_tables([known.cast(new.schema), new])
    before = items_file(manifest)
    name = f"items-{len(done) + len(names):05d}.parquet" if names else before
    replace_file(folder / name, lambda path: pyarrow.parquet.write_table(items, path))
    facts = facts or manifest.get(_FACTS)
    _write_manifest(folder, old.after_appending(identity), done + names, name, len(item_ids), len(items), facts)
    if name != before:
        (folder / before).unlink()
    begun.unlink(missing_ok=True)
    vectors = [vectors[has] for vectors, has in shards]
    return EmbeddingTable(
        new.column("item_id").combine_chunks(),
        np.concatenate(vectors) if vectors else np.zeros((0, 0), np.float32),
        new.column("title").to_pylist() if "title" in new.column_names else None,
        read_manifest(folder / "manifest.json", AGAIN).values,
    )


def new_rows(folder: Path, item_ids: pa.Array) -> np.ndarray:
    """The catalog rows (n,) of the items without a vector in a finished embedding folder.

    Args:
        folder: the embedding folder.
        item_ids: (N,) raw ids of the catalog, null for a row without an id.

    Raises:
        ValueError: the folder holds no finished embeddings, or the ids are of another type.
    """
    known = as_ids(read_items(folder)[1].column("item_id"), "item_id", folder)
    return np.flatnonzero((rows_of(item_ids, known, "catalog") < 0) & np.asarray(item_ids.is_valid()))


def _shard(number: int) -> str:
    return f"vectors-{number:05d}.safetensors"


def _item_rows(item_ids: pa.Array, titles: list[str | None] | None, rows: np.ndarray) -> pa.Table:
    columns: dict[str, Any] = {"item_id": item_ids.take(pa.array(rows))}
    if titles is not None:
        columns["title"] = pa.array(titles, type=pa.string()).take(pa.array(rows))
    return pa.table(columns)


def _write_manifest(
    folder: Path,
    identity: EmbeddingIdentity,
    shards: list[str],
    file: str,
    items: int,
    vectors: int,
    facts: dict[str, Any] | None,
) -> None:
    manifest: dict[str, Any] = {"format": FORMAT, "identity": identity.to_json(folder), "shards": shards}
    if file != ITEMS:
        manifest["items_file"] = file
    counts = {"items": items, "vectors": vectors, "without content": items - vectors}
    values = manifest | counts | ({_FACTS: facts} if facts else {})
    write_manifest(folder / "manifest.json", values, [file, *shards])
