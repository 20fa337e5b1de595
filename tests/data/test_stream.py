from __future__ import annotations

import io
import json
import re
import tarfile
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mmctr.data.batches import ItemBatch
from mmctr.data.images import decode_picture
from mmctr.data.loaders import TrainBatches
from mmctr.data.shards import ShardedItems
from mmctr.data.stream import StreamBatches, StreamContent, StreamPlan, content_keys
from tests.worlds import picture

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


def test_content_by_row(tmp_path):
    """What is read by number is what the batches held; ids come from the shards alone."""
    folder = write_shards(tmp_path / "shards")
    batches = batches_of(folder)
    content = batches.content
    assert content.items.item_ids().to_pylist() == list(range(1000, 1047))
    for _, items in items_of(batches_of(folder), 0, 3):
        order = torch.argsort(items.row)
        found = content.batch(items.row[order])
        for name in ("row", "image", "has_image", "input_ids", "has_text"):
            assert getattr(found, name).equal(getattr(items, name)[order]), name


def test_keys_of_a_batch_tell_equal_texts_and_pictures():
    image = torch.zeros(5, 3, 3, 3, dtype=torch.uint8)
    image[1, 0, 0, 0], image[2, 2, 2, 2], image[3, 0, 0, 0] = 7, 7, 7
    items = ItemBatch(
        row=torch.tensor([5, 9, 2, 11, 12]),
        image=image,
        has_image=torch.tensor([False, True, True, True, True]),
        input_ids=torch.tensor([[1, 2], [2, 1], [1, 2], [0, 0], [0, 0]]),
        has_text=torch.tensor([True, True, True, False, False]),
    )
    keys = content_keys(items)
    assert keys[:, 0].equal(items.row)
    same = [(a, b, c) for c in (1, 2) for a in range(5) for b in range(a) if keys[a, c] == keys[b, c]]
    assert same == [(2, 0, 1), (3, 1, 2)]


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


def held_out(batches: StreamBatches, limit: int) -> tuple[pa.Table, Any]:
    return batches.held_out(limit)


def refused(text: str):
    return pytest.raises(ValueError, match=re.escape(text))


def shards_at(folder: Path, columns=()) -> ShardedItems:
    return ShardedItems(folder, columns, folder / "cache")


# Plan ---------------------------------------------------------------------------------------------


def plans(group_rows, world_size: int, **options) -> list[StreamPlan]:
    options = {"batch_size": 5 * world_size, "seed": 1, "buffer_rows": 40} | options
    return [StreamPlan(tuple(group_rows), rank=rank, world_size=world_size, **options) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("validation", [0.0, 0.2])
def test_ranks_share_the_rows_of_an_epoch(world_size, validation):
    sizes = np.random.default_rng(world_size).integers(1, 30, 40)
    ranks = plans(sizes, world_size, validation=validation)
    assert len({plan.steps_per_epoch for plan in ranks}) == 1
    train = int(ranks[0].train_rows.sum())
    seen: set[int] = set()
    for epoch in range(12):
        rows = [epoch_of(plan, epoch) for plan in ranks]
        assert {len(part) for part in rows} == {5 * ranks[0].steps_per_epoch}  # every batch is full
        every = np.concatenate(rows)
        assert len(set(every.tolist())) == len(every) and every.min() >= 0 and every.max() < sizes.sum()
        # what falls out: at most a batch, and a group for each further rank
        assert train - len(every) < 5 * world_size + (world_size - 1) * sizes.max() + world_size
        groups = [{g for window in plan.order(epoch) for g in window.groups} for plan in ranks]
        assert sum(map(len, groups)) == len(set().union(*groups)) == np.count_nonzero(ranks[0].train_rows)
        seen |= set(every.tolist())
    assert len(seen) == train  # other rows fall out of other epochs


def test_all_rows_of_an_epoch_where_they_fit():
    plan = StreamPlan((7, 0, 13, 20), batch_size=10, seed=0, buffer_rows=15)
    assert plan.steps_per_epoch == 4
    epochs = [epoch_of(plan, epoch).tolist() for epoch in range(3)]
    assert all(sorted(rows) == list(range(40)) for rows in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epoch_of(StreamPlan((7, 0, 13, 20), 10, seed=0, buffer_rows=15), 1).tolist() == epochs[1]
    assert epoch_of(StreamPlan((7, 0, 13, 20), 10, seed=1, buffer_rows=15), 1).tolist() != epochs[1]


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_the_steps_of_an_epoch_fit_the_worst_deal(world_size):
    rng = np.random.default_rng(world_size)
    for trial in range(30):
        sizes = np.maximum(1, rng.pareto(0.9, world_size * 6).clip(0, 40) * 10).astype(int)
        try:
            ranks = plans(sizes, world_size, batch_size=world_size, seed=trial)
        except ValueError:
            continue
        for epoch in range(4):
            for plan in ranks:
                have = sum(int(plan.train_rows[window.groups].sum()) for window in plan.order(epoch))
                assert have >= plan.steps_per_epoch
    ranks = plans([10] * 6, 2, batch_size=2)  # equal groups: nothing but one group is given away
    assert ranks[0].steps_per_epoch == 25


def test_windows_are_as_large_as_asked_and_no_larger():
    sizes = np.random.default_rng(0).integers(1, 30, 60)
    for plan in plans(sizes, 2, buffer_rows=64):
        windows = plan.order(2)
        for window, following in pairwise(windows):
            rows = plan.shuffled(window)
            assert 64 <= len(rows) == following.start - window.start < 64 + max(sizes)
            groups = np.searchsorted(plan.first_row, rows, side="right") - 1
            assert set(groups.tolist()) == set(window.groups)
            assert (np.diff(groups) != 0).sum() > 2 * len(window.groups)  # mixed, not one group after another
        assert [window.start for window in windows] == sorted({window.start for window in windows})


def test_each_window_is_mixed_in_its_own_way():
    places = []
    for plan in plans([50] * 8, 2, buffer_rows=100):
        for window in plan.order(0):
            rows = np.concatenate([plan.rows_of(group) for group in window.groups]).tolist()
            places.append([rows.index(row) for row in plan.shuffled(window)])
    assert len(places) == 4 and all(one != other for i, one in enumerate(places) for other in places[:i])


def test_a_step_is_a_slice_of_the_windows():
    for plan in plans(np.random.default_rng(4).integers(1, 20, 50), 2, batch_size=28, buffer_rows=6):
        spans = 0
        for epoch in range(2):
            sequence = np.concatenate([plan.shuffled(window) for window in plan.order(epoch)])
            for step in range(plan.steps_per_epoch):
                run_step = epoch * plan.steps_per_epoch + step
                assert (numbers(plan, run_step) == sequence[step * 14 : step * 14 + 14]).all()
                pieces = plan.rows(run_step, plan.order(epoch))
                assert all(len(plan.shuffled(window)[places]) for window, places in pieces)
                spans = max(spans, len(pieces))
        assert spans > 2  # a batch over several windows


def test_rows_are_held_out_by_their_number_alone():
    sizes = (500,) * 20
    plan = StreamPlan(sizes, 10, seed=0, validation=0.1)
    held_out = np.concatenate([plan.rows_of(group, held_out=True) for group in range(20)])
    assert abs(len(held_out) - 1000) < 120  # deviation 30
    other = StreamPlan((*(250,) * 40, 777), 6, seed=9, world_size=2, rank=1, validation=0.1)
    same = np.concatenate([other.rows_of(group, held_out=True) for group in range(40)])
    assert held_out.tolist() == same.tolist()
    trained = epoch_of(plan, 0)
    assert len(np.intersect1d(trained, held_out)) == 0 and len(trained) + len(held_out) > 9990
    assert plan.train_rows.sum() + len(held_out) == 10_000
    assert not len(StreamPlan(sizes, 10, seed=0).rows_of(0, held_out=True))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 31}, "batch_size=31 is more than the 30 training rows; lower it"),
        ({"batch_size": 3, "world_size": 2}, "batch_size=3 is not a multiple of the 2 processes"),
        ({"buffer_rows": 0}, "buffer_rows=0"),
        ({"validation": 1.0}, "validation=1.0"),
        ({"validation": -0.1}, "validation=-0.1"),
        ({"world_size": 4}, "3 groups of up to 10 rows for 4 processes: too few.*write smaller row groups"),
        ({"world_size": 2, "batch_size": 24}, "too few for batch_size=24; lower it"),
    ],
)
def test_a_plan_that_does_not_fit(options, expected):
    with pytest.raises(ValueError, match=expected):
        StreamPlan((10, 10, 10), **{"batch_size": 4, "seed": 0} | options)


# Batches ------------------------------------------------------------------------------------------


def test_a_batch_is_what_loading_everything_gives(tmp_path):
    batches = batches_of(write_shards(tmp_path / "d"), validation=0.1)
    columns = world()
    assert isinstance(batches, TrainBatches) and batches.steps_per_epoch == batches.stream.steps_per_epoch > 5
    seen = set()
    for step, batch in taken(batches, 0, 2 * batches.steps_per_epoch):
        rows = numbers(batches.stream, step)
        assert batch.row.tolist() == rows.tolist() and batch.row.dtype == batch.input_ids.dtype == torch.int64
        texts = [". ".join(t for t in (columns["title"][row], columns["brand"][row]) if t) for row in rows]
        assert batch.input_ids.equal(tokenize(texts).long()) and batch.has_text.all()
        readable = [columns["image"][row] is not None and row % 13 != 12 for row in rows]
        assert batch.has_image.tolist() == readable and batch.image.dtype == torch.uint8
        for image, row, there in zip(batch.image, rows, readable, strict=True):
            expected = decode_picture(columns["image"][row], 8, "squash") if there else torch.zeros_like(image)
            assert image.equal(expected) and (image[:, 0, 0].tolist() == list(colour(row)) or not there)
        seen |= set(rows.tolist())
    assert len(seen) > 35


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_gives_the_same_batches(tmp_path, num_workers):
    folder = write_shards(tmp_path / "d")
    reference = batches_of(folder)
    steps = reference.steps_per_epoch
    expected = dict(items_of(reference, 0, 2 * steps + 2))
    assert list(expected) == list(range(2 * steps + 2)) and not equal(expected[0], expected[steps])
    batches = batches_of(folder, num_workers=num_workers)
    for start in (0, 2, steps - 1, steps, 2 * steps + 2):  # 2 is in the middle of a shard
        found = list(items_of(batches, start, 2 * steps + 2))
        assert [step for step, _ in found] == list(range(start, 2 * steps + 2))
        assert all(equal(batch, expected[step]) for step, batch in found)
    assert batches.report == reference.report and reference.report  # workers hand theirs over


def test_a_rank_reads_its_own_groups_and_only_what_its_steps_take(tmp_path, monkeypatch):
    folder = write_shards(tmp_path / "d")
    shares = []
    for rank in range(2):
        batches = batches_of(folder, rank=rank, world_size=2, batch_size=4)
        read: list[int] = []
        original = batches.content.items.read
        monkeypatch.setattr(
            batches.content.items, "read", lambda g, read=read, original=original: (read.append(g), original(g))[1]
        )
        order = batches.stream.order(0)
        rows = [batch.row for _, batch in items_of(batches, 0, batches.steps_per_epoch)]
        mine = [group for window in order for group in window.groups]
        assert read == mine[: len(read)]  # each once, in order
        shares.append((set(read), set(torch.cat(rows).tolist())))
        read.clear()
        next(items_of(batches, 1, 2))
        pieces = batches.stream.rows(1, order)
        assert read == [group for window, _ in pieces for group in window.groups]
    assert shares[0][0].isdisjoint(shares[1][0]) and shares[0][1].isdisjoint(shares[1][1])


def test_one_window_at_a_time_is_in_memory(tmp_path, monkeypatch):
    batches = batches_of(write_shards(tmp_path / "d", world(60), [(3,) * 20]), buffer_rows=6, batch_size=10)
    alive: list[weakref.ref[pa.Table]] = []
    rows: list[int] = []
    original = batches.content.items.read

    def read(group: int) -> pa.Table:
        table = original(group)
        alive.append(weakref.ref(table))
        rows.append(sum(len(there) for reference in alive if (there := reference()) is not None))
        return table

    monkeypatch.setattr(batches.content.items, "read", read)
    assert len(list(items_of(batches, 0, 12))) == 12
    assert len(rows) > 30 and max(rows) == 6


def test_problems_are_counted_once_by_reason(tmp_path):
    columns = world(40)
    columns["image"] = [picture(colour(i), 8) for i in range(40)]
    columns["image"][:6] = [b"", b"no picture", None, None, None, None]
    columns["image"][7] = picture(kind="JPEG", size=64)[:-300]
    columns["title"][8], columns["title"][9] = "  ", ""
    batches = batches_of(write_shards(tmp_path / "d", columns, [(20, 20)]), columns=["title"], batch_size=8)
    for _, batch in taken(batches, 0, 15):  # three epochs
        for image, row, has_image, has_text in zip(
            batch.image, batch.row.tolist(), batch.has_image.tolist(), batch.has_text.tolist(), strict=True
        ):
            assert has_text == (row not in (8, 9, 10, 21, 32))
            assert has_image == (row > 5 and row != 7)
            assert image[:, 3, 3].tolist() == (list(colour(row)) if has_image else [0, 0, 0])  # nothing has shifted
    assert {reason: entry["count"] for reason, entry in batches.report.items()} == {
        "empty": 1,
        "not_a_picture": 1,
        "truncated": 1,
        "no picture": 4,
    }
    assert batches.report["empty"]["examples"] == [1000] and batches.report["truncated"]["examples"] == [1007]
    assert len(set(batches.report["no picture"]["examples"])) == 3


def test_pictures_as_paths_and_as_datasets_writes_them(tmp_path):
    folder = tmp_path / "d"
    for part in ("a", "b"):
        (folder / part / "images").mkdir(parents=True)
        (folder / part / "images" / "same.png").write_bytes(picture(colour(60 if part == "a" else 70), 8))
        paths = ["images/same.png", "images/absent.png", "../secret.png", None]
        ids = [f"{part}{i}" for i in range(4)]
        write_shard(folder / part / "items.parquet", {"item_id": ids, "image": paths})
    (folder / "secret.png").write_bytes(picture())
    (folder / "c").mkdir()
    rows = [{"bytes": picture(colour(80), 8), "path": "x.png"}, None]
    features = datasets.Features({"item_id": datasets.Value("string"), "image": datasets.Image(decode=False)})
    datasets.Dataset.from_dict({"item_id": ["c0", "c1"], "image": rows}, features).to_parquet(
        folder / "c/items.parquet"
    )
    batches = batches_of(f"{folder}/**/*.parquet", columns=[], batch_size=10)
    ((_, batch),) = taken(batches, 0, 1)
    found = dict(zip(batch.row.tolist(), batch.image[:, :, 0, 0].tolist(), strict=True))
    assert {row for row, there in zip(batch.row.tolist(), batch.has_image, strict=True) if there} == {0, 4, 8}
    assert found[0] == list(colour(60)) and found[4] == list(colour(70)) and found[8] == list(colour(80))
    assert {reason: entry["count"] for reason, entry in batches.report.items()} == {
        "missing": 2,
        "escapes_folder": 2,
        "no picture": 3,
    }
    assert not batch.has_text.any()


def test_what_is_held_out(tmp_path):
    columns = world(200)
    batches = batches_of(write_shards(tmp_path / "d", columns, [(20,) * 5, (20,) * 5]), validation=0.3)
    table, batch = held_out(batches, 10_000)
    rows = [row for group in range(10) for row in batches.stream.rows_of(group, held_out=True).tolist()]
    assert 40 < len(rows) == len(batch) == len(table) < 80 and batch.row.tolist() == rows
    assert table.column_names == ["item_id", "title", "brand"]
    assert table["item_id"].to_pylist() == [1000 + row for row in rows]
    assert table["title"].to_pylist() == [columns["title"][row] for row in rows]
    assert batch.has_image.tolist() == [row % 7 != 6 and row % 13 != 12 for row in rows]
    there = batch.has_image.tolist()
    assert all(
        image[:, 0, 0].tolist() == list(colour(row))
        for image, row, t in zip(batch.image, rows, there, strict=True)
        if t
    )
    reasons = {"no picture", "truncated", "unreadable"}
    assert set(batches.report) <= reasons and batches.report
    for _, trained in items_of(batches, 0, batches.steps_per_epoch):
        assert not set(trained.row.tolist()) & set(rows)
    # a smaller limit reads fewer groups, the same whatever the seed and the rank
    read: list[int] = []
    other = batches_of(tmp_path / "d", validation=0.3, seed=8, rank=1, world_size=2)
    original = other.content.items.read
    other.content.items.read = lambda group: (read.append(group), original(group))[1]
    _, few = other.held_out(limit=13)
    assert len(few) == 13 and set(few.row.tolist()) <= set(rows) and len(read) < 5
    assert few.row.equal(batches.held_out(13)[1].row) and sorted(few.row.tolist()) == few.row.tolist()
    with refused("none of 200 rows is held out; raise validation"):
        batches_of(tmp_path / "d").held_out(10)
