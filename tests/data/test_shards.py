from __future__ import annotations

import gzip
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mmctr.data import shards as module
from mmctr.data.shards import ShardedItems
from mmctr.data.stream import StreamBatches
from tests.helpers.streams import (
    batches_of,
    colour,
    equal,
    items_of,
    members_of,
    refused,
    shards_at,
    taken,
    world,
    write_shard,
    write_shards,
    write_tar,
)
from tests.helpers.worlds import in_processes, picture

# Parquet shards -----------------------------------------------------------------------------------


def test_groups_count_through_the_shards(tmp_path):
    folder = write_shards(tmp_path / "d", world(), [(7, 0, 3), (), (10,)])
    (folder / "notes.txt").write_text("no shard")
    (folder / ".part-9.parquet").write_bytes(b"hidden")
    items = shards_at(folder, ["brand"])
    assert [(path.name, group, rows) for path, group, rows in items.groups] == [
        ("part-000.parquet", 0, 7),
        ("part-000.parquet", 2, 3),
        ("part-002.parquet", 0, 10),
    ]
    assert items.group_rows == (7, 3, 10)
    table = items.read(1)
    assert table.column_names == ["item_id", "brand", "image", module.PROBLEM] and table["item_id"].to_pylist() == [
        1007,
        1008,
        1009,
    ]
    assert table.schema.field("image").type == pa.large_binary() and table.schema.field("brand").type == pa.string()
    for pattern in (f"{folder}/part-*.parquet", str(folder)):
        assert ShardedItems(pattern, [], folder).group_rows == (7, 3, 10)
    assert ShardedItems(folder / "part-002.parquet", [], folder).group_rows == (10,)


def test_shards_that_cannot_be_used(tmp_path):
    folder = write_shards(tmp_path / "d")
    for pattern in (tmp_path / "none", f"{folder}/*.tar", tmp_path / "d*"):
        with refused(f"{pattern}: no rows in 0 shards"):
            ShardedItems(pattern, [], tmp_path)
    with refused("part-000.parquet: column 'titel' is missing; did you mean 'title'"):
        shards_at(folder, ["titel"])
    with refused("column 'image' cannot be a text column"):
        shards_at(folder, ["image"])
    good = world(5)
    last = folder / "part-009.parquet"
    for name in ("item_id", "brand", "image"):
        pq.write_table(pa.table({other: cells for other, cells in good.items() if other != name}), last)
        with refused(f"part-009.parquet: column '{name}' is missing"):
            shards_at(folder, ["brand"])
    for image in ([1, 2], [{"other": 1}] * 2):
        pq.write_table(pa.table({"item_id": [1, 2], "image": image}), last)
        with refused("part-009.parquet: "):
            shards_at(folder)
    write_shard(last, good)
    data = last.read_bytes()
    for damaged in (b"", data[:-30], data[: len(data) // 2], b"PAR1" + bytes(100)):
        last.write_bytes(damaged)
        with refused("part-009.parquet: cannot be read as parquet"):
            shards_at(folder)
    last.unlink()
    last.mkdir()
    with refused("part-009.parquet: cannot be read"):
        shards_at(folder)
    empty = tmp_path / "empty"
    write_shards(empty, {"item_id": [], "image": []}, [()])
    with refused("empty: no rows in 1 shards"):
        shards_at(empty)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_damaged_inside_or_replaced_is_named(tmp_path, num_workers):
    folder = write_shards(tmp_path / "d")
    path = folder / "part-001.parquet"
    batches = batches_of(folder, num_workers=num_workers)
    data = path.read_bytes()
    path.write_bytes(data[:4] + b"\xff" * 200 + data[204:])
    assert "part-001.parquet: group 0 is damaged, or has changed since the start" in error_of(batches)
    write_shard(path, {name: cells[:4] for name, cells in world().items()})
    assert "part-001.parquet: group 0 is damaged, or has changed since the start: another" in error_of(batches)


def error_of(batches: StreamBatches) -> str:
    try:
        list(items_of(batches, 0, batches.steps_per_epoch))
    except ValueError as error:
        error.__traceback__ = None  # a cycle, in which torch waits 5 seconds for its worker
        return str(error)
    return "none"


# Tars ---------------------------------------------------------------------------------------------


def test_a_tar_gives_the_batches_of_the_parquet_file(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAMPLES", 5)
    columns = world(40)
    parquet = batches_of(write_shards(tmp_path / "p", columns, [(5, 5, 5), (5, 5, 5, 5, 5)]), validation=0.1)
    write_tar(tmp_path / "t" / "a.tar", members_of(columns, 0, 15))
    write_tar(tmp_path / "t" / "b.tar", members_of(columns, 15))
    tar = batches_of(tmp_path / "t", validation=0.1, num_workers=1)
    assert tar.content.items.group_rows == parquet.content.items.group_rows == (5,) * 8
    for (_, one), (_, other) in zip(items_of(parquet, 0, 9), items_of(tar, 0, 9), strict=True):
        assert equal(one, other)
    counts = [{reason: entry["count"] for reason, entry in b.report.items()} for b in (parquet, tar)]
    assert counts[0] == counts[1] and counts[0]
    assert equal(parquet.validation_items(5)[1], tar.validation_items(5)[1])
    assert tar.content.items.read(0)["item_id"].to_pylist() == [str(1000 + i) for i in range(5)]


def test_samples_of_a_tar(tmp_path):
    red, blue = picture((200, 0, 0), 8), picture((0, 0, 200), 8)
    broken = [b"{", b"[1, 2]", b"\xff", b"[" * 100_000, b""]
    members = [
        ("whole.jpg", red),
        ("whole.txt", b" a text \n"),
        ("whole.json", json.dumps({"item_id": 7, "title": "t", "tags": ["x", None, 3], "image": "other"}).encode()),
        ("no_picture.txt", b"alone"),
        ("no_text.JPEG", red),
        ("dir.d/dotted.name.png", red),  # of a kind of its own: left alone
        ("dir.d/key.png", blue),
        ("dir.d/key.json", json.dumps({"text": "of the json", "title": " "}).encode()),
        ("late.webp", red),
        ("readme.md", b"#"),
        ("._whole.jpg", b"of another system"),
        *[(f"broken{i}.{suffix}", data) for i, j in enumerate(broken) for suffix, data in (("png", blue), ("json", j))],
        ("half.json", b'{"item_id": "\\ud800!", "title": "\\udfff?", "text": null}'),
        ("late.txt", b"bytes \xff that are no text"),
        ("whole.jpg", blue),  # again: another sample
        ("whole.txt", b"second"),
    ]
    batches = batches_of(write_tar(tmp_path / "t" / "s.tar", members), columns=["text", "title", "tags"], batch_size=12)
    table = batches.content.items.read(0)
    keys = ["7", "no_picture", "no_text", "dir.d/key", "late", *[f"broken{i}" for i in range(5)], "?!", "whole"]
    assert table["item_id"].to_pylist() == keys
    texts = table["text"].to_pylist()
    assert texts[:5] == ["a text", "alone", None, "of the json", "bytes \ufffd that are no text"]
    assert texts[5:] == [None] * 6 + ["second"]
    assert table["title"].to_pylist() == ["t"] + [None] * 9 + ["??", None] and table["tags"][0].as_py() == "x 3"
    ((_, batch),) = taken(batches, 0, 1)
    order = torch.argsort(batch.row)
    pixel = batch.image[order][:, :, 0, 0].tolist()
    assert batch.has_image[order].tolist() == [True, False, *[True] * 8, False, True]
    assert [p[0] > p[2] for p in pixel] == [True, False, True, False, True, *[False] * 7]
    assert pixel[3] == pixel[-1] == [0, 0, 200]
    assert {reason: entry["count"] for reason, entry in batches.report.items()} == {"broken json": 5, "no picture": 2}
    assert all(name.startswith("broken") for name in batches.report["broken json"]["examples"])
    with refused("s.tar: column 'titles' is missing; did you mean 'title'"):
        shards_at(tmp_path / "t", ["titles"])


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_formats_of_tars(tmp_path, form):
    name = "a" * 90 + "/" + "ü" * 45
    with tarfile.open(tmp_path / "s.tar", "w", format=form) as tar:
        (tmp_path / "x").write_bytes(picture(colour(9), 8))
        tar.add(tmp_path / "x", "a" * 90, recursive=False)
        tar.add(tmp_path / "x", f"{name}.png")
        folder = tarfile.TarInfo("folder.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    table = shards_at(tmp_path).read(0)
    assert table["item_id"].to_pylist() == [name] and table["image"][0].as_py() == picture(colour(9), 8)


def test_what_is_no_whole_plain_tar(tmp_path):
    path = write_tar(tmp_path / "s.tar", members_of(world(30)))
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        places = [member.offset for member in tar.getmembers()]
    cases = {
        "empty": b"",
        "compressed": gzip.compress(whole),
        "no tar": b"#" * 2000,
        "cut in a member": whole[: places[9] + 700],
        "cut in a header": whole[: places[9] + 100],
        "cut between members": whole[: places[9]],
        "two in one": whole + whole,
        "damaged header": whole[: places[9]] + b"\xff" * 512 + whole[places[9] + 512 :],
    }
    for case, data in cases.items():
        path.write_bytes(data)
        with refused("s.tar: not one whole, uncompressed tar ("):
            pytest.fail(f"{case}: {shards_at(tmp_path).group_rows}")
    path.unlink()
    for name in ("s.tar.gz", "s.tgz"):
        (tmp_path / name).write_bytes(gzip.compress(whole))
        with refused(f"{name}: not one whole, uncompressed tar"):
            shards_at(tmp_path)
        (tmp_path / name).unlink()
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = tarfile.LNKTYPE, "b.jpg"
        tar.addfile(info)
    with refused("s.tar: member 'a.jpg' is a link or sparse"):
        shards_at(tmp_path)
    write_tar(path, [("a.bin", b"0")])
    with refused("no rows in 1 shards"):
        shards_at(tmp_path)


def test_a_tar_is_indexed_once_until_it_changes(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "t" / "s.tar", members_of(world(5)))
    indexed = []
    original = module._index_tar
    monkeypatch.setattr(module, "_index_tar", lambda path, out: (indexed.append(path), original(path, out)))
    first = shards_at(tmp_path / "t", ["title"])
    assert shards_at(tmp_path / "t", ["brand"]).group_rows == (5,) and indexed == [path]
    write_tar(path, members_of(world(6)))
    with refused("s.tar: group 0 is damaged, or has changed"):
        first.read(0)
    assert shards_at(tmp_path / "t", ["title"]).group_rows == (6,) and indexed == [path, path]


def test_processes_may_index_at_once(tmp_path):
    write_tar(tmp_path / "s.tar", members_of(world(200)))
    assert in_processes(3, _rows, tmp_path) == [200] * 3
    assert len(list((tmp_path / "cache").iterdir())) == 1


def _rows(folder: Path) -> int:
    items = ShardedItems(folder, ["title"], folder / "cache")
    return sum(len(items.read(group)) for group in range(len(items.groups)))
