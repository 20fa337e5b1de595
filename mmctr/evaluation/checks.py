"""Checks of the inputs of metrics: labels, scores, probabilities and users."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def checked_scores(
    labels: ArrayLike, scores: ArrayLike, name: str = "scores"
) -> tuple[NDArray[np.bool_], NDArray[Any]]:
    """Labels as (B,) bool and scores as (B,) float64; ValueError for wrong values or shapes."""
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


def check_probabilities(probabilities: NDArray[Any]) -> None:
    """Raise ValueError for numbers outside [0, 1]."""
    if len(probabilities) and (probabilities.min() < 0 or probabilities.max() > 1):
        raise ValueError(
            f"probabilities range from {probabilities.min():g} to {probabilities.max():g}: give values in [0, 1], "
            f"the sigmoid of logits"
        )


def numbered_users(groups: ArrayLike, length: int) -> NDArray[np.int64]:
    """Users as numbers 0..G-1, in the order of the ids of users."""
    groups = np.asarray(groups)
    if groups.shape != (length,):
        raise ValueError(f"groups have shape {groups.shape} and labels ({length},): give one user an impression")
    return np.unique(groups, return_inverse=True)[1].reshape(-1)
