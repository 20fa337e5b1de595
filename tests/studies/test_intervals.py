"""Intervals over seeds: the formula, and how often a method that changes nothing gets one without zero."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t

from mmctr.evaluation.metrics import paired_samples
from mmctr.studies.intervals import mean_interval


def test_the_interval_is_the_one_written_down():
    values = np.array([0.02, 0.05, -0.01])
    samples = values + np.array([[0.01], [-0.01], [0.03], [-0.02], [0.0]])
    by_users, by_seeds = np.var([0.01, -0.01, 0.03, -0.02, 0.0], ddof=1), np.var(values, ddof=1) / 3
    degrees = (by_users + by_seeds) ** 2 / (by_users**2 / 49 + by_seeds**2 / 2)
    half = t.ppf(0.975, degrees) * np.sqrt(by_users + by_seeds)
    assert mean_interval(values, samples, 50) == pytest.approx((0.02 - half, 0.02 + half))
    # one seed: users alone, with as many degrees of freedom as users but one
    one = mean_interval(values[:1], samples[:, :1], 50)
    assert one == pytest.approx((0.02 - t.ppf(0.975, 49) * by_users**0.5, 0.02 + t.ppf(0.975, 49) * by_users**0.5))
    # seeds that agree add nothing to that
    same = mean_interval(np.repeat(values[:1], 3), np.repeat(samples[:, :1], 3, axis=1), 50)
    assert same == pytest.approx(one)


@pytest.mark.parametrize(
    ("values", "samples", "num_users"),
    [([0.1, np.nan], np.zeros((5, 2)), 9), ([0.1], np.full((5, 1), np.nan), 9), ([0.1], np.zeros((5, 1)), 1)],
)
def test_what_has_no_interval(values, samples, num_users):
    assert mean_interval(np.array(values), samples, num_users) is None


def test_two_equal_methods_have_no_width():
    assert mean_interval(np.zeros(3), np.zeros((5, 3)), 9) == (0.0, 0.0)


def test_a_method_against_itself_is_marked_about_as_often_as_promised():
    """Seeds of one method against other seeds of the same one: 5 % of the intervals should leave out zero. Those that
    draw three seeds with replacement do so in more than twice as many."""
    rng = np.random.default_rng(0)
    num_users, rows, studies = 40, 12, 150
    users = np.repeat(np.arange(num_users), rows)
    without_zero = {"t": 0, "drawn seeds": 0}
    for _ in range(studies):
        labels = (rng.random(len(users)) < 0.4).astype(int)
        noise = rng.normal(size=len(users))
        # a seed ranks better or worse as a whole
        runs = [(0.8 + 0.3 * rng.normal()) * labels + noise for _ in range(6)]
        values, samples = paired_samples(labels, runs[:3], runs[3:], users, 60)["gauc"]
        low, high = mean_interval(values, samples, num_users) or (0.0, 0.0)
        without_zero["t"] += not low <= 0 <= high
        drawn = np.take_along_axis(samples, rng.integers(0, 3, samples.shape), axis=1).mean(axis=1)
        low, high = np.quantile(drawn, [0.025, 0.975])
        without_zero["drawn seeds"] += not low <= 0 <= high
    assert 0 < without_zero["t"] / studies < 0.12 < 0.2 < without_zero["drawn seeds"] / studies
