"""The commands, as a user types them, on a tiny world."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mmctr.cli import main
from mmctr.data.toy import ToyWorld, ToyWorldConfig
from tests.tiny import CLONE, finetune_values, pretrain_values, start, write_config
from tests.worlds import picture

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(toy_folder, tmp_path_factory) -> Path:
    """A folder with the runs `pretrain`, `id`, `table` and `joint`, `embeddings` and `index`."""
    folder = tmp_path_factory.mktemp("runs")
    values = pretrain_values(toy_folder)
    values["fit"]["epochs"] = 1
    start(folder, "pretrain.train", write_config(folder / "p.yaml", values), f"run_dir={folder / 'pretrain'}").ok()
    main(["embed", str(folder / "pretrain"), "--out", str(folder / "embeddings")])
    main(["index", str(folder / "embeddings"), "--out", str(folder / "index")])
    contents = {
        "id": None,
        "table": {"name": "table", "path": str(folder / "embeddings"), "dim": 8, "hidden": [8]},
        "joint": {"name": "encoder", "run": str(folder / "pretrain"), "history": "table", "dim": 8, "hidden": [8]},
    }
    contents["trees"] = contents["table"]
    for name, content in contents.items():
        values = finetune_values(toy_folder, content, epochs=1)
        if name == "trees":
            values["task"]["ranker"] = {"name": "gbdt_lr", "trees": {"num_trees": 8, "min_rows": 5}}
        config = write_config(folder / f"{name}.yaml", values)
        start(folder, "finetune.train", config, f"run_dir={folder / name}").ok()
    return folder


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
        "import sys\nfrom mmctr.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit as stop:\n"
        "    assert stop.code == 0\n"
        "heavy = {'torch', 'transformers', 'open_clip', 'datasets', 'faiss', 'pandas', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=CLONE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("prepare", "embed", "index", "search", "evaluate", "compare", "export", "push", "demo"):
        assert f"\n    {command} " in done.stdout


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
    assert "--text is empty" in refused(capsys, "search", index, "--text", " ")
    assert "no such file" in refused(capsys, "search", index, "--image", tmp_path / "none.png")
    (tmp_path / "broken.png").write_bytes(b"hello")
    assert "broken.png" in refused(capsys, "search", index, "--image", tmp_path / "broken.png")
    assert "k=0" in refused(capsys, "search", index, "--text", "red", "-k", 0)
    assert str(tmp_path / "nowhere") in refused(capsys, "search", tmp_path / "nowhere", "--text", "red")
    with pytest.raises(SystemExit):
        main(["search", str(index)])


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
