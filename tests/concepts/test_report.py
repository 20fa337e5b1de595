"""`mmctr concepts` on tiny runs, and steering a search by what it named."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mmctr.cli.main import main
from mmctr.concepts.click_effects import click_reasons
from mmctr.concepts.latents import Latents, traversal
from mmctr.concepts.naming import name_dimensions
from mmctr.concepts.report import concepts_text, describe_latents
from mmctr.concepts.report_types import ConceptsReport
from mmctr.concepts.steering import steering_vector
from mmctr.data.embeddings import EmbeddingTable
from mmctr.retrieval.index import ItemIndex
from tests.cli.test_main import output, refused
from tests.concepts.test_naming import ATTRIBUTES, MU, N
from tests.helpers.tiny import finetune_values, pretrain_values, start, write_config

HEAD = {"name": "beta_vae", "dim": 3, "hidden": [16], "beta": 0.2}


def latents(mu: np.ndarray = MU) -> Latents:
    return Latents(np.arange(N), mu, np.ones(N, bool), None)


def described(mu: np.ndarray = MU) -> ConceptsReport:
    catalog: Any = SimpleNamespace(item_ids=pa.array([f"item {row}" for row in range(N)]))
    description = describe_latents(latents(mu), catalog, name_dimensions(mu, ATTRIBUTES), ATTRIBUTES)
    spread = {"mean": mu.mean(0).tolist(), "std": mu.std(0).tolist()}
    return ConceptsReport("r", "d", "w", description, refused_columns={"brand": "why"}, **spread, runs=[])


def test_a_report_says_what_there_is():
    report = json.loads(json.dumps(described().to_json()))
    bright, _, noise, nothing = report["dimensions"]
    assert report["active"] == 3 and "warning" not in report
    assert bright["name"]["text"] == "colour: black, navy ↔ yellow, white" and bright["name"]["verified"]
    assert sum(bright["histogram"]["counts"]) == N
    assert not noise["name"]["verified"] and nothing == {"dimension": 3, "active": False, "variance": 0.0, "name": None}
    assert report["scores"]["mig"] > 0.5 > report["chance"]["mig"] + 0.4
    assert report["dependency"]["columns"] == ["colour", "shape"]
    said = concepts_text(described())
    assert "3 of 4 dimensions vary" in said and "colour: black, navy ↔ yellow, white  AUC 0.9" in said
    assert "no name (not" in said


def test_a_collapsed_head_is_said():
    collapsed = described(np.full((N, 2), 0.5))
    report = collapsed.to_json()
    assert report["active"] == 0 and "posterior collapse" in report["warning"] and "scores" not in report
    assert "warning: posterior collapse" in concepts_text(collapsed)


def test_a_traversal_goes_along_one_dimension():
    steps = traversal(MU, 0, np.ones(N, bool))
    values = [MU[rows, 0].mean() for rows in steps]
    assert len(steps) == 5 and np.all(np.diff(values) > 0.3)
    assert np.abs(MU[np.concatenate(steps)][:, 1:3]).mean() < np.abs(MU[:, 1:3]).mean()
    assert len(set(np.concatenate(steps).tolist())) == 10
    some = np.zeros(N, bool)
    some[::3] = True
    assert some[np.concatenate(traversal(MU, 0, some))].all()


def test_reasons_name_the_end_a_user_likes():
    dimensions = described().description.dimensions
    items = pa.array([f"item {row}" for row in range(N)])
    dark = [int(row) for row in np.argsort(MU[:, 0])[:4]]
    history = ["gone", *(f"item {row}" for row in dark), f"item {int(MU[:, 0].argmax())}"]
    first, second = click_reasons(dimensions, np.array([-0.3, 0.1, 0.0, 0.0]), latents(), items, history)
    assert first.likes == ["black", "navy"] and first.end == "low" and first.click_effect == -0.3
    assert first.because_of == [f"item {row}" for row in dark[:2]]
    assert second.dimension == 1 and second.likes == ["square"]


def test_steering_by_names(tmp_path):
    path = tmp_path / "concepts.json"
    path.write_text(json.dumps(described().to_json()))
    std = MU.std(0)
    assert steering_vector(path, ["Yellow"], [], 2.0, "w") == pytest.approx([2 * std[0], 0, 0, 0])
    assert steering_vector(path, ["black"], ["square"], 1.0, None) == pytest.approx([-std[0], -std[1], 0, 0])
    with pytest.raises(ValueError, match="'yelow' names no dimension here; did you mean 'yellow'"):
        steering_vector(path, ["yelow"], [], 1.0, "w")
    with pytest.raises(ValueError, match="names of other weights than the vectors"):
        steering_vector(path, ["yellow"], [], 1.0, "v")
    with pytest.raises(ValueError, match="no such file; `mmctr concepts RUN` writes it"):
        steering_vector(tmp_path / "none.json", ["yellow"], [], 1.0, None)

    ids = pa.array(range(N))
    index = ItemIndex.build(EmbeddingTable(ids, MU.astype(np.float32)))
    index.save(tmp_path / "index")
    index = ItemIndex.load(tmp_path / "index")
    np.testing.assert_allclose(index.vector(7), MU[7], atol=1e-5)
    start_at = int(np.argsort(MU[:, 0])[50])
    plain = [MU[n.item_id, 0] for n in index.search_item(start_at, 20)]
    bright = [
        MU[n.item_id, 0] for n in index.search_item(start_at, 20, steering_vector(path, ["yellow"], [], 2.0, "w"))
    ]
    assert np.mean(bright) > np.mean(plain) + 1


@pytest.fixture(scope="module")
def runs(toy_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("concepts")
    values = pretrain_values(toy_folder, head=HEAD)
    values["fit"] |= {"epochs": 6, "optimizer": {"lr": 1e-2}}
    values["task"]["objectives"] = {}
    start(folder, "pretrain.train", write_config(folder / "p.yaml", values), f"run_dir={folder / 'run'}").ok()
    start(folder, "mmctr", "embed", folder / "run", "--out", folder / "emb").ok()
    content = {"name": "table", "path": str(folder / "emb"), "dim": 8, "hidden": [8]}
    config = write_config(folder / "f.yaml", finetune_values(toy_folder, content))
    start(folder, "finetune.train", config, f"run_dir={folder / 'ranker'}").ok()
    return folder


@pytest.mark.lowest
@pytest.mark.slow
def test_the_command_writes_json_and_a_page(runs, toy_folder, tmp_path, capsys):
    table = EmbeddingTable.read(runs / "emb")
    assert table.dim == 3 and np.abs(np.linalg.norm(table.vectors, axis=1) - 1).max() > 0.05
    metrics = json.loads((runs / "run" / "metrics.json").read_text())
    assert metrics["validation"]["head_active"] == 3 and metrics["validation"]["head_elbo"] > 0

    columns = ["factor_size", "factor_background", "category"]
    ranker = ["--ranker", runs / "ranker", "--user", 5_000_000_003]
    given = ["concepts", runs / "run", "--out", tmp_path / "out", "--columns", *columns, *ranker]
    report = json.loads(output(capsys, *given, "--json"))
    assert report == json.loads((tmp_path / "out" / "concepts.json").read_text())
    assert report["dependency"]["columns"] == columns and report["active"] == 3
    assert all(np.isfinite(entry["click_effect"]) for entry in report["dimensions"])
    assert any(abs(entry["click_effect"]) > 1e-4 for entry in report["dimensions"])
    assert report["user"]["user_id"] == 5_000_000_003 and report["user"]["reasons"]
    page = (tmp_path / "out" / "concepts.html").read_text()
    assert "<script" not in page and page.count("data:image/png") >= 10 and "Because you like" in page
    for entry in report["dimensions"]:
        assert f"<h2>{entry['dimension']}: " in page
    assert "dimensions vary over" in output(capsys, *given)

    assert "--user needs --ranker" in refused(capsys, "concepts", runs / "run", "--user", 1)
    assert "names another --user" not in refused(capsys, *given[:-1], 17)
    assert "column 'nothing' is missing" in refused(capsys, "concepts", runs / "run", "--columns", "nothing")


@pytest.mark.slow
def test_runs_that_cannot_be_named_or_explained(runs, toy_folder, tmp_path, capsys):
    values = pretrain_values(toy_folder)
    values["fit"]["epochs"] = 0
    start(tmp_path, "pretrain.train", write_config(tmp_path / "p.yaml", values), f"run_dir={tmp_path / 'plain'}").ok()
    assert "this run has no head" in refused(capsys, "concepts", tmp_path / "plain", "--out", tmp_path / "o")
    config = write_config(tmp_path / "f.yaml", finetune_values(toy_folder, epochs=0.2))
    start(tmp_path, "finetune.train", config, f"run_dir={tmp_path / 'ids'}").ok()
    error = refused(capsys, "concepts", runs / "run", "--out", tmp_path / "o", "--ranker", tmp_path / "ids")
    assert "does not read the latents of the run" in error
    assert "names no dimension" in refused(
        capsys, "search", runs / "emb", "--item", 7_000_000_003, "--more", "xyzzy", "--concepts", _named(runs, tmp_path)
    )


def _named(runs: Path, folder: Path) -> Path:
    main(["concepts", str(runs / "run"), "--out", str(folder / "named")])
    return folder / "named" / "concepts.json"


@pytest.mark.slow
def test_the_best_of_several_runs_is_shown(runs, toy_folder, tmp_path, capsys):
    config = runs / "p.yaml"
    start(tmp_path, "pretrain.train", config, f"run_dir={tmp_path / 'other'}", "seed=1", "fit.epochs=0").ok()
    report = json.loads(output(capsys, "concepts", tmp_path / "other", runs / "run", "--out", tmp_path / "o", "--json"))
    scores = {entry["run"]: entry["score"] for entry in report["runs"]}
    assert set(scores) == {str(tmp_path / "other"), str(runs / "run")}
    assert report["run"] == max(scores, key=lambda run: scores[run])
