from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from mmctr.features.columns import Vocabulary
from mmctr.features.vocabulary import FeatureConfigs, RankingVocabulary
from tests.features.conftest import FEATURES


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
