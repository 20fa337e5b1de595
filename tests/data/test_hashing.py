from __future__ import annotations

import numpy as np

from mmctr.data.hashing import hashed_uniform, stream_seed


def test_hashed_uniform_is_uniform():
    n, bins = 200_000, 100
    for seed, step in ((0, 0), (0, 1), (7, 123_456), (2**31, 2**40)):
        for keys in (np.arange(n), np.arange(n) * 1024, np.arange(n) + 2**40):
            draws = hashed_uniform(seed, step, keys)
            assert draws.min() >= 0 and draws.max() < 1
            counts = np.bincount((draws * bins).astype(int), minlength=bins)
            chi_square = ((counts - n / bins) ** 2 / (n / bins)).sum()
            assert 40 < chi_square < 180  # of mean 99 and deviation 14
            assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 0.012


def test_hashed_uniform_of_other_seeds_and_steps_is_unrelated():
    keys = np.arange(50_000)
    draws = [hashed_uniform(seed, step, keys) for seed in range(3) for step in (0, 1, 2, 1000)]
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlation).max() < 0.025
    one_key = np.array([hashed_uniform(0, step, np.array([5]))[0] for step in range(3000)])
    assert abs(one_key.mean() - 0.5) < 0.03 and abs(one_key.std() - 12**-0.5) < 0.02


def test_hashed_uniform_depends_on_the_key_alone():
    keys = np.random.default_rng(0).permutation(1000)
    draws = dict(zip(keys.tolist(), hashed_uniform(3, 9, keys).tolist(), strict=True))
    assert hashed_uniform(3, 9, keys[::-1][:50]).tolist() == [draws[key] for key in keys[::-1][:50].tolist()]
    assert hashed_uniform(3, 9, keys[:5].astype(np.int32)).tolist() == [draws[key] for key in keys[:5].tolist()]
    assert hashed_uniform(3, 9, keys[:0]).tolist() == []


def test_streams_of_a_seed_are_their_own():
    """By name, seed and numbers; the order of the numbers counts."""
    names = ("order of rows", "id dropout", "validation items of a generator")
    seeds = {
        stream_seed(seed, name, *n) for seed in range(5) for name in names for n in [(), (0,), (1,), (0, 1), (1, 0)]
    }
    assert len(seeds) == 75 and max(seeds) < 2**60
    assert stream_seed(3, "id dropout", 2) == stream_seed(3, "id dropout", 2)


def test_what_one_stream_drops_another_draws_anew():
    """A tenth of the items is dropped by each of two streams at step 0, and a hundredth by both."""
    keys = np.arange(100_000)
    dropped, chosen = (hashed_uniform(stream_seed(0, n), 0, keys) < 0.1 for n in ("id dropout", "validation items"))
    assert 800 < (dropped & chosen).sum() < 1200  # deviation 31
    near = hashed_uniform(stream_seed(1, "id dropout"), 0, keys) < 0.1  # the next seed
    assert 800 < (dropped & near).sum() < 1200
