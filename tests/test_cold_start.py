"""The point of it all: content ranks items that nobody has clicked yet, ids cannot, and vectors of others do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import load_file

from finetune.train import main
from mmctr.data.embeddings import write_npz
from mmctr.data.prepare import open_dataset
from mmctr.data.splits import split_interactions
from mmctr.datasets.toy_world import ToyWorld, ToyWorldConfig
from mmctr.files import read_json
from mmctr.runs.config import FinetuneConfig
from mmctr.studies.config import StudyConfig
from mmctr.studies.controls import factor_table
from mmctr.studies.results import study_results
from mmctr.studies.runner import run_study
from tests.helpers.tiny import write_config
from tests.helpers.worlds import write_dataset

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def protocol(tmp_path_factory):
    """What a study finds in a ToyWorld without hidden quality: IDs; with true factors; with those of other items."""
    folder = tmp_path_factory.mktemp("cold")
    world = ToyWorldConfig(
        num_items=200,
        num_users=400,
        impressions_per_user=50,
        image_size=16,
        quality_strength=0.0,
        drift=0.0,
        position_effect=0.0,
        popularity_exponent=0.3,
    )
    ToyWorld(world).write(folder / "data")
    write_npz(factor_table(folder / "data"), folder / "factors.npz")
    values = {
        "data": {"path": "unset"},
        "task": {
            "embedder": {"id_dim": 8, "id_dropout": 0.2, "init_std": 0.1},
            "ranker": {"name": "din", "attention": [16], "mlp": [32]},
            "user_dim": 8,
        },
        "fit": {"epochs": 6, "batch_size": 256, "optimizer": {"lr": 5e-3}},
        "run_dir": "unset",
    }
    config = str(write_config(folder / "din.yaml", values))
    reads = ["task.embedder.content={name: table, path: unset, dim: 16, hidden: [32]}"]
    study = StudyConfig.parse(
        {
            "data": str(folder / "data"),
            "protocols": {"held_out": {"name": "cold_items", "cold": 0.2, "test": 0.2}},
            "tables": {"true": {"name": "factors"}, "others": {"name": "shuffled", "of": str(folder / "factors.npz")}},
            "methods": {
                "ids": {"config": config},
                "content": {"config": config, "set": reads, "table": "true"},
                "shuffled": {"config": config, "set": reads, "table": "others"},
            },
            "baseline": "ids",
            "seeds": [0],
            "out": str(folder / "out"),
        }
    )

    def here(arguments, log) -> int:
        main(FinetuneConfig.load(arguments[0], arguments[1:]))
        return 0

    results = study_results(study, run_study(study, folder / "out", launch=here))
    (found,) = results.to_json()["protocols"].values()
    assert found["rows"]["cold"] > 500
    return found


def cold_gauc(protocol, method: str) -> float:
    return protocol["methods"][method]["test"]["cold"]["gauc"]["mean"]


def test_ids_alone_rank_cold_items_by_chance(protocol):
    assert 0.4 < cold_gauc(protocol, "ids") < 0.6


def test_content_ranks_cold_items(protocol):
    assert cold_gauc(protocol, "content") > 0.65
    assert protocol["methods"]["content"]["difference"]["cold"]["gauc_ci"][0] > 0.05


def test_vectors_of_other_items_do_not(protocol):
    """If they did, something but the content of the item would tell cold items apart: a leak."""
    assert 0.4 < cold_gauc(protocol, "shuffled") < 0.6
    low, _ = protocol["methods"]["shuffled"]["difference"]["cold"]["gauc_ci"]
    assert low < 0


@pytest.mark.parametrize(
    "split",
    [
        {"name": "cold_items", "cold": 0.2, "test": 0.2},
        {"name": "temporal", "test": 0.2},
        {"name": "staged", "new": 0.3, "rows": 2, "test_rows": 4},
    ],
    ids=lambda split: split["name"],
)
def test_no_label_beyond_training_reaches_a_weight(split, toy_folder, tmp_path):
    """Flipped labels of test rows, of held-out items and of later stages change neither weights nor the choice of an
    epoch; with a generator of ID vectors and, in DIEN, negatives that look at clicks."""
    dataset = open_dataset(toy_folder)
    log, ids = dataset.interactions, dataset.catalog.item_ids.to_pylist()
    values = {
        "data": {"path": "unset"},
        "split": split,
        "task": {
            "embedder": {"id_dim": 6, "cold_ids": {"name": "mwuf", "validation": 0.3}},
            "features": {"item": {"category": {"name": "categorical"}}},
            "ranker": {"name": "dien", "mlp": [8]},
            "user_dim": 4,
        },
        "fit": {"epochs": 2, "batch_size": 128, "optimizer": {"lr": 1e-2}},
        "cold_fit": {"epochs": 1, "batch_size": 128},
        "primary": "auc",
        "run_dir": "unset",
    }
    splits = split_interactions(log, len(ids), FinetuneConfig.parse(values).split)
    known = [splits.train, splits.validation, *[part for name, part in splits.stages.items() if name == "warm_a"]]
    hidden = np.ones(len(log), bool)
    hidden[np.concatenate([part.source for part in known])] = False
    assert hidden[splits.test.source].all()

    def run_of(name: str, label: np.ndarray) -> Path:
        columns = {"user_id": log.user, "item_id": pa.array(ids).take(pa.array(log.item)), "timestamp": log.time}
        items = {"item_id": ids, "title": ids, "category": dataset.catalog.table["category"]}
        data = write_dataset(tmp_path / name / "data", items, columns | {"label": label})
        run = tmp_path / name / "run"
        main(FinetuneConfig.parse(values | {"data": {"path": str(data)}, "run_dir": str(run)}))
        return run

    one, other = run_of("one", log.label), run_of("other", np.where(hidden, 1 - log.label, log.label))
    weights = {Path("model.safetensors")} | (
        {Path("checkpoints", "warm_a", "task.safetensors")} if splits.stages else set()
    )
    for file in weights:
        before, after = load_file(one / file), load_file(other / file)
        assert before.keys() == after.keys() and all(np.array_equal(before[key], after[key]) for key in before)
    first, second = (read_json(run / "metrics.json") for run in (one, other))
    assert first["validation"] == second["validation"] and first["test"]["all"] != second["test"]["all"]
    if splits.stages:  # whose labels a stage does learn
        files = [
            load_file(run / "checkpoints" / "warm_b" / "task.safetensors")["embedder.ids.weight"]
            for run in (one, other)
        ]
        assert not np.array_equal(*files)
