from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from mmctr.data.batches import BehaviorBatch, Jagged
from mmctr.data.content import ItemContent, PictureField, TextField
from mmctr.data.prepare import prepare
from mmctr.features.behavior_collator import NegativeSampler
from mmctr.features.crosses import CrossFeature, cross_features
from tests.helpers.behaviors import NUM_ITEMS, collator, equal, impressions
from tests.helpers.worlds import picture, write_dataset


def test_a_batch_is_what_its_rows_say():
    part = impressions()
    collate = collator(part)
    rows = np.random.default_rng(0).permutation(len(part))[:64]
    batch = collate(rows, 7)
    assert len(batch) == 64 and len(batch.items) == len(set(batch.items.row.tolist()))  # each item once
    shown = set()
    for b, row in enumerate(rows):
        assert batch.items.row[batch.target[b]] == part.item[row] and batch.label[b] == part.label[row]
        everything = part.history[part.history_start[row] : part.history_end[row]]
        here = batch.history[batch.history_offsets[b] : batch.history_offsets[b + 1]]
        assert batch.items.row[here].tolist() == everything[-4:].tolist()
        assert batch.user[b] == collate.user_rows[part.user[row]]
        assert batch.context["age"][b] == 10 * part.user[row]
        assert batch.context["place"][b] == collate.context.columns["place"][part.source[row]]
        shown |= {int(part.item[row]), *everything[-4:].tolist()}
    assert set(batch.items.row.tolist()) == shown
    assert batch.label.dtype == torch.float32 and batch.target.dtype == batch.history.dtype == torch.int64
    assert (batch.history_offsets[1:] - batch.history_offsets[:-1]).max() == 4  # the limit was reached
    tags = batch.items.features["tags"]
    for u, row in enumerate(batch.items.row.tolist()):
        assert batch.items.features["item_id"][u] == row + 1
        assert batch.items.features["brand"][u] == collate.items.columns["brand"][row]
        assert isinstance(tags, Jagged) and tags.values[tags.offsets[u] : tags.offsets[u + 1]].tolist() == [
            2 * row,
            2 * row + 1,
        ]
    assert batch.items.image is None and batch.items.encode is None and batch.negatives is None


def test_no_history():
    part = impressions()
    batch = collator(part, max_history=0)(np.arange(20))
    assert batch.history.tolist() == [] and batch.history_offsets.tolist() == [0] * 21
    assert batch.items.row.tolist() == sorted(set(part.item[:20].tolist()))
    first = np.flatnonzero(part.history_start == part.history_end)[:3]
    assert collator(part)(first).history.tolist() == []


def test_id_dropout_hides_the_id_and_nothing_else():
    part = impressions()
    rows = np.arange(len(part))
    plain, dropping = collator(part), collator(part, id_dropout=0.3, seed=2)
    hidden = 0
    for step in range(60):
        batch, full = dropping(rows, step), plain(rows, step)
        ids, known = batch.items.features["item_id"], full.items.features["item_id"]
        assert isinstance(ids, Tensor) and isinstance(known, Tensor)
        assert ((ids == known) | (ids == 0)).all()
        features = batch.items.features | {"item_id": known}
        assert equal(replace(batch, items=replace(batch.items, features=features)), full)
        hidden += int((ids == 0).sum())
    share = hidden / (60 * len(plain(rows).items))
    assert abs(share - 0.3) < 0.03  # of about 1500 draws: deviation 0.012
    assert plain.items.columns["item_id"].equal(torch.arange(1, NUM_ITEMS + 1))


def test_two_ranks_hide_the_same_items_and_users():
    part = impressions()
    collate = collator(part, id_dropout=0.4, user_dropout=0.4)
    whole = collate(np.arange(100), 3)
    halves = [collate(np.arange(50), 3), collate(np.arange(50, 100), 3)]
    for half in halves:
        where = torch.searchsorted(whole.items.row, half.items.row)
        assert half.items.features["item_id"].equal(whole.items.features["item_id"][where])
    assert torch.cat([half.user for half in halves]).equal(whole.user)
    other = collate(np.arange(100), 4)
    assert not other.items.features["item_id"].equal(whole.items.features["item_id"])


def test_user_dropout():
    part = impressions()
    rows = np.arange(len(part))
    plain, dropping = collator(part), collator(part, user_dropout=0.25)
    full = plain(rows)
    hidden = torch.stack([dropping(rows, step).user != full.user for step in range(80)])
    users = torch.from_numpy(part.user)
    assert all(len(torch.unique(step[users == 3])) == 1 for step in hidden)  # a user as a whole
    assert abs(hidden[:, full.user > 0].float().mean() - 0.25) < 0.03
    assert all(dropping(rows, step).user[hidden[step]].eq(0).all() for step in range(5))


def test_content_of_targets_and_histories(tmp_path):
    images = [None if i % 7 == 0 else picture((i * 8, 0, 0), size=8) for i in range(NUM_ITEMS)]
    folder = write_dataset(tmp_path / "d", {"item_id": list(range(NUM_ITEMS)), "image": pa.array(images, pa.binary())})
    pictures = prepare(folder, tmp_path / "out").catalog.pictures(8, "squash")
    tokens = torch.arange(NUM_ITEMS * 3, dtype=torch.int32).reshape(-1, 3)
    content = ItemContent((PictureField(pictures),), (TextField(tokens, torch.arange(NUM_ITEMS) % 5 > 0),))
    part = impressions()
    rows = np.arange(0, len(part), 40)
    whole = collator(part, content=content)(rows)
    assert whole.items.encode is None and whole.items.image is not None and whole.items.has_image is not None
    assert len(whole.items.image) == len(whole.items)
    few = collator(part, content=content, encode_history=False)(rows)
    assert few.items.encode is not None and few.items.image is not None
    assert few.items.row[few.items.encode].tolist() == sorted(set(part.item[rows].tolist()))
    # an item that is a target and in a history has a slot for each
    assert set(few.history.tolist()).isdisjoint(few.items.encode.tolist())
    assert set(few.target.tolist()) == set(few.items.encode.tolist())
    assert few.items.row[few.history].equal(whole.items.row[whole.history])
    assert few.items.row[few.target].equal(whole.items.row[whole.target])
    budget = collator(part, content=content, encode_history=False, max_encoded=5)
    drawn = [budget(rows, step).items for step in range(3)]
    assert all(len(items.encode) == 5 and len(items.image) == 5 for items in drawn)
    assert not drawn[0].encode.equal(drawn[1].encode)  # another draw each step
    assert set(drawn[0].encode.tolist()) <= set(few.items.encode.tolist())
    of_all = collator(part, content=content, max_encoded=7)
    steps = [of_all(rows, step) for step in range(60)]
    assert all(len(step.items.encode) == len(step.items.image) == 7 for step in steps)
    assert all(step.history.equal(whole.history) and step.items.row.equal(whole.items.row) for step in steps)
    # behaviours are drawn as targets are
    counts = np.bincount(torch.cat([step.items.encode for step in steps]), minlength=len(whole.items))
    assert counts.min() > 0 and counts.max() < 5 * counts.mean()
    assert collator(part, content=content, max_encoded=1000)(rows).items.encode is None
    for items, encoded in ((whole.items, whole.items.row), (few.items, few.items.row[few.items.encode])):
        assert items.image is not None and items.input_ids is not None
        assert items.has_image.tolist() == [row % 7 > 0 for row in encoded.tolist()]
        assert items.image[:, 0, 0, 0].tolist() == [0 if row % 7 == 0 else row * 8 for row in encoded.tolist()]
        assert items.input_ids.equal(tokens[encoded].long())
        assert items.has_text.tolist() == [row % 5 > 0 for row in encoded.tolist()]
    bare = {"image": None, "has_image": None, "input_ids": None, "has_text": None, "encode": None}
    without = collator(part)(rows)
    assert equal(replace(whole, items=replace(whole.items, **bare)), without)


def test_crosses_of_a_batch_are_those_of_its_rows():
    part = impressions()
    config = {
        "a": CrossFeature(of=["user_id", "brand"], buckets=1 << 30),
        "b": CrossFeature(of=["history.tags", "item_id", "place"], buckets=1 << 30),
    }
    collate = collator(
        part, derived=(partial(cross_features, config),), id_dropout=0.3, negatives=NegativeSampler(part, 0)
    )
    batch, rows = collate(np.arange(300), 2), np.arange(300)
    brand, tags = (collate.items.columns[name] for name in ("brand", "tags"))
    ids = batch.items.features["item_id"][batch.target].tolist()
    lengths = {name: batch.context[name].offsets.diff().tolist() for name in config}
    for b, row in enumerate(rows):
        history = part.history[part.history_start[row] : part.history_end[row]][-4:]
        known = sum(int(v > 0) for i in history for v in tags.values[tags.offsets[i] : tags.offsets[i + 1]])
        place = int(batch.context["place"][b])
        assert lengths["a"][b] == (batch.user[b] > 0 and brand[part.item[row]] > 0)
        assert lengths["b"][b] == (known if ids[b] and place else 0)  # no cross with an unknown item
    pairs = [(int(batch.user[b]), int(brand[part.item[b]])) for b in range(300) if lengths["a"][b]]
    found = batch.context["a"].values.tolist()
    assert len(set(found)) == len(set(pairs)) == len(set(zip(found, pairs, strict=True))) > 20
    assert sum(lengths["b"]) > 0 and len(set(lengths["b"])) > 2
    assert equal(
        replace(batch, context=collator(part)(rows).context, negatives=None, items=None),
        replace(
            collator(part, id_dropout=0.3, negatives=NegativeSampler(part, 0))(rows, 2), negatives=None, items=None
        ),
    )


def test_negatives_are_shown_items_the_user_never_clicked():
    part = impressions()
    clicked = {(u, i) for u, i, label in zip(part.user, part.item, part.label, strict=True) if label}
    collate = collator(part, negatives=NegativeSampler(part, seed=0))
    rows = np.arange(len(part))
    batch, plain = collate(rows, 5), collator(part)(rows, 5)
    assert batch.negatives is not None and len(batch.negatives) == len(batch.history) > 500
    users = np.repeat(part.user, np.diff(batch.history_offsets.numpy()))
    items = batch.items.row[batch.negatives].tolist()
    assert not clicked & set(zip(users.tolist(), items, strict=True)) and set(items) <= set(part.item.tolist())
    # nothing else of the batch changes, but that there are more items
    assert batch.items.row[batch.history].equal(plain.items.row[plain.history])
    assert batch.items.row[batch.target].equal(plain.items.row[plain.target])
    assert plain.negatives is None and batch.label.equal(plain.label)


def test_negatives_depend_on_impression_place_and_step_alone():
    part = impressions()
    collate = collator(part, negatives=NegativeSampler(part, seed=0))
    rows = np.random.default_rng(1).permutation(len(part))[:80]

    def drawn(batch: BehaviorBatch) -> list[int]:
        return batch.items.row[batch.negatives].tolist()

    halves = [drawn(collate(half, 3)) for half in np.split(rows, 2)]
    assert halves[0] + halves[1] == drawn(collate(rows, 3)) != drawn(collate(rows, 4))
    other = collator(part, negatives=NegativeSampler(part, seed=1))
    assert drawn(other(rows, 3)) != drawn(collate(rows, 3))


def test_negatives_are_drawn_as_often_as_shown():
    n = 40_000
    part = replace(impressions(), item=np.repeat([2, 5, 7], [1, 2, 5]), label=np.zeros(8), user=np.zeros(8, np.int64))
    items = NegativeSampler(part, seed=0)(np.zeros(n, np.int64), np.arange(n), 0)
    np.testing.assert_allclose(np.bincount(items)[[2, 5, 7]] / n, [1 / 8, 2 / 8, 5 / 8], atol=0.01)


def test_a_user_who_clicked_nearly_or_simply_all():
    item, user = np.tile(np.arange(50), 2), np.repeat([0, 1], 50)
    label = np.ones(100, np.int64)
    label[7] = 0  # user 0 left out item 7, user 1 none
    sampler = NegativeSampler(replace(impressions(), item=item, user=user, label=label), seed=0)
    assert sampler(np.zeros(200, np.int64), np.arange(200), 0).tolist() == [7] * 200
    rest = sampler(np.ones(200, np.int64), np.arange(200), 0)
    assert rest.min() >= 0 and rest.max() < 50
