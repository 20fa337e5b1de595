"""Trees of strangers: what would make LightGBM run for ever or end the process is refused before."""

from __future__ import annotations

import re

import numpy as np
import pytest

lightgbm = pytest.importorskip("lightgbm")

from mmctr.features.lightgbm_text import checked_model  # noqa: E402


@pytest.fixture(scope="module")
def booster():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 4))
    x[:, 3] = rng.integers(0, 40, 600)
    x[::7, 0] = np.nan
    label = (x[:, 1] * x[:, 2] + (x[:, 3] % 3 == 0) > 0.3).astype(int)
    data = lightgbm.Dataset(x, label, categorical_feature=[3])
    settings = {"objective": "binary", "num_leaves": 8, "min_data_in_leaf": 5, "verbosity": -1, "num_threads": 1}
    return lightgbm.train(settings, data, num_boost_round=6), x


def test_a_sound_model_predicts_as_before(booster):
    model, x = booster
    text = model.model_to_string()
    again = lightgbm.Booster(model_str=checked_model(text, num_columns=4, most_leaves=8))
    assert "num_cat=0" not in text.split("Tree=1")[0] or "num_cat=" in text
    np.testing.assert_array_equal(again.predict(x, pred_leaf=True), model.predict(x, pred_leaf=True))
    np.testing.assert_array_equal(again.predict(x), model.predict(x))


def test_a_tree_of_one_leaf_is_sound():
    data = lightgbm.Dataset(np.zeros((50, 2)), np.arange(50) % 2)
    model = lightgbm.train({"objective": "binary", "verbosity": -1}, data, num_boost_round=2)
    assert "end of trees" in checked_model(model.model_to_string())


@pytest.mark.parametrize(
    ("pattern", "new", "message"),
    [
        (r"left_child=\S+", "left_child=0", "tree 0: left_child leads to no node below"),  # a circle
        (r"right_child=\S+", "right_child=99", "right_child leads to no node below"),
        (r"left_child=\S+", "left_child=-99", "left_child leads to no node below"),
        (r"split_feature=\S+", "split_feature=4000", "split_feature is none of the 4 columns"),
        (r"split_feature=\S+", "split_feature=-1", "split_feature is none of the 4 columns"),
        (r"num_leaves=8", "num_leaves=9", "num_leaves is '9', but must be a number from 1 to 8"),
        (r"num_leaves=8", "num_leaves=-3", "num_leaves is '-3'"),
        (r"leaf_value=\S+ ", "leaf_value=", "leaf_value has 7 values where 8 belong"),
        (r"threshold=\S+", "threshold=x", "threshold holds something else than numbers"),
        (r"num_class=1", "num_class=3", "is no model of binary classification"),
        (r"max_feature_idx=3", "max_feature_idx=999999999", "the header: max_feature_idx"),
        (r"Tree=1", "Tree=7", "the trees are not numbered in order"),
        (r"is_linear=0", "is_linear=1", "is a linear tree"),
        (r"end of trees", "", "is no text of a LightGBM model"),
        (r"^tree", "forest", "is no text of a LightGBM model"),
    ],
)
def test_malformed_trees_are_refused(booster, pattern, new, message):
    text = booster[0].model_to_string()
    changed = re.sub(pattern, new, text, count=1)
    assert changed != text
    with pytest.raises(ValueError, match=re.escape(message)):
        checked_model(changed, most_leaves=8)


def test_sets_of_categories_are_checked(booster):
    text = booster[0].model_to_string()
    assert re.search(r"num_cat=[1-9]", text)
    for pattern, new, message in (
        (r"cat_boundaries=0 ", "cat_boundaries=5 ", "cat_boundaries do not ascend from 0"),
        (r"cat_threshold=\S+", "cat_threshold=", "cat_threshold has|cat_threshold holds"),
        (r"num_cat=[1-9]", "num_cat=0", "num_cat is 0, but nodes split categories"),
    ):
        changed = re.sub(pattern, new, text, count=1)
        assert changed != text
        with pytest.raises(ValueError, match=message):
            checked_model(changed)
