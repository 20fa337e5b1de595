"""The code in docs/ works: the worked ranker, its try-out from Python, the YAML of features and splits."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pydantic import TypeAdapter

from mmctr.rankers.base import RankerInput
from tests.test_readme import CLONE, FENCE, PAGES, page


def blocks(name: str, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(page(CLONE / "docs" / name)) if kind == language]


@pytest.fixture
def recency(tmp_path, monkeypatch):
    """The module of the worked example, importable under the name the page gives it."""
    path = tmp_path / "recency.py"
    path.write_text(blocks("extending.md", "python")[0], encoding="utf-8")
    name = "mmctr.rankers.recency"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(importlib.import_module("sys").modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_the_worked_ranker_equals_a_loop(recency):
    lengths, dim, half_life = [3, 0, 1, 5], 4, 2.0
    torch.manual_seed(0)
    ranker = recency.RecencyConfig(half_life=half_life, mlp=[5]).build(dim, 2)
    inputs = RankerInput(
        items=torch.randn(6, dim),
        target=torch.tensor([0, 1, 5, 2]),
        history=torch.tensor([3, 3, 1, 5, 0, 1, 2, 3, 4]),
        history_offsets=torch.tensor([0, *np.cumsum(lengths)]),
        context=torch.randn(4, 2),
    )
    rows = []
    for i, history in enumerate(inputs.items[inputs.history].split(lengths)):
        weights = [0.5 ** (later / half_life) for later in reversed(range(len(history)))]
        interest = sum((w * v for w, v in zip(weights, history, strict=True)), torch.zeros(dim)) / (sum(weights) or 1)
        target = inputs.items[inputs.target[i]]
        rows.append(ranker.mlp(torch.cat([inputs.context[i], target, interest, interest * target])))
    output = ranker(inputs)
    torch.testing.assert_close(output.logits, torch.stack(rows).squeeze(1))
    assert output.logits.shape == (4,) and not output.losses


def test_the_worked_ranker_trains_from_python(recency, toy_folder):
    _, tryout, _ = blocks("extending.md", "python")
    assert '"demo/data"' in tryout and "batch_size=256" in tryout
    namespace: dict = {"__name__": "tryout"}
    exec(tryout.replace('"demo/data"', repr(str(toy_folder))), namespace)
    losses = namespace["losses"]
    assert len(losses) == 50 and np.isfinite(losses).all()
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.01


def test_the_union_of_the_worked_example_takes_it(recency):
    namespace: dict = {}
    exec(blocks("extending.md", "python")[2], namespace)
    union = TypeAdapter(namespace["RankerConfig"])
    assert union.validate_python({"name": "recency"}) == recency.RecencyConfig()
    assert union.validate_python({"name": "din"}).name == "din"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_yaml_loads(path, tmp_path, monkeypatch):
    """Every YAML block is valid over a config of the recipe it speaks of, or a whole study or description of data."""
    from mmctr.data.description import DatasetDescription
    from mmctr.runs.config import FinetuneConfig, PretrainConfig
    from mmctr.studies.config import StudyConfig
    from mmctr.studies.runner import study_cells

    monkeypatch.chdir(CLONE)

    for kind, body in FENCE.findall(page(path)):
        if kind != "yaml":
            continue
        values = yaml.safe_load(body)
        if "protocols" in values:
            study_cells(StudyConfig.parse(values), tmp_path)
            continue
        if "interactions" in values:
            DatasetDescription.parse(values)
            continue
        pretrain = "encoder" in values.get("task", {}) or "attributes" in values
        base = CLONE / "configs" / ("pretrain/toy.yaml" if pretrain else "finetune/toy_din_id.yaml")
        (tmp_path / "block.yaml").write_text(yaml.safe_dump({"base": str(base), **values}), encoding="utf-8")
        (PretrainConfig if pretrain else FinetuneConfig).load(tmp_path / "block.yaml")


def test_toy_world_snippet_writes_a_dataset_folder(tmp_path, monkeypatch):
    (snippet,) = blocks("data.md", "python")
    monkeypatch.chdir(tmp_path)
    small = snippet.replace("num_items=500, num_users=300", "num_items=60, num_users=20")
    assert small != snippet
    exec(small, {})
    assert {path.name for path in Path("toy").iterdir()} >= {"items.parquet", "interactions.parquet", "images"}


def test_the_reasons_pictures_are_refused_for_are_all_named():
    from mmctr.data.images import REMEDIES

    assert len(REMEDIES) == 10
    for reason in REMEDIES:
        assert f"`{reason}`" in page(CLONE / "docs" / "data.md"), reason
