from __future__ import annotations

import numpy as np
import torch

from mmctr.data.batches import BehaviorBatch, Jagged, jagged_rows
from tests.helpers.behaviors import collator, impressions


def test_a_batch_moves_as_a_whole():
    batch = collator(impressions())(np.arange(10)).to("meta")
    tags = batch.items.features["tags"]
    assert isinstance(batch, BehaviorBatch) and isinstance(tags, Jagged)
    tensors = (
        batch.target,
        batch.label,
        batch.items.row,
        batch.items.features["brand"],
        tags.values,
        batch.context["age"],
    )
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_jagged_rows():
    start, end = torch.tensor([3, 0, 7, 7]), torch.tensor([5, 4, 7, 8])
    index, offsets = jagged_rows(start, end)
    assert index.tolist() == [3, 4, 0, 1, 2, 3, 7] and offsets.tolist() == [0, 2, 6, 6, 7]
    index, offsets = jagged_rows(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    assert index.tolist() == [] and offsets.tolist() == [0]
