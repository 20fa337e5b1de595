"""The point of it all: content ranks items that nobody has clicked yet, ids cannot, and vectors of others do not."""

from __future__ import annotations

import pytest

from finetune.train import FinetuneConfig, main
from mmctr.controls import factor_table
from mmctr.data.toy import ToyWorld, ToyWorldConfig
from mmctr.interchange import write_npz
from mmctr.study import StudyConfig, run_study
from mmctr.study_results import study_results
from tests.tiny import write_config

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

    (found,) = study_results(study, run_study(study, folder / "out", launch=here))["protocols"].values()
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
