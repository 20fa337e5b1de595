from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from mmctr.data.batches import Jagged
from mmctr.data.prepare import Dataset, open_dataset, prepare
from mmctr.data.splits import ColdItemsSplit, Splits, TemporalSplit, split_interactions
from mmctr.features.columns import CategoricalFeature, MultiValuedFeature, NumericFeature, Vocabulary
from mmctr.features.ranking_data import RankingData
from mmctr.features.vocabulary import FeatureConfigs, RankingVocabulary
from tests.helpers.worlds import log_columns, write_dataset

FEATURES = FeatureConfigs(
    item={"brand": CategoricalFeature(), "title": MultiValuedFeature(separator=" ")},
    user={"region": CategoricalFeature()},
    context={"position": NumericFeature()},
)


@pytest.fixture(scope="module")
def world(toy_folder) -> tuple[Dataset, Splits]:
    dataset = open_dataset(toy_folder)
    return dataset, split_interactions(dataset.interactions, len(dataset.catalog), ColdItemsSplit(cold=0.2))


def test_the_vocabulary_knows_training_alone(world):
    dataset, splits = world
    vocabulary = RankingVocabulary.learn(dataset, splits, FEATURES)
    log, train = dataset.interactions, splits.train.source
    warm, users = sorted(set(log.item[train].tolist())), sorted(set(log.user[train].tolist()))
    ids = dataset.catalog.item_ids.to_pylist()
    assert vocabulary.item_ids.to_pylist() == [ids[row] for row in warm] and 0 < len(warm) < 0.85 * len(ids)
    assert vocabulary.clicks.tolist() == [int(log.label[train][log.item[train] == row].sum()) for row in warm]
    assert vocabulary.user_ids.to_pylist() == [dataset.users["user_id"][row].as_py() for row in users]
    table = dataset.catalog.table
    assert vocabulary.item["brand"].values == sorted({table["brand"][row].as_py() for row in warm})
    regions = dataset.users["region"].to_pylist()
    assert vocabulary.user["region"].values == sorted({regions[row] for row in users})
    positions = np.array(dataset.context["position"].to_pylist())[train]
    assert vocabulary.context["position"].mean == pytest.approx(positions.mean())
    assert vocabulary.context["position"].std == pytest.approx(positions.std())


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


def test_the_vocabulary_saved_and_loaded_is_the_same(world, tmp_path):
    dataset, splits = world
    vocabulary = RankingVocabulary.learn(dataset, splits, FEATURES)
    check_round_trip(vocabulary, tmp_path / "a" / "b")
    odd = RankingVocabulary(
        item_ids=pa.array(["007", "猫", ""]),
        clicks=np.array([1, 2**40, 0]),
        user_ids=pa.array([2**63 - 1, -1]),
        item={"größe": Vocabulary(["é", '"', "\n", "\u2028"]), "n": Vocabulary([], 0.1 + 0.2, 1e-300)},
        user={"b": Vocabulary([0.1, 1e300])},
    )
    check_round_trip(odd, tmp_path / "odd")


def check_round_trip(vocabulary: RankingVocabulary, folder) -> None:
    vocabulary.save(folder)
    again = RankingVocabulary.load(folder)
    assert again.item_ids.equals(vocabulary.item_ids) and again.user_ids.equals(vocabulary.user_ids)
    assert again.clicks.tolist() == vocabulary.clicks.tolist()
    assert (again.item, again.user, again.context) == (vocabulary.item, vocabulary.user, vocabulary.context)


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


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"user": {"a": {"name": "numeric"}}, "context": {"a": {"name": "numeric"}}},
            "'a' is declared as a user and a con",
        ),
        ({"item": {"item_id": {"name": "categorical"}}}, "item_id is not a side feature"),
        ({"item": {"brand": {"name": "categorical", "dimm": 4}}}, "unknown key 'item.brand.dimm'; did you mean 'dim'"),
        ({"item": {"dim": {"name": "categorical", "min_cout": 4}}}, "'item.dim.min_cout'; did you mean 'min_count'"),
        (
            {"item": {"brand": {"name": "categoric"}}},
            "item.brand.name: unknown name 'categoric'; did you mean 'categorical'",
        ),
        ({"items": {}}, "unknown key 'items'; did you mean 'item'"),
    ],
)
def test_wrong_declarations(values, expected):
    with pytest.raises(ValueError) as caught:
        FeatureConfigs.parse(values)
    assert expected in str(caught.value)
