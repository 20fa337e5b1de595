from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import resource
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from mmctr.data import picture_building as module
from mmctr.data.catalog import Catalog
from mmctr.data.images import REMEDIES, decode_picture
from mmctr.data.picture_cache import Pictures, reserve
from mmctr.data.prepare import open_dataset, prepare
from mmctr.locks import locked
from tests.helpers.worlds import in_processes, picture, write_dataset

COLOURS = [(250, 10, 20), (20, 240, 30), (10, 20, 230), (120, 130, 10)]


def colour(image: torch.Tensor) -> tuple[int, ...]:
    return tuple(image.float().mean((1, 2)).round().int().tolist())


def bomb(width: int = 50_000, height: int = 50_000) -> bytes:
    """A valid PNG of a few hundred bytes that announces 2.5 thousand million pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10_000)))
        + chunk(b"IEND", b"")
    )


def noise(size: int = 64) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_bad_pictures_are_counted_by_reason_and_shift_nothing(tmp_path):
    folder = tmp_path / "d"
    (folder / "images").mkdir(parents=True)
    files = {
        "good0.png": picture(COLOURS[0]),
        "cut.jpg": noise()[:-400],
        "zero.jpg": b"",
        "text.jpg": b"I am no picture " * 50,
        "good1.jpg": picture(COLOURS[1], kind="JPEG"),
        "bomb.png": bomb(),
        "cut2.jpg": noise()[: len(noise()) // 2],
        "good2.png": picture(COLOURS[2]),
    }
    for name, data in files.items():
        (folder / "images" / name).write_bytes(data)
    (tmp_path / "secret.png").write_bytes(picture())
    (folder / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    bad = {
        "images/cut.jpg": "truncated",
        "images/zero.jpg": "empty",
        "images/text.jpg": "not_a_picture",
        "images/bomb.png": "too_large",
        "images/gone.png": "missing",
        "../secret.png": "escapes_folder",
        str(tmp_path / "secret.png"): "escapes_folder",
        "images/link.png": "escapes_folder",
        "images/../../secret.png": "escapes_folder",
        "images": "unreadable",
        "images/cut2.jpg": "truncated",
        "": "missing",
    }
    paths = [None, "images/good0.png", *list(bad)[:4], "images/good1.jpg", *list(bad)[4:], "images/good2.png", None]
    ids = [f"item {row}" for row in range(len(paths))]
    dataset = prepare(write_dataset(folder, {"item_id": ids, "image": paths}), tmp_path / "out")
    pictures = dataset.catalog.pictures(32, "shortest")

    assert len(dataset.catalog) == len(paths)
    images, there = pictures.take(torch.arange(len(paths)))
    good = ["images/good0.png", "images/good1.jpg", "images/good2.png"]
    assert there.tolist() == [path in good for path in paths]
    for path, expected in zip(good, COLOURS, strict=False):
        found = np.array(colour(images[paths.index(path)]))
        assert np.abs(found - expected).max() <= 2
    assert not images[~there].any()

    report = pictures.report
    assert (report["items"], report["pictures"], report["items without a picture"]) == (len(paths), 3, 2)
    expected = {}
    for row, path in enumerate(paths):
        if path in bad:
            entry = expected.setdefault(bad[path], {"count": 0, "examples": [], "remedy": REMEDIES[bad[path]]})
            entry["count"] += 1
            entry["examples"] = [*entry["examples"], ids[row]][:3]
    assert report["rejected"] == expected


@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
def test_pictures_are_those_that_decode_picture_makes(tmp_path, resize):
    data = [noise(40), None, picture(), b"junk", noise(90)]
    dataset = prepare(write_dataset(tmp_path / "d", {"item_id": [5, 6, 7, 8, 9], "image": data}), tmp_path / "out")
    pictures = dataset.catalog.pictures(24, resize)
    rows = torch.tensor([4, 1, 0, 0, 2, 3])
    images, there = pictures.take(rows)
    assert there.tolist() == [True, False, True, True, True, False] and images.dtype == torch.uint8
    for image, row, has in zip(images, rows.tolist(), there.tolist(), strict=True):
        cell = data[row]
        expected = decode_picture(cell, 24, resize) if has and cell else torch.zeros(3, 24, 24, dtype=torch.uint8)
        assert image.equal(expected)
    some, all_there = pictures.take(torch.tensor([2, 0]))  # the path without gaps
    assert all_there.all() and some.equal(images[[4, 2]])


@pytest.mark.parametrize("images", [None, [None, None], [b"junk", None]])
def test_a_catalog_without_any_picture(tmp_path, images):
    items = {"item_id": [1, 2], **({} if images is None else {"image": pa.array(images, pa.binary())})}
    dataset = prepare(write_dataset(tmp_path / "d", items), tmp_path / "out")
    values, there = dataset.catalog.pictures(16, "shortest").take(torch.tensor([0, 1, 1]))
    assert values.shape == (3, 3, 16, 16) and not values.any() and not there.any()
    assert dataset.catalog.pictures(16, "shortest").report["items without a picture"] == (
        1 if images and images[0] else 2
    )


def many(tmp_path) -> Catalog:
    """1300 items, a third without a picture and some broken: three chunks of the builder."""
    good = [picture((i % 256, i // 256, 77), size=8) for i in range(1300)]
    cells = [None if i % 3 == 0 else b"junk" if i % 100 == 1 else good[i] for i in range(1300)]
    folder = write_dataset(tmp_path / "d", {"item_id": list(range(1300)), "image": cells})
    return prepare(folder, tmp_path / "out").catalog


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_interrupted_build_goes_on_and_gives_the_same(tmp_path, monkeypatch):
    catalog = many(tmp_path)
    catalog.pictures(8, "squash")
    folder = catalog.folder / "pictures-8-squash"
    whole = contents(folder)
    for file in folder.iterdir():
        file.unlink()

    calls = []
    decode = module.decode_picture

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 700:
            raise KeyboardInterrupt
        return decode(*args)

    monkeypatch.setattr(module, "decode_picture", interrupted)
    with pytest.raises(KeyboardInterrupt):
        catalog.pictures(8, "squash")
    assert not (folder / "report.json").exists()
    calls.clear()
    values, _ = catalog.pictures(8, "squash").take(torch.arange(1300))
    assert contents(folder) == whole and values.any()
    assert len(calls) == 866 - 512  # the first chunk was not decoded again
    catalog.pictures(8, "squash")
    assert len(calls) == 866 - 512


def _number_of_pictures(folder: Path, start=None) -> int:
    if start is not None:
        start.wait(60)
    return open_dataset(folder).catalog.pictures(8, "squash").report["pictures"]


def test_processes_that_want_the_same_pictures_at_once(tmp_path):
    catalog = many(tmp_path)
    with multiprocessing.get_context("fork").Manager() as manager:
        assert in_processes(3, _number_of_pictures, catalog.folder, manager.Barrier(3)) == [857] * 3
    folder = catalog.folder / "pictures-8-squash"
    together = contents(folder)
    for file in folder.iterdir():
        file.unlink()
    catalog.pictures(8, "squash")
    assert contents(folder) == together


def test_who_comes_second_waits_for_the_first(tmp_path):
    catalog = many(tmp_path)
    folder = catalog.folder / "pictures-8-squash"
    with ThreadPoolExecutor(1) as thread:
        with locked(folder):
            other = thread.submit(in_processes, 1, _number_of_pictures, catalog.folder)
            time.sleep(0.5)
            assert not folder.exists() and not other.done()
        assert other.result(timeout=60) == [857]


def test_the_room_for_pictures_is_taken_before_they_are_decoded(tmp_path):
    reserve(tmp_path / "values.npy", (100, 3, 32, 32))
    stat = (tmp_path / "values.npy").stat()
    assert stat.st_blocks * 512 >= stat.st_size > 100 * 3 * 32 * 32


def _build_with_a_limit(folder: Path) -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    with pytest.raises(OSError) as caught:
        open_dataset(folder).catalog.pictures(16, "squash")
    return str(caught.value)


def test_a_full_disk_is_told_before_the_build(tmp_path):
    catalog = many(tmp_path)
    (message,) = in_processes(1, _build_with_a_limit, catalog.folder)
    path = catalog.folder / "pictures-16-squash" / "values.npy"
    assert message.startswith(f"cannot write {path} of {866 * 3 * 16 * 16:,} bytes: ") and "Free some space" in message
    assert catalog.pictures(16, "squash").report["pictures"] == 857  # with room again it is built


def test_pictures_go_to_worker_processes_as_a_file_name(tmp_path):
    pictures = many(tmp_path).pictures(32, "squash")
    data = pickle.dumps(pictures)
    assert len(data) < 1000
    again = pickle.loads(data)
    rows = torch.arange(20)
    assert isinstance(again, Pictures) and again.take(rows)[0].equal(pictures.take(rows)[0])


# Ids, texts, tokens -------------------------------------------------------------------------------


def catalog_of(tmp_path, **columns) -> Catalog:
    return Catalog.from_dataset(datasets.Dataset.from_dict(columns), tmp_path / "cache")


def test_rows(tmp_path):
    catalog = catalog_of(tmp_path, item_id=[2**31 + 1, 7, 2**53 + 1])
    assert catalog.rows([2**53 + 1, 2**31 + 1, 7, 7]).tolist() == [2, 0, 1, 1]
    assert catalog.rows(np.array([7])).tolist() == [1] and catalog.rows([]).tolist() == []
    assert catalog.rows(pa.array([7, 2**53 + 1])).tolist() == [1, 2]
    with pytest.raises(ValueError, match="item id 8 is not in the catalog of 3 items"):
        catalog.rows([7, 8])
    with pytest.raises(ValueError, match=r"int64.*'7'"):
        catalog.rows(["7"])
    with pytest.raises(ValueError, match="item ids are all integers or all strings"):
        catalog.rows([7, "7"])


def test_texts_join_what_there_is(tmp_path):
    catalog = catalog_of(
        tmp_path,
        item_id=["a", "b", "c", "d"],
        title=["Red shoe", None, " ", "猫"],
        year=[1984, 2001, None, None],
        tags=[["x", "y"], [], None, ["z"]],
    )
    assert catalog.texts(["title"]) == ["Red shoe", "", "", "猫"]
    assert catalog.texts(["title", "year", "tags"]) == ["Red shoe. 1984. x y", "2001", "", "猫. z"]
    assert catalog.texts(["year", "title"])[0] == "1984. Red shoe"
    assert catalog.texts([]) == [""] * 4
    with pytest.raises(ValueError, match="items: column 'titel' is missing; did you mean 'title'"):
        catalog.texts(["titel"])


def test_tokens_are_made_once_and_anew_for_other_texts(tmp_path):
    calls = []

    def tokenize(texts: list[str]) -> torch.Tensor:
        calls.append(len(texts))
        return torch.tensor([[len(text), sum(map(ord, text))] for text in texts]).reshape(-1, 2)

    texts = [f"word {i}" * (i % 3) for i in range(5000)]
    expected = tokenize(texts)
    catalog = catalog_of(tmp_path, item_id=list(range(5000)), title=texts)
    calls.clear()
    for _ in range(2):
        ids, has_text = catalog.tokens(["title"], tokenize, "key")
        assert ids.dtype == torch.int32 and ids.equal(expected.int())
        assert has_text.tolist() == [bool(text) for text in texts]
    assert sum(calls) == 5000
    catalog.tokens(["title"], tokenize, "another tokenizer")
    assert sum(calls) == 10_000
    other = catalog_of(tmp_path, item_id=list(range(5000)), title=texts[::-1])  # the same folder
    assert other.tokens(["title"], tokenize, "key")[0].equal(expected.flip(0).int())


def test_pictures_that_appear_later_are_looked_up_again(tmp_path):
    """A picture that was absent or cut off at the first look is decoded once its file has changed, and no other one."""
    folder = write_dataset(tmp_path / "d", {"item_id": list("abcd"), "image": ["a.png", "b.png", "c.png", "d.png"]})
    (folder / "a.png").write_bytes(picture(COLOURS[0]))
    (folder / "c.png").write_bytes(picture(COLOURS[2])[:60])
    catalog = prepare(folder, tmp_path / "out").catalog
    first = catalog.pictures(8, "squash")
    assert first.take(torch.arange(4))[1].tolist() == [True, False, False, False]
    assert {reason: entry["count"] for reason, entry in first.report["rejected"].items()} == {
        "missing": 2,
        "truncated": 1,
    }
    again = catalog.pictures(8, "squash")
    assert again.report == first.report  # nothing has changed
    for name, rgb in (("b.png", COLOURS[1]), ("c.png", COLOURS[2])):
        (folder / name).write_bytes(picture(rgb))
    later = open_dataset(tmp_path / "out").catalog.pictures(8, "squash")  # as another run does
    images, there = later.take(torch.arange(4))
    assert there.tolist() == [True, True, True, False]
    assert [colour(image) for image in images[:3]] == COLOURS[:3]
    assert later.report["pictures"] == 3 and list(later.report["rejected"]) == ["missing"]
    assert len(np.unique(later.hashes[:3])) == 3 and later.report["revision"] == 1


def test_every_reason_has_a_remedy_in_the_report(tmp_path):
    cells = ["https://shop.example/a.png", "data:image/png;base64," + "A" * 5000, "images\\a.png", "C:/a.png", "a.png"]
    folder = write_dataset(tmp_path / "d", {"item_id": list(range(5)), "image": cells})
    rejected = prepare(folder, tmp_path / "out").catalog.pictures(8, "squash").report["rejected"]
    assert {reason: entry["count"] for reason, entry in rejected.items()} == {
        "url": 1,
        "data_uri": 1,
        "windows_path": 2,
        "missing": 1,
    }
    assert all(entry["remedy"] == REMEDIES[reason] for reason, entry in rejected.items())


def test_lists_of_pictures_in_the_column_image(tmp_path):
    cells = [[picture(COLOURS[0]), picture(COLOURS[1])], [], None, [picture(COLOURS[2])]]
    items = {"item_id": [1, 2, 3, 4], "image": pa.array(cells, pa.large_list(pa.binary()))}
    catalog = prepare(write_dataset(tmp_path / "d", items), tmp_path / "out").catalog
    assert catalog.pictures_per_item("image") == 2
    for position, expected in ((0, [COLOURS[0], None, None, COLOURS[2]]), (1, [COLOURS[1], None, None, None])):
        images, there = catalog.pictures(8, "squash", position=position).take(torch.arange(4))
        assert [colour(image) if has else None for image, has in zip(images, there, strict=True)] == expected
    assert catalog.picture_cell(0) == cells[0][0] and catalog.picture_cell(1) is None


def test_caches_of_a_read_only_folder_go_to_the_cache_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("MMCTR_CACHE", str(tmp_path / "cache"))
    folder = write_dataset(
        tmp_path / "d", {"item_id": [1, 2], "title": ["a", "b"], "image": [picture(), "x.png"][:1] * 2}
    )
    catalog = prepare(folder, tmp_path / "out").catalog
    catalog.pictures(8, "squash")
    before = sorted(path.name for path in (tmp_path / "out").rglob("*"))
    writable = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: not str(path).startswith(str(tmp_path / "out")) and writable(path, mode)
    )
    catalog = open_dataset(tmp_path / "out").catalog
    for size in (8, 16):  # the first is there, the second is not
        assert catalog.pictures(size, "squash").take(torch.arange(2))[1].all()
    ids, _ = catalog.tokens(["title"], lambda texts: torch.ones(len(texts), 3), "ones")
    assert ids.tolist() == [[1, 1, 1]] * 2
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == before
    names = {path.name for path in (tmp_path / "cache").glob("out-*/*")}
    assert "pictures-16-squash" in names and "pictures-8-squash" not in names and len(names) == 2


# Catalogs from `datasets` -------------------------------------------------------------------------


def test_from_dataset(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a.png").write_bytes(picture(COLOURS[0]))
    source = datasets.Dataset.from_dict(
        {"item_id": ["x", "y", "x", "z"], "title": ["1", "2", "3", "4"], "image": ["a.png", None, None, "../a.png"]}
    )
    catalog = Catalog.from_dataset(source, tmp_path / "cache", tmp_path / "root")
    assert catalog.item_ids.to_pylist() == ["x", "y", "z"] and catalog.items["title"] == ["1", "2", "4"]
    assert catalog.items.column_names == ["item_id", "title"]
    pictures = catalog.pictures(8, "shortest")
    assert pictures.take(torch.arange(3))[1].tolist() == [True, False, False]
    remedy = REMEDIES["escapes_folder"]
    assert pictures.report["rejected"] == {"escapes_folder": {"count": 1, "examples": ["z"], "remedy": remedy}}


def test_an_image_column_with_bytes_file_names_and_gaps(tmp_path):
    """As hubs have it: the bytes, the name the file once had, and nulls."""
    cells = [{"bytes": picture(c), "path": f"{i}.png"} for i, c in enumerate(COLOURS)]
    source = datasets.Dataset.from_dict({"item_id": [1, 2, 3, 4], "image": [cells[0], None, cells[2], cells[3]]})
    catalog = Catalog.from_dataset(source.cast_column("image", datasets.Image()), tmp_path / "cache")
    images, there = catalog.pictures(8, "shortest").take(torch.arange(4))
    assert there.tolist() == [True, False, True, True]
    assert [colour(images[i]) for i in (0, 2, 3)] == [COLOURS[0], COLOURS[2], COLOURS[3]]


def test_paths_and_bytes_in_one_column_are_an_error(tmp_path):
    cells = [{"bytes": picture(), "path": None}, {"bytes": None, "path": "a.png"}]
    source = datasets.Dataset.from_dict({"item_id": [1, 2], "image": cells}).cast_column("image", datasets.Image())
    with pytest.raises(ValueError, match="column 'image' mixes paths and bytes"):
        Catalog.from_dataset(source, tmp_path / "cache")


def test_an_image_column_of_another_type_is_an_error(tmp_path):
    write_dataset(tmp_path / "d", {"item_id": [1], "image": [5]})
    with pytest.raises(ValueError, match=r"items\.parquet: column 'image' has type int64; it holds relative paths"):
        prepare(tmp_path / "d", tmp_path / "out")


def test_a_folder_used_for_another_catalog_is_built_anew(tmp_path):
    for colours in (COLOURS, COLOURS[::-1]):
        cells = [{"bytes": picture(c, size=10 + i), "path": None} for i, c in enumerate(colours)]
        source = datasets.Dataset.from_dict({"item_id": [str(c) for c in colours], "image": cells})
        catalog = Catalog.from_dataset(source.cast_column("image", datasets.Image()), tmp_path / "cache")
        images, _ = catalog.pictures(8, "shortest").take(torch.arange(4))
        assert [colour(image) for image in images] == list(colours)


def test_from_dataset_without_ids(tmp_path):
    with pytest.raises(ValueError, match="dataset: column 'item_id' is missing; did you mean 'itemid'"):
        catalog_of(tmp_path, itemid=[1])


def test_items_from_a_split_of_a_saved_dataset(tmp_path):
    folder = write_dataset(tmp_path / "d", None)
    parts = {
        name: datasets.Dataset.from_dict({"item_id": ids}) for name, ids in (("train", [10, 20]), ("all", [10, 20, 30]))
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "items"))
    assert len(prepare(folder, tmp_path / "out1", items=f"{tmp_path}/items:all").catalog) == 3
    assert len(prepare(folder, tmp_path / "out2", items=f"{tmp_path}/items").catalog) == 2
    with pytest.raises(ValueError, match=r"has splits train, all; write .*items:SPLIT"):
        prepare(folder, tmp_path / "out3", items=f"{tmp_path}/items:test")


def test_items_that_cannot_be_loaded(tmp_path):
    datasets.Dataset.from_dict({"itemid": [10]}).save_to_disk(tmp_path / "items")
    with pytest.raises(ValueError, match=r"--items .*: column 'item_id' is missing; did you mean 'itemid'"):
        prepare(tmp_path, tmp_path / "out", items=str(tmp_path / "items"))
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"--items .*other: cannot be loaded by `datasets`"):
        prepare(tmp_path, tmp_path / "out", items=str(tmp_path / "other"))


def test_the_toy_worlds_pictures(toy_folder):
    catalog = open_dataset(toy_folder).catalog
    pictures = catalog.pictures(32, "shortest")
    without = catalog.table["image"].null_count
    assert pictures.report["rejected"] == {} and pictures.report["pictures"] == 120 - without
    row = catalog.table["image"].to_pylist().index(None)
    assert not pictures.take(torch.tensor([row]))[1].item()
    first = catalog.table["image"][0].as_py()
    assert pictures.take(torch.tensor([0]))[0][0].equal(decode_picture((toy_folder / first).read_bytes(), 32))
