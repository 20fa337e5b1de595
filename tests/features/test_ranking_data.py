from __future__ import annotations

import numpy as np
import pytest

from mmctr.data.batches import Jagged
from mmctr.data.prepare import prepare
from mmctr.data.splits import ColdItemsSplit, TemporalSplit, split_interactions
from mmctr.features.columns import CategoricalFeature, NumericFeature
from mmctr.features.ranking_data import RankingData
from mmctr.features.vocabulary import FeatureConfigs, RankingVocabulary
from tests.features.conftest import FEATURES
from tests.helpers.worlds import log_columns, write_dataset


def test_values_of_cold_items_and_test_users_are_unknown(tmp_path):
    """Item "c" is cold and user 9 tests only; what only they have is row 0."""
    log = [(user, item, time, time % 2) for user in range(4) for time, item in enumerate("abababab")]
    items = {"item_id": ["a", "b", "c"], "brand": ["x", "y", "only c"]}
    users = {"user_id": [0, 1, 2, 3, 9], "town": ["u", "v", "u", None, "only 9"]}
    folder = write_dataset(tmp_path / "d", items, log_columns([*log, (9, "c", 100, 1)]), users)
    dataset = prepare(folder, tmp_path / "out")
    splits = split_interactions(dataset.interactions, 3, TemporalSplit(test=0.03, validation=0.1))
    assert splits.test.source.tolist() == [32]
    features = FeatureConfigs(item={"brand": CategoricalFeature()}, user={"town": CategoricalFeature()})
    vocabulary = RankingVocabulary.learn(dataset, splits, features)
    assert vocabulary.item_ids.to_pylist() == ["a", "b"] and vocabulary.user_ids.to_pylist() == [0, 1, 2, 3]
    assert vocabulary.item["brand"].values == ["x", "y"] and vocabulary.user["town"].values == ["u", "v"]
    data = RankingData(dataset, vocabulary, features, max_history=5)
    batch = data.collator(splits.test)(np.array([0]))
    assert batch.user.tolist() == [0] and batch.items.features["item_id"].tolist() == [0]
    assert batch.items.features["brand"].tolist() == [0] and batch.context["town"].tolist() == [0]
    assert data.id_rows.tolist() == [1, 2, 0] and data.clicks.tolist() == [
        0,
        12,
        0,
    ]  # the last "b" of each user is validation


def test_batches_speak_of_the_right_rows(world, tmp_path):
    dataset, splits = world
    vocabulary = RankingVocabulary.learn(dataset, splits, FEATURES)
    vocabulary.save(tmp_path)
    data = RankingData(dataset, RankingVocabulary.load(tmp_path), FEATURES, max_history=6)
    batch = data.collator(splits.test)(np.arange(40))
    ids, brands = dataset.catalog.item_ids.to_pylist(), dataset.catalog.table["brand"].to_pylist()
    warm, known_users = vocabulary.item_ids.to_pylist(), vocabulary.user_ids.to_pylist()
    item_id, brand, words = (batch.items.features[name] for name in ("item_id", "brand", "title"))
    titles = dataset.catalog.table["title"].to_pylist()
    assert isinstance(words, Jagged) and words.offsets[-1] == len(words.values) > 0
    for u, row in enumerate(batch.items.row.tolist()):
        assert item_id[u] == (warm.index(ids[row]) + 1 if ids[row] in warm else 0)
        assert brand[u] == vocabulary.item["brand"].values.index(brands[row]) + 1
        text = (titles[row] or "").lower().replace("-", " ").split()
        known = [vocabulary.item["title"].values.index(w) + 1 for w in text if w in vocabulary.item["title"].values]
        assert words.values[words.offsets[u] : words.offsets[u + 1]].tolist() == known
    assert 0 in item_id.tolist() and len(set(item_id.tolist())) > 5
    mean, std = vocabulary.context["position"].mean, vocabulary.context["position"].std
    for b in range(40):
        user = dataset.users.slice(int(splits.test.user[b]), 1).to_pylist()[0]
        assert batch.user[b] == known_users.index(user["user_id"]) + 1
        assert batch.context["region"][b] == vocabulary.user["region"].values.index(user["region"]) + 1
        position = dataset.context["position"][int(splits.test.source[b])].as_py()
        assert batch.context["position"][b].tolist() == pytest.approx([(position - mean) / std, 0], abs=1e-5)
    assert data.clicks[splits.seen == 0].tolist() == [0] * int((splits.seen == 0).sum())
    assert data.clicks.tolist() == splits.clicks.tolist()


def test_another_dataset_is_seen_through_the_vocabulary(tmp_path):
    """Other order, other items and users, a value never seen: what is shared keeps its row."""
    log = log_columns([(u, i, t, t % 2) for u in (1, 2, 3) for t, i in enumerate([10, 20, 30, 10, 20, 30])])
    items = {"item_id": [10, 20, 30], "brand": ["x", "y", "z"]}
    first = prepare(write_dataset(tmp_path / "a", items, log), tmp_path / "out a")
    splits = split_interactions(first.interactions, 3, ColdItemsSplit(cold=0.01, validation_cold=0, validation=0.2))
    features = FeatureConfigs(item={"brand": CategoricalFeature()})
    vocabulary = RankingVocabulary.learn(first, splits, features)
    other_log = log_columns([(3, 40, 1, 1), (7, 20, 2, 0), (1, 30, 3, 1)])
    other = write_dataset(tmp_path / "b", {"item_id": [40, 30, 20], "brand": ["z", "new", "x"]}, other_log)
    data = RankingData(prepare(other, tmp_path / "out b"), vocabulary, features, max_history=3)
    assert data.id_rows.tolist() == [0, 3, 2] and data.user_rows.tolist() == [1, 3, 0]  # users 1, 3, 7
    assert data.items.columns["brand"].tolist() == [3, 0, 1]
    strings = write_dataset(tmp_path / "c", {"item_id": ["10"], "brand": ["x"]}, log_columns([(1, "10", 1, 1)]))
    with pytest.raises(ValueError, match="the run's items and this dataset's: ids are string on one side and int64"):
        RankingData(prepare(strings, tmp_path / "out c"), vocabulary, features, max_history=3)
    write_dataset(tmp_path / "e", {"item_id": [10]}, log_columns([(1, 10, 1, 1)]))
    with pytest.raises(ValueError, match="items table: column 'brand' is missing"):
        RankingData(prepare(tmp_path / "e", tmp_path / "out e"), vocabulary, features, max_history=3)


def test_a_log_without_further_columns_and_no_features(tmp_path):
    log = log_columns([(u, i, t, t % 2) for u in (1, 2) for t, i in enumerate([10, 20, 10, 20, 10])])
    dataset = prepare(write_dataset(tmp_path / "d", {"item_id": [10, 20]}, log), tmp_path / "out")
    splits = split_interactions(dataset.interactions, 2, ColdItemsSplit(cold=0.1, validation_cold=0, validation=0.25))
    vocabulary = RankingVocabulary.learn(dataset, splits, FeatureConfigs())
    batch = RankingData(dataset, vocabulary, FeatureConfigs(), 3).collator(splits.train)(np.arange(2))
    assert batch.context == {} and list(batch.items.features) == ["item_id"]
    with pytest.raises(ValueError, match="interactions table: column 'position' is missing"):
        RankingVocabulary.learn(dataset, splits, FeatureConfigs(context={"position": NumericFeature()}))
