from __future__ import annotations

import builtins
import math

import numpy as np
import pytest
import torch

from mmctr.data.batches import Jagged
from mmctr.data.prepare import open_dataset
from mmctr.data.splits import ColdItemsSplit, split_interactions
from mmctr.features.columns import BehaviorView, CategoricalFeature, FeatureColumns, MultiValuedFeature, NumericFeature
from mmctr.features.ranking_data import RankingData
from mmctr.features.trees import LEAVES, Projection, TreeColumns, Trees, TreesConfig, _shared, disjoint_rows
from mmctr.features.vocabulary import FeatureConfigs, RankingVocabulary
from mmctr.rankers import GBDTLRConfig
from mmctr.tasks import RankingTask, RankingTaskConfig

FEATURES = FeatureConfigs(
    item={"brand": CategoricalFeature(), "title": MultiValuedFeature(separator=" ")},
    user={"region": CategoricalFeature()},
    context={"position": NumericFeature()},
)
CONFIG = TreesConfig(num_trees=12, num_leaves=6, min_rows=5, top_values=3, content_dims=4)


@pytest.fixture(scope="module")
def world(toy_folder):
    dataset = open_dataset(toy_folder)
    splits = split_interactions(dataset.interactions, len(dataset.catalog), ColdItemsSplit(cold=0.2))
    rng = np.random.default_rng(0)
    vectors = torch.from_numpy(rng.normal(size=(len(dataset.catalog), 9)).astype(np.float32))
    content = vectors, torch.from_numpy(rng.random(len(dataset.catalog)) < 0.8)
    vocabulary = RankingVocabulary.learn(dataset, splits, FEATURES)
    return dataset, splits, vocabulary, content


@pytest.fixture(scope="module")
def trees(world) -> Trees:
    dataset, splits, vocabulary, content = world
    data = RankingData(dataset, vocabulary, FEATURES, 10, content)
    return data.fit_trees(CONFIG, splits.train.take(disjoint_rows(len(splits.train), 0.5, 0)[0]), 0.1, seed=0)


def slow_columns(world, trees: Trees, row: int) -> list[float]:
    """What trees read of one test impression, value by value."""
    dataset, splits, vocabulary, (vectors, has) = world
    data, part, nan = RankingData(dataset, vocabulary, FEATURES, 10), splits.test, math.nan
    own = data.collator(part)(np.array([row]))
    target = int(part.item[row])
    history = part.history[part.history_start[row] : part.history_end[row]][-10:].tolist()
    brand, title = data.items.columns["brand"].tolist(), data.items.columns["title"]
    words = [title.values[a:b].tolist() for a, b in zip(title.offsets[:-1], title.offsets[1:], strict=True)]
    ids = data.id_rows.tolist()

    def share(count: float) -> float:
        return count / len(history) if history else nan

    region, position = own.context["region"], own.context["position"][0]
    columns = [float(len(history)), float(region) if region else nan, nan if position[1] else float(position[0])]
    columns += [ids[target] or nan, share(sum(ids[i] == ids[target] for i in history if ids[i]))]
    columns += [brand[target] or nan, share(sum(brand[i] == brand[target] for i in history if brand[i]))]
    columns += [float(word in words[target]) for word in trees.columns.top["item title"]]
    columns += [share(sum(a == b for i in history for a in words[i] for b in set(words[target])))]

    def components(item: int) -> np.ndarray | None:
        if not has[item]:
            return None
        projected = (vectors[item].numpy() - trees.columns.projection.mean) @ trees.columns.projection.components
        return projected / np.linalg.norm(projected)

    v = components(target)
    columns += [nan] * 4 if v is None else v.tolist()
    cosines = [nan if v is None or components(i) is None else float(v @ components(i)) for i in history]
    defined = [c for c in cosines if c == c]
    columns += [np.mean(defined), max(defined), cosines[-1]] if defined else [nan] * 3
    return columns


def test_leaves_are_those_of_lightgbm(world, trees):
    dataset, splits, vocabulary, content = world
    data = RankingData(dataset, RankingVocabulary(**vars(vocabulary) | {"trees": trees}), FEATURES, 10, content)
    rows = np.concatenate([np.arange(40), np.flatnonzero(splits.seen[splits.test.item] == 0)[:20]])
    # columns as the trees read them: the slow ones are as near as rounding, and a threshold may lie between the two
    x = read_columns(world, trees, rows)
    assert np.isnan(x).any() and len(np.unique(x[:, 0])) > 2
    feature = data.collator(splits.test)(rows).context[LEAVES]
    expected = trees.booster.predict(x, pred_leaf=True)
    assert isinstance(feature, Jagged) and feature.offsets.tolist() == list(range(0, 12 * len(rows) + 1, 12))
    np.testing.assert_array_equal(feature.values.view(-1, 12).numpy(), expected + 6 * np.arange(12) + 1)
    assert len(np.unique(expected[:, 0])) > 1 and feature.values.max() < trees.num_rows == 73


def read_columns(world, trees, rows, is_category: list[bool] | None = None) -> np.ndarray:
    """(n, C) the columns that trees read of test rows."""
    dataset, splits, vocabulary, content = world
    data, read = RankingData(dataset, vocabulary, FEATURES, 10, content), {}

    def collect(view):
        read["x"], flags = trees.columns(view, data.projected(trees.columns))
        if is_category is not None:
            is_category.extend(flags)
        return {}

    data.derived = (collect,)
    data.collator(splits.test)(rows)
    return read["x"]


def test_the_columns_are_those_written_down(world, trees):
    rows, is_category = np.arange(60), []
    x = read_columns(world, trees, rows, is_category)
    np.testing.assert_allclose(x, [slow_columns(world, trees, row) for row in rows], rtol=1e-4, atol=1e-5)
    assert [i for i, flag in enumerate(is_category) if flag] == [1, 3, 5]  # region, item_id, brand


def test_trees_are_the_same_again_and_go_through_a_folder(world, trees, tmp_path):
    dataset, splits, vocabulary, content = world
    data = RankingData(dataset, vocabulary, FEATURES, 10, content)
    part = splits.train.take(disjoint_rows(len(splits.train), 0.5, 0)[0])
    again = data.fit_trees(CONFIG, part, 0.1, seed=0)
    assert again.model == trees.model
    trees.save(tmp_path)
    loaded = Trees.load(tmp_path)
    batches = [
        RankingData(dataset, RankingVocabulary(**vars(vocabulary) | {"trees": some}), FEATURES, 10, content)
        .collator(splits.test)(np.arange(50))
        .context[LEAVES]
        .values
        for some in (trees, loaded)
    ]
    assert torch.equal(*batches)
    for a, b in zip(vars(trees.columns.projection).values(), vars(loaded.columns.projection).values(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_logits_add_up_one_weight_a_leaf(world, trees, tmp_path):
    dataset, splits, vocabulary, _ = world
    vocabulary = RankingVocabulary(**vars(vocabulary) | {"trees": trees})
    config = RankingTaskConfig(features=FEATURES, ranker=GBDTLRConfig(trees=CONFIG), user_dim=0)
    task = RankingTask(config, vocabulary).eval()
    weights = task.context.tables[LEAVES].weight
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.zero_()
        weights.copy_(torch.randn_like(weights))
        task.ranker.bias.fill_(0.5)
    batch = RankingData(dataset, vocabulary, config.features, 10).collator(splits.test)(np.arange(20))
    leaves = batch.context[LEAVES].values.view(20, 12)
    with torch.no_grad():
        expected = 0.5 + weights[leaves, 0].mean(1)
        torch.testing.assert_close(task.logits(batch)[0], expected)
        task.save(tmp_path)
        assert torch.equal(RankingTask.load(tmp_path).logits(batch)[0], task.logits(batch)[0])


def test_shared_values_of_many_and_of_few():
    """Both ways of counting them."""
    rng = np.random.default_rng(0)
    for highest in (9, 1 << 40):
        lists = [[rng.integers(1, 9, rng.integers(0, 4)) * (highest // 9) for _ in range(50)] for _ in range(2)]
        target, behaviors = (
            Jagged(torch.from_numpy(np.concatenate(part)), torch.tensor([0, *np.cumsum([len(x) for x in part])]))
            for part in lists
        )
        expected = [sum(value in own for value in values) for own, values in zip(*lists, strict=True)]
        assert _shared(target, behaviors).tolist() == expected and max(expected) > 1


def test_rows_of_the_test_do_not_change_the_trees(world):
    """Lists of items without a training row, lists of test rows, and content of such items: as they are, and others."""
    dataset, splits, vocabulary, (vectors, has) = world
    part = splits.train.take(disjoint_rows(len(splits.train), 0.5, 0)[0])
    unseen = np.flatnonzero(splits.seen == 0)
    trained = np.isin(np.arange(len(dataset.interactions)), splits.train.source)

    def lists(original: list[list[int]], changed: np.ndarray, value: int) -> Jagged:
        rows = [[value] * 50 if at in set(changed.tolist()) else list(row) for at, row in enumerate(original)]
        flat = torch.tensor([one for row in rows for one in row])
        return Jagged(flat, torch.tensor([0, *np.cumsum([len(row) for row in rows])]))

    def fitted(changes: bool) -> Trees:
        other = vectors.clone()
        if changes:
            other[unseen] = 100.0 + torch.arange(9) ** 2
        data = RankingData(dataset, vocabulary, FEATURES, 10, (other, has))
        title = data.items.columns["title"]
        words = [title.values[a:b].tolist() for a, b in zip(title.offsets[:-1], title.offsets[1:], strict=True)]
        nothing = np.zeros(0, np.int64)
        of_items = lists(words, unseen if changes else nothing, 9)
        of_rows = lists(
            [[1 + at % 5] for at in range(len(trained))], np.flatnonzero(~trained) if changes else nothing, 7
        )
        data.items = FeatureColumns(data.items.columns | {"title": of_items})
        data.context = FeatureColumns(data.context.columns | {"tags": of_rows})
        return data.fit_trees(CONFIG, part, 0.1, seed=0)

    one, other = fitted(False), fitted(True)
    assert one.columns.top == other.columns.top and set(one.columns.top) == {"item title", "impression tags"}
    assert one.model == other.model
    np.testing.assert_array_equal(one.columns.projection.components, other.columns.projection.components)


def test_an_item_and_a_user_feature_of_one_name_are_two():
    lists = Jagged(torch.tensor([1, 2, 3]), torch.tensor([0, 1, 3]))
    items, impressions = FeatureColumns({"tags": lists}), FeatureColumns({"tags": torch.tensor([4, 0])})
    columns = TreeColumns.learn(CONFIG, items, impressions, None)
    nothing = torch.zeros(0, dtype=torch.int64)
    view = BehaviorView(items, torch.arange(2), nothing, nothing, nothing, torch.zeros(3).long(), impressions.columns)
    x, is_category = columns(view)
    assert columns.top == {"item tags": [1, 2, 3]} and is_category == [False, True, False, False, False, False]
    np.testing.assert_array_equal(x[:, :5], [[0, 4, 1, 0, 0], [0, np.nan, 0, 1, 1]])


def test_rows_of_trees_and_of_the_linear_model_are_disjoint():
    trees, rest = disjoint_rows(1000, 0.3, seed=1)
    assert len(trees) == 300 and np.array_equal(np.sort(np.concatenate([trees, rest])), np.arange(1000))
    assert not np.array_equal(trees, disjoint_rows(1000, 0.3, seed=2)[0])
    with pytest.raises(ValueError, match=r"share=0.1 of 2 training rows"):
        disjoint_rows(2, 0.1, 0)


def test_principal_components():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(400, 6)) * np.array([5, 3, 1, 0.1, 0.1, 0.1]) + 2
    projection = Projection.fit(vectors, 2)
    assert abs(projection.components[0, 0]) > 0.99 and abs(projection.components[1, 1]) > 0.99
    np.testing.assert_allclose(np.linalg.norm(projection(vectors), axis=1), 1, rtol=1e-5)
    assert Projection.fit(vectors, 20)(vectors).shape == (400, 6)


def test_without_lightgbm_the_remedy_is_said(monkeypatch):
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "lightgbm":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ValueError, match=r"pip install 'mmctr\[gbdt\]'"):
        Trees.fit(CONFIG, None, np.zeros((3, 1)), [False], np.zeros(3), 0)
