"""AUC by user, and intervals from resamples of users."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

MIN_USERS = 10
"""least number of users with both labels for an interval to be shown or called without zero: resamples of a few users
hardly vary, and where nothing differs at all, resampling two users leaves zero out every second time"""


def users_with_both_labels(labels: NDArray[np.bool_], users: NDArray[Any]) -> int:
    """The number of users that have both a click and an impression without a click: gAUC is a mean over these users.

    Args:
        labels: (B,) bool.
        users: (B,) the user of each impression.
    """
    return len(np.intersect1d(users[labels], users[~labels]))


def user_aucs(
    labels: NDArray[np.bool_], scores: NDArray[Any], users: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """AUC (G,) and weight (G,) of each user 0..G-1; a user with equal labels has AUC 0 and weight 0."""
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


def weighted_mean(values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """The weighted mean of values (n,); nan where all weights are 0."""
    total = weights.sum()
    return float(values @ weights / total) if total else math.nan


def resampled_users(num_users: int, num_samples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """For each sample of G draws with replacement, the number of draws of each user (G,)."""
    generator = np.random.default_rng(seed)
    for _ in range(num_samples):
        # counting uniform draws is the multinomial, ten times faster than `Generator.multinomial`
        yield np.bincount(generator.integers(0, num_users, num_users), minlength=num_users)


def bootstrap(
    labels: NDArray[np.bool_], scores: list[NDArray[Any]], users: NDArray[np.int64], num_samples: int, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """AUC and gAUC, each (num_samples, number of score arrays), of the same resampled users for every score array."""
    aucs = np.full((num_samples, len(scores)), math.nan)
    gaucs = np.full((num_samples, len(scores)), math.nan)
    num_users = int(users.max(initial=-1)) + 1
    if num_users < 2:  # resamples of one user repeat the same data: an interval of width 0 would be wrong
        return aucs, gaucs
    users_of_clicks, users_of_others = users[labels], users[~labels]
    prepared = []
    for values in scores:
        order = np.argsort(values[~labels], kind="stable")
        sorted_others, clicked = values[~labels][order], values[labels]
        below = np.searchsorted(sorted_others, clicked, side="left")
        below_or_equal = np.searchsorted(sorted_others, clicked, side="right")
        prepared.append((users_of_others[order], below, below_or_equal, *user_aucs(labels, values, users)))
    for sample, times in enumerate(resampled_users(num_users, num_samples, seed)):
        click_weights = times[users_of_clicks]
        pairs = float(click_weights.sum()) * float(times[users_of_others].sum())
        for column, (others, below, below_or_equal, user_auc, user_weight) in enumerate(prepared):
            if pairs:
                mass = np.append(0, np.cumsum(times[others]))  # weight of the non-clicks before each position
                aucs[sample, column] = float(click_weights @ (mass[below] + mass[below_or_equal])) / (2 * pairs)
            if np.count_nonzero(user_weight) > 1:
                gaucs[sample, column] = weighted_mean(user_auc, user_weight * times)
    return aucs, gaucs


def interval(samples: NDArray[np.float64], confidence: float = 0.95) -> list[float]:
    """Percentile interval of values.

    Args:
        samples: (num_samples,); nan values are ignored.
        confidence: probability mass of the interval, in (0, 1).

    Returns:
        [lo, hi]; both ends are nan where all values are nan.

    Raises:
        ValueError: a confidence outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: give a number between 0 and 1, for example 0.95")
    samples = samples[~np.isnan(samples)]
    if not len(samples):
        return [math.nan, math.nan]
    tail = (1 - confidence) / 2
    return [float(end) for end in np.quantile(samples, [tail, 1 - tail])]


def t_interval(value: float, samples: NDArray[np.float64], num_users: int, confidence: float = 0.95) -> list[float]:
    """The interval value ± t · deviation of the samples, with num_users - 1 degrees of freedom.

    With few users percentiles of resamples are too narrow: of two scores that differ by chance alone, percentiles call
    8 to 19 of 100 different with 5 to 11 users, and this interval 2 to 9.

    Args:
        value: the quantity on all users.
        samples: (num_samples,) the quantity on resampled users; nan values are ignored.
        num_users: number of users with both labels.
        confidence: probability mass of the interval, in (0, 1).

    Returns:
        [lo, hi]; both ends are nan for fewer than two users or samples, or where `value` is nan.

    Raises:
        ValueError: a confidence outside (0, 1).
    """
    low, _ = interval(samples, confidence)  # checks the confidence
    samples = samples[~np.isnan(samples)]
    if math.isnan(low) or math.isnan(value) or num_users < 2 or len(samples) < 2:
        return [math.nan, math.nan]
    half = t_quantile(num_users - 1, confidence) * float(samples.std(ddof=1))
    return [value - half, value + half]


def t_quantile(degrees: float, confidence: float = 0.95) -> float:
    """The quantile of Student's t that bounds the central probability mass `confidence`.

    Args:
        degrees: degrees of freedom.
        confidence: probability mass, in (0, 1).
    """
    from scipy.stats import t  # takes half a second to import, which most commands need not spend

    return float(t.ppf((1 + confidence) / 2, degrees))
