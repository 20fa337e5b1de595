from __future__ import annotations

import math

import numpy as np
import pytest

from mmctr.evaluation.probes import (
    alignment,
    coclick_auc,
    coclick_recall,
    modality_gap,
    neighbour_agreement,
    retrieval_both_ways,
    uniformity,
    zero_shot_accuracy,
)


def unit(n: int, dim: int = 8, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_neighbours_that_share_a_value_by_hand():
    angles = np.radians([0, 10, 20, 180, 190, 90])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1)
    values = ["a", "a", "b", "b", "b", None]
    # nearest two of each: 1 2 | 0 2 | 1 0 | 4 5 (None) | 3 5 -> for item 4: 3 and 5; the last has no value
    expected = np.mean([1 / 2, 1 / 2, 0, 1 / 2, 1 / 2])
    assert neighbour_agreement(vectors, values, k=2) == pytest.approx(expected)
    assert neighbour_agreement(vectors, values, k=2, chunk=2) == pytest.approx(expected)


def test_fewer_items_than_neighbours_asked_for():
    assert neighbour_agreement(unit(3), ["a", "a", "a"], k=10) == 1  # of two: itself is no neighbour
    assert neighbour_agreement(unit(3), ["a", "a", "b"], k=10) == pytest.approx(1 / 3)
    assert math.isnan(neighbour_agreement(unit(1), ["a"]))


def test_zero_shot_by_hand():
    prompts = np.eye(3)
    images = np.eye(3)[[0, 1, 2, 0]] + 0.01
    assert zero_shot_accuracy(images, prompts, np.array([0, 1, 1, -1])) == pytest.approx(2 / 3)
    assert zero_shot_accuracy(images, np.ones((3, 3)), np.array([0, 1, 2, 0])) == 0  # says the same of everything
    assert math.isnan(zero_shot_accuracy(images, prompts, np.full(4, -1)))


@pytest.mark.parametrize("k", [1, 5])
def test_coclick_recall_equals_a_slow_loop(k):
    vectors = unit(40)
    rng = np.random.default_rng(1)
    anchors = rng.integers(0, 40, 100)
    targets = (anchors + rng.integers(1, 40, 100)) % 40
    expected = []
    for a, t in zip(anchors, targets, strict=True):
        order = [i for i in np.argsort(-(vectors @ vectors[a])) if i != a]
        expected.append(t in order[:k])
    hit = coclick_recall(vectors, anchors, targets, k, chunk=7)
    assert hit.tolist() == expected and 0 < hit.mean() < 1
    assert not coclick_recall(np.ones((40, 2)), anchors, targets, k).any()  # ties go against


def test_coclick_auc_equals_a_slow_loop():
    vectors = np.round(unit(30, 3), 1)  # with ties
    rng = np.random.default_rng(2)
    candidates = np.array([2, 3, 5, 8, 11, 20, 21, 29])
    anchors = rng.integers(0, 30, 50)
    targets = rng.choice(candidates, 50)
    anchors, targets = anchors[anchors != targets], targets[anchors != targets]
    wins = []
    for a, t in zip(anchors, targets, strict=True):
        for c in candidates:
            if c not in (a, t):
                x, y = vectors[a] @ vectors[t], vectors[a] @ vectors[c]
                wins.append(0.5 if abs(x - y) < 1e-6 else float(x > y))
    assert coclick_auc(vectors, anchors, targets, candidates, chunk=9) == pytest.approx(np.mean(wins))
    assert coclick_auc(np.ones((30, 2)), anchors, targets, candidates) == 0.5
    assert math.isnan(coclick_auc(vectors, np.array([0]), np.array([2]), np.array([2])))


def test_alignment_uniformity_and_gap_by_hand():
    x, y = np.eye(2), np.array([[0.0, 1.0], [0.0, 1.0]])
    assert alignment(x, y) == pytest.approx(1.0)
    assert modality_gap(x, y) == pytest.approx(math.sqrt(0.5))
    assert uniformity(x) == pytest.approx(-4.0)  # one pair, squared distance 2
    assert uniformity(np.repeat(x[:1], 3, 0)) == pytest.approx(0.0)
    many = unit(500, 3)
    squared = np.square(many[:, None] - many[None]).sum(2)[~np.eye(500, dtype=bool)]
    assert uniformity(many) == pytest.approx(np.log(np.exp(-2 * squared).mean()), abs=1e-5)
    assert uniformity(many, limit=200) == pytest.approx(uniformity(many), abs=0.1)


def test_retrieval_of_equal_and_of_unrelated_vectors():
    x = unit(50, 32)
    perfect = retrieval_both_ways(x, x)
    assert set(perfect.values()) == {1.0} and len(perfect) == 7
    assert retrieval_both_ways(x, unit(50, 32, seed=1))["mean_recall"] < 0.3
