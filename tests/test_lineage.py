"""Data whose right answer is known: what each ranker adds to the one before it, it adds where it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.train import FinetuneConfig, main
from mmctr.files import read_json
from tests.worlds import write_dataset

pytestmark = pytest.mark.slow


def write_world(folder: Path, item: np.ndarray, label: np.ndarray, category: np.ndarray) -> Path:
    """A log of (users, moments) item rows and labels, and its catalog."""
    users, moments = item.shape
    interactions = {
        "user_id": np.repeat(np.arange(users), moments),
        "item_id": item.ravel(),
        "timestamp": np.tile(np.arange(moments), users),
        "label": label.ravel().astype(np.int64),
    }
    items = {"item_id": np.arange(len(category)), "title": [f"item {i}" for i in range(len(category))]}
    return write_dataset(folder, items | {"category": [str(c) for c in category]}, interactions)


@pytest.fixture(scope="module")
def ordered(tmp_path_factory) -> Path:
    """What comes next depends on the last click alone: whoever clicked category c then clicks c + 1, mostly."""
    rng = np.random.default_rng(0)
    users, moments, categories, each = 1000, 24, 6, 5
    item, label = np.zeros((users, moments), np.int64), np.zeros((users, moments), bool)
    last = rng.integers(0, categories, users)
    for t in range(moments):
        wanted = (last + 1) % categories
        shown = np.where(rng.random(users) < 0.5, wanted, rng.integers(0, categories, users))
        label[:, t] = rng.random(users) < np.where(shown == wanted, 0.9, 0.1)
        last = np.where(label[:, t], shown, last)
        item[:, t] = shown * each + rng.integers(0, each, users)
    return write_world(tmp_path_factory.mktemp("ordered"), item, label, np.arange(categories * each) // each)


@pytest.fixture(scope="module")
def diverse(tmp_path_factory) -> Path:
    """A user likes 12 of 120 categories that have nothing in common, and clicks those alone, mostly."""
    rng = np.random.default_rng(0)
    users, moments, categories = 1500, 40, 120
    likes = np.argsort(rng.random((users, categories)), axis=1)[:, :12]
    liked = likes[np.arange(users)[:, None], rng.integers(0, 12, (users, moments))]
    item = np.where(rng.random((users, moments)) < 0.5, liked, rng.integers(0, categories, (users, moments)))
    is_liked = (item[:, :, None] == likes[:, None, :]).any(2)
    label = rng.random((users, moments)) < np.where(is_liked, 0.9, 0.1)
    return write_world(tmp_path_factory.mktemp("diverse"), item, label, np.arange(categories))


def auc_of(data: Path, ranker: dict[str, Any], epochs: float) -> float:
    values = {
        "data": {"path": str(data)},
        "split": {"name": "temporal", "test": 0.2, "validation": 0.1},
        "task": {
            "embedder": {"id_dim": 8, "id_dropout": 0.0, "init_std": 0.1},
            "features": {"item": {"category": {"name": "categorical", "dim": 8}}},
            "ranker": {"mlp": [32, 16], "activation": "relu", **ranker},
            "user_dim": 0,
        },
        "fit": {"epochs": epochs, "batch_size": 256, "optimizer": {"lr": 5e-3}},
        "run_dir": str(data / f"run-{ranker['name']}"),
    }
    main(FinetuneConfig.parse(values))
    return read_json(data / f"run-{ranker['name']}" / "metrics.json")["test"]["all"]["auc"]


def test_dien_beats_din_where_order_matters(ordered):
    din = auc_of(ordered, {"name": "din", "attention": [16]}, epochs=4)
    dien = auc_of(ordered, {"name": "dien"}, epochs=4)
    assert dien > din + 0.03


def test_din_beats_embedding_mlp_where_interest_is_diverse(diverse):
    base = auc_of(diverse, {"name": "embedding_mlp"}, epochs=4)
    din = auc_of(diverse, {"name": "din", "attention": [16]}, epochs=4)
    assert din > base + 0.1
