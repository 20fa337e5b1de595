"""Impressions of a random log, a collator of made-up features over the log, and comparison of batches."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mmctr.data.batches import Jagged
from mmctr.data.interactions import Impressions
from mmctr.data.splits import ColdItemsSplit, split_interactions
from mmctr.features.behavior_collator import BehaviorCollator
from mmctr.features.columns import FeatureColumns
from tests.helpers.worlds import random_log

NUM_ITEMS = 30


def equal(a, b) -> bool:
    """Whether two batches hold the same tensors of the same types."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and a.equal(b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[name], b[name]) for name in a)
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(equal(getattr(a, name), getattr(b, name)) for name in a.__dataclass_fields__)
    return a is None and b is None


def impressions() -> Impressions:
    return split_interactions(random_log(), NUM_ITEMS, ColdItemsSplit()).train


def collator(part: Impressions, **options) -> BehaviorCollator:
    rng = np.random.default_rng(5)
    items = FeatureColumns(
        {
            "item_id": torch.arange(1, NUM_ITEMS + 1),
            "brand": torch.from_numpy(rng.integers(0, 5, NUM_ITEMS).astype(np.int32)),
            "tags": Jagged(torch.arange(2 * NUM_ITEMS).int(), 2 * torch.arange(NUM_ITEMS + 1)),
        }
    )
    return BehaviorCollator(
        **{
            "impressions": part,
            "items": items,
            "user_rows": torch.from_numpy(rng.permutation(40)),
            "users": FeatureColumns({"age": torch.arange(40).float() * 10}),
            "context": FeatureColumns({"place": torch.from_numpy(rng.integers(0, 9, 900))}),
            "max_history": 4,
        }
        | options
    )
