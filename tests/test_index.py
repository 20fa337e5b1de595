from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from mmctr.embeddings import EmbeddingTable
from mmctr.index import ItemIndex

N, D = 60, 8


def table(ids=None, titles=True, manifest=None) -> EmbeddingTable:
    vectors = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    names = [f"title {row}" for row in range(N)] if titles else None
    return EmbeddingTable(pa.array(range(1000, 1000 + N) if ids is None else ids), vectors, names, manifest or {})


def test_search_equals_brute_force():
    source = table()
    index = ItemIndex.build(source)
    query = np.random.default_rng(1).normal(size=D)
    query /= np.linalg.norm(query)
    found = index.search(query, 7)
    scores = source.vectors @ query.astype(np.float32)
    order = np.argsort(-scores)[:7]
    assert [n.item_id for n in found] == [1000 + row for row in order]
    assert [n.score for n in found] == pytest.approx(scores[order].tolist(), rel=1e-5)
    assert [n.title for n in found] == [f"title {row}" for row in order]
    assert all(type(n.item_id) is int for n in found)
    assert ItemIndex.build(table(titles=False)).search(query, 1)[0].title is None


def test_vectors_of_any_length_are_compared_by_cosine():
    source = table()
    lengths = np.random.default_rng(2).uniform(0.1, 9, (N, 1)).astype(np.float32)
    index = ItemIndex.build(EmbeddingTable(source.ids, source.vectors * lengths))
    for item in (1000, 1031):
        expected, found = ItemIndex.build(source).search_item(item, 5), index.search_item(item, 5)
        assert [n.item_id for n in found] == [n.item_id for n in expected]
        assert [n.score for n in found] == pytest.approx([n.score for n in expected], abs=1e-5)
    vector = source.vectors[3]
    assert index.search(5 * vector, 1)[0].score == pytest.approx(1, abs=1e-5)


def test_neighbours_of_an_item_leave_it_out():
    source = table()
    index = ItemIndex.build(source)
    scores = source.vectors @ source.vectors[5]
    order = [row for row in np.argsort(-scores) if row != 5][:4]
    assert [n.item_id for n in index.search_item(1005, 4)] == [1000 + row for row in order]
    assert index.search_item("1005", 4) == index.search_item(1005, 4)  # an id typed at the command line
    named = ItemIndex.build(table(ids=[f"i{row}" for row in range(N)]))
    assert [n.item_id for n in named.search_item("i5", 4)] == [f"i{row}" for row in order]
    digits = ItemIndex.build(table(ids=[str(row) for row in range(N)]))
    assert [n.item_id for n in digits.search_item("5", 4)] == [str(row) for row in order]
    np.testing.assert_array_equal(index.vector(1005), source.vectors[5])


def test_more_neighbours_than_items():
    index = ItemIndex.build(table())
    assert len(index.search(np.ones(D), 500)) == N and len(index.search_item(1005, 500)) == N - 1
    assert len(index) == N


def test_mistakes():
    index = ItemIndex.build(table())
    for item, message in ((7, "item 7 has no vector here; ids look like 1000"), ("x1", "ids here are integers")):
        with pytest.raises(ValueError, match=message):
            index.search_item(item)
    named = ItemIndex.build(table(ids=[f"i{row}" for row in range(N)]))
    for item in ("nobody", 5):
        with pytest.raises(ValueError, match=r"has no vector here; ids look like 'i0'"):
            named.search_item(item)
    with pytest.raises(ValueError, match="the query has 3 dimensions, the index 8"):
        index.search(np.ones(3))
    with pytest.raises(ValueError, match="k=0"):
        index.search(np.ones(D), 0)


def test_saved_and_loaded(tmp_path):
    index = ItemIndex.build(table(manifest={"identity": {"run": "r"}}))
    index.save(tmp_path / "index")
    again = ItemIndex.load(tmp_path / "index")
    assert again.search_item(1005) == index.search_item(1005) and again.manifest == {"identity": {"run": "r"}}
    index.save(tmp_path / "index")  # an index may be replaced
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("precious")
    with pytest.raises(ValueError, match="not empty and holds no index"):
        index.save(tmp_path / "other")
    assert (tmp_path / "other" / "file").read_text() == "precious"


def test_embeddings_are_indexed_on_the_fly(tmp_path):
    source = table()
    np.savez(tmp_path / "e.npz", item_id=np.arange(1000, 1000 + N), vectors=source.vectors)
    a, b = ItemIndex.load(tmp_path / "e.npz").search_item(1005), ItemIndex.build(source).search_item(1005)
    assert [(n.item_id, n.score) for n in a] == [(n.item_id, n.score) for n in b]


def test_a_broken_index_is_refused(tmp_path):
    ItemIndex.build(table()).save(tmp_path / "i")
    file = tmp_path / "i" / "index.faiss"
    whole = file.read_bytes()
    for content in (whole[:-100], whole[:10], b"", b"hello"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"index\.faiss: not a readable FAISS index.*mmctr index"):
            ItemIndex.load(tmp_path / "i")
    small = table()
    ItemIndex.build(EmbeddingTable(small.ids[:5], small.vectors[:5])).save(tmp_path / "small")
    file.write_bytes((tmp_path / "small" / "index.faiss").read_bytes())
    with pytest.raises(ValueError, match="holds 5 vectors but there are 60 ids"):
        ItemIndex.load(tmp_path / "i")
    with pytest.raises(ValueError, match="no such embedding folder"):
        ItemIndex.load(tmp_path / "nowhere")
