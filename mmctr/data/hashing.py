"""Random numbers as functions of a seed, the name of a stream, and a key: the same in every process and version."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from mmctr.files import fingerprint

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@lru_cache(maxsize=4096)
def stream_seed(seed: int, name: str, *numbers: int) -> int:
    """The seed of one stream of random numbers of a run: 60 bits of a SHA-256 hash.

    Every place that draws has a stream of its own, by name, so no two places share their draws, and streams of
    neighbouring seeds have nothing in common.

    Args:
        seed: of the run.
        name: what is drawn, such as "id dropout".
        numbers: the epoch, step or process a stream belongs to, where each has one of its own.

    Example:
        ```python
        rng = np.random.default_rng(stream_seed(config.seed, "order of rows", epoch))
        ```
    """
    return int(fingerprint(seed, name, *numbers)[:15], 16)


def splitmix64(x: np.ndarray) -> np.ndarray:
    """(n,) uint64 -> (n,) uint64: one step of splitmix64 from state x."""
    with np.errstate(over="ignore"):
        x = x + GOLDEN
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def hashed_uniform(seed: int, step: int, keys: np.ndarray) -> np.ndarray:
    """(n,) numbers in [0, 1) that depend on (seed, step, key) alone: the same draw in every process and worker."""
    with np.errstate(over="ignore"):
        x = keys.astype(np.uint64) + np.uint64(seed) * GOLDEN
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9) + np.uint64(step)
    # twice: neighbouring steps and keys must not look alike
    x = splitmix64(splitmix64(x))
    return (x >> np.uint64(11)) * 2.0**-53


def row_hashes(values: np.ndarray) -> np.ndarray:
    """(n, ...) -> (n,) int64, not negative: sums of the bytes in words of eight, each times an odd number."""
    flat = np.ascontiguousarray(values.reshape(len(values), -1)).view(np.uint8)
    flat = np.pad(flat, ((0, 0), (0, -flat.shape[1] % 8))).view(np.uint64)
    factors = splitmix64(np.arange(flat.shape[1], dtype=np.uint64)) | np.uint64(1)
    with np.errstate(over="ignore"):
        sums = splitmix64(flat @ factors)
    return (sums >> np.uint64(1)).astype(np.int64)
