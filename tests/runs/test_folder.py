"""Run folders that are opened from somewhere else, or begun again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from accelerate import Accelerator

from mmctr.run_folder import RunFolder
from mmctr.runs.config import FinetuneConfig
from mmctr.runs.folder import begin_folder, data_config


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A folder with a dataset in which a run was begun with relative paths."""
    folder = tmp_path / "project"
    (folder / "shop").mkdir(parents=True)
    monkeypatch.chdir(folder)
    config = FinetuneConfig.parse({"data": {"path": "shop"}, "run_dir": "runs/a"})
    begin_folder(config, RunFolder(Path(config.run_dir)), Accelerator())
    return folder


def test_a_relative_path_starts_from_where_the_run_was_started(project, tmp_path, monkeypatch):
    """From any other folder, also after run and dataset moved together; the run names no path of this machine."""
    assert data_config("runs/a", None).path == str(project / "shop")
    for text in project.glob("runs/a/*"):
        assert str(tmp_path) not in text.read_text()
    moved = project.rename(tmp_path / "moved")
    monkeypatch.chdir("/")
    assert data_config(moved / "runs" / "a", None).path == str(moved / "shop")
    assert RunFolder(moved / "runs" / "a").read_config()["data"]["path"] == "shop"
    assert data_config(moved / "runs" / "a", "elsewhere").path == "elsewhere"


def test_a_run_folder_that_was_copied_alone_reads_the_dataset_of_this_folder(project, tmp_path, monkeypatch):
    copied = (project / "runs" / "a").rename(tmp_path / "a")
    with pytest.raises(
        ValueError, match=r"config\.yaml: data\.path 'shop' does not exist from the folder where the run"
    ):
        monkeypatch.chdir(tmp_path)
        data_config(copied, None)
    monkeypatch.chdir(project)
    assert data_config(copied, None).path == "shop"


def test_names_of_the_hub_and_absolute_paths_stay(project):
    run = RunFolder(project / "runs" / "a")
    assert run.located("user/name:train") == "user/name:train"
    assert run.located(str(project / "shop")) == str(project / "shop")
    (project / "shop" / "a-0.parquet").write_text("")
    assert run.located("shop/*.parquet") == str(project / "shop" / "*.parquet")


@pytest.mark.parametrize("value", ["[]", "{}", "{", '{"relative paths start from": 3}'])
def test_a_damaged_place_is_named(project, value):
    run = RunFolder(project / "runs" / "a")
    run.place.write_text(value)
    with pytest.raises(ValueError, match=r"place\.json"):
        run.located("shop")


def test_an_absolute_path_that_is_gone_is_named(project):
    path = project / "runs" / "a" / "config.yaml"
    gone = str(project / "gone")
    path.write_text(path.read_text().replace("path: shop", f"path: {json.dumps(gone)}"))
    with pytest.raises(ValueError, match=r"data\.path .*gone' does not exist; put the dataset there again"):
        data_config("runs/a", None)
    assert data_config("runs/a", None, is_read=False).path == gone  # an encoder needs no dataset


def begin(folder: Path, **values: object) -> str:
    config = FinetuneConfig.parse({"data": {"path": "shop"}, "run_dir": str(folder), **values})
    return begin_folder(config, RunFolder(folder), Accelerator())


def test_a_run_that_ended_before_training_does_not_block_the_folder(tmp_path, caplog):
    """As after a typo in the name of the dataset: the corrected config takes the place of the first one."""
    folder = tmp_path / "run"
    first = begin(folder, seed=1)
    RunFolder(folder).item_tables.write_text("columns of the first config")
    with caplog.at_level("INFO"):
        assert begin(folder, seed=2) != first
    assert "seed: 1" in caplog.text and RunFolder(folder).read_config()["seed"] == 2
    assert not RunFolder(folder).item_tables.exists()


@pytest.mark.parametrize(
    "kept", ["log.jsonl", "checkpoints/best.safetensors", "model.safetensors", "metrics.json", "trees.json"]
)
def test_what_was_trained_is_not_replaced(tmp_path, kept):
    folder = tmp_path / "run"
    begin(folder, seed=1)
    (folder / kept).parent.mkdir(exist_ok=True)
    (folder / kept).write_text("")
    with pytest.raises(ValueError, match=r"holds a run of another config \(seed: 1 in the folder, 2 now\)"):
        begin(folder, seed=2)
    assert begin(folder, seed=1)
