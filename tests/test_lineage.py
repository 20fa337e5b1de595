"""Data whose right answer is known: what each ranker adds to the one before it, it adds where it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.train import main
from mmctr.files import fingerprint, read_json
from mmctr.runs.config import FinetuneConfig
from tests.helpers.worlds import write_dataset

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


@pytest.fixture(scope="module")
def folded(tmp_path_factory) -> Path:
    """A click needs two numbers of the impression of one sign: no line divides the plane so, four pieces do."""
    rng = np.random.default_rng(0)
    users, moments = 300, 40
    x, y = rng.normal(size=(2, users * moments))
    label = rng.random(users * moments) < np.where(x * y > 0, 0.9, 0.1)
    interactions = {
        "user_id": np.repeat(np.arange(users), moments),
        "item_id": rng.integers(0, 20, users * moments),
        "timestamp": np.tile(np.arange(moments), users),
        "label": label.astype(np.int64),
        "x": x,
        "y": y,
    }
    items = {"item_id": np.arange(20), "title": [f"item {i}" for i in range(20)], "category": ["a"] * 20}
    return write_dataset(tmp_path_factory.mktemp("folded"), items, interactions)


def auc_of(data: Path, ranker: dict[str, Any], epochs: float, **features: Any) -> float:
    deep = {"mlp": [32, 16], "activation": "relu"} if ranker["name"] not in ("lr", "ls_plm", "gbdt_lr") else {}
    values = {
        "data": {"path": str(data)},
        "split": {"name": "temporal", "test": 0.2, "validation": 0.1},
        "task": {
            "embedder": {"id_dim": 8, "id_dropout": 0.0, "init_std": 0.1},
            "features": {"item": {"category": {"name": "categorical", "dim": 8}}, **features},
            "ranker": {**deep, **ranker},
            "user_dim": 0,
        },
        "fit": {"epochs": epochs, "batch_size": 256, "optimizer": {"lr": 5e-3}},
    }
    run_dir = data / f"run-{fingerprint(values)}"
    main(FinetuneConfig.parse(values | {"run_dir": str(run_dir)}))
    return read_json(run_dir / "metrics.json")["test"]["all"]["auc"]


def test_dien_beats_din_where_order_matters(ordered):
    din = auc_of(ordered, {"name": "din", "attention": [16]}, epochs=4)
    dien = auc_of(ordered, {"name": "dien"}, epochs=4)
    assert dien > din + 0.03


def test_din_beats_embedding_mlp_where_interest_is_diverse(diverse):
    base = auc_of(diverse, {"name": "embedding_mlp"}, epochs=4)
    din = auc_of(diverse, {"name": "din", "attention": [16]}, epochs=4)
    assert din > base + 0.1


NUMBERS = {"context": {"x": {"name": "numeric"}, "y": {"name": "numeric"}}}


def test_ls_plm_beats_lr_where_the_boundary_is_piecewise_linear(folded):
    lr = auc_of(folded, {"name": "lr"}, epochs=6, **NUMBERS)
    pieces = auc_of(folded, {"name": "ls_plm", "pieces": 4}, epochs=12, **NUMBERS)
    assert 0.45 < lr < 0.55 and pieces > 0.8


def test_gbdt_lr_beats_lr_where_the_boundary_is_piecewise_linear(folded):
    lr = auc_of(folded, {"name": "lr"}, epochs=6, **NUMBERS)
    trees = auc_of(folded, {"name": "gbdt_lr"}, epochs=12, **NUMBERS)
    assert 0.45 < lr < 0.55 and trees > 0.75


def test_lr_sees_interactions_through_crosses(ordered, diverse):
    """Behaviour by target crosses hold what the bag of behaviours says: all there is without order."""
    assert auc_of(diverse, {"name": "lr"}, epochs=4) < 0.55
    cross = {"cross": {"seen": {"of": ["history.category", "category"], "buckets": 1 << 16}}}
    assert auc_of(diverse, {"name": "lr"}, epochs=8, **cross) > 0.6
