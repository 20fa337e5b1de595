"""Ranking metrics on NumPy arrays: AUC, gAUC, log loss, calibration, and bootstrap intervals.

Labels are 0/1 (1 = click), scores are finite numbers of any scale, where a higher score means a more probable click;
log loss and calibration need probabilities. Letters: B impressions, G users (groups).

A metric that the data does not define (AUC of one class, calibration without clicks) is nan in this module, and None in
the dictionaries of `impression_metrics` and `ranking_report`, which go into JSON files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmctr.evaluation.checks import check_probabilities, checked_scores, numbered_users
from mmctr.evaluation.user_resampling import (
    bootstrap,
    interval,
    t_interval,
    user_aucs,
    users_with_both_labels,
    weighted_mean,
)

CLICK_BUCKETS: tuple[tuple[int, int | None], ...] = ((0, 0), (1, 5), (6, 20), (21, 100), (101, None))
"""buckets of the number of training clicks of the target item: first and last number (inclusive), None = no limit"""


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
    labels, scores = checked_scores(labels, scores)
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
    labels, scores = checked_scores(labels, scores)
    return weighted_mean(*user_aucs(labels, scores, numbered_users(groups, len(labels))))


def log_loss(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Mean binary cross-entropy in nats, in float64, with probabilities clipped to [1e-7, 1 - 1e-7].

    Args:
        labels: (B,) 0 or 1.
        probabilities: (B,) in [0, 1].

    Returns:
        A number of nats; nan for no rows.

    Raises:
        ValueError: unequal lengths, labels other than 0 and 1, or probabilities outside [0, 1].
    """
    labels, probabilities = checked_scores(labels, probabilities, name="probabilities")
    check_probabilities(probabilities)
    if not len(labels):
        return math.nan
    clipped = np.clip(probabilities, 1e-7, 1 - 1e-7)
    return float(-np.mean(np.where(labels, np.log(clipped), np.log1p(-clipped))))


def calibration(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Predicted clicks divided by observed clicks: 1 is calibrated, 2 predicts twice the observed clicks.

    Args:
        labels: (B,) 0 or 1.
        probabilities: (B,) in [0, 1].

    Returns:
        The ratio; nan without a click.

    Raises:
        ValueError: unequal lengths, labels other than 0 and 1, or probabilities outside [0, 1].
    """
    labels, probabilities = checked_scores(labels, probabilities, name="probabilities")
    check_probabilities(probabilities)
    clicks = int(labels.sum())
    return float(probabilities.sum() / clicks) if clicks else math.nan


def bootstrap_intervals(
    labels: ArrayLike,
    scores: ArrayLike,
    groups: ArrayLike,
    num_samples: int = 200,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, list[float]]:
    """Percentile bootstrap intervals of AUC and gAUC over resampled users.

    Users, not impressions, are drawn with replacement, because impressions of one user are not independent. The
    interval does not include the variation between training seeds.

    Args:
        labels: (B,) 0 or 1.
        scores: (B,).
        groups: (B,) the user of each impression.
        num_samples: number of resamples.
        seed: seed of the resamples.
        confidence: probability mass of the interval, in (0, 1).

    Returns:
        {"auc_ci": [lo, hi], "gauc_ci": [lo, hi]}; both ends are nan when fewer than two users define the metric.

    Raises:
        ValueError: as `auc`, and for a confidence outside (0, 1).
    """
    labels, scores = checked_scores(labels, scores)
    users = numbered_users(groups, len(labels))
    auc_samples, gauc_samples = bootstrap(labels, [scores], users, num_samples, seed)
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
    """Differences of AUC and gAUC between two scores of the same impressions, with intervals over users.

    The interval is that of `mmctr.evaluation.user_resampling.t_interval`. Both scores are evaluated on the same
    resampled users, so common variation cancels and the interval is narrower than two separate intervals.

    Args:
        labels: (B,) 0 or 1.
        scores_a: (B,).
        scores_b: (B,).
        groups: (B,) the user of each impression.
        num_samples: number of resamples.
        seed: seed of the resamples.
        confidence: probability mass of the interval, in (0, 1).

    Returns:
        {"num_users", "auc": b - a, "auc_ci": [lo, hi], "gauc": b - a, "gauc_ci": [lo, hi]}, where `num_users` is the
        number of users with both labels; nan as in `bootstrap_intervals`. An interval of fewer than ten such users
        should not be trusted.

    Raises:
        ValueError: as `bootstrap_intervals`.
    """
    drawn = paired_samples(labels, [scores_a], [scores_b], groups, num_samples, seed)
    checked, _ = checked_scores(labels, scores_a)
    num_users = users_with_both_labels(checked, numbered_users(groups, len(checked)))
    differences: dict[str, Any] = {"num_users": num_users}
    for name, (values, samples) in drawn.items():
        value = float(values[0])
        differences |= {name: value, f"{name}_ci": t_interval(value, samples[:, 0], num_users, confidence)}
    return differences


def paired_samples(
    labels: ArrayLike,
    scores_a: Sequence[ArrayLike],
    scores_b: Sequence[ArrayLike],
    groups: ArrayLike,
    num_samples: int = 200,
    seed: int = 0,
) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Differences of AUC and gAUC of P pairs of scores, on all users and on resampled users.

    Args:
        labels: (B,) 0 or 1.
        scores_a: P arrays (B,).
        scores_b: P arrays (B,).
        groups: (B,) the user of each impression.
        num_samples: number of resamples; all pairs of a resample have the same users.
        seed: seed of the resamples.

    Returns:
        For "auc" and "gauc" the differences b - a (P,) on all users, and (num_samples, P) on resampled users.

    Raises:
        ValueError: as `auc`.
    """
    truth = checked_scores(labels, scores_a[0], name="scores_a")[0]
    a = [checked_scores(labels, scores, name="scores_a")[1] for scores in scores_a]
    b = [checked_scores(labels, scores, name="scores_b")[1] for scores in scores_b]
    users = numbered_users(groups, len(truth))
    pairs = list(zip(a, b, strict=True))
    values = {
        "auc": [auc(truth, later) - auc(truth, first) for first, later in pairs],
        "gauc": [gauc(truth, later, users) - gauc(truth, first, users) for first, later in pairs],
    }
    drawn = bootstrap(truth, [*a, *b], users, num_samples, seed)
    return {
        name: (np.array(values[name]), samples[:, len(pairs) :] - samples[:, : len(pairs)])
        for name, samples in zip(values, drawn, strict=True)
    }


def impression_metrics(
    labels: ArrayLike, probabilities: ArrayLike, users: ArrayLike, num_bootstrap: int = 200, seed: int = 0
) -> dict[str, Any]:
    """All metrics of a set of impressions, as Python numbers for JSON; None for a metric the data does not define.

    Args:
        labels: (B,) 0 or 1.
        probabilities: (B,) in [0, 1].
        users: (B,) the user of each impression.
        num_bootstrap: number of resamples of users.
        seed: seed of the resamples.

    Returns:
        auc, gauc, log_loss, calibration, num_impressions, num_positives, num_users (users with both labels), and the
        95% intervals auc_ci and gauc_ci as [lo, hi], None when `num_bootstrap` is 0.

    Raises:
        ValueError: as `log_loss`.
    """
    labels, probabilities = checked_scores(labels, probabilities, name="probabilities")
    users = numbered_users(users, len(labels))
    result: dict[str, Any] = {
        "auc": auc(labels, probabilities),
        "gauc": gauc(labels, probabilities, users),
        "log_loss": log_loss(labels, probabilities),
        "calibration": calibration(labels, probabilities),
        "num_impressions": len(labels),
        "num_positives": int(labels.sum()),
        "num_users": users_with_both_labels(labels, users),
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
    """`impression_metrics` of all impressions, of warm and cold targets, and by training clicks of the target.

    Args:
        labels: (B,) 0 or 1.
        probabilities: (B,) in [0, 1].
        users: (B,) the user of each impression.
        cold: (B,) bool, whether the target item never occurred in training.
        clicks: (B,) number of training clicks of the target item.
        num_bootstrap: number of resamples of users.
        seed: seed of the resamples.

    Returns:
        {"all": M, "warm": M, "cold": M, "buckets": [{"clicks": "1-5", **M}, ...]}, with the buckets of `CLICK_BUCKETS`,
        empty buckets included.

    Raises:
        ValueError: as `log_loss`, and for unequal lengths and negative clicks.
    """
    labels, probabilities = checked_scores(labels, probabilities, name="probabilities")
    users = numbered_users(users, len(labels))
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
    """The name of a bucket of click counts: "0", "1-5", ">100"."""
    if last is None:
        return f">{first - 1}"
    return str(first) if first == last else f"{first}-{last}"
