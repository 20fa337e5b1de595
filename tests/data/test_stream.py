from __future__ import annotations

import weakref

import datasets
import pyarrow as pa
import pytest
import torch

from mmctr.data.batches import ItemBatch
from mmctr.data.images import decode_picture
from mmctr.data.loaders import TrainBatches
from mmctr.data.stream import content_keys
from tests.helpers.streams import (
    batches_of,
    colour,
    equal,
    items_of,
    numbers,
    refused,
    taken,
    tokenize,
    validation_items,
    world,
    write_shard,
    write_shards,
)
from tests.helpers.worlds import picture


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


@pytest.mark.lowest
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
    table, batch = validation_items(batches, 10_000)
    rows = [row for group in range(10) for row in batches.stream.rows_of(group, validation=True).tolist()]
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
    _, few = other.validation_items(limit=13)
    assert len(few) == 13 and set(few.row.tolist()) <= set(rows) and len(read) < 5
    assert few.row.equal(batches.validation_items(13)[1].row) and sorted(few.row.tolist()) == few.row.tolist()
    with refused("none of 200 rows is held out; raise validation"):
        batches_of(tmp_path / "d").validation_items(10)
