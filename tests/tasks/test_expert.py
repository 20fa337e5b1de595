"""MAKE: what the expert hands over, against plain arithmetic; the run folder of step 2 is all that is needed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from mmctr.data.batches import BehaviorBatch
from mmctr.data.splits import ColdItemsSplit
from mmctr.export.onnx_ranker import export_ranker
from mmctr.features.vocabulary import RankingVocabulary
from mmctr.runs.config import DataConfig
from mmctr.runs.expert import load_expert
from mmctr.studies.config import StudyConfig
from mmctr.studies.runner import run_study
from mmctr.tasks import RankingTask, RankingTaskConfig
from tests.helpers.damage import rewrite
from tests.helpers.serving import FEATURES, MAX_HISTORY, ServingWorld, look_trained, make_world, ranking_data, save_run
from tests.helpers.studies import Launcher
from tests.helpers.tiny import finetune_values, start, write_config

TABLE = {"name": "table", "path": "/nowhere/e", "dim": 3, "hidden": [4]}
DIN = {"name": "din", "attention": [4], "mlp": [6, 5]}
DIEN = {"name": "dien", "mlp": [6, 5]}
SPLIT = ColdItemsSplit(cold=0.2)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> ServingWorld:
    return make_world(tmp_path_factory.mktemp("make") / "data")


def task_of(world: ServingWorld, expert: RankingTask | None = None, **values) -> RankingTask:
    config = RankingTaskConfig.parse({"user_dim": 0, "max_history": MAX_HISTORY} | values)
    vocabulary = RankingVocabulary.learn(world.dataset, world.splits, config.features)
    content = world.content if config.embedder.content.name == "table" else None
    ids = world.dataset.catalog.item_ids
    return look_trained(RankingTask(config, vocabulary, content, catalog_ids=ids, expert=expert))


def expert_of(world: ServingWorld, **values) -> RankingTask:
    embedder = {"id_dim": 0, "content": TABLE}
    given = {"embedder": embedder, "ranker": DIN | {"mlp": [7, 3]}, "features": {"item": FEATURES["item"]}}
    return task_of(world, **given | values)


def student_values(ranker: dict, content: dict | None = None, **make) -> dict:
    embedder = {"id_dim": 3, "content": content or {"name": "none"}}
    make = {"run": "/nowhere/expert"} | make
    return {"embedder": embedder, "ranker": ranker, "features": FEATURES, "user_dim": 3, "make": make}


def with_expert(world: ServingWorld, ranker: dict, content: dict | None = None, **make) -> RankingTask:
    return task_of(world, expert_of(world), **student_values(ranker, content, **make))


def batch_of(world: ServingWorld, task: RankingTask, rows: int = 25) -> BehaviorBatch:
    return ranking_data(world, task).collator(world.splits.test)(np.arange(rows))


def mlp_by_hand(mlp: nn.Sequential, x: torch.Tensor, beside: list[torch.Tensor]) -> list[torch.Tensor]:
    """The hidden layers and the last one: [linear, activation] each, what is handed over beside the last ones."""
    pairs = [(mlp[i], mlp[i + 1]) for i in range(0, len(mlp) - 1, 2)]
    first, outputs = len(pairs) - len(beside), []
    for place, (linear, act) in enumerate(pairs):
        x = act(x @ linear.weight.T + linear.bias)
        outputs.append(x)
        if place >= first:
            x = torch.cat([x, beside[place - first]], dim=1)
    return [*outputs, x @ mlp[-1].weight.T + mlp[-1].bias]


def din_by_hand(expert: RankingTask, batch: BehaviorBatch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(v, layers of the MLP) of a DIN, one impression after another."""
    items, unit, tops, vectors = expert.embedder(batch.items), expert.ranker.unit, [], []
    for b, (begin, end) in enumerate(zip(batch.history_offsets[:-1], batch.history_offsets[1:], strict=True)):
        q, k = items[batch.target[b]], items[batch.history[begin:end]]
        rows = torch.cat([q.expand_as(k), k, q - k, q * k], dim=1)
        weights = unit.rest(unit.act(unit.first(rows)))
        interest = (weights * k).sum(0)
        vectors.append(torch.cat([q, interest]))
        tops.append(torch.cat([q, interest, interest * q]))
    return torch.stack(vectors), mlp_by_hand(expert.ranker.mlp, torch.stack(tops), [])


@pytest.mark.parametrize("hidden_layers", [0, 1, 2])
@pytest.mark.parametrize("ranker", [DIN, DIEN], ids=["din", "dien"])
def test_what_is_handed_over_is_the_formula(world, ranker, hidden_layers):
    task = with_expert(world, ranker, hidden_layers=hidden_layers)
    batch, seen = batch_of(world, task), []
    task.ranker.mlp[0].register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        logits = task.logits(batch)[0]
        vector, layers = din_by_hand(task.expert.task, batch)
        assert len(layers) == 3 and vector.shape[1] == 2 * task.expert.task.embedder.dim
        bare = torch.cat([task.users(batch.user), task.context(batch.context, batch.user)], dim=1)
        context = torch.cat([bare, vector], dim=1)
        torch.testing.assert_close(seen[0][:, : context.shape[1]], context, rtol=1e-4, atol=1e-4)
        own = mlp_by_hand(task.ranker.mlp, seen[0], layers[2 - hidden_layers : 2])[-1]
        torch.testing.assert_close(logits, (own + layers[-1]).squeeze(1), rtol=1e-4, atol=1e-3)
    assert logits.std() > 0.1


@pytest.mark.parametrize("ranker", [DIN, DIEN], ids=["din", "dien"])
def test_without_weight_on_the_expert_it_is_the_ranker_on_ids(world, ranker):
    task = with_expert(world, ranker)
    values = student_values(ranker) | {"make": None}
    plain = task_of(world, **values)
    bare, v = plain.users.weight.shape[1] + plain.context.dim, task.expert.dim
    state = {name: value for name, value in task.state_dict().items() if not name.startswith("expert.")}
    first, last = state["ranker.mlp.0.weight"], state["ranker.mlp.4.weight"]
    state["ranker.mlp.0.weight"] = torch.cat([first[:, :bare], first[:, bare + v :]], dim=1)
    state["ranker.mlp.4.weight"] = last[:, :5]
    plain.load_state_dict(state)
    batch = batch_of(world, task)
    with torch.no_grad():
        assert not torch.allclose(task.logits(batch)[0], plain.logits(batch)[0])
        first[:, bare : bare + v] = 0
        last[:, 5:] = 0
        end = task.expert.task.ranker.mlp[-1]
        end.weight.zero_(), end.bias.zero_()
        torch.testing.assert_close(task.logits(batch)[0], plain.logits(batch)[0])


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_expert_stays_as_it_is(world, frozen):
    task = with_expert(world, DIN, frozen=frozen).train()
    parts = task.parameter_parts()
    expert = dict(task.expert.named_parameters())
    assert {id(p) for p in parts["expert"]} == {id(p) for p in expert.values()}
    before = {name: value.clone() for name, value in task.expert.state_dict().items()}
    task(batch_of(world, task))["log_loss"].backward()
    assert all((p.grad is None) == frozen == (not p.requires_grad) for p in expert.values())
    assert [n for n, p in task.named_parameters() if p.requires_grad and p.grad is None] == []
    moved = [name for name, value in task.expert.state_dict().items() if not torch.equal(value, before[name])]
    assert bool(moved) != frozen and all("running" in name for name in moved)  # of Dice


@pytest.mark.parametrize("content", [None, TABLE | {"dim": 5}], ids=["ids alone", "the same table"])
def test_a_saved_ranker_has_its_expert_and_a_table_once(world, content, tmp_path):
    task = with_expert(world, DIN, content)
    batch = batch_of(world, task)
    with torch.no_grad():
        logits = task.logits(batch)[0]
        task.save(tmp_path)
        again = RankingTask.load(tmp_path)
        assert torch.equal(again.logits(batch)[0], logits)
        tables = [path for path in tmp_path.rglob("content.safetensors")]
        assert tables == [tmp_path / "content.safetensors" if content else tmp_path / "expert" / "content.safetensors"]
        own, expert = again.embedder, again.expert.task.embedder
        assert content is None or own.content_table.data_ptr() == expert.content_table.data_ptr()
        # another catalog, in another order, both with it
        order = np.arange(len(world.dataset.catalog))[::-1].copy()
        again.bind(world.dataset.catalog.item_ids.take(pa.array(order)))
        moved = replace(batch, items=replace(batch.items, row=len(order) - 1 - batch.items.row))
        torch.testing.assert_close(again.logits(moved)[0], logits)
        assert not torch.allclose(again.logits(batch)[0], logits)
        # one that has got another table keeps its own
        task.expert.task.embedder.refresh(world.content[0] + 1, world.content[1])
        logits = task.logits(batch)[0]
        task.save(tmp_path)
        assert torch.equal(RankingTask.load(tmp_path).logits(batch)[0], logits)
        assert (tmp_path / "expert" / "content.safetensors").is_file()


@pytest.mark.parametrize("content", [None, TABLE | {"dim": 5}], ids=["ids alone", "the same table"])
def test_what_is_saved_after_another_catalog_was_bound_is_in_its_order(world, content, tmp_path):
    task, ids = with_expert(world, DIN, content), world.dataset.catalog.item_ids
    batch = batch_of(world, task)
    with torch.no_grad():
        logits = task.logits(batch)[0]
        task.bind(ids.take(pa.array(np.arange(len(ids))[::-1].copy())))
        task.save(tmp_path)
        again = RankingTask.load(tmp_path)
        again.bind(ids)
        torch.testing.assert_close(again.logits(batch)[0], logits)


def test_cold_items_are_told_apart_by_the_expert_alone(world):
    """All cold items share an ID row; with an expert their logits differ."""
    values = student_values(DIN) | {"features": {"item": FEATURES["item"]}}
    plain = task_of(world, **values | {"make": None, "features": {}})
    task = task_of(world, expert_of(world), **values)
    cold = np.flatnonzero(ranking_data(world, plain).id_rows == 0)
    part = replace(world.splits.test.take(np.zeros(len(cold), int)), item=cold)
    with torch.no_grad():
        same, told = (
            one.logits(ranking_data(world, one).collator(part)(np.arange(len(cold))))[0] for one in (plain, task)
        )
    assert len(cold) > 2 and same.std() < 1e-6 < 1e-3 < told.std()


@pytest.mark.parametrize(
    ("expert", "student", "message"),
    [
        ({"embedder": {"id_dim": 2, "content": TABLE}}, {}, "reads item IDs .* task.embedder.id_dim=0"),
        ({"ranker": DIEN}, {}, "is a dien; an expert is a DIN"),
        ({"max_history": 3}, {}, "max_history 3, this ranker has 8"),
        ({"features": FEATURES}, {"features": {"item": FEATURES["item"]}}, "reads the user feature 'gender'"),
        ({}, {"make": {"run": "r", "hidden_layers": 3}}, "hidden_layers: 3, but the expert has 2 hidden layers"),
        ({}, {"ranker": DIN | {"mlp": []}}, "this ranker has 0 hidden layers"),
        ({"embedder": {"id_dim": 0}}, {}, "has its content from 'none'"),
    ],
)
def test_an_expert_that_does_not_fit_is_refused(world, expert, student, message):
    with pytest.raises(ValueError, match=f"task.make.*{message}"):
        task_of(world, expert_of(world, **expert), **student_values(DIN) | student)


def test_rankers_without_a_place_for_it_are_refused(world, tmp_path):
    with pytest.raises(ValueError, match="make is for din and dien; embedding_mlp cannot read an expert"):
        RankingTaskConfig.parse({"ranker": {"name": "embedding_mlp"}, "make": {"run": "r"}})
    run = save_run(world, with_expert(world, DIN), tmp_path / "run")
    with pytest.raises(ValueError, match=r"a ranker with an expert \(task.make\) has no graph"):
        export_ranker(run, tmp_path, None, False)
    with pytest.raises(ValueError, match="is itself a ranker with an expert"):
        task_of(world, RankingTask.load(run), **student_values(DIN))


def test_an_expert_of_other_rows_is_refused(world, tmp_path):
    """One that was trained on rows that are tested here knows their answers."""
    run = save_run(world, expert_of(world), tmp_path / "run")
    config = RankingTaskConfig.parse(student_values(DIN, run=str(run)))
    assert config.make is not None
    vocabulary = RankingVocabulary.learn(world.dataset, world.splits, config.features)
    ids, data = world.dataset.catalog.item_ids, str(world.folder)
    # config.yaml of `save_run` has what differs from the defaults alone; a run has all of it
    values = {"data": {"path": data, "items": None}, "split": SPLIT.model_dump(mode="json")}
    (run / "config.yaml").write_text(str(values).replace("None", "null"), encoding="utf-8")
    rewrite(run / "task.json", {})
    expert = load_expert(config.make, DataConfig(path=data), SPLIT, vocabulary, ids)
    assert torch.equal(expert.embedder.content_table, world.content[0])
    backwards = ids.take(pa.array(np.arange(len(ids))[::-1]))
    moved = load_expert(config.make, DataConfig(path=data + "/../data"), SPLIT, vocabulary, backwards)
    assert torch.equal(moved.embedder.content_table, world.content[0].flip(0))
    for given, message in (
        ((DataConfig(path=str(tmp_path)), SPLIT, vocabulary), "was trained on data.path"),
        (
            (DataConfig(path=data, items="else"), SPLIT, vocabulary),
            "was trained on data.items None, this run on 'else'",
        ),
        (
            (DataConfig(path=data), ColdItemsSplit(cold=0.3), vocabulary),
            r"another split \(cold: 0.2, in this run 0.3\)",
        ),
        ((DataConfig(path=data), ColdItemsSplit(cold=0.2, seed=1), vocabulary), r"another split \(seed"),
        (
            (DataConfig(path=data), SPLIT, replace(vocabulary, clicks=vocabulary.clicks + 1)),
            "the dataset has changed since",
        ),
    ):
        with pytest.raises(ValueError, match=f"task.make.run: .*{message}"):
            load_expert(config.make, *given, ids)
    with pytest.raises(ValueError, match="is not the folder of a finished run"):
        load_expert(
            config.make.model_copy(update={"run": str(tmp_path)}), DataConfig(path=data), SPLIT, vocabulary, ids
        )


@pytest.mark.slow
def test_a_study_makes_the_expert_first_and_its_run_is_all_that_is_needed(toy_folder, runs, tmp_path):
    values = finetune_values(toy_folder, {"name": "table", "path": str(runs / "embeddings"), "dim": 8, "hidden": [8]})
    values["task"]["embedder"]["id_dim"] = values["task"]["user_dim"] = 0
    write_config(tmp_path / "content.yaml", values)
    values = finetune_values(toy_folder, epochs=1)
    values["task"]["make"] = {"run": "unset", "frozen": False}
    write_config(tmp_path / "make.yaml", values)
    methods = {name: {"config": str(tmp_path / f"{name}.yaml")} for name in ("content", "make")}
    methods["make"]["after"] = "content"
    study_values = {"data": str(toy_folder), "protocols": {"cold": {"name": "cold_items", "cold": 0.3}}, "seeds": [0]}
    study_values |= {"methods": methods, "baseline": "content", "out": str(tmp_path / "out")}
    study = StudyConfig.parse(study_values)
    folder = tmp_path / "out" / "runs" / "cold"

    (failed, waits), launch = run_study(study, tmp_path / "out", launch=lambda *_: 1), Launcher()
    assert (failed.state, waits.state) == ("failed", "failed") and str(folder / "content" / "seed0") in waits.reason
    assert [one.state for one in run_study(study, tmp_path / "out", launch=launch)] == ["made", "made"]
    assert launch.calls == ["cold/content/seed0", "cold/make/seed0"]
    run = folder / "make" / "seed0"
    made = RankingTask.load(run)
    assert made.config.make is not None and made.config.make.run == str(folder / "content" / "seed0")
    before = RankingTask.load(folder / "content" / "seed0")
    moved = zip(made.expert.task.parameters(), before.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in moved)  # it learned on

    shutil.rmtree(folder / "content")
    metrics = json.loads((run / "metrics.json").read_text())
    again = json.loads(start(tmp_path, "mmctr", "evaluate", run).ok())
    assert again["test"]["cold"]["gauc"] == pytest.approx(metrics["test"]["cold"]["gauc"], abs=1e-9)

    methods["make"]["set"] = ["task.make.run=x"]
    with pytest.raises(ValueError, match=r"methods\.make: `after` sets task\.make\.run"):
        StudyConfig.parse(study_values)
    methods["make"]["set"] = []
    methods["make"]["after"] = "nobody"
    with pytest.raises(ValueError, match=r"methods\.make\.after: no method above it is called 'nobody' \(content\)"):
        StudyConfig.parse(study_values | {"methods": methods})
