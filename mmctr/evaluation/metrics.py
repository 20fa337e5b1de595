"""Ranking and retrieval metrics on NumPy arrays: AUC, gAUC, log loss, calibration, recall@k, bootstrap intervals.

Labels are 0/1 (1 = click), scores are finite numbers of any scale where higher means "rather a click"; log loss and
calibration need probabilities. Letters: B impressions, G users (groups), Q queries, C candidates, D embedding.

A metric that the data does not define (AUC of one class, calibration without clicks) is nan here, and None in the
dictionaries of `impression_metrics` and `ranking_report`, which go into JSON files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

CLICK_BUCKETS: tuple[tuple[int, int | None], ...] = ((0, 0), (1, 5), (6, 20), (21, 100), (101, None))
"""Clicks of the target item in training: first and last (inclusive) of each bucket, None = no upper end."""


def auc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve: the probability that a random click scores above a random non-click, with ties counted
    as one half. Equals the Mann-Whitney U statistic divided by the number of pairs.

    Args:
        labels: (B,) 0 or 1.
        scores: (B,) numbers of any range.

    Returns:
        The area in [0, 1], or nan when all labels are equal.

    Raises:
        ValueError: the lengths differ, a label is neither 0 nor 1, or a score is not finite.

    Example:
        ```python
        assert mmctr.auc(labels=[1, 0, 1, 0], scores=[0.9, 0.8, 0.7, 0.1]) == 0.75
        ```
    """
    labels, scores = _checked(labels, scores)
    negatives, positives = np.sort(scores[~labels]), np.sort(scores[labels])
    if not len(negatives) or not len(positives):
        return math.nan
    below = np.searchsorted(negatives, positives, side="left")
    below_or_equal = np.searchsorted(negatives, positives, side="right")
    return float((below.sum() + below_or_equal.sum()) / (2 * len(negatives) * len(positives)))


def gauc(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike) -> float:
    """Grouped AUC: the mean over users of the AUC of a user, weighted by the number of impressions of the user.

    Users whose labels are all equal have no AUC and are left out, together with the impressions of these users.
    Source: Zhou et al., Deep Interest Network for Click-Through Rate Prediction, KDD 2018, equation 7.

    Args:
        labels: (B,) 0 or 1.
        scores: (B,) numbers of any range.
        groups: (B,) the user of each impression, integers or strings.

    Returns:
        The mean in [0, 1], or nan when no user has both labels.

    Raises:
        ValueError: the lengths differ, a label is neither 0 nor 1, or a score is not finite.

    Example:
        ```python
        users = ["ann", "ann", "bob", "bob", "bob"]
        assert mmctr.gauc([1, 0, 0, 1, 1], [0.9, 0.2, 0.7, 0.3, 0.8], users) == (2 * 1.0 + 3 * 0.5) / 5
        ```
    """
    labels, scores = _checked(labels, scores)
    return _weighted_mean(*_user_aucs(labels, scores, _user_rows(groups, len(labels))))


def log_loss(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Mean binary cross-entropy in nats, in float64, with probabilities clipped to [1e-7, 1 - 1e-7].

    labels and probabilities are (B,). nan for no rows. Raises ValueError on probabilities outside [0, 1].
    """
    labels, probabilities = _checked(labels, probabilities, name="probabilities")
    _check_probabilities(probabilities)
    if not len(labels):
        return math.nan
    clipped = np.clip(probabilities, 1e-7, 1 - 1e-7)
    return float(-np.mean(np.where(labels, np.log(clipped), np.log1p(-clipped))))


def calibration(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Predicted clicks over observed clicks: 1 is right, 2 promises twice the clicks that came.

    labels and probabilities are (B,). nan without a click. Raises ValueError on probabilities outside [0, 1].
    """
    labels, probabilities = _checked(labels, probabilities, name="probabilities")
    _check_probabilities(probabilities)
    clicks = int(labels.sum())
    return float(probabilities.sum() / clicks) if clicks else math.nan


def recall_at_k(
    queries: ArrayLike,
    candidates: ArrayLike,
    ks: Sequence[int] = (1, 5, 10),
    query_ids: ArrayLike | None = None,
    candidate_ids: ArrayLike | None = None,
    chunk: int = 1024,
) -> dict[str, float]:
    """Share of queries whose right candidate is among the k with the largest inner product: {"R@1": ..., ...}.

    queries (Q, D) and candidates (C, D) are floats; normalise them first for cosine similarity. The right answer of
    query i is candidate i, or, with query_ids (Q,) and candidate_ids (C,), the best of the candidates with its id.
    Ties count against: the rank is the number of wrong candidates that score at least as high, up to rounding, so an
    encoder that gives every item the same vector gets about 0 and not 1. Memory is chunk × C floats.

    Raises ValueError on shapes that do not fit, values that are not finite, and a query without a right candidate.
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
        # the same vectors can give sums that differ in the last bits, by their place in the matrix product
        rounding = 8 * np.finfo(scores.dtype).eps * np.linalg.norm(part, axis=1) * largest
        rank[start : start + chunk] = ((scores >= (best - rounding)[:, None]) & ~right).sum(axis=1)
    return {f"R@{k}": float((rank < k).mean()) if len(rank) else math.nan for k in ks}


def bootstrap_intervals(
    labels: ArrayLike,
    scores: ArrayLike,
    groups: ArrayLike,
    num_samples: int = 200,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, list[float]]:
    """Percentile intervals of AUC and gAUC over resampled users: {"auc_ci": [lo, hi], "gauc_ci": [lo, hi]}.

    Users, not impressions, are drawn with replacement, as impressions of one user are not independent. The interval
    says nothing of the spread between training seeds. labels, scores, groups are (B,). Both ends are nan when fewer
    than two users bear on the metric. Errors as for `auc`.
    """
    labels, scores = _checked(labels, scores)
    users = _user_rows(groups, len(labels))
    auc_samples, gauc_samples = _bootstrap(labels, [scores], users, num_samples, seed)
    return {"auc_ci": interval(auc_samples[:, 0], confidence), "gauc_ci": interval(gauc_samples[:, 0], confidence)}


def paired_difference(
    labels: ArrayLike,
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    groups: ArrayLike,
    num_samples: int = 200,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """How much better b ranks than a: {"auc": b - a, "auc_ci": [lo, hi], "gauc": b - a, "gauc_ci": [lo, hi]}.

    Both scores are of the same impressions and see the same resampled users, so what is common to both cancels and
    the interval is narrower than two separate ones. All arguments are (B,); errors and nan as `bootstrap_intervals`.
    """
    found: dict[str, Any] = {}
    for name, (values, samples) in paired_samples(labels, [scores_a], [scores_b], groups, num_samples, seed).items():
        found |= {name: float(values[0]), f"{name}_ci": interval(samples[:, 0], confidence)}
    return found


def paired_samples(
    labels: ArrayLike,
    scores_a: Sequence[ArrayLike],
    scores_b: Sequence[ArrayLike],
    groups: ArrayLike,
    num_samples: int = 200,
    seed: int = 0,
) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """How much better each b ranks than its a: {"auc": (b - a, of resampled users), "gauc": the same}.

    labels and groups are (B,), scores_a and scores_b P arrays (B,); the pairs are (P,) and (num_samples, P), where all
    pairs of a sample see the same users. Errors and nan as `bootstrap_intervals`.
    """
    truth = _checked(labels, scores_a[0], name="scores_a")[0]
    a = [_checked(labels, scores, name="scores_a")[1] for scores in scores_a]
    b = [_checked(labels, scores, name="scores_b")[1] for scores in scores_b]
    users = _user_rows(groups, len(truth))
    pairs = list(zip(a, b, strict=True))
    values = {
        "auc": [auc(truth, later) - auc(truth, first) for first, later in pairs],
        "gauc": [gauc(truth, later, users) - gauc(truth, first, users) for first, later in pairs],
    }
    drawn = _bootstrap(truth, [*a, *b], users, num_samples, seed)
    return {
        name: (np.array(values[name]), samples[:, len(pairs) :] - samples[:, : len(pairs)])
        for name, samples in zip(values, drawn, strict=True)
    }


def impression_metrics(
    labels: ArrayLike, probabilities: ArrayLike, users: ArrayLike, num_bootstrap: int = 200, seed: int = 0
) -> dict[str, Any]:
    """All metrics of a set of impressions as JSON-ready Python numbers; what the data does not define is None.

    labels, probabilities, users are (B,). Keys: auc, gauc, log_loss, calibration, num_impressions, num_positives,
    auc_ci and gauc_ci ([lo, hi], 95%, `num_bootstrap` resamples of users; None when `num_bootstrap` is 0).
    """
    labels, probabilities = _checked(labels, probabilities, name="probabilities")
    users = _user_rows(users, len(labels))
    result: dict[str, Any] = {
        "auc": auc(labels, probabilities),
        "gauc": gauc(labels, probabilities, users),
        "log_loss": log_loss(labels, probabilities),
        "calibration": calibration(labels, probabilities),
        "num_impressions": len(labels),
        "num_positives": int(labels.sum()),
        **bootstrap_intervals(labels, probabilities, users, num_bootstrap, seed),
    }
    return {key: None if np.isnan(value).any() else value for key, value in result.items()}


def ranking_report(
    labels: ArrayLike,
    probabilities: ArrayLike,
    users: ArrayLike,
    cold: ArrayLike,
    clicks: ArrayLike,
    num_bootstrap: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """`impression_metrics` of all impressions, of warm and cold targets, and by clicks of the target in training.

    All arguments are (B,): cold is True where the target item never occurred in training, clicks counts its clicks
    there. Returns {"all": M, "warm": M, "cold": M, "buckets": [{"clicks": "1-5", **M}, ...]}, the buckets being
    those of `CLICK_BUCKETS`, empty ones included. Raises ValueError on unequal lengths and negative clicks.
    """
    labels, probabilities = _checked(labels, probabilities, name="probabilities")
    users = _user_rows(users, len(labels))
    cold, clicks = np.asarray(cold), np.asarray(clicks)
    for name, column in (("cold", cold), ("clicks", clicks)):
        if column.shape != labels.shape:
            raise ValueError(f"{name} has shape {column.shape} and labels {labels.shape}: give one value an impression")
    cold = cold.astype(bool)
    if len(clicks) and clicks.min() < 0:
        raise ValueError(f"clicks has the value {clicks.min()}: counts start at 0, give cold items 0")

    def metrics(rows: NDArray[np.bool_]) -> dict[str, Any]:
        return impression_metrics(labels[rows], probabilities[rows], users[rows], num_bootstrap, seed)

    buckets = []
    for first, last in CLICK_BUCKETS:
        rows = (clicks >= first) & (clicks <= (np.inf if last is None else last))
        buckets.append({"clicks": bucket_name(first, last), **metrics(rows)})
    return {"all": metrics(np.ones_like(cold)), "warm": metrics(~cold), "cold": metrics(cold), "buckets": buckets}


def bucket_name(first: int, last: int | None) -> str:
    """The words for a bucket of click counts: "0", "1-5", ">100"."""
    if last is None:
        return f">{first - 1}"
    return str(first) if first == last else f"{first}-{last}"


def _checked(labels: ArrayLike, scores: ArrayLike, name: str = "scores") -> tuple[NDArray[np.bool_], NDArray[Any]]:
    """labels as (B,) bool and scores as (B,) float64, or a ValueError."""
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if labels.ndim != 1 or labels.shape != scores.shape:
        raise ValueError(
            f"labels have shape {labels.shape} and {name} {scores.shape}: give one-dimensional arrays of equal length"
        )
    positive = labels == 1
    wrong = ~positive & (labels != 0)
    if wrong.any():
        raise ValueError(f"labels contain {labels[wrong][0]!r}: use 0 for no click and 1 for a click")
    finite = np.isfinite(scores)
    if not finite.all():
        row = int(np.argmin(finite))
        raise ValueError(
            f"{name} has {int((~finite).sum())} values that are not finite, the first is {scores[row]} in row {row}: "
            f"the model diverged, train it with a lower learning rate or gradient clipping"
        )
    return positive, scores


def _check_probabilities(probabilities: NDArray[Any]) -> None:
    if len(probabilities) and (probabilities.min() < 0 or probabilities.max() > 1):
        raise ValueError(
            f"probabilities range from {probabilities.min():g} to {probabilities.max():g}: give values in [0, 1], "
            f"the sigmoid of logits"
        )


def _user_rows(groups: ArrayLike, length: int) -> NDArray[np.int64]:
    """Users as numbers 0..G-1 in the order of their ids."""
    groups = np.asarray(groups)
    if groups.shape != (length,):
        raise ValueError(f"groups have shape {groups.shape} and labels ({length},): give one user an impression")
    return np.unique(groups, return_inverse=True)[1].reshape(-1)


def _user_aucs(
    labels: NDArray[np.bool_], scores: NDArray[Any], users: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """AUC (G,) and weight (G,) of each user 0..G-1; a user with one class has AUC 0 and weight 0."""
    num_users = int(users.max(initial=-1)) + 1
    if not num_users:
        return np.zeros(0), np.zeros(0)
    order = np.lexsort((scores, users))
    labels, scores, users = labels[order], scores[order], users[order]
    new_user = users[1:] != users[:-1]
    block = np.append(np.flatnonzero(np.append(True, new_user | (scores[1:] != scores[:-1]))), len(users))
    clicks = np.append(0, np.cumsum(labels))  # clicks before each row
    others = np.arange(len(labels) + 1) - clicks
    user = users[block[:-1]]  # the user of each block of tied scores
    first_row = np.searchsorted(users, np.arange(num_users))
    others_below = others[block[:-1]] - others[first_row][user]
    wins = np.diff(clicks[block]) * (others_below + np.diff(others[block]) / 2)
    impressions = np.bincount(users, minlength=num_users)
    num_clicks = np.bincount(users[labels], minlength=num_users)
    pairs = num_clicks * (impressions - num_clicks)
    aucs = np.bincount(user, weights=wins, minlength=num_users) / np.maximum(pairs, 1)
    return aucs, np.where(pairs > 0, impressions, 0).astype(np.float64)


def _weighted_mean(values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    total = weights.sum()
    return float(values @ weights / total) if total else math.nan


def _resampled_users(num_users: int, num_samples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """How often each user (G,) is drawn in each sample of G draws with replacement."""
    generator = np.random.default_rng(seed)
    for _ in range(num_samples):
        # counting uniform draws is the multinomial, ten times faster than `Generator.multinomial`
        yield np.bincount(generator.integers(0, num_users, num_users), minlength=num_users)


def _bootstrap(
    labels: NDArray[np.bool_], scores: list[NDArray[Any]], users: NDArray[np.int64], num_samples: int, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """AUC and gAUC, each (num_samples, number of score arrays), of the same resampled users for every score array."""
    aucs = np.full((num_samples, len(scores)), math.nan)
    gaucs = np.full((num_samples, len(scores)), math.nan)
    num_users = int(users.max(initial=-1)) + 1
    if num_users < 2:  # resampling one user repeats the same data: an interval of width 0 would be a lie
        return aucs, gaucs
    users_of_clicks, users_of_others = users[labels], users[~labels]
    prepared = []
    for values in scores:
        order = np.argsort(values[~labels], kind="stable")
        sorted_others, clicked = values[~labels][order], values[labels]
        below = np.searchsorted(sorted_others, clicked, side="left")
        below_or_equal = np.searchsorted(sorted_others, clicked, side="right")
        prepared.append((users_of_others[order], below, below_or_equal, *_user_aucs(labels, values, users)))
    for sample, times in enumerate(_resampled_users(num_users, num_samples, seed)):
        click_weights = times[users_of_clicks]
        pairs = float(click_weights.sum()) * float(times[users_of_others].sum())
        for column, (others, below, below_or_equal, user_auc, user_weight) in enumerate(prepared):
            if pairs:
                mass = np.append(0, np.cumsum(times[others]))  # weight of the non-clicks before each place
                aucs[sample, column] = float(click_weights @ (mass[below] + mass[below_or_equal])) / (2 * pairs)
            if np.count_nonzero(user_weight) > 1:
                gaucs[sample, column] = _weighted_mean(user_auc, user_weight * times)
    return aucs, gaucs


def interval(samples: NDArray[np.float64], confidence: float = 0.95) -> list[float]:
    """Percentile interval [lo, hi] of the (num_samples,) values that are not nan; both ends nan where there is none."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: give a number between 0 and 1, for example 0.95")
    samples = samples[~np.isnan(samples)]
    if not len(samples):
        return [math.nan, math.nan]
    tail = (1 - confidence) / 2
    return [float(end) for end in np.quantile(samples, [tail, 1 - tail])]


def _as_vectors(values: ArrayLike, name: str) -> NDArray[Any]:
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
    """Numbers (Q,) and (C,) that are equal where the candidate is a right answer."""
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
    lost = ~np.isin(keys[:num_queries], keys[num_queries:])
    if lost.any():
        raise ValueError(
            f"query_ids contain {query_ids[lost][0]!r}, which no candidate has: add that candidate or drop the query"
        )
    return keys[:num_queries], keys[num_queries:]
