"""95% intervals of means over training seeds, for differences that the users of a test set and the seeds both vary."""

from __future__ import annotations

import numpy as np

from mmctr.evaluation.user_resampling import t_quantile
from mmctr.reports.run import Interval


def mean_interval(values: np.ndarray, samples: np.ndarray, num_users: int) -> Interval | None:
    """The 95% interval of the mean of a quantity over seeds: mean ± t · sqrt(user variance + seed variance / S).

    The user variance is that of the mean over seeds when users are drawn again; the seed variance is that of the S
    values on the same users. The degrees of freedom of t are those of Satterthwaite (1946, Biometrics Bulletin 2):
    (a + b)² / (a² / (num_users − 1) + b² / (S − 1)) for a = user variance and b = seed variance / S. With three seeds
    that disagree the interval is wide, as three seeds say little about the next one; drawing seeds with replacement
    from three makes it too narrow by half and more.

    Args:
        values: (S,) the quantity for each seed.
        samples: (num_samples, S) the quantity on resampled users, the same users for all seeds of a sample.
        num_users: users that were resampled.

    Returns:
        (low, high); None where a value is not finite, fewer than two samples are, or there is a single user.
    """
    count = len(values)
    of_samples = samples.mean(axis=1)
    of_samples = of_samples[np.isfinite(of_samples)]
    if not np.isfinite(values).all() or len(of_samples) < 2 or num_users < 2:
        return None
    by_users = float(of_samples.var(ddof=1))
    by_seeds = float(values.var(ddof=1)) / count if count > 1 else 0.0
    variance, mean = by_users + by_seeds, float(values.mean())
    if variance == 0:
        return mean, mean
    squares = by_users**2 / (num_users - 1) + (by_seeds**2 / (count - 1) if count > 1 else 0.0)
    half = t_quantile(variance**2 / squares) * variance**0.5
    return mean - half, mean + half
