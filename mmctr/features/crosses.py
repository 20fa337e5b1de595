"""Crosses: combinations of feature values hashed to rows of a table, with which linear models read interactions."""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field

from mmctr.config import Config
from mmctr.data.batches import Features, Jagged
from mmctr.data.hashing import GOLDEN, splitmix64
from mmctr.features.columns import BehaviorView, known_values, pooled_by

HISTORY = "history."


class CrossFeature(Config):
    """All combinations of the values of several features, each combination hashed to one of `buckets` rows; the vectors
    of the rows are averaged.

    A combination with an unknown value is left out. Tables start at zero, so a combination that is not in the training
    rows contributes nothing, unless the bucket is shared with a combination that is.
    """

    of: list[str] = Field(min_length=2)
    """the features to combine: `user_id`, `item_id`, names of side features, and for the behaviours `history.item_id`
    or `history.NAME` with the name of an item feature"""
    buckets: int = Field(default=1_000_000, ge=1)
    """number of rows of the table to which combinations are hashed"""
    dim: int = Field(default=8, ge=1)
    """embedding size"""


def cross(parts: list[Jagged], buckets: int) -> Jagged:
    """Hash all combinations of the values of several features.

    Args:
        parts: for each feature the lists of values over n rows.
        buckets: number of buckets.

    Returns:
        Lists of rows in 1 ... `buckets` over n rows; the value of the first feature varies slowest.
    """
    keys, offsets = _mixed(np.zeros(1, np.uint64), parts[0].values.numpy()), parts[0].offsets.numpy()
    for part in parts[1:]:
        others, other_offsets = part.values.numpy(), part.offsets.numpy()
        count = np.diff(other_offsets)
        sizes = np.diff(offsets) * count
        ends = np.cumsum(sizes)
        row = np.repeat(np.arange(len(sizes)), sizes)
        position = np.arange(len(row)) - (ends - sizes)[row]
        keys = _mixed(keys[offsets[row] + position // count[row]], others[other_offsets[row] + position % count[row]])
        offsets = np.concatenate([[0], ends])
    rows = (keys % np.uint64(buckets)).astype(np.int64) + 1
    return Jagged(values=torch.from_numpy(rows), offsets=torch.from_numpy(offsets))


def _mixed(key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """(n,) uint64 that depend on key and value in this order."""
    with np.errstate(over="ignore"):
        return splitmix64(key * GOLDEN + value.astype(np.uint64))


def cross_features(configs: dict[str, CrossFeature], view: BehaviorView) -> Features:
    """The declared crosses of B impressions.

    Args:
        configs: name of the cross -> declared cross.
        view: side features of the impressions.

    Returns:
        Name of the cross -> lists of rows over B impressions.
    """

    def values(name: str) -> Jagged:
        if name.startswith(HISTORY):
            return pooled_by(known_values(view.history(name.removeprefix(HISTORY))), view.offsets)
        return known_values(view.impression[name] if name in view.impression else view.target(name))

    return {name: cross([values(part) for part in config.of], config.buckets) for name, config in configs.items()}
