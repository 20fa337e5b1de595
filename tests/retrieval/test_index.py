from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
import pyarrow as pa
import pytest

from mmctr.data.embeddings import EmbeddingTable
from mmctr.errors import UnknownId
from mmctr.retrieval.filters import matching
from mmctr.retrieval.index import ItemIndex
from mmctr.retrieval.merging import merge
from mmctr.retrieval.storage import columns_of
from mmctr.retrieval.tuning import Wanted, build, choose_factory, num_lists, tune
from mmctr.serving.search import Searcher
from tests.helpers.damage import rewrite
from tests.helpers.worlds import write_table

N, D = 60, 8
MANY = 24_000
KINDS = ["Flat", "HNSW16,Flat", "IVF64,Flat", "IVF64,SQ8", "IVF32,PQ8x4", "RR16,IVF32,PQ8x4,RFlat"]


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


@pytest.mark.lowest
def test_saved_and_loaded(tmp_path):
    index = ItemIndex.build(table(manifest={"identity": {"run": "/r"}}))
    index.save(tmp_path / "index")
    again = ItemIndex.load(tmp_path / "index")
    assert again.search_item(1005) == index.search_item(1005) and again.manifest == {"identity": {"run": "/r"}}
    index.save(tmp_path / "index")  # an index may be replaced
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("precious")
    with pytest.raises(ValueError, match="would be replaced: no index of mmctr"):
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
    for content in (whole[:-100], whole[:10], b"", b"hello", bytes(len(whole)), b"\x00" * 100 + whole[100:]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"index\.faiss: (damaged|missing).*mmctr index"):
            ItemIndex.load(tmp_path / "i")
    small = table()
    ItemIndex.build(EmbeddingTable(small.ids[:5], small.vectors[:5])).save(tmp_path / "small")
    file.write_bytes((tmp_path / "small" / "index.faiss").read_bytes())
    with pytest.raises(ValueError, match=r"index\.faiss: damaged"):
        ItemIndex.load(tmp_path / "i")
    with pytest.raises(ValueError, match="no such embedding folder"):
        ItemIndex.load(tmp_path / "nowhere")


def clustered(count=MANY, dim=16, seed=0) -> EmbeddingTable:
    """Unit vectors around 200 centres."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(200, dim))
    vectors = centres[rng.integers(200, size=count)] + 0.5 * rng.normal(size=(count, dim))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return EmbeddingTable(pa.array(np.arange(count) * 3 + seed), vectors)


def columns(count=MANY) -> pa.Table:
    rows = np.arange(count)
    return pa.table({"colour": pa.array(np.array(["red", "blue"])[rows % 2]), "price": rows.astype(np.float64)})


@pytest.fixture(scope="module")
def indexes() -> dict[str, ItemIndex]:
    """An index of every kind over the same vectors; not to be changed."""
    table = clustered()
    return {kind: ItemIndex.build(table, Wanted(0.95, factory=kind), columns()) for kind in KINDS}


def brute_force(table, queries, k, allowed=None):
    scores = queries @ table.vectors.T
    if allowed is not None:
        scores[:, ~allowed] = -np.inf
    return np.argsort(-scores, axis=1)[:, :k]


def rows_of_table(index, rows):
    """Rows of `clustered()`, whose ids are three times its rows."""
    return np.asarray(index.ids)[rows] // 3


def overlap(found, truth):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), truth.tolist(), strict=True)])


@pytest.mark.lowest
@pytest.mark.parametrize("kind", KINDS)
def test_the_recall_that_was_measured_is_the_recall_there_is(indexes, kind):
    index, table = indexes[kind], clustered()
    measured = index.measured
    queries = clustered(300, seed=7).vectors  # not in the index
    truth = brute_force(table, queries, 10)
    found = rows_of_table(index, index.nearest(queries, 10)[1])
    assert overlap(found, truth) == pytest.approx(measured["recall"], abs=0.03 if "PQ" not in kind else 0.06)
    assert measured["reached"] == (measured["recall"] >= 0.95) and (measured["reached"] or "PQ" in kind)
    if kind == "Flat":
        assert measured["recall"] == 1 and measured["setting"] == {}
    else:
        settings = [next(v for k, v in point.items() if k in ("nprobe", "efSearch")) for point in measured["curve"]]
        recalls = [point["recall"] for point in measured["curve"]]
        assert settings == sorted(settings) and len(set(settings)) == len(settings)
        assert np.all(np.diff(recalls) > -0.02) and recalls[-1] > recalls[0]
        # with room for the error of the measurement, and no more than was tried
        chosen = next(iter(measured["setting"].values()))
        assert chosen in settings and (not measured["reached"] or recalls[settings.index(chosen)] > 0.95)


@pytest.mark.parametrize("kind", KINDS)
def test_filters_find_the_nearest_of_what_is_left(indexes, kind):
    index, table = indexes[kind], clustered()
    queries = table.vectors[:40]
    lossy = "PQ" in kind and "RFlat" not in kind
    for where, least in (
        (["colour=red"], 0.9),  # half of the items
        (["price<30"], 1.0),  # so few that all are compared
        (["colour=blue", "price>=23000"], 1.0),
    ):
        allowed = index.rows_where(where)
        in_table = np.zeros(MANY, bool)
        in_table[rows_of_table(index, np.flatnonzero(allowed))] = True
        expected = brute_force(table, queries, 10, in_table)
        scores, rows = index.nearest(queries, 10, allowed)
        rows = rows_of_table(index, rows)
        assert in_table[rows].all() and (np.diff(scores, axis=1) <= 1e-6).all()
        assert all(len(set(line)) == 10 for line in rows.tolist())
        if not lossy and not ("SQ8" in kind or "RFlat" in kind):
            assert overlap(rows, expected) >= least
    assert index.nearest(queries, 10, index.rows_where(["price<0"]))[1].shape == (40, 0)
    assert index.nearest(queries, 10, index.rows_where(["price<3"]))[1].shape == (40, 3)
    assert index.search(queries[0], 5, where=["price<0"]) == []
    found = [n.item_id for n in index.search_item(0, 5, where=["price<12"])]
    assert len(found) == 5 and set(found) <= {3 * row for row in range(1, 12)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_answers_after_saving_mapping_and_loading(indexes, kind, tmp_path):
    index = indexes[kind]
    index.save(tmp_path / "i")
    queries = clustered().vectors[:50]
    expected = index.nearest(queries, 7)
    for again in (ItemIndex.load(tmp_path / "i"), ItemIndex.load(tmp_path / "i", mmap=True)):
        for a, b in zip(again.nearest(queries, 7), expected, strict=True):
            np.testing.assert_array_equal(a, b)
        assert again.search_item(9, 3, where=["colour=red"]) == index.search_item(9, 3, where=["colour=red"])
        assert again.measured == index.measured and again.factory == kind
    with pytest.raises(ValueError, match="opened memory-mapped"):
        again.add(clustered(5, seed=1), columns(5))
    # anyone's FAISS reads the file, with the setting that reaches the recall in it
    plain = faiss.read_index(str(tmp_path / "i" / "index.faiss"))
    np.testing.assert_array_equal(plain.search(queries, 7)[1], expected[1])


@pytest.mark.parametrize("kind", [k for k in KINDS if "PQ" not in k])
def test_append_remove_and_merge_give_what_one_index_gives(kind):
    table, k = clustered(3000), 6
    factory = kind.replace("64", "16")
    halves = [EmbeddingTable(table.ids[a:b], table.vectors[a:b]) for a, b in ((0, 2000), (2000, 3000))]
    wanted = Wanted(1.0, factory=factory)
    exact = ItemIndex.build(table)
    queries = clustered(50, seed=4).vectors

    def ids(index, **more):
        return [[n.item_id for n in index.search(query, k, **more)] for query in queries]

    appended = ItemIndex.build(halves[0], wanted)
    assert appended.add(halves[1]) == 1000 and len(appended) == 3000
    merged = merge([ItemIndex.build(half, wanted) for half in halves])
    for index in (appended, merged):
        if index.measured["setting"]:
            index.tune(1.0)
        agreed = np.mean([set(a) == set(b) for a, b in zip(ids(index), ids(exact), strict=True)])
        assert agreed >= (0.6 if "SQ8" in kind else 0.95)
        np.testing.assert_allclose(index.vector(2997 * 3), table.vectors[2997], atol=0.1)

    gone = [n.item_id for query in queries[:10] for n in exact.search(query, 2)]
    assert appended.remove(gone) == len(set(gone)) and len(appended) == 3000 - len(set(gone))
    left_out = ids(exact, exclude=gone)
    for index in (appended, appended.compact()):
        assert len(index) == 3000 - len(set(gone)) and gone[0] not in index
        agreed = np.mean([set(a) == set(b) for a, b in zip(ids(index), left_out, strict=True)])
        assert agreed >= (0.6 if "SQ8" in kind else 0.95)
        with pytest.raises(ValueError, match="has no vector here"):
            index.search_item(gone[0])
    # an item that comes back has its new vector
    row = gone[0] // 3
    appended.add(EmbeddingTable(pa.array([gone[0]]), -table.vectors[row : row + 1]))
    np.testing.assert_allclose(appended.vector(gone[0]), -table.vectors[row], atol=0.02)


def test_codes_of_parts_trained_alike_are_merged_as_they_are(indexes):
    whole = indexes["IVF32,PQ8x4"]
    halves = []
    for rows in (np.arange(0, 9000), np.arange(9000, MANY)):
        half = faiss.clone_index(whole.index)
        half.set_direct_map_type(faiss.DirectMap.NoMap)
        half.remove_ids(np.setdiff1d(np.arange(MANY), rows))
        # ids by row again
        lists = half.invlists
        for number in range(half.nlist):
            size = lists.list_size(number)
            held = faiss.rev_swig_ptr(lists.get_ids(number), size)
            held[:] = np.searchsorted(rows, held)
        halves.append(ItemIndex(half, whole.items.take(pa.array(rows)), factory=whole.factory))
    merged = merge(halves)
    queries = clustered().vectors[:50]
    for a, b in zip(merged.nearest(queries, 5), whole.nearest(queries, 5), strict=True):
        np.testing.assert_array_equal(a, b)


def test_changes_that_cannot_be_made(tmp_path):
    index = ItemIndex.build(clustered(500), None, columns(500))
    with pytest.raises(ValueError, match=r"2 items are in the index already, like \[3, 6\]"):
        index.add(EmbeddingTable(pa.array([3, 6, 4]), clustered(3).vectors), columns(3))
    with pytest.raises(ValueError, match="of 8 dimensions cannot be added to an index of 16"):
        index.add(clustered(3, dim=8, seed=1), columns(3))
    with pytest.raises(ValueError, match=r"filters by \['colour', 'price'\]"):
        index.add(clustered(3, seed=1))
    with pytest.raises(ValueError, match="item 4 has no vector here"):
        index.remove([3, 4])
    assert len(index) == 500 and 3 in index and True not in index and "3" not in index
    replaced = -clustered(500).vectors[1:2]
    assert index.add(EmbeddingTable(pa.array([3]), replaced), columns(1), replace=True) == 1 and len(index) == 500
    np.testing.assert_array_equal(index.vector(3), replaced[0])
    parts = [ItemIndex.build(clustered(50, seed=seed)) for seed in (0, 1)]
    with pytest.raises(ValueError, match=r"items are in several parts, like \[0, 3, 6\]"):
        merge([parts[0], parts[0]])
    with pytest.raises(ValueError, match="part 1 has 8 dimensions"):
        merge([parts[0], ItemIndex.build(clustered(50, dim=8, seed=1))])
    for one, other in zip(parts, ("a", "b"), strict=True):
        one.manifest = {"identity": {"weights": other}}
    with pytest.raises(ValueError, match="another run's vectors"):
        merge(parts)


@pytest.mark.lowest
def test_a_vector_of_zeros_is_left_out_and_named(caplog):
    """One item without a direction must not keep the others out of an index, nor out of one that grows."""
    vectors = np.array([[1, 0], [0, 0], [0, 1], [0, 0]], np.float32)
    source = EmbeddingTable(pa.array([5, 6, 7, 8]), vectors, ["a", "b", "c", "d"])
    for wanted in (None, Wanted(factory="Flat")):
        index = ItemIndex.build(source, wanted, pa.table({"price": [1, 2, 3, 4]}))
        assert index.items.sort_by("item_id").to_pydict() == {
            "item_id": [5, 7],
            "title": ["a", "c"],
            "price": [1, 3],
        }
        assert "2 of 4 items have a vector of zeros" in caplog.text and "[6, 8]" in caplog.text
        caplog.clear()
    new = EmbeddingTable(pa.array([9, 10]), np.array([[0, 0], [1, 1]], np.float32), ["e", "f"])
    assert index.add(new, pa.table({"price": [5, 6]})) == 1 and "like [9]" in caplog.text
    assert index.search_item(10, k=1, where=["price<3"])[0].item_id == 5
    assert len(ItemIndex.build(EmbeddingTable(pa.array([1]), np.zeros((1, 2), np.float32)))) == 0


def emptied_index(how: str) -> ItemIndex:
    if how == "built":
        return ItemIndex.build(EmbeddingTable(pa.array([], pa.int64()), np.zeros((0, 3), np.float32)), Wanted())
    index = ItemIndex.build(EmbeddingTable(pa.array([1, 2]), np.eye(3, dtype=np.float32)[:2]))
    index.remove([1, 2])
    return index.compact() if how == "compacted" else index


@pytest.mark.parametrize("how", ["removed", "compacted", "built"])
def test_an_index_without_items(tmp_path, how):
    emptied_index(how).save(tmp_path / "i")
    index = ItemIndex.load(tmp_path / "i")
    assert len(index) == 0 and index.search(np.ones(3), 5) == [] and index.sample(3) == []
    for ask in (index.search_item, index.vector):
        with pytest.raises(UnknownId, match="item 1: the index holds no items"):
            ask(1)
    with pytest.raises(UnknownId, match="item 'x': ids here are integers"):
        index.search_item("x")
    write_table(tmp_path / "q.csv", {"item_id": [1]})
    with pytest.raises(UnknownId, match="the index holds no items"):
        Searcher(index).answer_file(tmp_path / "q.csv")
    other = ItemIndex.build(EmbeddingTable(pa.array([7]), np.ones((1, 3), np.float32)))
    assert len(merge([index, other])) == len(merge([other, index])) == 1
    assert index.compact().tune()["reached"]
    assert index.add(EmbeddingTable(pa.array([7]), np.ones((1, 3), np.float32))) == 1 and 7 in index


def many_equal() -> EmbeddingTable:
    vectors = np.random.default_rng(0).normal(size=(4000, 32)).astype(np.float32)
    vectors[1:2000] = vectors[0] + 1e-7  # as of one picture in several batches
    return EmbeddingTable(pa.array(range(4000)), vectors)


def test_many_equal_vectors_are_not_put_into_a_graph(caplog):
    """Searches in a graph end among equal vectors: HNSW finds half of the nearest of other items."""
    wanted = Wanted(0.95, latency_ms=1e-6)  # exact search is too slow for this
    assert ItemIndex.build(table(), wanted).factory.startswith("HNSW")
    source = many_equal()
    index = ItemIndex.build(source, wanted)
    assert index.factory.startswith("IVF") and index.measured is not None and index.measured["reached"]
    queries = source.vectors[3600:]
    exact = ItemIndex.build(source).nearest(queries, 10)[0]
    assert (index.nearest(queries, 10)[0] >= exact[:, -1:] - 1e-5).mean() > 0.9
    ItemIndex.build(source, Wanted(factory="HNSW32"))
    assert "2000 items have one and the same vector" in caplog.text


def test_the_recall_counts_any_of_equally_near_vectors():
    vectors = np.repeat(np.eye(4, dtype=np.float32), 200, axis=0)
    index = ItemIndex.build(EmbeddingTable(pa.array(range(800)), vectors), Wanted(factory="Flat"))
    assert index.measured is not None and index.measured["recall"] == 1
    assert tune(build(vectors, "IVF4,Flat"), vectors, 0.99)["recall"] == 1


def test_foreign_files_are_refused(tmp_path, indexes):
    indexes["IVF64,Flat"].save(tmp_path / "i")
    file = tmp_path / "i" / "index.faiss"

    def put(index):
        faiss.write_index(index, str(file))
        rewrite(tmp_path / "i" / "index.json", {})

    def filled(index):
        index.add(np.zeros((24000, index.d), np.float32))
        return index

    put(filled(faiss.index_factory(8, "Flat", faiss.METRIC_INNER_PRODUCT)))
    with pytest.raises(ValueError, match=r"8 dimensions and metric 0; 16 dimensions by inner product are expected"):
        ItemIndex.load(tmp_path / "i")
    put(filled(faiss.IndexFlatL2(16)))
    with pytest.raises(ValueError, match="metric 1"):
        ItemIndex.load(tmp_path / "i")
    put(faiss.IndexFlatIP(16))
    with pytest.raises(ValueError, match="holds 0 vectors where 24000 were written"):
        ItemIndex.load(tmp_path / "i")
    put(filled(faiss.IndexFlatIP(16)))
    (tmp_path / "i" / "rows.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"rows\.npz: damaged"):
        ItemIndex.load(tmp_path / "i")
    rewrite(tmp_path / "i" / "index.json", {})
    with pytest.raises(ValueError, match=r"rows\.npz: not a readable"):
        ItemIndex.load(tmp_path / "i")
    (tmp_path / "i" / "index.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no digests of files"):
        ItemIndex.load(tmp_path / "i")


def test_threads_get_what_one_gets(indexes):
    queries = clustered().vectors[:64]
    for kind in ("HNSW16,Flat", "IVF64,Flat"):
        index = indexes[kind]
        expected = [index.search(query, 5, where=["colour=red"]) for query in queries]
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda query, index=index: index.search(query, 5, where=["colour=red"]), queries)) == (
                expected
            )


def test_the_choice_of_an_index():
    assert choose_factory(1000, 512, Wanted()) == "Flat"
    assert choose_factory(100_000, 512, Wanted()) == "HNSW32,Flat"
    assert choose_factory(100_000, 512, Wanted(latency_ms=1000)) == "Flat"
    assert choose_factory(1_000_000, 512, Wanted()) == "IVF4096,Flat"
    assert choose_factory(1_000_000, 512, Wanted(memory=10**9)) == "IVF4096,SQ8"
    assert choose_factory(1_000_000, 512, Wanted(memory=2 * 10**8)) == "IVF4096,PQ128x8"
    assert choose_factory(5, 512, Wanted(factory="HNSW8")) == "HNSW8"
    with pytest.raises(ValueError, match="memory 1000000: 1000000 vectors of 512 dimensions need at least"):
        choose_factory(1_000_000, 512, Wanted(memory=10**6))
    assert num_lists(39) == 1 and num_lists(1_000_000) == 4096
    for count in (1, 2, 40, 1000, 10**5, 10**8):
        assert num_lists(count) * 39 <= max(count, 39)
    for values in ({"recall": 0}, {"recall": 1.1}, {"latency_ms": 0}, {"memory": 0}):
        with pytest.raises(ValueError):
            Wanted(**values)
    for factory, message in (("Nonsense", "not an index FAISS can make"), ("IVF4096,Flat", "4096 lists for 450")):
        with pytest.raises(ValueError, match=message):
            ItemIndex.build(clustered(500), Wanted(factory=factory))
    for count in (1, 2, 5):
        assert len(ItemIndex.build(clustered(count), Wanted()).search_item(0, 3)) == min(3, count - 1)


@pytest.mark.lowest
def test_columns_of_a_catalog_of_polars_and_pandas(caplog):
    """Lists of 64-bit offsets and categories are columns to filter by; what cannot be filtered by is named."""
    catalog = pa.table(
        {
            "item_id": [1, 2, 3],
            "tags": pa.array([["a"], ["a", "b"], []], pa.large_list(pa.large_string())),
            "colour": pa.array(["red", "blue", None]).dictionary_encode(),
            "brand": pa.array(["x", "y", "y"], pa.string_view()),
            "size": pa.array([[1, 2], [3, 4], None], pa.list_(pa.int64(), 2)),
            "made": pa.array([1, 2, 3], pa.timestamp("s")),
            "parts": pa.array([{"a": 1}] * 3),
        }
    )
    ids = pa.array([1, 2, 3])
    found = columns_of(catalog, ids, ids, None)
    assert found.column_names == ["tags", "colour", "brand", "size"]
    assert "'made' (timestamp[s]), 'parts' (struct" in caplog.text
    for where, rows in (("tags=b", [1]), ("colour=red", [0]), ("brand!=x", [1, 2]), ("size=3|1", [0, 1])):
        assert matching(found, [where]).nonzero()[0].tolist() == rows
    assert columns_of(catalog, ids, ids, ["made"]).column_names == ["made"]
    with pytest.raises(ValueError, match=r"no condition can be written on column 'parts' of type struct"):
        columns_of(catalog, ids, ids, ["parts"])


def test_columns_of_a_catalog():
    catalog = pa.table(
        {
            "item_id": [1, 2, 3],
            "title": ["a", "b", "c"],
            "price": [1.5, None, 3.0],
            "tags": [["x"], ["y", "z"], None],
            "image": ["1.jpg", None, None],
        }
    )
    ids = pa.array([3, 9, 1])
    found = columns_of(catalog, catalog.column("item_id").combine_chunks(), ids, None)
    assert found.to_pydict() == {"price": [3.0, None, 1.5], "tags": [None, None, ["x"]]}
    with pytest.raises(ValueError, match="no column 'colour'; there are item_id, title"):
        columns_of(catalog, ids, ids, ["colour"])
