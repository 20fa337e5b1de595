"""Queries of items, words, pictures and users against arithmetic on the vectors themselves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmctr.cli.main import main
from mmctr.data.embeddings import EmbeddingTable
from mmctr.data.prepare import open_dataset
from mmctr.retrieval.index import ItemIndex
from mmctr.serving.search import Part, Searcher
from tests.helpers.worlds import picture, write_table

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(runs, tmp_path_factory) -> Path:
    """A folder with an `index` that has the columns of the catalog."""
    folder = tmp_path_factory.mktemp("search")
    main(["index", str(runs / "embeddings"), "--out", str(folder / "index"), "--columns"])
    return folder


@pytest.fixture(scope="module")
def table(runs) -> EmbeddingTable:
    return EmbeddingTable.read(runs / "embeddings")


@pytest.fixture(scope="module")
def searcher(folder) -> Searcher:
    return Searcher(ItemIndex.load(folder / "index"))


def nearest(table, query, k, without=()):
    order = np.argsort(-(table.vectors @ query), kind="stable")
    ids = [table.ids[int(row)].as_py() for row in order]
    return [item for item in ids if item not in without][:k]


def ids(found):
    return [n.item_id for n in found]


def test_a_mix_is_the_weighted_sum_of_unit_vectors(searcher, table):
    a, b = (table.ids[row].as_py() for row in (3, 8))
    expected = nearest(table, 2 * table.vectors[3] - 0.5 * table.vectors[8], 6, {a, b})
    assert ids(searcher.answer([Part("item_id", a, 2.0), Part("item_id", str(b), -0.5)], 6)) == expected
    text = searcher.encoder.embed(texts=["red circle"])[0]
    expected = nearest(table, table.vectors[3] + 3 * text / np.linalg.norm(text), 6, {a})
    assert ids(searcher.answer([Part("text", "red circle", 3.0), Part("item_id", a)], 6)) == expected
    image = searcher.encoder.embed(images=[picture()])[0]
    assert ids(searcher.answer([Part("image", picture())], 6)) == nearest(table, image, 6)


def test_a_user_is_the_mean_of_the_latest_clicks(folder, table, toy_folder):
    dataset = open_dataset(toy_folder)
    log, users = dataset.interactions, dataset.users["user_id"].to_pylist()
    searcher = Searcher(ItemIndex.load(folder / "index"), last=4)
    item_ids = dataset.catalog.item_ids.to_pylist()
    position = {item: row for row, item in enumerate(table.ids.to_pylist())}
    clicked = [item_ids[i] for i, u, y in zip(log.item, log.user, log.label, strict=True) if u == 7 and y == 1][-4:]
    assert len(clicked) == 4
    mean = table.vectors[[position[item] for item in clicked]].mean(0)
    assert ids(searcher.answer([Part("user_id", users[7])], 5)) == nearest(table, mean, 5, set(clicked))
    for user in ("nobody", 10**9, None):
        with pytest.raises(ValueError, match="is not in the log; ids look like"):
            searcher.answer([Part("user_id", user)])


def test_conditions_on_catalog_columns(searcher, table, toy_folder):
    items = pq.read_table(toy_folder / "items.parquet")
    shape = dict(zip(items["item_id"].to_pylist(), items["factor_shape"].to_pylist(), strict=True))
    wanted = shape[table.ids[0].as_py()]
    found = ids(searcher.answer([Part("item_id", table.ids[0].as_py())], 100, [f"factor_shape={wanted}"]))
    others = {item for item in table.ids.to_pylist()[1:] if shape[item] == wanted}
    assert set(found) == others and found == nearest(table, table.vectors[0], 200, set(shape) - others)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_a_file_of_queries_equals_one_by_one(folder, searcher, table, tmp_path, capsys, suffix):
    (tmp_path / "p.png").write_bytes(picture())
    a, b = (table.ids[row].as_py() for row in (3, 8))
    rows = {
        "query": ["mix", "word", "mix", "seen", "user"],
        "item_id": [a, None, b, None, None],
        "text": [None, "blue", None, None, None],
        "image": [None, None, None, str(tmp_path / "p.png"), None],
        "user_id": [None, None, None, None, open_dataset(searcher._data).users["user_id"][2].as_py()],
        "weight": [1.0, 1.0, -0.3, 1.0, 1.0],
    }
    file = write_table(tmp_path / f"q{suffix}", rows)
    answers = searcher.answer_file(file, 4)
    assert answers["query"].unique().to_pylist() == ["mix", "word", "seen", "user"]
    queries = {
        "mix": [Part("item_id", a), Part("item_id", b, -0.3)],
        "word": [Part("text", "blue")],
        "seen": [Part("image", picture())],
        "user": [Part("user_id", rows["user_id"][4])],
    }
    for name, parts in queries.items():
        own = answers.filter(pa.compute.equal(answers["query"], name))
        expected = searcher.answer(parts, 4)
        assert own["item_id"].to_pylist() == ids(expected) and own["rank"].to_pylist() == [1, 2, 3, 4]
        np.testing.assert_allclose(own["score"].to_numpy(), [n.score for n in expected], atol=1e-5)
        assert own["title"].to_pylist() == [n.title for n in expected]
    out = tmp_path / f"answers{suffix}"
    main(["search", str(folder / "index"), "--queries", str(file), "-k", "4", "--out", str(out)])
    capsys.readouterr()
    main(["search", str(folder / "index"), "--queries", str(file), "-k", "4"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["item_id"] for line in lines] == answers["item_id"].to_pylist()
    assert out.stat().st_size > 0


def test_files_of_queries_that_cannot_be_read(searcher, table, tmp_path):
    item = table.ids[0].as_py()
    for number, (columns, message) in enumerate(
        (
            ({"items": [1]}, "needs a column item_id, text, image or user_id"),
            ({"item_id": [item, None], "text": [None, None]}, "row 1: give one of item_id, text"),
            ({"item_id": [item], "text": ["red"]}, "row 0: give one of"),
            ({"item_id": [item], "query": pa.array([None], pa.string())}, "row 0"),
            ({"item_id": [item], "weight": [float("inf")]}, "row 0: weight inf"),
            ({"item_id": pa.array([], pa.int64())}, "holds no query"),
            ({"item_id": [item], "weight": [0.0]}, "the parts cancel out"),
        )
    ):
        with pytest.raises(ValueError, match=message):
            searcher.answer_file(write_table(tmp_path / f"{number}.parquet", columns))
    with pytest.raises(ValueError, match="does not name the run that made the vectors"):
        Searcher(ItemIndex.build(EmbeddingTable(table.ids, table.vectors))).answer([Part("text", "red")])
    with pytest.raises(ValueError, match="does not name the dataset"):
        Searcher(ItemIndex.build(EmbeddingTable(table.ids, table.vectors))).answer([Part("user_id", 1)])
    other = ItemIndex.build(EmbeddingTable(table.ids, table.vectors[:, :8]))
    with pytest.raises(ValueError, match="vectors of 16 dimensions, the index has 8"):
        Searcher(other, run=str(searcher.encoder.run)).answer([Part("text", "red")])
    with pytest.raises(ValueError, match="nothing to search by"):
        searcher.answer([])
