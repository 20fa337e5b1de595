"""The commands, as a user types them, on a tiny world."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmctr.cli.main import main
from mmctr.data.embeddings import EmbeddingTable
from mmctr.datasets.toy_world import ToyWorld, ToyWorldConfig
from mmctr.errors import exit_on_error
from tests.helpers.tiny import CLONE, pretrain_values, write_config
from tests.helpers.worlds import picture

pytestmark = pytest.mark.slow


def output(capsys, *arguments) -> str:
    capsys.readouterr()
    main([str(part) for part in arguments])
    return capsys.readouterr().out


def refused(capsys, *arguments) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(part) for part in arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and error.startswith("error: ") and error.count("\n") == 1
    return error


def test_help_does_not_import_torch():
    code = (
        "import sys\nfrom mmctr.cli.main import main\ntry:\n    main(['--help'])\nexcept SystemExit as stop:\n"
        "    assert stop.code == 0\n"
        "heavy = {'torch', 'transformers', 'open_clip', 'datasets', 'faiss', 'pandas', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=CLONE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in (
        "prepare",
        "embed",
        "index",
        "export",
        "semantic-ids",
        "search",
        "evaluate",
        "compare",
        "push",
        "serve",
        "demo",
    ):
        assert re.search(rf"^    {command}\s", done.stdout, re.MULTILINE), command


@pytest.mark.lowest
def test_prepare_prints_its_report(toy_folder, tmp_path, capsys):
    config = write_config(tmp_path / "p.yaml", pretrain_values(toy_folder))
    out = tmp_path / "prepared"
    text = output(capsys, "prepare", toy_folder, "--out", out, "--image-size", 16, "--config", config)
    report = json.loads(text[: text.rindex("}") + 1])
    assert report["items"]["kept"] == 120 and "pictures 16 shortest" in report and "pictures 32 shortest" in report
    assert f"data.path={out}" in text
    assert "no items.parquet" in refused(capsys, "prepare", tmp_path / "nowhere", "--out", tmp_path / "o")
    assert "not a pretraining config" in refused(
        capsys, "prepare", toy_folder, "--out", out, "--config", write_config(tmp_path / "x.yaml", {"a": 1})
    )


@pytest.mark.lowest
def test_embed_writes_the_catalog_or_another_one(runs, tmp_path, capsys):
    manifest = json.loads((runs / "embeddings" / "manifest.json").read_text())
    assert manifest["items"] == 120 and manifest["vectors"] + manifest["without content"] == 120
    other = ToyWorld(ToyWorldConfig(num_items=50, num_users=5, impressions_per_user=6, image_size=16, seed=9))
    other.write(tmp_path / "other")
    text = output(capsys, "embed", runs / "pretrain", "--data", tmp_path / "other", "--out", tmp_path / "e")
    assert f"{tmp_path / 'e'}: " in text and json.loads((tmp_path / "e" / "manifest.json").read_text())["items"] == 50
    text = output(capsys, "embed", runs / "pretrain", "--out", tmp_path / "text", "--modality", "text")
    alone = json.loads((tmp_path / "text" / "manifest.json").read_text())
    assert alone["vectors"] < manifest["vectors"] + 1 and alone["identity"]["modality"] == "text"
    assert "another run or dataset" in refused(capsys, "embed", runs / "pretrain", "--out", tmp_path / "e")
    assert "not the folder of a finished run" in refused(capsys, "embed", tmp_path, "--out", tmp_path / "new")
    assert "needs a run of pretrain.train" in refused(capsys, "embed", runs / "id", "--out", tmp_path / "new")


@pytest.mark.lowest
def test_search_by_item_text_and_picture(runs, toy_folder, tmp_path, capsys):
    items = pq.read_table(runs / "embeddings" / "items.parquet")
    item = items["item_id"][3].as_py()
    for where in ("index", "embeddings"):
        found = json.loads(output(capsys, "search", runs / where, "--item", item, "-k", 5, "--json"))
        assert len(found) == 5 and item not in [n["item_id"] for n in found]
        scores = [n["score"] for n in found]
        assert scores == sorted(scores, reverse=True) and -1 <= scores[-1] <= scores[0] <= 1.0001
    titles = dict(zip(items["item_id"].to_pylist(), items["title"].to_pylist(), strict=True))
    assert [n["title"] for n in found] == [titles[n["item_id"]] for n in found]
    text = output(capsys, "search", runs / "index", "--item", item, "-k", 2)
    assert str(found[0]["item_id"]) in text.splitlines()[0] and len(text.splitlines()) == 2
    assert len(json.loads(output(capsys, "search", runs / "index", "--text", "red circle", "--json"))) == 10
    # an item is its own nearest neighbour by the picture and text it has; a picture alone is near to it too
    (tmp_path / "p.png").write_bytes(picture())
    assert len(json.loads(output(capsys, "search", runs / "index", "--image", tmp_path / "p.png", "--json"))) == 10


def test_search_mistakes(runs, tmp_path, capsys):
    index = runs / "index"
    assert "has no vector here" in refused(capsys, "search", index, "--item", 5)
    assert "ids here are integers" in refused(capsys, "search", index, "--item", "shoe")
    assert "the text is empty" in refused(capsys, "search", index, "--text", " ")
    assert "no such file" in refused(capsys, "search", index, "--image", tmp_path / "none.png")
    (tmp_path / "broken.png").write_bytes(b"hello")
    assert "broken.png" in refused(capsys, "search", index, "--image", tmp_path / "broken.png")
    assert "k=0" in refused(capsys, "search", index, "--text", "red", "-k", 0)
    assert str(tmp_path / "nowhere") in refused(capsys, "search", tmp_path / "nowhere", "--text", "red")


@pytest.fixture(scope="module")
def grown(runs, toy_folder, tmp_path_factory) -> Path:
    """The dataset with three more items, shown to users, and a vector table and an index they were added to."""
    folder = tmp_path_factory.mktemp("grown")
    shutil.copytree(toy_folder, folder / "data")
    items = pq.read_table(toy_folder / "items.parquet")
    new = items.slice(0, 3).set_column(0, "item_id", pa.array([91, 92, 93], items.schema.field("item_id").type))
    assert items.column_names[0] == "item_id"
    pq.write_table(pa.concat_tables([items, new]), folder / "data" / "items.parquet")
    log = pq.read_table(toy_folder / "interactions.parquet")
    ids = np.asarray(log["item_id"])
    first = items["item_id"][0].as_py()
    ids = np.where(ids == first, 91, ids)  # what the first item was shown to, its twin now is
    place = log.column_names.index("item_id")
    pq.write_table(log.set_column(place, "item_id", pa.array(ids)), folder / "data" / "interactions.parquet")
    shutil.copytree(runs / "embeddings", folder / "embeddings")
    shutil.copytree(runs / "index", folder / "index")
    return folder


def test_new_items_are_embedded_indexed_and_scored_as_cold_ones(runs, grown, toy_folder, tmp_path, capsys):
    text = output(
        capsys,
        *("embed", runs / "pretrain", "--data", grown / "data", "--out", grown / "embeddings"),
        *("--append", "--index", grown / "index"),
    )
    before, after = (pq.read_table(runs / "embeddings" / "items.parquet"), EmbeddingTable.read(grown / "embeddings"))
    assert after.ids.to_pylist() == [*before["item_id"].to_pylist(), 91, 92, 93] and "3 items added" in text
    # a twin has its original's vector and stands next to it
    first = pq.read_table(toy_folder / "items.parquet")["item_id"][0].as_py()
    np.testing.assert_allclose(after.vectors[-3], after.vectors[before["item_id"].to_pylist().index(first)], atol=1e-5)
    found = json.loads(output(capsys, "search", grown / "index", "--item", 91, "-k", 2, "--json"))
    assert found[0]["item_id"] == first and found[0]["score"] == pytest.approx(1, abs=1e-5)
    assert "0 items added" in output(capsys, "index", grown / "embeddings", "--out", grown / "index", "--append")

    # the ranker knows no id of theirs, but their content
    arguments = ("evaluate", runs / "table", "--data", grown / "data")
    without = json.loads(output(capsys, *arguments))["test"]["cold"]
    given = json.loads(output(capsys, *arguments, "--embeddings", grown / "embeddings"))["test"]["cold"]
    assert given["num_impressions"] == without["num_impressions"] > 0 and given["log_loss"] != without["log_loss"]
    joint = json.loads(output(capsys, "evaluate", runs / "joint", "--data", grown / "data"))["test"]["cold"]
    assert joint["num_impressions"] == given["num_impressions"]
    pictures = ("--modality", "image", "--out", tmp_path / "pictures")
    output(capsys, "embed", runs / "pretrain", "--data", grown / "data", *pictures)
    wrong = refused(capsys, *arguments, "--embeddings", tmp_path / "pictures")
    assert "not the vectors this ranker was trained on" in wrong
    assert "reads no content" in refused(
        capsys, "evaluate", runs / "id", "--data", grown / "data", "--embeddings", grown / "embeddings"
    )
    assert "of modality 'both', not 'text'" in refused(
        capsys,
        *("embed", runs / "pretrain", "--out", grown / "embeddings", "--append", "--modality", "text"),
    )
    assert "--index goes with --append" in refused(
        capsys, "embed", runs / "pretrain", "--out", tmp_path / "x", "--index", tmp_path / "y"
    )


def test_an_index_is_built_merged_and_thinned_out(runs, toy_folder, tmp_path, capsys):
    text = output(
        capsys,
        *("index", runs / "embeddings", "--out", tmp_path / "i", "--columns", "factor_colour", "--factory", "HNSW8"),
    )
    assert "HNSW8 (efSearch" in text and "recall@10" in text
    items = pq.read_table(toy_folder / "items.parquet")
    colour = dict(zip(items["item_id"].to_pylist(), items["factor_colour"].to_pylist(), strict=True))
    where = f"factor_colour={colour[items['item_id'][0].as_py()]}"
    found = json.loads(
        output(capsys, "search", tmp_path / "i", "--text", "red", "--where", where, "-k", 500, "--mmap", "--json")
    )
    assert {colour[n["item_id"]] for n in found} == {colour[items["item_id"][0].as_py()]}
    assert len(found) == sum(value == colour[items["item_id"][0].as_py()] for value in colour.values())
    gone = [n["item_id"] for n in found[:2]]
    assert f"{len(colour) - 2} items" in output(capsys, "index", tmp_path / "i", "--remove", *gone)
    found = json.loads(output(capsys, "search", tmp_path / "i", "--text", "red", "-k", 500, "--json"))
    assert len(found) == len(colour) - 2 and not {n["item_id"] for n in found} & set(gone)
    table = EmbeddingTable.read(runs / "embeddings")
    for name, rows in (("a", slice(0, 70)), ("b", slice(70, None))):
        np.savez(tmp_path / f"{name}.npz", item_id=np.asarray(table.ids)[rows], vectors=table.vectors[rows])
    text = output(capsys, "index", tmp_path / "a.npz", tmp_path / "b.npz", "--out", tmp_path / "both")
    assert f"{len(table)} items" in text
    for item in table.ids[:3].to_pylist():
        merged, whole = (
            json.loads(output(capsys, "search", folder, "--item", item, "--json"))
            for folder in (tmp_path / "both", runs / "index")
        )
        assert [n["item_id"] for n in merged] == [n["item_id"] for n in whole]
    for arguments, message in (
        (("index", runs / "index", "--remove", "5"), "item 5 has no vector here"),
        (("index", runs / "embeddings", "--remove", "5"), "--remove needs an index"),
        (("index", runs / "embeddings", "--out", tmp_path / "none", "--append"), "no index to append to"),
        (("index", runs / "index", "--out", tmp_path / "i", "--append"), "one embedding folder"),
        (("index", tmp_path / "a.npz", "--columns"), "give --data"),
        (("index", runs / "embeddings", "--recall", "2"), "recall 2.0"),
        (("search", runs / "index"), "nothing to search by"),
        (("search", runs / "index", "--text", "a", "--weights", "1", "2"), "2 for 1 parts"),
        (("search", runs / "index", "--text", "a", "--queries", "q.csv"), "leave other queries"),
        (("search", runs / "index", "--text", "a", "--where", "price<3"), "no column 'price'"),
    ):
        assert message in refused(capsys, *arguments)
    with pytest.raises(SystemExit):
        main(["index", str(runs / "embeddings"), "--memory", "much"])


@pytest.mark.lowest
@pytest.mark.parametrize("name", ["id", "table", "joint", "trees"])
def test_evaluate_gives_the_metrics_of_the_run(runs, name, tmp_path, capsys):
    numbers = json.loads(output(capsys, "evaluate", runs / name, "--out", tmp_path / "m.json"))
    metrics = json.loads((runs / name / "metrics.json").read_text())
    assert numbers == {part: metrics[part] for part in ("validation", "test")}
    assert json.loads((tmp_path / "m.json").read_text()) == numbers


def test_evaluate_of_pretraining_gives_the_metrics_of_the_run(runs, capsys):
    numbers = json.loads(output(capsys, "evaluate", runs / "pretrain"))["validation"]
    metrics = json.loads((runs / "pretrain" / "metrics.json").read_text())["validation"]
    assert numbers == {name: metrics[name] for name in numbers} and "mean_recall" in numbers


@pytest.mark.parametrize("name", ["id", "table", "joint", "trees"])
def test_evaluate_on_another_log(runs, name, tmp_path, capsys):
    """The catalog has other items too, all of them cold for the run."""
    config = ToyWorldConfig(num_items=60, num_users=20, impressions_per_user=20, image_size=32, seed=4)
    ToyWorld(config).write(tmp_path / "other")
    m = json.loads(output(capsys, "evaluate", runs / name, "--data", tmp_path / "other"))["test"]
    rows = pq.read_table(tmp_path / "other" / "interactions.parquet")
    assert m["all"]["num_impressions"] == len(rows)
    assert m["all"]["num_positives"] == sum(rows["label"].to_pylist())
    known = pq.read_table(runs / name / "vocabulary" / "items.parquet")["item_id"].to_pylist()
    cold = [item not in set(known) for item in rows["item_id"].to_pylist()]
    assert m["cold"]["num_impressions"] == sum(cold) > 0 and 0 < m["all"]["log_loss"] < 5


def test_compare(runs, tmp_path, capsys):
    text = output(capsys, "compare", runs / "id", runs / "table", runs / "joint", "--html", tmp_path / "r.html")
    assert all(name in text for name in ("id", "table", "joint", "cold")) and f"report: {tmp_path / 'r.html'}" in text
    page = (tmp_path / "r.html").read_text()
    assert "<html" in page and all(name in page for name in ("table", "joint", "cold"))
    compared = output(capsys, "compare", runs / "id", runs / "table", "--json")
    assert "gauc" in compared and json.loads(compared)
    assert str(tmp_path / "nothing") in refused(capsys, "compare", runs / "id", tmp_path / "nothing")


def test_a_command_that_is_interrupted_ends_without_a_traceback(capsys):
    with pytest.raises(SystemExit) as stopped, exit_on_error():
        raise KeyboardInterrupt
    assert stopped.value.code == 130 and capsys.readouterr().err == "interrupted\n"  # as a shell has it
