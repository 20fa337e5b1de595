"""The stages of a `staged` split: what trains, what stays, and that a run and a study show it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_file

from mmctr.data.batches import ItemBatch
from mmctr.data.hashing import stream_seed
from mmctr.data.prepare import open_dataset
from mmctr.data.splits import StagedSplit, split_interactions
from mmctr.evaluation.metrics import impression_metrics, paired_difference
from mmctr.evaluation.predict import predict
from mmctr.features.ranking_data import RankingData
from mmctr.features.vocabulary import RankingVocabulary
from mmctr.files import read_json
from mmctr.run_folder import RunFolder
from mmctr.runs.config import FinetuneConfig
from mmctr.studies.config import StudyConfig
from mmctr.studies.page import write_study_page
from mmctr.studies.results import study_results
from mmctr.studies.runner import Outcome, run_study, study_cells
from mmctr.studies.table import study_table
from mmctr.tasks import RankingTask, RankingTaskConfig
from mmctr.training.context import RunContext
from mmctr.training.stages import StagesConfig, add_item_rows, train_stages
from tests.helpers.pages import Page
from tests.helpers.tiny import finetune_values, start, write_config

SPLIT = {"name": "staged", "new": 0.3, "rows": 2, "test_rows": 2}


@pytest.fixture(scope="module")
def world(toy_folder):
    dataset = open_dataset(toy_folder)
    return dataset, split_interactions(dataset.interactions, len(dataset.catalog), StagedSplit.parse(SPLIT))


def task_of(world, **embedder) -> tuple[RankingTask, RankingData]:
    dataset, splits = world
    features = {"item": {"brand": {"name": "categorical", "dim": 3}}}
    values = {"embedder": {"id_dim": 6, "init_std": 0.5, **embedder}, "features": features, "max_history": 5}
    config = RankingTaskConfig.parse(values | {"ranker": {"name": "din", "attention": [5], "mlp": [7]}})
    vocabulary = RankingVocabulary.learn(dataset, splits, config.features)
    torch.manual_seed(0)
    task = RankingTask(config, vocabulary, catalog_ids=dataset.catalog.item_ids).eval()
    with torch.no_grad():
        task.embedder.ids.weight[0] = 0.3  # type: ignore[union-attr]
        for parameter in task.embedder.generator.parameters() if task.embedder.generator else ():
            parameter.add_(0.3 * torch.randn_like(parameter))
    task.embedder.uses_generator = task.embedder.generator is not None
    return task, RankingData(dataset, vocabulary, config.features, config.max_history)


def stages_of(world, task: RankingTask, tmp_path, **config) -> dict[str, np.ndarray]:
    dataset, splits = world

    def see(known):
        return RankingData(dataset, known, task.config.features, task.config.max_history)

    accelerator = Accelerator(cpu=True)
    how = StagesConfig.parse(config)
    return train_stages(
        task, see, splits, how, dataset.catalog.item_ids, RunContext(RunFolder(tmp_path), accelerator, 0, "")
    )


@pytest.mark.parametrize("name", ["none", "meta_embedding", "mwuf", "cvar"])
def test_fresh_rows_begin_where_cold_items_are(world, tmp_path, name):
    """With steps of no size every stage scores as before the first: what a cold item reads is what its row starts with.
    MWUF alone changes: by then its items have users."""
    task, data = task_of(world, cold_ids={"name": name})
    before = {key: value.clone() for key, value in task.state_dict().items()}
    cold = predict(task, data.collator(world[1].test), Accelerator(cpu=True))
    found = stages_of(world, task, tmp_path, lr=1e-12)
    assert list(found) == ["warm_a", "warm_b", "warm_c"]
    for scores in found.values():
        if name == "mwuf":
            assert np.abs(scores - cold).max() > 1e-4
        else:
            np.testing.assert_allclose(scores, cold, atol=1e-6)
    for key, value in task.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def test_mwuf_warms_vectors_by_the_users_of_the_stages_so_far(world, tmp_path):
    task, data = task_of(world, cold_ids={"name": "mwuf"})
    found = stages_of(world, task, tmp_path, lr=1e-12)
    splits, generator = world[1], task.embedder.generator
    item = int(splits.test.item[0])
    users = torch.cat([data.user_rows[part.user[part.item == item]] for part in list(splits.stages.values())[:2]])
    mean = task.users.weight[users].mean(0)  # type: ignore[union-attr]
    rows = splits.test.item == item
    batch = data.collator(splits.test)(np.flatnonzero(rows))
    with torch.no_grad():
        x = task.embedder.describe(batch.items)
        warm = generator.mean * (1 + generator.scale(x)) + generator.shift(mean)  # type: ignore[union-attr, operator]
        expected = torch.sigmoid(task.logits(batch, target_ids=warm)[0])
    np.testing.assert_allclose(found["warm_b"][rows], expected, atol=1e-6)


def test_stages_train_the_rows_of_new_items_alone(world, tmp_path):
    task, _ = task_of(world)
    stages_of(world, task, tmp_path)
    trained = load_file(tmp_path / "checkpoints" / "warm_c" / "task.safetensors")
    known = len(task.vocabulary.item_ids) + 1
    for key, value in task.state_dict().items():
        torch.testing.assert_close(trained[key][: len(value)] if value.ndim else trained[key], value, rtol=0, atol=0)
    fresh = trained["embedder.ids.weight"][known:]
    assert len(fresh) == len(np.unique(world[1].test.item)) and (fresh != 0.3).any(1).all()

    stages_of(world, task, tmp_path / "all", trains="all", lr=1e-3)
    everything = load_file(tmp_path / "all" / "checkpoints" / "warm_a" / "task.safetensors")
    assert (everything["ranker.mlp.0.weight"] != trained["ranker.mlp.0.weight"]).any()


def test_a_step_costs_the_new_rows_whatever_the_table(world, tmp_path, monkeypatch):
    """Moments and gradients are of new items; and what comes out is what Adam makes of the whole table."""
    task, _ = task_of(world)
    new, sizes, adam = len(np.unique(world[1].test.item)), [], torch.optim.Adam

    def spy(parameters, **how):
        sizes.append([tuple(p.shape) for p in parameters])
        return adam(parameters, **how)

    monkeypatch.setattr("mmctr.training.stages.torch.optim.Adam", spy)
    stages_of(world, task, tmp_path)
    assert sizes == [[(new, 6)]] * 3

    dataset, splits = world
    items = np.unique(splits.test.item)
    rows = torch.from_numpy(items).long()
    features = RankingData(dataset, task.vocabulary, task.config.features, 5).items.take(rows)
    whole = add_item_rows(task, dataset.catalog.item_ids.take(pa.array(items)), ItemBatch(rows, features))
    collator = RankingData(dataset, whole.vocabulary, task.config.features, 5).collator(splits.stages["warm_a"])
    ids = whole.embedder.ids.weight.requires_grad_(True)  # type: ignore[union-attr]
    optimizer = adam([ids], lr=1e-2)
    stage_seed = stream_seed(0, "stage", 0)
    rng = np.random.default_rng(stream_seed(stage_seed, "order of rows", 0))
    order = rng.permutation(len(collator.impressions))
    for begin in range(0, len(order), 16):
        batch = collator(order[begin : begin + 16])
        F.binary_cross_entropy_with_logits(whole.logits(batch)[0], batch.label).backward()
        ids.grad[: -len(items)] = 0  # type: ignore[index]
        optimizer.step()
        optimizer.zero_grad()
    stages_of(world, task, tmp_path / "small", batch_size=16)
    trained = load_file(tmp_path / "small" / "checkpoints" / "warm_a" / "task.safetensors")
    torch.testing.assert_close(trained["embedder.ids.weight"], ids.detach(), rtol=1e-5, atol=1e-6)


def test_an_item_that_is_clicked_in_a_stage_rises_after_it(world, tmp_path):
    """In each stage a third of the new items are clicked by all; scores of the rest do not rise with theirs."""
    task, data = task_of(world)
    new = np.unique(world[1].test.item)
    liked = {name: new[place::3] for place, name in enumerate(world[1].stages)}
    stages = {
        name: replace(part, label=np.isin(part.item, liked[name]).astype(np.uint8))
        for name, part in world[1].stages.items()
    }
    changed = (world[0], replace(world[1], stages=stages))
    found = stages_of(changed, task, tmp_path, passes=20, lr=0.2, batch_size=32)
    scores = [predict(task, data.collator(world[1].test), Accelerator(cpu=True)), *found.values()]
    for place, name in enumerate(stages):
        rows = np.isin(world[1].test.item, liked[name])
        gain = scores[place + 1] - scores[place]
        assert gain[rows].mean() > gain[~rows].mean() + 0.06


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"ranker": {"name": "gbdt_lr"}}, "gbdt_lr has trees, which stages do not train"),
        (
            {"features": {"cross": {"c": {"of": ["user_id", "item_id"]}}}},
            "the cross 'c' is of item_id, and values of new items would collide",
        ),
        ({"embedder": {"id_dim": 0}}, "without ID vectors .* a stage has nothing to train"),
    ],
)
def test_rankers_that_cannot_be_warmed_up_are_refused(task, message):
    with pytest.raises(ValueError, match=message):
        FinetuneConfig.parse({"data": {"path": "x"}, "run_dir": "y", "split": SPLIT, "task": task})


@pytest.fixture(scope="module")
def study(toy_folder, runs, tmp_path_factory):
    """(study, out) of IDs and MWUF with one seed, both finished."""
    folder = tmp_path_factory.mktemp("staged")
    content = {"name": "table", "path": str(runs / "embeddings"), "dim": 8, "hidden": [8]}
    values = finetune_values(toy_folder, content, epochs=1)
    values["task"]["embedder"]["cold_ids"] = {"name": "mwuf", "hidden": [8], "validation": 0.3}
    values["cold_fit"] = {"epochs": 1, "batch_size": 96, "checkpoint_every": 4}
    write_config(folder / "mwuf.yaml", values)
    write_config(folder / "ids.yaml", finetune_values(toy_folder, epochs=1))
    methods = {name: {"config": str(folder / f"{name}.yaml")} for name in ("ids", "mwuf")}
    study = StudyConfig.parse(
        {"data": str(toy_folder), "protocols": {"warming": SPLIT}, "methods": methods, "baseline": "ids"}
        | {"seeds": [0], "bootstrap": 20, "out": str(folder / "out")}
    )

    def launch(arguments, log) -> int:
        return start(log.parent / "output", "finetune.train", *arguments).wait()

    outcomes = run_study(study, folder / "out", launch=launch)
    assert {one.state for one in outcomes} == {"made"}
    return study, folder / "out"


@pytest.mark.slow
def test_a_staged_study_shows_warm_up_curves(study, tmp_path):
    config, out = study
    results = study_results(config, [Outcome(cell, "kept") for cell in study_cells(config, out)])
    written = results.to_json()
    protocol = written["protocols"]["warming"]
    assert protocol["rows"]["warm"] == 0 < protocol["rows"]["cold"]
    tables = {
        name: pq.read_table(out / "runs" / "warming" / name / "seed0" / "stages.parquet") for name in ("ids", "mwuf")
    }
    names = ["cold", "warm_a", "warm_b", "warm_c"]
    label, user = (tables["ids"][key].to_numpy() for key in ("label", "user"))
    for name, table in tables.items():
        run = out / "runs" / "warming" / name / "seed0"
        assert table.column_names == ["user", "item", "label", *names]
        metrics = read_json(run / "metrics.json")
        assert metrics["stages"]["cold"] == metrics["test"]["all"] and list(metrics["stages"]) == names
        found = protocol["methods"][name]["stages"]
        for stage in names:
            by_hand = impression_metrics(label, table[stage].to_numpy(), user)
            # in single precision new items that IDs do not tell apart tie
            near = 1e-6 if name == "mwuf" else 2e-2
            assert found[stage]["gauc"]["mean"] == pytest.approx(by_hand["gauc"], abs=near)
            assert found[stage]["auc_ci"] == metrics["stages"][stage]["auc_ci"]
    one, other = (tables[name]["warm_b"].to_numpy() for name in ("ids", "mwuf"))
    difference = protocol["methods"]["mwuf"]["stages"]["warm_b"]["difference"]
    by_hand = paired_difference(label, one, other, user, num_samples=20)
    users = sum(len(set(label[user == one])) == 2 for one in set(user.tolist()))
    assert difference["seeds"][0] == {"seed": 0, "num_users": users, **by_hand} and difference["num_users"] == users
    assert protocol["methods"]["ids"]["stages"]["warm_b"]["difference"] is None

    write_study_page(results, tmp_path / "page.html")
    page, table = Page((tmp_path / "page.html").read_text(encoding="utf-8")), study_table(results)
    assert max(map(len, table.splitlines())) <= 100
    for metric in ("gauc", "auc"):
        value = protocol["methods"]["mwuf"]["stages"]["warm_c"][metric]["mean"]
        assert f"{value:.4f}" in page.text and f"{value:.4f}" in table
        assert f"{difference[metric]:+.4f}" in page.text
    assert "Warm-up by stage" in page.text and json.loads(json.dumps(written, allow_nan=False)) == written
