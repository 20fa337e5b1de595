"""Random numbers as functions of a seed, a stream name and a key: equal in every process and every NumPy version."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from mmctr.files import fingerprint

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@lru_cache(maxsize=4096)
def stream_seed(seed: int, name: str, *numbers: int) -> int:
    """The seed of one stream of random numbers of a run: 60 bits of a SHA-256 hash.

    Every use of random numbers has a separate stream with a separate name, so that no two uses share draws, and the
    streams of neighbouring seeds are independent.

    Args:
        seed: seed of the run.
        name: purpose of the draws, such as "id dropout".
        numbers: the epoch, step or process, where every epoch, step or process has a separate stream.

    Example:
        ```python
        rng = np.random.default_rng(stream_seed(config.seed, "order of rows", epoch))
        ```
    """
    return int(fingerprint(seed, name, *numbers)[:15], 16)


def splitmix64(x: np.ndarray) -> np.ndarray:
    """One step of the splitmix64 generator (Steele et al. 2014) from every state in `x`: (n,) uint64 -> (n,) uint64."""
    with np.errstate(over="ignore"):
        x = x + GOLDEN
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def hashed_uniform(seed: int, step: int, keys: np.ndarray) -> np.ndarray:
    """Uniform random numbers that depend on (seed, step, key) alone: equal in every process and worker.

    Args:
        seed: seed of a stream, from `stream_seed`.
        step: training step.
        keys: (n,) integers, such as catalog rows.

    Returns:
        (n,) float64 in [0, 1).
    """
    with np.errstate(over="ignore"):
        x = keys.astype(np.uint64) + np.uint64(seed) * GOLDEN
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9) + np.uint64(step)
    # twice: neighbouring steps and keys must not look alike
    x = splitmix64(splitmix64(x))
    return (x >> np.uint64(11)) * 2.0**-53


def tie_hashes(*keys: np.ndarray) -> np.ndarray:
    """Hashes of tuples of integers, by which rows with equal times are put in an order that no file determines.

    Args:
        keys: one or more (n,) integer arrays.

    Returns:
        (n,) uint64; equal tuples have equal hashes.
    """
    x = np.zeros(len(keys[0]), np.uint64)
    for key in keys:
        x = splitmix64(x ^ np.asarray(key).astype(np.uint64))
    return x


def row_hashes(values: np.ndarray) -> np.ndarray:
    """Hashes of the rows of an array: the 8-byte words of a row, each times an odd number, are added up and mixed.

    Args:
        values: (n, ...) array of any type.

    Returns:
        (n,) int64, not negative.
    """
    flat = np.ascontiguousarray(values.reshape(len(values), -1)).view(np.uint8)
    flat = np.pad(flat, ((0, 0), (0, -flat.shape[1] % 8))).view(np.uint64)
    factors = splitmix64(np.arange(flat.shape[1], dtype=np.uint64)) | np.uint64(1)
    with np.errstate(over="ignore"):
        sums = splitmix64(flat @ factors)
    return (sums >> np.uint64(1)).astype(np.int64)
