"""Data at its edges, through every ranker: a user with 50 000 events, users with none, numbers that are none, values
nobody has seen, batches of one."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from mmctr.data.prepare import prepare
from mmctr.data.splits import TemporalSplit, split_interactions
from mmctr.features.behavior_collator import NegativeSampler
from mmctr.features.ranking_data import RankingData
from mmctr.features.trees import TreesConfig
from mmctr.features.vocabulary import RankingVocabulary
from mmctr.tasks import RankingTask, RankingTaskConfig
from mmctr.training.optimizers import OptimizerConfig, make_optimizer
from tests.contract.test_rankers import RANKERS
from tests.helpers.worlds import write_dataset

EVENTS, ITEMS, MAX_HISTORY = 50_000, 60, 20
FEATURES = {
    "item": {"category": {"name": "categorical", "dim": 4}, "price": {"name": "numeric"}},
    "context": {"bid": {"name": "numeric", "log": True}, "slot": {"name": "numeric", "buckets": 3, "dim": 4}},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    rng = np.random.default_rng(0)
    small = np.repeat(np.arange(1, 41), 10)
    user = np.concatenate([np.zeros(EVENTS, np.int64), small])
    time = np.concatenate([np.arange(EVENTS), rng.integers(0, EVENTS + 3000, len(small))])
    item = rng.integers(0, ITEMS - 2, len(user))
    item[time > EVENTS] = rng.integers(ITEMS - 4, ITEMS, (time > EVENTS).sum())  # two items are new by then
    bid = rng.lognormal(size=len(user))
    bid[rng.random(len(user)) < 0.3] = np.nan
    bid[rng.random(len(user)) < 0.01] = np.inf
    bid[rng.random(len(user)) < 0.01] = -5  # no logarithm
    log = {"user_id": user, "item_id": item, "timestamp": time, "label": (rng.random(len(user)) < 0.4).astype(np.int64)}
    price = [None if i % 5 == 0 else float("nan") if i % 5 == 1 else float(i) for i in range(ITEMS)]
    category = [f"c{i % 7}" for i in range(ITEMS - 2)] + ["never seen", None]
    items = {"item_id": np.arange(ITEMS), "title": ["x"] * ITEMS, "category": category, "price": price}
    slot = pa.array([None if i % 3 else i % 11 for i in range(len(user))], pa.float64())
    folder = tmp_path_factory.mktemp("edges")
    write_dataset(folder / "d", items, log | {"bid": bid, "slot": slot})
    dataset = prepare(folder / "d", folder / "out")
    splits = split_interactions(dataset.interactions, ITEMS, TemporalSplit(test=0.01, validation=0.01))
    features = RankingTaskConfig.parse({"features": FEATURES}).features
    return dataset, splits, features, RankingVocabulary.learn(dataset, splits, features)


@pytest.mark.lowest
@pytest.mark.parametrize("name", RANKERS)
def test_every_ranker_takes_it(world, name):
    dataset, splits, features, vocabulary = world
    if name == "gbdt_lr":
        data = RankingData(dataset, vocabulary, features, MAX_HISTORY)
        part = splits.train.take(np.arange(0, len(splits.train), 20))
        trees = data.fit_trees(TreesConfig(num_trees=3, min_rows=5), part, 0.1, seed=0)
        vocabulary = RankingVocabulary(**vars(vocabulary) | {"trees": trees})
    data = RankingData(dataset, vocabulary, features, MAX_HISTORY)
    torch.manual_seed(0)
    values = {"features": features, "ranker": RANKERS[name], "max_history": MAX_HISTORY}
    table = None
    if RANKERS[name].needs_similarity:  # which some items do not have
        values["embedder"] = {"content": {"name": "table", "path": "", "dim": 4, "hidden": []}}
        table = torch.randn(ITEMS, 3), torch.arange(ITEMS) % 5 > 0
    task = RankingTask(RankingTaskConfig.model_validate(values), vocabulary, table)
    optimizer = make_optimizer(task, OptimizerConfig())
    collator = data.collator(splits.train, negatives=NegativeSampler(splits.train, 0), id_dropout=0.1)
    lengths = splits.train.history_end - splits.train.history_start
    longest, empty = int(lengths.argmax()), np.flatnonzero(lengths == 0)[:3]
    assert lengths[longest] > 15_000 and len(empty) == 3
    some = np.random.default_rng(0).choice(len(splits.train), 60, replace=False)
    batches = [np.concatenate([some, [longest], empty]), np.array([longest]), empty[:1], np.array([longest, longest])]
    task.train()
    for rows in batches * 2:
        terms = task(collator(rows))
        assert all(term.isfinite() for term in terms.values())
        sum(terms.values()).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in task.parameters())
        optimizer.step()
        optimizer.zero_grad()
    task.eval()
    with torch.no_grad():
        batch = data.collator(splits.test)(np.arange(len(splits.test)))
        whole = task.logits(batch)[0]
        assert whole.isfinite().all()
        for row in range(0, len(whole), 50):  # a batch of one says the same
            alone = data.collator(splits.test)(np.array([row]))
            torch.testing.assert_close(task.logits(alone)[0][0], whole[row], rtol=1e-4, atol=1e-5)


def test_of_50_000_events_the_latest_clicks_are_read(world):
    dataset, splits, features, vocabulary = world
    rows = np.flatnonzero(splits.test.user == 0)[-5:]
    batch = RankingData(dataset, vocabulary, features, MAX_HISTORY).collator(splits.test)(rows)
    log = dataset.interactions
    for i, row in enumerate(rows):
        before = (log.user == 0) & (log.time < log.time[splits.test.source[row]]) & (log.label == 1)
        start, end = batch.history_offsets[i : i + 2].tolist()
        assert batch.items.row[batch.history[start:end]].tolist() == log.item[before][-MAX_HISTORY:].tolist()


def test_numbers_that_are_none_are_missing_and_new_values_unknown(world):
    dataset, splits, features, vocabulary = world
    batch = RankingData(dataset, vocabulary, features, MAX_HISTORY).collator(splits.test)(np.arange(len(splits.test)))
    bid, slot = batch.context["bid"], batch.context["slot"]
    given = np.array([np.nan if b is None else b for b in dataset.context["bid"].to_pylist()])[splits.test.source]
    usable = np.isfinite(given) & (given > -1)
    assert 0.5 < usable.mean() < 0.9
    np.testing.assert_array_equal(bid[:, 1].numpy(), ~usable)
    assert (bid[~usable, 0] == 0).all() and bid[usable, 0].abs().max() < 10
    assert (slot == 0).sum() > 0.5 * len(slot)
    category, price = batch.items.features["category"], batch.items.features["price"]
    new = batch.items.row >= ITEMS - 2
    assert new.sum() == 2 and (category[new] == 0).all() and (category[~new] > 0).all()
    assert torch.equal(price[:, 1] == 1, batch.items.row % 5 < 2)
