"""Recall against a loop over all queries."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mmctr.evaluation.retrieval_metrics import recall_at_k


def looped_recall(queries, candidates, k, query_ids, candidate_ids) -> float:
    hits = 0
    for query, name in zip(queries, query_ids, strict=True):
        scores = candidates @ query
        right = candidate_ids == name
        hits += (scores[~right] >= scores[right].max()).sum() < k
    return hits / len(queries)


@pytest.mark.parametrize("chunk", [3, 7, 1024])
def test_recall_equals_a_loop(chunk):
    generator = np.random.default_rng(0)
    candidates = generator.integers(-2, 3, (30, 4)).astype(float)  # small integers: exact products, many ties
    queries = candidates[:20] + generator.integers(-1, 2, (20, 4))
    found = recall_at_k(queries, candidates, ks=(1, 3, 10), chunk=chunk)
    ids = np.arange(30)
    assert found == {f"R@{k}": looped_recall(queries, candidates, k, ids[:20], ids) for k in (1, 3, 10)}
    names = np.array([f"item {i % 12}" for i in range(30)])
    found = recall_at_k(queries, candidates, (1, 5), names[:20], names, chunk=chunk)
    assert found == {f"R@{k}": looped_recall(queries, candidates, k, names[:20], names) for k in (1, 5)}


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_recall_of_a_constant_encoder_is_zero(dtype):
    vector = np.random.default_rng(0).normal(size=100)
    vectors = np.tile(vector / np.linalg.norm(vector), (333, 1)).astype(dtype)
    assert recall_at_k(vectors, vectors, chunk=50) == {"R@1": 0.0, "R@5": 0.0, "R@10": 0.0}


def test_recall_of_the_identity_is_one_and_of_nothing_undefined():
    vectors = np.random.default_rng(0).normal(size=(200, 32))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert recall_at_k(vectors, vectors, ks=[1]) == {"R@1": 1.0}
    assert math.isnan(recall_at_k(vectors[:0], vectors, ks=[1])["R@1"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: recall_at_k(np.ones((2, 3)), np.ones((2, 4))), "3 dimensions and candidates 4"),
        (lambda: recall_at_k(np.ones(3), np.ones((2, 4))), "queries have shape"),
        (lambda: recall_at_k(np.ones((3, 1)), np.ones((2, 1))), "3 queries and 2 candidates"),
        (lambda: recall_at_k(np.ones((1, 1)), np.full((1, 1), np.nan)), "candidates hold values"),
        (lambda: recall_at_k(np.ones((1, 1)), np.ones((1, 1)), ks=(0,)), "ks is"),
        (lambda: recall_at_k(np.ones((1, 1)), np.ones((1, 1)), query_ids=[1]), "go together"),
        (lambda: recall_at_k(np.ones((1, 1)), np.ones((1, 1)), (1,), [7], [8]), "query_ids contain .*7"),
        (lambda: recall_at_k(np.ones((1, 1)), np.ones((1, 1)), (1,), [7], [8, 7]), "candidate_ids have"),
    ],
)
def test_wrong_vectors_and_ids_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
