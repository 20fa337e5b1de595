"""The point of it all: content ranks items that nobody has clicked yet, ids cannot."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from finetune.train import FinetuneConfig, main
from mmctr.data.toy import ToyWorld, ToyWorldConfig
from mmctr.files import read_json

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A ToyWorld without hidden quality, and a table of its true factors, one-hot."""
    folder = tmp_path_factory.mktemp("cold")
    config = ToyWorldConfig(
        num_items=200,
        num_users=400,
        impressions_per_user=50,
        image_size=16,
        quality_strength=0.0,
        drift=0.0,
        position_effect=0.0,
        popularity_exponent=0.3,
    )
    toy = ToyWorld(config)
    toy.write(folder / "data")
    one_hot = [np.eye(len(toy.factor_values[name]))[values] for name, values in toy.factors.items()]
    np.savez(folder / "factors.npz", item_id=np.array(toy.item_ids), vectors=np.concatenate(one_hot, 1))
    return folder


def cold_gauc(world, name, content) -> float:
    torch.manual_seed(0)
    values = {
        "data": {"path": str(world / "data")},
        "split": {"name": "cold_items", "cold": 0.2, "test": 0.2},
        "task": {
            "embedder": {"id_dim": 8, "id_dropout": 0.2, "init_std": 0.1, "content": content},
            "ranker": {"name": "din", "attention": [16], "mlp": [32]},
            "user_dim": 8,
        },
        "fit": {"epochs": 10, "batch_size": 256, "optimizer": {"lr": 5e-3}},
        "run_dir": str(world / name),
    }
    main(FinetuneConfig.parse(values))
    metrics = read_json(world / name / "metrics.json")["test"]
    assert metrics["cold"]["num_impressions"] > 500
    return metrics["cold"]["gauc"]


def test_ids_alone_rank_cold_items_by_chance(world):
    assert 0.4 < cold_gauc(world, "id", {"name": "none"}) < 0.6


def test_content_ranks_cold_items(world):
    content = {"name": "table", "path": str(world / "factors.npz"), "dim": 16, "hidden": [32]}
    assert cold_gauc(world, "table", content) > 0.65
