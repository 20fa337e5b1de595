"""Crosses: pairs (and more) of feature values hashed to rows of a table, the way linear models see interactions."""

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
    """All combinations of the values of several features, each hashed to one of `buckets` rows and mean-pooled.

    A combination is left out when one of its values is unknown. Tables start at zero, so a combination that training
    has not seen says nothing, unless it shares its bucket with one that was seen.
    """

    of: list[str] = Field(min_length=2)
    """`user_id`, `item_id`, names of side features, and `history.item_id` or `history.` and the name of an item
    feature: the values of the behaviours read"""
    buckets: int = Field(default=1_000_000, ge=1)
    """rows of the table that combinations are hashed to"""
    dim: int = Field(default=8, ge=1)
    """embedding size"""


def cross(parts: list[Jagged], buckets: int) -> Jagged:
    """Rows 1 ... buckets of all combinations of the values of each row: the first part varies slowest."""
    keys, offsets = _mixed(np.zeros(1, np.uint64), parts[0].values.numpy()), parts[0].offsets.numpy()
    for part in parts[1:]:
        others, other_offsets = part.values.numpy(), part.offsets.numpy()
        count = np.diff(other_offsets)
        sizes = np.diff(offsets) * count
        ends = np.cumsum(sizes)
        row = np.repeat(np.arange(len(sizes)), sizes)
        place = np.arange(len(row)) - (ends - sizes)[row]
        keys = _mixed(keys[offsets[row] + place // count[row]], others[other_offsets[row] + place % count[row]])
        offsets = np.concatenate([[0], ends])
    rows = (keys % np.uint64(buckets)).astype(np.int64) + 1
    return Jagged(values=torch.from_numpy(rows), offsets=torch.from_numpy(offsets))


def _mixed(key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """(n,) uint64 that depend on key and value in this order."""
    with np.errstate(over="ignore"):
        return splitmix64(key * GOLDEN + value.astype(np.uint64))


def cross_features(configs: dict[str, CrossFeature], view: BehaviorView) -> Features:
    """The declared crosses of B impressions."""

    def values(name: str) -> Jagged:
        if name.startswith(HISTORY):
            return pooled_by(known_values(view.history(name.removeprefix(HISTORY))), view.offsets)
        return known_values(view.impression[name] if name in view.impression else view.target(name))

    return {name: cross([values(part) for part in config.of], config.buckets) for name, config in configs.items()}
