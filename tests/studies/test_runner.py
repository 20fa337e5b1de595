"""`mmctr coldstart`: cells are runs that are made once, go on after a kill, and are refused when they do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from mmctr.cli.main import main
from mmctr.data.embeddings import EmbeddingTable, write_npz
from mmctr.files import read_json
from mmctr.studies.config import StudyConfig
from mmctr.studies.controls import factor_table
from mmctr.studies.results import study_results
from mmctr.studies.runner import run_study
from tests.helpers.damage import rewrite
from tests.helpers.studies import Launcher, write_study
from tests.helpers.tiny import log_lines

pytestmark = pytest.mark.slow


def test_cells_are_ordinary_runs_seed_by_seed(finished_study):
    study, folder, _, calls = finished_study
    expected = [f"held_out/{name}/seed{seed}" for seed in (0, 3) for name in ("ids", "content")]
    assert {*calls[:2]} == {*expected[:2]} and {*calls} == {*expected} and len(calls) == 4  # two at a time
    config = yaml.safe_load((folder / "out" / "runs" / "held_out" / "content" / "seed3" / "config.yaml").read_text())
    assert config["seed"] == 3 and config["split"]["cold"] == 0.3 and config["task"]["max_history"] == 8
    assert config["task"]["user_dim"] == 4  # of the method, after that of all
    assert config["task"]["embedder"]["content"]["path"] == str(folder / "out" / "tables" / "factors.npz")
    assert config["data"]["path"] == study.data


def test_a_second_call_runs_nothing_and_a_removed_cell_runs_alone(finished_study):
    study, folder, results, _ = finished_study
    again = Launcher()
    outcomes = run_study(study, folder / "out", launch=again)
    assert not again.calls and {one.state for one in outcomes} == {"kept"}
    assert study_results(study, outcomes) == results
    shutil.rmtree(folder / "out" / "runs" / "held_out" / "content" / "seed0")
    outcomes = run_study(study, folder / "out", launch=again)
    assert again.calls == ["held_out/content/seed0"]
    assert [one.state for one in outcomes] == ["kept", "made", "kept", "kept"]
    assert study_results(study, outcomes) == results  # one thread, fp32: bit for bit


def test_a_killed_cell_is_reported_and_goes_on(finished_study):
    study, folder, results, _ = finished_study
    cell = folder / "out" / "runs" / "held_out" / "ids" / "seed3"
    shutil.rmtree(cell)
    outcomes = run_study(study, folder / "out", launch=Launcher(kill_at_rename=4))
    assert [one.state for one in outcomes] == ["kept", "kept", "failed", "kept"]
    assert list((cell / "checkpoints").iterdir()) and not (cell / "metrics.json").exists()
    found = study_results(study, outcomes).to_json()
    assert [(one["method"], one["seed"]) for one in found["failed"]] == [("ids", 3)]
    methods = found["protocols"]["held_out"]["methods"]
    assert methods["ids"]["seeds"] == [0] and methods["content"]["seeds"] == [0, 3]
    assert [one["seed"] for one in methods["content"]["difference"]["cold"]["seeds"]] == [0]
    outcomes = run_study(study, folder / "out", launch=(launch := Launcher()))
    assert launch.calls == ["held_out/ids/seed3"] and study_results(study, outcomes) == results
    assert sum(line.get("step") == 1 and "loss" in line for line in log_lines(cell)) == 1  # not from the start again


def test_command_goes_on_after_a_failed_cell_and_exits_with_1(finished_study, toy_folder, tmp_path, capsys):
    def breaks(values):
        lost = {"config": str(tmp_path / "table.yaml"), "set": ["task.embedder.content.path=nowhere"]}
        values["methods"] = {"lost": lost, **values["methods"]}
        values["seeds"] = [0]

    path = write_study(tmp_path, toy_folder, breaks)
    study, out = StudyConfig.load(path), tmp_path / "out"
    for name in ("ids", "content"):
        shutil.copytree(
            finished_study[1] / "out" / "runs" / "held_out" / name / "seed0", out / "runs" / "held_out" / name / "seed0"
        )
    config = out / "runs" / "held_out" / "content" / "seed0" / "config.yaml"
    config.write_text(config.read_text().replace(str(finished_study[1] / "out"), str(out)))
    rewrite(config.with_name("task.json"), {})
    with pytest.raises(SystemExit) as caught:
        main(["coldstart", str(path), "--json", f"--html={tmp_path}/page.html", f"--figures={tmp_path}/svg"])
    said = capsys.readouterr()
    assert caught.value.code == 1 and "1 runs failed" in said.err and "FAILED with exit code 1" in said.err
    results = json.loads(said.out)
    assert results == read_json(out / "results.json") and (tmp_path / "page.html").is_file()
    assert (tmp_path / "svg" / "held_out_clicks.svg").is_file()
    (failed,) = results["failed"]
    assert failed["method"] == "lost" and "nowhere: no such embedding folder or file" in failed["said"]
    assert "no such embedding folder" in Path(failed["log"]).read_text()
    assert set(results["protocols"]["held_out"]["methods"]) == {"ids", "content"}
    assert study.seeds == [0]


def test_a_cell_of_another_config_is_refused(finished_study):
    study, folder, _, _ = finished_study
    changed = study.model_copy(
        update={"methods": {"ids": study.methods["ids"].model_copy(update={"set": ["fit.epochs=9"]})}}
    )
    with pytest.raises(
        ValueError, match=r"ids/seed0: holds a run of another config \(fit.epochs: 2.0 there, 9.0 in the"
    ):
        run_study(changed, folder / "out", launch=Launcher())


def test_vectors_that_changed_since_a_cell_was_made_are_refused(finished_study, toy_folder, tmp_path):
    def from_file(values):
        del values["methods"]["content"]["table"]
        values["methods"]["content"]["set"].append(f"task.embedder.content.path={tmp_path / 'v.npz'}")
        values["seeds"] = [0]

    table = EmbeddingTable.read(finished_study[1] / "out" / "tables" / "factors.npz")
    write_npz(table, tmp_path / "v.npz")
    study, out = StudyConfig.load(write_study(tmp_path, toy_folder, from_file)), tmp_path / "out"
    run_study(study, out, launch=Launcher())
    more = study.model_copy(update={"seeds": [0, 1]})
    write_npz(EmbeddingTable(table.ids, table.vectors[::-1]), tmp_path / "v.npz")
    with pytest.raises(ValueError, match=r"content/seed0: was made with other vectors than .*v.npz holds now"):
        run_study(more, out, launch=(launch := Launcher()))
    assert not launch.calls
    write_npz(EmbeddingTable(table.ids, table.vectors + np.float32(1e-6)), tmp_path / "v.npz")  # rounding
    assert {one.state for one in run_study(study, out, launch=launch)} == {"kept"}
    (tmp_path / "v.npz").unlink()
    assert {one.state for one in run_study(study, out, launch=launch)} == {"kept"} and not launch.calls


def test_a_changed_table_is_refused(copied_study):
    study, out, _ = copied_study
    (out / "tables").unlink()
    table = factor_table(study.data)
    write_npz(EmbeddingTable(table.ids, 1 - table.vectors), out / "tables" / "factors.npz")
    ids_only = study.model_copy(update={"methods": {"ids": study.methods["ids"]}})
    with pytest.raises(ValueError, match=r"factors.npz: holds another table than `tables.factors` gives now"):
        run_study(ids_only, out, launch=Launcher())
