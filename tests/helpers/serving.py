"""A small world with features of every kind, rankers on it that look trained, and the folder of a run of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmctr.data.prepare import Dataset, open_dataset
from mmctr.data.splits import ColdItemsSplit, Splits, split_interactions
from mmctr.features.ranking_data import RankingData
from mmctr.features.vocabulary import FeatureConfigs, RankingVocabulary
from mmctr.files import write_json
from mmctr.layers.dice import Dice
from mmctr.run_folder import RunFolder
from mmctr.tasks import RankingTask, RankingTaskConfig
from tests.helpers.worlds import write_dataset

NUM_ITEMS, NUM_USERS, MAX_HISTORY = 30, 12, 8
FEATURES = {
    "item": {
        "brand": {"name": "categorical", "dim": 2},
        "genres": {"name": "multi_valued", "dim": 3},
        "price": {"name": "numeric", "log": True},
    },
    "user": {"gender": {"name": "categorical", "dim": 2}, "age": {"name": "numeric", "buckets": 3, "dim": 2}},
    "context": {
        "device": {"name": "categorical", "dim": 2},
        "wait": {"name": "numeric", "log": True},
        "hour": {"name": "numeric"},
        "tags": {"name": "multi_valued", "dim": 2, "pooling": "sum"},
    },
}
CROSSES = {
    "cross": {
        "bought_before": {"of": ["history.item_id", "item_id"], "buckets": 50, "dim": 2},
        "place": {"of": ["device", "gender"], "buckets": 9, "dim": 2},
    }
}


@dataclass(frozen=True)
class ServingWorld:
    folder: Path
    dataset: Dataset
    splits: Splits
    columns: dict[str, dict[str, list[Any]]]
    """raw tables, as a server knows them"""
    content: tuple[Tensor, Tensor]


def make_world(folder: Path, seed: int = 0) -> ServingWorld:
    """Some values are missing everywhere, some users and items are unseen in training, some histories empty."""
    rng = np.random.default_rng(seed)

    def some(values: list[Any], count: int) -> list[Any]:
        return [values[i] if i < len(values) else None for i in rng.integers(0, len(values) + 1, count)]

    rows = 300
    items = {
        "item_id": [f"item {i}" for i in range(NUM_ITEMS)],
        "title": [f"thing {i}" for i in range(NUM_ITEMS)],
        "brand": some(["acme", "zenith"], NUM_ITEMS),
        "genres": some(["war|love", "love", "space|war|dogs"], NUM_ITEMS),
        "price": some([0.0, 3.5, 1e4], NUM_ITEMS),
    }
    users = {
        "user_id": list(range(100, 100 + NUM_USERS)),
        "gender": some(["f", "m"], NUM_USERS),
        "age": some([18.0, 30.0, 41.5, 70.0], NUM_USERS),
    }
    log = {
        "user_id": [100 + int(u) for u in rng.integers(0, NUM_USERS, rows)],
        "item_id": [f"item {i}" for i in rng.integers(0, NUM_ITEMS, rows)],
        "timestamp": list(range(rows)),
        "label": [int(x) for x in rng.integers(0, 2, rows)],
        "device": some(["phone", "desk"], rows),
        "wait": some([0.0, 12.0, 900.0, -5.0], rows),
        "hour": some([float(h) for h in range(24)], rows),
        "tags": some(["a|b", "c", "a|a|zz"], rows),
    }
    write_dataset(folder, items, log, users)
    dataset = open_dataset(folder)
    splits = split_interactions(dataset.interactions, len(dataset.catalog), ColdItemsSplit(cold=0.2))
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.nn.functional.normalize(torch.randn(NUM_ITEMS, 6, generator=generator), dim=1)
    content = (vectors, torch.rand(NUM_ITEMS, generator=generator) < 0.8)
    return ServingWorld(folder, dataset, splits, {"items": items, "users": users, "log": log}, content)


def make_task(world: ServingWorld, ranker: dict[str, Any], all_features: bool = True, **embedder: Any) -> RankingTask:
    """A task with features of all kinds (or of items and a number) and content from a table, all its numbers drawn as
    if it were trained."""
    features = FEATURES if all_features else {"item": FEATURES["item"], "context": {"hour": {"name": "numeric"}}}
    crosses = CROSSES if all_features and ranker["name"] in ("lr", "ls_plm") else {}
    values = {
        "embedder": {
            "id_dim": 3,
            "content": {"name": "table", "path": "/nowhere/e", "dim": 3, "hidden": [4]},
            **embedder,
        },
        "features": {**features, **crosses},
        "ranker": ranker,
        "user_dim": 3,
        "max_history": MAX_HISTORY,
    }
    config = RankingTaskConfig.parse(values)
    vocabulary = RankingVocabulary.learn(world.dataset, world.splits, config.features)
    task = RankingTask(config, vocabulary, world.content, catalog_ids=world.dataset.catalog.item_ids)
    return look_trained(task)


def look_trained(module: nn.Module, scale: float = 0.4) -> Any:
    """Random weights nowhere near zero, and statistics that are not those of a fresh layer."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))
        for part in module.modules():
            if isinstance(part, Dice):
                part.running_mean.copy_(torch.randn(part.running_mean.shape, generator=generator))
                part.running_var.copy_(0.5 + torch.rand(part.running_var.shape, generator=generator))
    return module.eval()


def save_run(world: ServingWorld, task: RankingTask, run: Path) -> Path:
    """The folder as `finetune.train` leaves it, as far as later commands read it. JSON is YAML."""
    config = {"data": {"path": str(world.folder)}, "split": {"name": "cold_items", "cold": 0.2}, "run_dir": str(run)}
    write_json(run / "config.yaml", config | {"task": task.config.model_dump(mode="json")})
    task.save(run)
    numbers = {"auc": 0.7123, "gauc": 0.65, "log_loss": 0.5, "num_impressions": 60}
    RunFolder(run).write_metrics({"test": {"all": numbers, "warm": numbers, "cold": numbers, "buckets": []}})
    return run


def ranking_data(world: ServingWorld, task: RankingTask) -> RankingData:
    return RankingData(
        world.dataset, task.vocabulary, FeatureConfigs.parse(task.config.features.model_dump()), MAX_HISTORY
    )
