from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from mmctr.data.content import ItemContent, PictureField, TextField
from mmctr.data.prepare import open_dataset
from tests.helpers.worlds import picture, write_dataset

NUM_ITEMS = 12


def texts(offset: int, has: list[bool], weight: float = 1.0) -> TextField:
    ids = torch.arange(NUM_ITEMS * 2, dtype=torch.int32).reshape(-1, 2) + offset
    return TextField(ids, torch.tensor(has), weight)


ALL = [True] * NUM_ITEMS
SOME = [i % 3 > 0 for i in range(NUM_ITEMS)]
FEW = [i % 4 == 1 for i in range(NUM_ITEMS)]


def test_one_field_is_read_as_it_is():
    content = ItemContent((), (texts(0, SOME),))
    rows = torch.tensor([5, 0, 7])
    batch = content.batch(rows, draw=(0, 3))
    assert batch.input_ids.tolist() == [[10, 11], [0, 1], [14, 15]] and batch.input_ids.dtype == torch.int64
    assert batch.has_text.tolist() == [True, False, True]
    assert batch.text_item is None and batch.image is None and batch.has_image is None
    assert content.has_image is None and content.has_text.tolist() == SOME


def test_all_texts_of_an_item_with_their_weights():
    content = ItemContent((), (texts(0, SOME), texts(100, FEW, 3.0)))
    rows = torch.arange(NUM_ITEMS)
    batch = content.batch(rows)
    assert batch.has_text.tolist() == [a or b for a, b in zip(SOME, FEW, strict=True)]
    shown: dict[int, dict[int, float]] = {}
    for ids, item, weight in zip(batch.input_ids, batch.text_item, batch.text_weight, strict=True):
        shown.setdefault(int(item), {})[int(ids[0]) // 100] = float(weight)
        assert ids[0] % 100 == 2 * item
    assert shown[1] == {0: 0.25, 1: 0.75} and shown[2] == {0: 1.0} and shown[9] == {1: 1.0}
    assert set(shown) == {i for i in range(NUM_ITEMS) if SOME[i] or FEW[i]}


def test_a_step_shows_one_text_drawn_by_weight():
    content = ItemContent((), (texts(0, SOME), texts(100, FEW, 3.0), texts(200, ALL, 0.0)))
    rows = torch.arange(NUM_ITEMS)
    count = np.zeros((NUM_ITEMS, 3))
    for step in range(2000):
        batch = content.batch(rows, draw=(0, step))
        assert len(batch.input_ids) == NUM_ITEMS and batch.text_item is None and batch.has_text.all()
        count[np.arange(NUM_ITEMS), batch.input_ids[:, 0].numpy() // 100] += 1
    share = count / 2000
    for item in range(NUM_ITEMS):
        weight = np.array([SOME[item], 3.0 * FEW[item], 0.0])
        expected = weight / weight.sum() if weight.sum() else np.array([0, 0, 1.0])  # the only one there is
        np.testing.assert_allclose(share[item], expected, atol=0.05)  # deviation 0.011
    again = content.batch(torch.tensor([7, 2]), draw=(0, 11))
    whole = content.batch(rows, draw=(0, 11))
    assert again.input_ids.equal(whole.input_ids[[7, 2]])


def test_kept_features_stand_in_for_what_they_were_made_of():
    features = torch.randn(NUM_ITEMS, 4)
    field = replace(texts(0, SOME), features=features)
    batch = ItemContent((), (field,)).batch(torch.tensor([3, 1]))
    assert batch.input_ids is None and batch.text_features.equal(features[[3, 1]])
    assert batch.has_text.tolist() == [False, True]


@pytest.fixture
def shop(tmp_path):
    """Items with a cover and a list of further photos, some of them broken or missing."""
    colours = [(20 * i, 0, 0) for i in range(4)]
    photos = [[picture(c), picture((0, 200, 0))] for c in colours[:2]] + [None, [b"broken", picture((0, 0, 90)), None]]
    items = {
        "item_id": list(range(4)),
        "title": ["a", "b", "c", "d"],
        "image": pa.array([picture(c) for c in colours[:3]] + [None], pa.binary()),
        "photos": pa.array(photos, pa.list_(pa.binary())),
    }
    return open_dataset(write_dataset(tmp_path / "shop", items)).catalog


def test_several_pictures_in_one_cell(shop):
    assert shop.pictures_per_item("photos") == 3 and shop.pictures_per_item("image") == 1
    places = [shop.pictures(8, "squash", column="photos", position=place) for place in range(3)]
    assert [(p.index >= 0).tolist() for p in places] == [
        [True, True, False, False],
        [True, True, False, True],
        [False] * 4,
    ]
    assert [entry["examples"] for entry in places[0].report["rejected"].values()] == [[3]]
    content = ItemContent((PictureField(shop.pictures(8, "squash")), *(PictureField(p, 0.5) for p in places)))
    batch = content.batch(torch.arange(4))
    assert batch.has_image.all()
    of_first = batch.image[batch.image_item == 0][:, :, 0, 0].tolist()
    assert of_first == [[0, 0, 0], [0, 0, 0], [0, 200, 0]]
    assert batch.image_weight[batch.image_item == 0].tolist() == [0.5, 0.25, 0.25]
    assert batch.image[batch.image_item == 3][:, :, 0, 0].tolist() == [[0, 0, 90]]


def test_equal_pictures_have_equal_hashes(shop):
    second = shop.pictures(8, "squash", column="photos", position=1)
    hashes = second.hashes[second.index[[0, 1, 3]]]
    assert hashes[0] == hashes[1] != hashes[2]
