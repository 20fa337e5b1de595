"""Shards of small pictures and titles, and what streams make of them."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mmctr.data.shards import ShardedItems
from mmctr.data.stream import StreamBatches, StreamContent, StreamPlan
from tests.helpers.worlds import picture

SIZES = [(7, 7, 3), (10,), (4, 6, 1, 9)]  # rows of the groups of three shards
NUM_ROWS = 47


def colour(row: int) -> tuple[int, int, int]:
    return row * 5 % 256, row * 3 % 256, row


def world(num_rows: int = NUM_ROWS) -> dict[str, list]:
    """Every eleventh item has no title, every seventh no picture, every thirteenth a broken one."""
    images = [None if i % 7 == 6 else picture(colour(i), 8)[: 45 if i % 13 == 12 else None] for i in range(num_rows)]
    return {
        "item_id": list(range(1000, 1000 + num_rows)),
        "title": [None if i % 11 == 10 else f"item {i}" for i in range(num_rows)],
        "brand": [f"brand {i % 3}" for i in range(num_rows)],
        "image": images,
    }


def write_shard(path: Path, columns: dict[str, list], sizes=(1 << 20,)) -> Path:
    """A Parquet file with groups of the given sizes."""
    types = {"image": pa.binary()} if any(isinstance(cell, bytes) for cell in columns["image"]) else {}
    table = pa.table({name: pa.array(cells, types.get(name)) for name, cells in columns.items()})
    with pq.ParquetWriter(path, table.schema) as writer:
        start = 0
        for size in sizes:
            writer.write_table(table.slice(start, size), row_group_size=1 << 20)
            start += size
    return path


def write_shards(folder: Path, columns: dict[str, list] | None = None, sizes=SIZES) -> Path:
    columns = columns or world()
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    for number, groups in enumerate(sizes):
        part = {name: cells[start : start + sum(groups)] for name, cells in columns.items()}
        write_shard(folder / f"part-{number:03}.parquet", part, groups)
        start += sum(groups)
    return folder


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def members_of(columns: dict[str, list], first: int = 0, stop: int | None = None) -> list[tuple[str, bytes]]:
    """WebDataset members of columns: the title and the id as json, the picture as it is."""
    members: list[tuple[str, bytes]] = []
    for i in range(first, len(columns["image"]) if stop is None else stop):
        fields = {name: columns[name][i] for name in columns if name != "image" and columns[name][i] is not None}
        if columns["image"][i] is not None:
            members.append((f"{i:06}.png", columns["image"][i]))
        members.append((f"{i:06}.json", json.dumps(fields).encode()))
    return members


def tokenize(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[len(text), sum(map(ord, text)), int(text[:1] == "i")] for text in texts], dtype=torch.int32)


def batches_of(folder: Path | str, columns=("title", "brand"), size=8, num_workers=0, **options) -> StreamBatches:
    items = ShardedItems(folder, columns, Path(folder).parent / "cache")
    plan = StreamPlan(items.group_rows, **{"batch_size": 6, "seed": 3, "buffer_rows": 12} | options)
    return StreamBatches(StreamContent(items, columns, tokenize, size, "squash"), plan, num_workers)


def items_of(batches: StreamBatches, start: int, stop: int):
    """The items of the batches; every one of them is an anchor."""
    for step, batch in batches.iterate(start, stop):
        assert batch.anchor.equal(torch.arange(len(batch.items))) and batch.keys[:, 0].equal(batch.items.row)
        yield step, batch.items


def equal(a, b) -> bool:
    tensors = ("row", "image", "has_image", "input_ids", "has_text")
    return all(getattr(a, name).equal(getattr(b, name)) for name in tensors)


def numbers(plan: StreamPlan, step: int) -> np.ndarray:
    """The row numbers of a step."""
    order = plan.order(step // plan.steps_per_epoch)
    return np.concatenate([plan.shuffled(window)[places] for window, places in plan.rows(step, order)])


def epoch_of(plan: StreamPlan, epoch: int) -> np.ndarray:
    steps = plan.steps_per_epoch
    return np.concatenate([numbers(plan, epoch * steps + step) for step in range(steps)])


def taken(batches: StreamBatches, start: int, stop: int) -> list[tuple[int, Any]]:
    return list(items_of(batches, start, stop))


def validation_items(batches: StreamBatches, limit: int) -> tuple[pa.Table, Any]:
    return batches.validation_items(limit)


def refused(text: str):
    return pytest.raises(ValueError, match=re.escape(text))


def shards_at(folder: Path, columns=()) -> ShardedItems:
    return ShardedItems(folder, columns, folder / "cache")
