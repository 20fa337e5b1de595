from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from mmctr.data.batches import Jagged
from mmctr.features.columns import (
    BehaviorView,
    CategoricalFeature,
    FeatureColumns,
    MultiValuedFeature,
    NumericFeature,
    known_values,
    pooled_by,
)
from mmctr.features.crosses import CrossFeature, cross, cross_features
from mmctr.features.vocabulary import FeatureConfigs


def jagged(*rows: list[int]) -> Jagged:
    offsets = np.cumsum([0, *map(len, rows)])
    return Jagged(torch.tensor([v for row in rows for v in row], dtype=torch.int64), torch.from_numpy(offsets))


def lists(feature: Jagged) -> list[list[int]]:
    ends = feature.offsets.tolist()
    return [feature.values[a:b].tolist() for a, b in itertools.pairwise(ends)]


def test_unknown_values_are_left_out():
    assert lists(known_values(torch.tensor([3, 0, 5]))) == [[3], [], [5]]
    assert lists(known_values(jagged([0, 2], [], [0], [4, 0, 1]))) == [[2], [], [], [4, 1]]
    assert lists(known_values(torch.zeros(0, dtype=torch.int64))) == []


def test_behaviours_are_pooled_by_impression():
    assert lists(pooled_by(jagged([1, 2], [3], [], [4]), torch.tensor([0, 2, 2, 4]))) == [[1, 2, 3], [], [4]]


def test_a_cross_holds_every_combination():
    """In order, and equal to the combination on its own, whatever stands beside it."""
    a, b, c = jagged([1, 2], [3], [], [5]), jagged([7, 8, 9], [7], [1], []), jagged([4], [4, 5], [4], [4])
    for parts in ((a, b), (a, b, c)):
        rows = lists(cross(list(parts), 1 << 40))
        for row, values in enumerate(zip(*map(lists, parts), strict=True)):
            alone = [cross([jagged([v]) for v in combination], 1 << 40) for combination in itertools.product(*values)]
            assert rows[row] == [int(one.values) for one in alone]
    assert len(set(cross([a, b], 1 << 40).values.tolist())) == 7
    # (1, 2) is not (2, 1), nor does (1, 2, 3) collide with its parts
    assert lists(cross([jagged([1]), jagged([2])], 1 << 40)) != lists(cross([jagged([2]), jagged([1])], 1 << 40))


def test_buckets_are_filled_evenly():
    n, buckets = 300, 64
    grid = np.stack(np.meshgrid(np.arange(1, n + 1), np.arange(1, n + 1)), -1).reshape(-1, 2)
    each = torch.arange(len(grid) + 1)
    rows = cross([Jagged(torch.from_numpy(grid[:, i].copy()), each) for i in (0, 1)], buckets).values.numpy()
    assert rows.min() == 1 and rows.max() == buckets
    counts = np.bincount(rows, minlength=buckets + 1)[1:]
    expected = n * n / buckets
    assert (((counts - expected) ** 2) / expected).sum() < 110  # chi square of mean 63 and deviation 11


def test_crosses_of_targets_users_and_histories():
    config = {
        "a": CrossFeature(of=["user_id", "genre"], buckets=1 << 30),
        "b": CrossFeature(of=["history.genre", "genre"], buckets=1 << 30),
        "c": CrossFeature(of=["history.item_id", "item_id"], buckets=1 << 30),
    }
    view = BehaviorView(
        items=FeatureColumns({"genre": jagged([1, 2], [3], [2], [], [1])}),
        target_rows=torch.tensor([0, 1]),
        history_rows=torch.tensor([2, 3, 4]),
        target_ids=torch.tensor([4, 0]),
        history_ids=torch.tensor([4, 5, 6]),
        offsets=torch.tensor([0, 2, 3]),
        impression={"user_id": torch.tensor([0, 9])},
    )
    found = cross_features(config, view)
    assert [len(row) for row in lists(found["a"])] == [0, 1]  # no combination with the unknown user
    assert lists(found["a"])[1] == lists(cross([jagged([9]), jagged([3])], 1 << 30))[0]
    assert lists(found["b"]) == lists(cross([jagged([2], [1]), jagged([1, 2], [3])], 1 << 30))
    assert lists(found["c"]) == [lists(cross([jagged([4, 5]), jagged([4])], 1 << 30))[0], []]


@pytest.mark.parametrize(
    ("of", "message"),
    [
        (
            ["user_id", "gener"],
            "the cross 'x' is of 'gener', which is none of user_id, item_id, history.item_id, g",
        ),
        (["item_id", "price"], "the cross 'x' is of the number 'price'; give it `buckets`"),
        (["item_id", "history.age"], "is of 'history.age', which is none of"),
        (["item_id", "history.user_id"], "is of 'history.user_id'"),
    ],
)
def test_a_cross_of_something_else(of, message):
    features = {
        "item": {"genre": MultiValuedFeature(), "price": NumericFeature()},
        "user": {"age": CategoricalFeature()},
    }
    FeatureConfigs(**features, cross={"x": CrossFeature(of=["user_id", "item_id", "history.genre", "age"])})
    with pytest.raises(ValueError, match=message):
        FeatureConfigs(**features, cross={"x": CrossFeature(of=of)})
    with pytest.raises(ValueError, match="has the name of another feature"):
        FeatureConfigs(**features, cross={"age": CrossFeature(of=["user_id", "genre"])})
