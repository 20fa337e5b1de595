"""Recipes and configs are found in a clone and in an installation, from any current folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mmctr import shipped
from mmctr.config import Config
from mmctr.shipped import find_config, recipe_environment, recipe_module, recipes_folder, shipped_config
from mmctr.studies.config import StudyConfig
from mmctr.studies.runner import study_cells
from tests.helpers.tiny import CLONE

CONFIG = "configs/finetune/toy_din_id.yaml"


class Numbers(Config):
    task: dict = {}
    data: dict = {}
    fit: dict = {}
    split: dict = {}
    run_dir: str = ""
    seed: int = 0


@pytest.fixture
def installation(tmp_path, monkeypatch) -> Path:
    """The folder of a package that stands alone, with the recipes inside; the library that runs is the clone's."""
    package = tmp_path / "site" / "mmctr"
    for recipe in ("pretrain", "finetune"):
        (package / "recipes" / recipe).mkdir(parents=True)
        (package / "recipes" / recipe / "train.py").touch()
    (package / "recipes" / "configs" / "finetune").mkdir(parents=True)
    (package / "recipes" / CONFIG).write_text("seed: 11")
    monkeypatch.setattr(shipped, "PACKAGE", package)
    return package


def test_a_clone_runs_its_recipes_under_their_short_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "before")
    assert recipes_folder() == CLONE and recipe_module("finetune") == "finetune.train"
    assert recipe_environment()["PYTHONPATH"] == f"{CLONE}{os.pathsep}before"
    assert find_config(CONFIG) == CLONE / CONFIG


def test_an_installation_runs_the_recipes_inside_the_package(installation, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert recipe_module("pretrain") == "mmctr.recipes.pretrain.train"
    assert "PYTHONPATH" not in recipe_environment()
    assert find_config(CONFIG) == installation / "recipes" / CONFIG
    assert Numbers.load(CONFIG).seed == 11


def test_a_copy_without_recipes_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "PACKAGE", tmp_path / "mmctr")
    with pytest.raises(ValueError, match="no recipes and no configs; install the package"):
        recipe_module("finetune")


def test_a_file_of_the_user_comes_before_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / CONFIG).parent.mkdir(parents=True)
    (tmp_path / CONFIG).write_text("seed: 5")
    assert find_config(CONFIG) == Path(CONFIG) and Numbers.load(CONFIG).seed == 5


def test_only_paths_below_configs_are_looked_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("finetune/toy_din_id.yaml", "configs/finetune/none.yaml", tmp_path / CONFIG, "configs/finetune"):
        assert shipped_config(path) is None and find_config(path) == Path(path)
    with pytest.raises(ValueError, match=r"^configs/finetune/none\.yaml: no such config file"):
        Numbers.load("configs/finetune/none.yaml")


def test_a_base_may_be_a_shipped_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mine.yaml").write_text(f"base: {CONFIG}\nseed: 9")
    config = Numbers.load("sub/mine.yaml")
    assert config.seed == 9 and config.task["ranker"]["name"] == "din"


def test_a_study_finds_the_configs_it_names_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = study_cells(StudyConfig.load("configs/studies/toy.yaml", ["seeds=[0]"]), tmp_path / "out")
    assert len(cells) > 3 and all(cell.arguments[0].startswith("configs/finetune/") for cell in cells)


@pytest.fixture(scope="module")
def wheel_folder(tmp_path_factory) -> Path:
    """An unpacked wheel of this clone."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=CLONE, check=True, capture_output=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "unpacked")
    return folder / "unpacked"


@pytest.mark.slow
def test_an_editable_installation_is_the_clone_and_no_copy(tmp_path):
    code = f"from hatchling.build import build_editable; build_editable({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=CLONE, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (link,) = [name for name in archive.namelist() if ".dist-info/" not in name]
        assert link.endswith(".pth") and archive.read(link).decode() == str(CLONE)


@pytest.mark.slow
def test_a_wheel_runs_without_the_clone(wheel_folder, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(wheel_folder)}

    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "ToyWorld" in run("-m", "mmctr", "demo", "--help")
    assert "mmctr.recipes.finetune.train" in run("-m", "mmctr.recipes.finetune.train", "--help")
    code = (
        "import json, mmctr.recipes.finetune.train as recipe\n"
        "from mmctr.shipped import find_config, recipe_module\n"
        f"config = recipe.FinetuneConfig.load({CONFIG!r})\n"
        f"print(json.dumps([recipe.__file__, str(find_config({CONFIG!r})), recipe_module('finetune'), config.run_dir]))"
    )
    recipe, config, module, run_dir = json.loads(run("-c", code))
    inside = wheel_folder / "mmctr" / "recipes"
    assert recipe == str(inside / "finetune" / "train.py") and config == str(inside / CONFIG)
    assert module == "mmctr.recipes.finetune.train" and run_dir == "demo/din_id"
    shipped_files = {path.relative_to(inside) for path in inside.rglob("*.yaml")}
    assert shipped_files == {path.relative_to(CLONE) for path in (CLONE / "configs").rglob("*.yaml")}
