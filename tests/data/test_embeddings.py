from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmctr.data.embedding_export import write_embeddings
from mmctr.data.embedding_identity import EmbeddingIdentity
from mmctr.data.embeddings import EmbeddingTable, read_tables

VECTORS = np.arange(12, dtype=np.float32).reshape(4, 3)
IDS = ["a", "b", "c", "d"]


def encode(rows):
    """Row r is [r, 2 r]; every fifth item has no content."""
    return np.stack([rows, 2 * rows], 1).astype(np.float32), rows % 5 != 4


def write(folder, n=12, identity=None, calls=None, titles=True, **more):
    def counted(rows):
        if calls is not None:
            calls.append(rows.tolist())
        return encode(rows)

    ids, names = pa.array([f"i{row}" for row in range(n)]), [f"t{row}" if row else None for row in range(n)]
    made_by = EmbeddingIdentity(**(identity or {"run": "x"}))
    write_embeddings(folder, ids, names if titles else None, counted, made_by, shard_size=4, **more)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_written_and_read(tmp_path):
    write(tmp_path / "e")
    table = EmbeddingTable.read(tmp_path / "e")
    rows = [0, 1, 2, 3, 5, 6, 7, 8, 10, 11]
    assert table.ids.to_pylist() == [f"i{row}" for row in rows] and len(table) == 10 and table.dim == 2
    assert table.vectors.tolist() == [[row, 2 * row] for row in rows]
    assert table.titles == [None, *(f"t{row}" for row in rows[1:])]
    manifest = json.loads((tmp_path / "e" / "manifest.json").read_text())
    assert (manifest["items"], manifest["vectors"], manifest["without content"]) == (12, 10, 2)
    write(tmp_path / "plain", titles=False)
    assert EmbeddingTable.read(tmp_path / "plain").titles is None


def test_resumed_equals_fresh_and_encodes_only_what_is_missing(tmp_path):
    write(tmp_path / "fresh")
    folder, calls = tmp_path / "resumed", []

    def stop(rows):
        if rows[0] == 8:
            raise KeyboardInterrupt
        return encode(rows)

    with pytest.raises(KeyboardInterrupt):
        ids = pa.array([f"i{row}" for row in range(12)])
        write_embeddings(folder, ids, None, stop, EmbeddingIdentity(run="x"), shard_size=4)
    with pytest.raises(ValueError, match=r"not a finished embedding folder.*mmctr embed"):
        EmbeddingTable.read(folder)
    with pytest.raises(ValueError, match="another run or dataset"):
        write(folder, identity={"run": "y"})
    write(folder, calls=calls)
    assert calls == [[8, 9, 10, 11]] and contents(folder) == contents(tmp_path / "fresh")
    write(folder, calls=calls)  # finished: nothing is encoded again
    assert len(calls) == 1 and contents(folder) == contents(tmp_path / "fresh")
    with pytest.raises(ValueError, match="another run or dataset"):
        write(folder, identity={"run": "y"})


def test_processes_share_the_shards(tmp_path):
    write(tmp_path / "one")
    calls = {0: [], 1: []}
    other = [False]

    def wait():  # the other process writes its shards while the first one waits
        if not other[0]:
            other[0] = True
            write(tmp_path / "two", calls=calls[1], rank=1, world_size=2)

    write(tmp_path / "two", calls=calls[0], rank=0, world_size=2, wait=wait)
    assert [rows[0] for rows in calls[0]] == [0, 8] and [rows[0] for rows in calls[1]] == [4]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_foreign_folder_is_not_written_to(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="not empty and holds no embeddings"):
        write(tmp_path)
    assert contents(tmp_path) == {"mine.txt": b"precious"}


def test_a_broken_shard_is_named(tmp_path):
    write(tmp_path / "e")
    shard = tmp_path / "e" / "vectors-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"vectors-00001\.safetensors: damaged"):
        EmbeddingTable.read(tmp_path / "e")


def test_parquet_and_npz(tmp_path):
    flat = pa.array(VECTORS.ravel())
    for name, column in {
        "list": pa.array(VECTORS.tolist()),
        "large": pa.array(VECTORS.tolist(), pa.large_list(pa.float64())),
        "fixed": pa.FixedSizeListArray.from_arrays(flat, 3),
    }.items():
        pq.write_table(pa.table({"item_id": IDS, "v": column}), tmp_path / f"{name}.parquet", row_group_size=3)
    np.savez(tmp_path / "x.npz", item_id=np.array(IDS), vectors=VECTORS.astype(np.float64))
    for name in ("list.parquet", "large.parquet", "fixed.parquet", "x.npz"):
        table = EmbeddingTable.read(tmp_path / name)
        assert table.ids.to_pylist() == IDS and table.vectors.dtype == np.float32, name
        np.testing.assert_array_equal(table.vectors, VECTORS)
    np.savez(tmp_path / "int.npz", item_id=np.array([2**40, 7]), vectors=VECTORS[:2])
    assert EmbeddingTable.read(tmp_path / "int.npz").ids.to_pylist() == [2**40, 7]


def test_mistakes_name_the_file(tmp_path):
    nan = VECTORS.copy()
    nan[2, 1] = np.nan
    arrays = {
        "lengths": ({"item_id": np.array(IDS), "vectors": VECTORS[:3]}, r"4 ids but vectors of shape \(3, 3\)"),
        "flat": ({"item_id": np.array(IDS), "vectors": VECTORS[:, 0]}, r"shape \(4,\)"),
        "nan": ({"item_id": np.array(IDS), "vectors": nan}, "vector of item 'c' is not finite"),
        "twice": ({"item_id": np.array(list("abca")), "vectors": VECTORS}, "ids repeat"),
        "keys": ({"id": np.array(IDS), "vectors": VECTORS}, "needs the arrays `item_id` and `vectors`"),
        "objects": ({"item_id": np.array(IDS, dtype=object), "vectors": VECTORS}, "needs the arrays"),
    }
    for name, (values, message) in arrays.items():
        np.savez(tmp_path / f"{name}.npz", **values)
        with pytest.raises(ValueError, match=rf"{name}\.npz.*{message}"):
            EmbeddingTable.read(tmp_path / f"{name}.npz")
    lists = {
        "ragged": ([[1.0], [1.0, 2.0, 3.0], [1.0, 2.0], [1.0, 2.0]], "differ in length"),
        "null": ([[1.0, 2.0], None, [1.0, 2.0], [1.0, 2.0]], "differ in length, or some are null"),
        "null_value": ([[1.0, 2.0], [None, 1.0], [1.0, 2.0], [1.0, 2.0]], "vector of item 'b' is not finite"),
        "scalar": ([1.0, 2.0, 3.0, 4.0], "exactly one list column of vectors, found none"),
    }
    for name, (column, message) in lists.items():
        pq.write_table(pa.table({"item_id": IDS, "v": column}), tmp_path / f"{name}.parquet")
        with pytest.raises(ValueError, match=rf"{name}\.parquet.*{message}"):
            EmbeddingTable.read(tmp_path / f"{name}.parquet")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 no more of it")
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "broken.parquet").write_text("hello")
    (tmp_path / "v.txt").write_text("hello")
    for name in ("broken.npz", "text.npz", "broken.parquet", "v.txt", "nowhere"):
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            EmbeddingTable.read(tmp_path / name)


def test_aligned_with_a_catalog():
    table = EmbeddingTable(pa.array(IDS), VECTORS)
    vectors, has = table.aligned(pa.array(["d", "new", "a", "d"]))
    assert has.tolist() == [True, False, True, True]
    assert vectors.tolist() == [VECTORS[3].tolist(), [0, 0, 0], VECTORS[0].tolist(), VECTORS[3].tolist()]
    with pytest.raises(ValueError, match="ids are int64 on one side and string on the other"):
        table.aligned(pa.array([1, 2]))


def test_several_tables_side_by_side(tmp_path):
    np.savez(tmp_path / "a.npz", item_id=np.array(["x", "y"]), vectors=np.array([[1.0, 2.0], [3.0, 6.0]]))
    np.savez(tmp_path / "b.npz", item_id=np.array(["y", "z"]), vectors=np.array([[10.0], [20.0]]))
    catalog = pa.array(["x", "y", "z", "none"])
    vectors, has = read_tables([str(tmp_path / "a.npz"), str(tmp_path / "b.npz")], catalog)
    assert has.tolist() == [True, True, True, False]
    # the mean of a table stands in where an item lacks it
    assert vectors[:3].tolist() == [[1, 2, 15], [3, 6, 10], [2, 4, 20]]
    alone, has = read_tables(str(tmp_path / "a.npz"), catalog)
    assert alone.tolist() == [[1, 2], [3, 6], [0, 0], [0, 0]] and has.tolist() == [True, True, False, False]


def append(folder, order, identity=None, calls=None, titles=True, stop_at=None, **more):
    """The catalog now has the rows `order`, in this order."""

    def counted(rows):
        wanted = np.array(order)[rows]
        if stop_at in wanted:
            raise KeyboardInterrupt
        if calls is not None:
            calls.append(wanted.tolist())
        return encode(wanted)

    ids, names = pa.array([f"i{row}" for row in order]), [f"t{row}" for row in order]
    identity = EmbeddingIdentity(**({"run": "x", "catalog": str(order)} | (identity or {})))
    return write_embeddings(
        folder, ids, names if titles else None, counted, identity, append=True, shard_size=4, **more
    )


def test_appending_encodes_new_items_alone(tmp_path):
    folder, calls = tmp_path / "e", []
    write(folder, identity={"run": "x", "catalog": "12"})
    before = contents(folder)
    order = [30, *range(11, -1, -1), *range(40, 47)]  # a catalog in another order, with items before and after
    new = append(folder, order, calls=calls)
    assert new.ids.to_pylist() == [f"i{row}" for row in (30, 40, 41, 42, 43, 45, 46)]
    assert new.vectors.tolist() == [[row, 2 * row] for row in (30, 40, 41, 42, 43, 45, 46)] and new.titles[0] == "t30"
    # rows 4 and 9 had no content, and may have some now
    assert calls == [[30, 9, 4, 40], [41, 42, 43, 44], [45, 46]]
    table = EmbeddingTable.read(folder)
    rows = [0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 30, 40, 41, 42, 43, 45, 46]
    assert table.ids.to_pylist() == [f"i{row}" for row in rows]
    assert table.vectors.tolist() == [[row, 2 * row] for row in rows] and table.titles[-1] == "t46"
    assert {name: content for name, content in contents(folder).items() if name in before and "vectors" in name} == {
        name: content for name, content in before.items() if "vectors" in name
    }
    assert not list(folder.glob("appending*")) and len(list(folder.glob("items*"))) == 1
    again = contents(folder)
    append(folder, order, calls=calls[:0])
    assert EmbeddingTable.read(folder).ids.to_pylist() == table.ids.to_pylist()
    # the folder is no longer one of a single pass over the catalog
    with pytest.raises(ValueError, match="another run or dataset"):
        write(folder, identity={"run": "x", "catalog": str(order)})
    assert again.keys() <= contents(folder).keys() | {"items-00006.parquet"}
    assert table.without(pa.array(["i0", "i46", "zz"])).ids.to_pylist() == [f"i{row}" for row in rows[1:-1]]


def test_appending_goes_on_where_it_was_killed(tmp_path):
    order = [*range(12), *range(30, 44)]
    for name in ("killed", "straight"):
        write(tmp_path / name, identity={"run": "x", "catalog": "12"})
    with pytest.raises(KeyboardInterrupt):
        append(tmp_path / "killed", order, stop_at=38)
    assert len(EmbeddingTable.read(tmp_path / "killed")) == 10  # reads as before
    calls = []
    append(tmp_path / "killed", order, calls=calls)
    append(tmp_path / "straight", order)
    assert calls[0][0] == 36 and contents(tmp_path / "killed") == contents(tmp_path / "straight")
    # a catalog that has changed once more: what was left of the old call is not taken for new items
    order = [*order, 50, 51, 52]
    with pytest.raises(KeyboardInterrupt):
        append(tmp_path / "killed", [*order, 60, 61, 62, 63], stop_at=61)
    append(tmp_path / "killed", order[::-1])
    append(tmp_path / "straight", order[::-1])
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


def test_vectors_of_another_run_are_not_appended(tmp_path):
    write(tmp_path / "e", identity={"run": "x", "catalog": "12", "weights": "a", "modality": "both"})
    with pytest.raises(ValueError, match=r"its vectors are of weights 'a', not 'b'"):
        append(tmp_path / "e", range(14), identity={"weights": "b", "modality": "both"})
    append(tmp_path / "e", range(14), identity={"weights": "a", "modality": "both", "run": "moved"})
    with pytest.raises(ValueError, match="no such embedding folder"):
        append(tmp_path / "nothing", range(14))
    write(tmp_path / "plain", titles=False)
    append(tmp_path / "plain", range(14), titles=True)
    assert EmbeddingTable.read(tmp_path / "plain").titles is None
