"""Every config in the repository loads through the recipe it is for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

from mmctr.runs.config import FinetuneConfig, PretrainConfig
from mmctr.studies.config import StudyConfig
from mmctr.studies.runner import study_cells
from mmctr.training.optimizers import make_optimizer
from tests.helpers.tiny import CLONE

RECIPES = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}
CONFIGS = [path for name in RECIPES for path in sorted((CLONE / "configs" / name).rglob("*.yaml"))]


@pytest.mark.parametrize("path", CONFIGS, ids=[str(path.relative_to(CLONE / "configs")) for path in CONFIGS])
def test_a_config_loads_and_saves_equal(path: Path, tmp_path):
    recipe = RECIPES[path.relative_to(CLONE / "configs").parts[0]]
    config = recipe.load(path)
    config.save(tmp_path / "config.yaml")
    assert recipe.load(tmp_path / "config.yaml") == config
    moved = recipe.load(path, ["data.path=/d", "run_dir=/r", "seed=7"])
    assert (moved.data.path, moved.run_dir, moved.seed) == ("/d", "/r", 7)
    parts = {
        "pretrain": {"encoder", "projection", "head", "discriminator", "temperatures"},
        "finetune": {"id", "encoder", "content", "expert", "ranker"},
    }
    assert set(config.fit.optimizer.groups) <= parts[path.relative_to(CLONE / "configs").parts[0]]


def test_there_are_configs_of_both_recipes_and_no_others():
    assert {path.relative_to(CLONE / "configs").parts[0] for path in CONFIGS} == set(RECIPES)
    assert {path.name for path in (CLONE / "configs").iterdir()} == {*RECIPES, "accelerate", "studies"}
    for path in (CLONE / "configs" / "accelerate").glob("*.yaml"):
        values = yaml.safe_load(path.read_text())
        assert values["num_processes"] >= 1 and isinstance(values["use_cpu"], bool)


@pytest.mark.parametrize("path", sorted((CLONE / "configs" / "studies").glob("*.yaml")), ids=lambda path: path.name)
def test_a_study_and_its_cells_load(path: Path, tmp_path, monkeypatch):
    monkeypatch.chdir(CLONE)  # as recipes are run
    study = StudyConfig.load(path)
    cells = study_cells(study, tmp_path, path.name)
    assert len(cells) == len(study.protocols) * len(study.methods) * len(study.seeds) and len(study.methods) > 3
    assert len({cell.folder for cell in cells}) == len(cells)
    for cell in cells:
        again = FinetuneConfig.load(cell.arguments[0], cell.arguments[1:])
        assert again == cell.config and again.run_dir == str(cell.folder) and again.data.path == study.data
    assert study.seeds == ([0] if path.stem == "one_epoch" else [0, 1, 2])
    assert path.stem not in ("toy", "ml1m") or study.methods["shuffled"].table == "shuffled"


@pytest.mark.parametrize("path", sorted((CLONE / "configs" / "studies").glob("*.yaml")), ids=lambda path: path.name)
def test_what_a_study_reads_is_made_by_commands_it_names(path: Path, tmp_path, monkeypatch):
    """In its own comment, or in those of the configs and studies this names; `make demo` makes the demo's."""
    monkeypatch.chdir(CLONE)
    needed = set()
    for cell in study_cells(StudyConfig.load(path), tmp_path):
        content, tables = cell.config.task.embedder.content.model_dump(), cell.config.data.item_tables
        vectors = content.get("path") or []
        needed |= {content.get("run"), *tables, *([vectors] if isinstance(vectors, str) else vectors)}
    needed = {place for place in needed - {None} if not Path(place).is_relative_to(tmp_path)}
    said, seen = path.read_text(), set()
    while new := set(re.findall(r"configs/\S+\.yaml", re.sub("(?m)^[^#]*$", "", said))) - seen:
        seen |= new
        said += "".join((CLONE / name).read_text() for name in sorted(new))
    made = {*re.findall(r"--out (\S+)", said), *re.findall(r"(?m)^run_dir: (\S+)", said)}
    if "make demo" in said:
        made |= {"demo/pretrain", "demo/embeddings"}
    assert needed <= made


def test_parts_of_the_optimizer_are_those_of_the_task():
    """`parts` above is what the tasks call them."""
    from mmctr.tasks import PretrainTask, PretrainTaskConfig
    from mmctr.training.optimizers import OptimizerConfig
    from tests.helpers.tiny import ARCHITECTURE

    task = PretrainTask(PretrainTaskConfig.parse({"encoder": {"name": "openclip", "architecture": ARCHITECTURE}}))
    groups = {name: {"lr": 0.5} for name in ("encoder", "temperatures")}
    optimizer = make_optimizer(task, TypeAdapter(OptimizerConfig).validate_python({"groups": groups}))
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
