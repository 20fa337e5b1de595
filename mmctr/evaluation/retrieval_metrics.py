"""Retrieval metrics on NumPy arrays: recall@k. Letters: Q queries, C candidates, D size of embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def recall_at_k(
    queries: ArrayLike,
    candidates: ArrayLike,
    ks: Sequence[int] = (1, 5, 10),
    query_ids: ArrayLike | None = None,
    candidate_ids: ArrayLike | None = None,
    chunk: int = 1024,
) -> dict[str, float]:
    """Fraction of queries whose relevant candidate is among the k candidates with the largest inner product.

    The relevant candidate of query i is candidate i, or, with ids, the best of the candidates with the id of the query.
    A tie counts against the query: the rank is the number of irrelevant candidates with at least the same score, up to
    rounding, so an encoder that gives every item the same vector gets about 0 and not 1.

    Args:
        queries: (Q, D) floats, of unit norm for cosine similarity.
        candidates: (C, D) floats.
        ks: the numbers k.
        query_ids: (Q,).
        candidate_ids: (C,).
        chunk: number of queries compared at once; the memory is chunk × C floats.

    Returns:
        {"R@1": ..., ...}, each in [0, 1]; nan without queries.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, or a query without a relevant candidate.
    """
    queries, candidates = _as_vectors(queries, "queries"), _as_vectors(candidates, "candidates")
    if queries.shape[1] != candidates.shape[1]:
        raise ValueError(
            f"queries have {queries.shape[1]} dimensions and candidates {candidates.shape[1]}: "
            f"encode both with the same encoder"
        )
    if any(k < 1 for k in ks):
        raise ValueError(f"ks is {tuple(ks)}: give positive numbers, for example (1, 5, 10)")
    query_key, candidate_key = _retrieval_keys(len(queries), len(candidates), query_ids, candidate_ids)
    largest = np.linalg.norm(candidates, axis=1).max(initial=0.0)
    rank = np.empty(len(queries), dtype=np.int64)
    for start in range(0, len(queries), chunk):
        part = queries[start : start + chunk]
        scores = part @ candidates.T  # (chunk, C)
        right = query_key[start : start + chunk, None] == candidate_key[None, :]
        best = np.where(right, scores, -np.inf).max(axis=1)
        # equal vectors can give sums that differ in the last bits, by the position in the matrix product
        rounding = 8 * np.finfo(scores.dtype).eps * np.linalg.norm(part, axis=1) * largest
        rank[start : start + chunk] = ((scores >= (best - rounding)[:, None]) & ~right).sum(axis=1)
    return {f"R@{k}": float((rank < k).mean()) if len(rank) else math.nan for k in ks}


def _as_vectors(values: ArrayLike, name: str) -> NDArray[Any]:
    """Values as finite floats (n, D), float32 unless they are float64; ValueError for other values or shapes."""
    values = np.asarray(values)
    if values.ndim != 2:
        raise ValueError(f"{name} have shape {values.shape}: give one vector a row, (rows, dimensions)")
    if values.dtype != np.float64:
        values = values.astype(np.float32)  # half precision has no fast product and too few digits
    if not np.isfinite(values).all():
        raise ValueError(f"{name} hold values that are not finite: the encoder diverged, train it again")
    return values


def _retrieval_keys(
    num_queries: int, num_candidates: int, query_ids: ArrayLike | None, candidate_ids: ArrayLike | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers (Q,) and (C,) that are equal where the candidate is relevant for the query."""
    if (query_ids is None) != (candidate_ids is None):
        raise ValueError("query_ids and candidate_ids go together: give both or neither")
    if query_ids is None or candidate_ids is None:
        if num_queries > num_candidates:
            raise ValueError(f"{num_queries} queries and {num_candidates} candidates: give query_ids and candidate_ids")
        return np.arange(num_queries), np.arange(num_candidates)
    query_ids, candidate_ids = np.asarray(query_ids), np.asarray(candidate_ids)
    for name, ids, rows in (("query_ids", query_ids, num_queries), ("candidate_ids", candidate_ids, num_candidates)):
        if ids.shape != (rows,):
            raise ValueError(f"{name} have shape {ids.shape} for {rows} vectors: give one id a vector")
    keys = np.unique(np.concatenate([query_ids, candidate_ids]), return_inverse=True)[1].reshape(-1)
    missing = ~np.isin(keys[:num_queries], keys[num_queries:])
    if missing.any():
        raise ValueError(
            f"query_ids contain {query_ids[missing][0]!r}, which no candidate has: add that candidate or drop the query"
        )
    return keys[:num_queries], keys[num_queries:]
