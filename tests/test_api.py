"""The public Python API: the script of docs/python.md, and what is refused."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import mmctr
from mmctr.errors import UnknownId
from tests.helpers.tiny import CLONE
from tests.helpers.worlds import picture


@pytest.fixture(scope="module")
def demo(runs, toy_folder, tmp_path_factory):
    """A folder laid out as `mmctr demo` leaves it, of the small runs."""
    folder = tmp_path_factory.mktemp("demo")
    shutil.copytree(toy_folder, folder / "data")
    for name, run in {"pretrain": "pretrain", "din_id": "id", "din_table": "table", "embeddings": "embeddings"}.items():
        shutil.copytree(runs / run, folder / name)
    return folder


@pytest.mark.slow
def test_the_script_of_the_docs_runs(demo):
    command = [sys.executable, str(CLONE / "docs" / "examples" / "python_api.py"), str(demo)]
    done = subprocess.run(command, cwd=CLONE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for use in (
        "embed: 3 items",
        "search: ",
        "rank: the best of user",
        "score: four cold items",
        "compare: ",
        "train: ",
    ):
        assert use in done.stdout
    assert (demo / "two_runs.html").is_file()


def test_the_page_shows_all_of_the_script():
    script = (CLONE / "docs" / "examples" / "python_api.py").read_text(encoding="utf-8")
    page = (CLONE / "docs" / "python.md").read_text(encoding="utf-8")
    parts = re.findall(r"\[start:(\w+)\]", script)
    assert len(parts) == 5 and re.findall(r"python_api.py:(\w+)", page) == parts


def test_public_names_are_the_ones_written_down():
    page = (CLONE / "docs" / "python.md").read_text(encoding="utf-8")
    table = page.split("## The public names")[1]
    rows = "\n".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    named = set(re.findall(r"`(\w+)(?:\([^`]*\))?`", rows))
    assert named == set(mmctr.__all__) == set(mmctr._PUBLIC)
    for name in mmctr.__all__:
        assert getattr(mmctr, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'lode'; public names are"):
        mmctr.lode  # noqa: B018
    # type checkers see the same names
    tree = ast.parse((CLONE / "mmctr" / "__init__.py").read_text(encoding="utf-8"))
    public = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and "mmctr" in str(node.module)]
    typed = {alias.name for node in public for alias in node.names}
    assert typed == set(mmctr.__all__)


@pytest.fixture(scope="module")
def encoder(runs) -> mmctr.ItemEncoder:
    return mmctr.load(runs / "pretrain")


def test_an_embedding_of_a_catalog_item_in_memory_is_that_of_the_folder(encoder, runs, toy_folder):
    """Picture and text of catalog items, given by hand, have the vectors of `mmctr embed`."""
    table, catalog = mmctr.EmbeddingTable.read(runs / "embeddings"), mmctr.open_dataset(toy_folder).catalog
    items = catalog.table.slice(0, 5).to_pylist()
    paths = [toy_folder / item["image"] if isinstance(item["image"], str) else item["image"] for item in items]
    vectors = encoder.embed(images=paths, texts=[item["title"] for item in items])
    expected, has = table.aligned(catalog.item_ids)
    assert has[:5].all()
    np.testing.assert_allclose(vectors, expected[:5].numpy(), atol=1e-5)


def test_pictures_of_all_kinds_have_one_vector(encoder, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    given = [image, pixels, tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()]
    vectors = encoder.embed(images=given)
    assert vectors.shape == (5, encoder.dim)
    np.testing.assert_allclose(vectors, np.repeat(vectors[:1], 5, 0), atol=1e-6)
    np.testing.assert_allclose(encoder.embed(images=image), vectors[0], atol=1e-6)
    assert encoder.embed(texts="red circle").shape == (encoder.dim,)
    # an item with both differs from one with either, and one that lacks a picture from a black one
    both, text, black = encoder.embed([image, None, np.zeros_like(pixels)], ["red", "red", "red"])
    assert not np.allclose(both, text, atol=1e-3) and not np.allclose(black, text, atol=1e-3)
    np.testing.assert_allclose(text, encoder.embed(texts=["red"])[0], atol=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "nothing to embed: give images, texts, or both"),
        ({"texts": ["a", " "]}, "item 1: the text is empty"),
        ({"images": [None, None], "texts": ["a", None]}, "item 1: neither picture nor text"),
        ({"images": [None], "texts": ["a", "b"]}, "1 images and 2 texts"),
        ({"images": "no/such.jpg"}, "picture no/such.jpg: no such file"),
        ({"images": [b"", picture()]}, "item 0: picture: empty"),
        ({"images": np.zeros((2, 3, 3, 3), np.uint8)}, r"pixels are \(H, W, 3\) uint8, not \(2, 3, 3, 3\)"),
    ],
)
def test_what_cannot_be_embedded_is_named(encoder, given, message):
    with pytest.raises(ValueError, match=message):
        encoder.embed(**given)


def test_searches(runs, encoder):
    search = mmctr.load(runs / "embeddings")
    exact = mmctr.ItemIndex.build(mmctr.EmbeddingTable.read(runs / "embeddings"))
    vector = encoder.embed(texts="red circle")
    assert search.search(vector=vector, k=4) == search.search(text="red circle", k=4) == exact.search(vector, 4)
    item = search.search(text="red circle", k=1)[0].item_id
    assert search.search(item_id=item, k=4) == exact.search_item(item, 4)
    assert item not in [one.item_id for one in search.search(item_id=item, image=picture(), k=5)]
    assert isinstance(mmctr.load(runs / "index"), mmctr.ItemSearch) and len(search) == len(exact)
    with pytest.raises(ValueError, match="leave the other parts out"):
        search.search(vector=vector, text="red")
    with pytest.raises(UnknownId, match="has no vector here"):
        search.search(item_id=-5)


def test_scores_by_raw_ids_are_those_of_the_predictions(runs, toy_folder):
    """The last test impression of a user, scored by hand at its time, has the score of predictions.parquet."""
    import pyarrow.parquet

    ranker = mmctr.load(runs / "table")
    predictions = pyarrow.parquet.read_table(mmctr.RunFolder(runs / "table").predictions).to_pylist()
    log = ranker.dataset.interactions
    splits = mmctr.split_interactions(log, len(ranker.item_ids), _split(runs / "table"))
    for number in (0, len(predictions) // 2, len(predictions) - 1):
        row = predictions[number]
        at = int(log.time[splits.test.source[number]])
        item, user = [row["item"]], row["user"]
        history = splits.test.history[splits.test.history_start[number] : splits.test.history_end[number]]
        past = ranker.item_ids.take(history).to_pylist()
        score = ranker.score(item, user_id=user, history=past, at=at)[0]
        assert score == pytest.approx(row["score"], abs=1e-5)
    ranking = ranker.rank(user_id=user, k=None)
    assert sorted(i for i, _ in ranking) == sorted(ranker.item_ids.to_pylist())
    assert [s for _, s in ranking] == sorted((s for _, s in ranking), reverse=True)
    best = [i for i, _ in ranking[:3]]
    np.testing.assert_allclose(ranker.score(best, user_id=user), [s for _, s in ranking[:3]], rtol=1e-5)
    assert ranker.rank(best[::-1], user_id=user, k=2) == [(i, pytest.approx(s)) for i, s in ranking[:2]]


def _split(run):
    from mmctr.runs.folder import split_config

    return split_config(run)


def test_a_user_nobody_knows_needs_a_history_or_no_id(runs):
    ranker = mmctr.load(runs / "id")
    items = ranker.item_ids.to_pylist()[:6]
    anonymous = ranker.score(items[:2], history=items[2:])
    np.testing.assert_array_equal(ranker.score(items[:2], user_id=10**9, history=items[2:]), anonymous)
    assert ranker.score(items[:2]).shape == (2,) and ranker.score([]).shape == (0,)
    assert not np.allclose(ranker.score(items[:2], history=items[:1]), anonymous)
    with pytest.raises(UnknownId, match=r"is not in the log.*give a history"):
        ranker.score(items[:1], user_id=10**9)
    with pytest.raises(UnknownId, match="item -7 is not in the catalog; ids look like"):
        ranker.score([-7])
    with pytest.raises(UnknownId, match="item ids here are"):
        ranker.score(["no number"])


def test_what_cannot_be_opened_is_named(tmp_path, runs):
    with pytest.raises(ValueError, match="no such folder or file"):
        mmctr.load(tmp_path / "none")
    (tmp_path / "begun").mkdir()
    shutil.copy(runs / "id" / "config.yaml", tmp_path / "begun")
    with pytest.raises(ValueError, match="a run that has not finished"):
        mmctr.load(tmp_path / "begun")
    with pytest.raises(ValueError, match="embedding"):
        mmctr.load(tmp_path)
