from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from mmctr.data.batches import ItemBatch
from mmctr.data.content import ItemContent, TextField
from mmctr.data.interactions import Impressions, Interactions
from mmctr.data.pairs import ClickedQueries, CoClicks, GroupMates, PairCollator, ShownNotClicked
from tests.helpers.worlds import random_log

NUM_ITEMS = 30


def train_of(log: Interactions) -> Impressions:
    values, start, end = log.histories(np.ones(len(log), bool))
    return Impressions(log.user, log.item, log.label, np.arange(len(log)), values, start, end)


def log_of(rows: list[tuple[int, int, int, int]]) -> Interactions:
    """(user, item, time, label) rows."""
    return Interactions.from_columns(*(np.array(column) for column in zip(*rows, strict=True)))[0]


def all_allowed() -> np.ndarray:
    return np.ones(NUM_ITEMS, bool)


def simple_partners(log: Interactions, window: int, max_gap: int | None) -> dict[int, dict[int, float]]:
    """P(partner | item) by walking through every click, the item itself as a partner meaning none."""
    clicks = [(int(u), int(i), int(t)) for u, i, t, y in zip(log.user, log.item, log.time, log.label, strict=True) if y]
    chances: dict[int, Counter] = {}
    count = Counter(item for _, item, _ in clicks)
    for at, (user, item, time) in enumerate(clicks):
        near = [
            clicks[other][1]
            for other in range(max(0, at - window), min(len(clicks), at + window + 1))
            if other != at and clicks[other][0] == user and (max_gap is None or abs(clicks[other][2] - time) <= max_gap)
        ]
        for partner in near or [item]:
            chances.setdefault(item, Counter())[partner] += 1 / max(1, len(near)) / count[item]
    return {item: dict(partners) for item, partners in chances.items()}


@pytest.mark.parametrize(("window", "max_gap"), [(1, None), (3, None), (4, 5)])
def test_partners_are_drawn_as_often_as_they_are_clicked_nearby(window, max_gap):
    log = random_log(num_users=20, num_items=12, num_rows=120)
    train = train_of(log)
    sampler = CoClicks(train, log, NUM_ITEMS, window, max_gap, seed=0, allowed=all_allowed())
    expected = simple_partners(log, window, max_gap)
    rows = np.arange(NUM_ITEMS)
    draws = 4000
    seen: dict[int, Counter] = {row: Counter() for row in range(NUM_ITEMS)}
    for step in range(draws):
        partner, has = sampler(rows, step)
        for row in range(NUM_ITEMS):
            assert has[row] == (partner[row] != row)
            seen[row][int(partner[row])] += 1
    for row in range(NUM_ITEMS):
        chances = expected.get(row, {row: 1.0})
        assert set(seen[row]) <= set(chances)
        for partner, chance in chances.items():
            assert abs(seen[row][partner] / draws - chance) < 0.04, (row, partner)  # deviation at most 0.008

    # how often each is drawn, exactly, over how often it would be were all that are drawn drawn alike
    q = np.zeros(NUM_ITEMS)
    for item, chances in expected.items():
        for partner, chance in chances.items():
            q[partner] += chance if partner != item else 0  # the item itself is no partner
    np.testing.assert_allclose(np.exp(sampler.log_q)[q > 0], (q * (q > 0).sum() / q.sum())[q > 0], rtol=1e-5)


def test_log_q_by_hand():
    """Items 0 and 1 are clicked together by two users, 2 beside 0 by one: P(1|0) = 2/3, P(2|0) = 1/3, P(0|1) = P(0|2)
    = 1. So 0 is drawn twice in three, 1 in 2/9 and 2 in 1/9 of all draws."""
    log = log_of([(0, 0, 1, 1), (0, 1, 2, 1), (1, 1, 1, 1), (1, 0, 2, 1), (2, 0, 1, 1), (2, 2, 2, 1), (3, 5, 1, 1)])
    sampler = CoClicks(train_of(log), log, NUM_ITEMS, 1, None, seed=0, allowed=all_allowed())
    assert sampler.num_pairs == 3
    np.testing.assert_allclose(np.exp(sampler.log_q[:3]), [2.0, 2 / 3, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(np.exp(sampler.log_q[5]), 1 / 3, rtol=1e-6)  # never drawn: as the rarest
    _, has = sampler(np.arange(NUM_ITEMS), 0)
    assert np.flatnonzero(has).tolist() == [0, 1, 2]


def test_what_may_not_be_drawn_is_not_there_at_all():
    log = random_log(num_users=20, num_items=12, num_rows=200)
    allowed = all_allowed()
    allowed[[3, 7]] = False
    sampler = CoClicks(train_of(log), log, NUM_ITEMS, 3, None, 0, allowed)
    shown = ShownNotClicked(train_of(log), NUM_ITEMS, 5, 0, allowed)
    for step in range(300):
        for draw in (sampler, shown):
            partner, has = draw(np.arange(12), step)
            assert not np.isin(partner[has], [3, 7]).any() and not has[[3, 7]].any()


def test_draws_depend_on_seed_step_and_item_alone():
    log = random_log()
    train = train_of(log)
    for make in (
        lambda seed: CoClicks(train, log, NUM_ITEMS, 3, None, seed, all_allowed()),
        lambda seed: ShownNotClicked(train, NUM_ITEMS, 5, seed, all_allowed()),
        lambda seed: GroupMates(np.arange(NUM_ITEMS) % 4, all_allowed(), seed),
    ):
        sampler, rows = make(0), np.arange(NUM_ITEMS)
        whole = sampler(rows, 5)
        assert all(np.array_equal(a, b) for a, b in zip(sampler(rows, 5), whole, strict=True))
        some = np.array([20, 3, 11])
        assert np.array_equal(sampler(some, 5)[0], whole[0][some])
        assert not np.array_equal(sampler(rows, 6)[0], whole[0])
        assert not np.array_equal(make(1)(rows, 5)[0], whole[0])


def test_hard_negatives_were_shown_to_the_same_user_and_not_clicked():
    log = random_log(num_users=15, num_items=NUM_ITEMS, num_rows=400)
    clicked: dict[int, list[int]] = {}
    for at in np.flatnonzero(log.label):
        clicked.setdefault(int(log.item[at]), []).append(int(at))
    sampler = ShownNotClicked(train_of(log), NUM_ITEMS, window=4, seed=0, allowed=all_allowed())
    found = 0
    for step in range(60):
        negative, has = sampler(np.arange(NUM_ITEMS), step)
        for row in np.flatnonzero(has):
            nearby = [
                int(log.item[other])
                for at in clicked[int(row)]
                for other in range(max(0, at - 4), min(len(log), at + 5))
                if log.user[other] == log.user[at] and log.label[other] == 0
            ]
            assert negative[row] in nearby and negative[row] != row
            found += 1
    assert found > 500


def test_group_mates():
    codes = np.array([0, 0, 0, 1, 1, 2, -1, 0])
    allowed = np.array([1, 1, 0, 1, 1, 1, 1, 1], bool)
    sampler = GroupMates(codes, allowed, seed=0)
    seen: dict[int, set[int]] = {row: set() for row in range(8)}
    for step in range(200):
        mate, has = sampler(np.arange(8), step)
        for row in range(8):
            if has[row]:
                seen[row].add(int(mate[row]))
    assert seen == {0: {1, 7}, 1: {0, 7}, 2: {0, 1, 7}, 3: {4}, 4: {3}, 5: set(), 6: set(), 7: {0, 1}}


def test_queries_are_those_of_clicks_on_the_item():
    log = log_of([(0, 0, 1, 1), (0, 1, 2, 0), (0, 2, 3, 1), (1, 0, 1, 1), (1, 2, 2, 1), (1, 3, 4, 1)])
    query = np.array([0, 1, -1, 2, 1, -1])  # by row of the log
    input_ids = torch.arange(6).reshape(3, 2)
    sampler = ClickedQueries(train_of(log), NUM_ITEMS, query, input_ids, seed=0)
    seen: dict[int, set[int]] = {row: set() for row in range(4)}
    for step in range(50):
        ids, has, number = sampler(np.arange(4), step)
        for row in np.flatnonzero(has.numpy()):
            seen[int(row)].add(int(number[row]))
            assert ids[row].tolist() == input_ids[number[row]].tolist()
    assert seen == {0: {0, 2}, 1: set(), 2: {1}, 3: set()}


def test_a_log_without_clicks_gives_no_partners():
    log = log_of([(0, 0, 1, 0), (0, 1, 2, 0)])
    for sampler in (
        CoClicks(train_of(log), log, NUM_ITEMS, 3, None, 0, all_allowed()),
        ShownNotClicked(train_of(log), NUM_ITEMS, 3, 0, all_allowed()),
        GroupMates(np.full(NUM_ITEMS, -1), all_allowed(), 0),
    ):
        partner, has = sampler(np.arange(4), 0)
        assert not has.any() and partner.tolist() == [0, 1, 2, 3]


def collator(samplers, **more) -> PairCollator:
    ids = torch.arange(NUM_ITEMS * 2, dtype=torch.int32).reshape(-1, 2)
    content = ItemContent((), (TextField(ids, torch.ones(NUM_ITEMS, dtype=torch.bool)),))
    keys = torch.arange(NUM_ITEMS)[:, None]
    return PairCollator(content, np.arange(NUM_ITEMS - 1, -1, -1), keys, samplers, **more)


def test_a_batch_holds_anchors_and_partners_once_each():
    log = random_log()
    samplers = {
        "clicked": CoClicks(train_of(log), log, NUM_ITEMS, 3, None, 0, all_allowed()),
        "group": GroupMates(np.arange(NUM_ITEMS) % 4, all_allowed(), 0),
    }
    teacher = torch.randn(NUM_ITEMS, 3), torch.arange(NUM_ITEMS) % 2 == 0
    groups = {"g": torch.arange(NUM_ITEMS) % 4}
    collate = collator(samplers, groups=groups, teacher=teacher)
    rows = np.array([4, 0, 9])
    batch = collate(rows, 7)
    items: ItemBatch = batch.items
    assert items.row.tolist() == sorted(set(items.row.tolist()))
    anchors = NUM_ITEMS - 1 - rows
    assert items.row[batch.anchor].tolist() == anchors.tolist()
    for name, sampler in samplers.items():
        partner, has = sampler(anchors, 7)
        assert items.row[batch.partners[name].item].tolist() == partner.tolist()
        assert batch.partners[name].has_partner.tolist() == has.tolist()
    log_q = samplers["clicked"].log_q[samplers["clicked"](anchors, 7)[0]]
    assert batch.partners["clicked"].log_q.tolist() == log_q.tolist() and batch.partners["group"].log_q is None
    assert batch.keys[:, 0].equal(items.row) and batch.groups["g"].equal(items.row % 4)
    assert batch.teacher.equal(teacher[0][items.row]) and batch.has_teacher.equal(items.row % 2 == 0)
    assert items.input_ids[:, 0].equal(items.row * 2)
    moved = batch.to("cpu", non_blocking=True)
    assert moved.partners["clicked"].item.equal(batch.partners["clicked"].item)


def test_two_ranks_draw_the_partners_of_one():
    log = random_log()
    collate = collator({"clicked": CoClicks(train_of(log), log, NUM_ITEMS, 3, None, 0, all_allowed())})
    whole = collate(np.arange(10), 3)
    halves = [collate(np.arange(5), 3), collate(np.arange(5, 10), 3)]
    for part, pick in ((whole.anchor, "anchor"), (whole.partners["clicked"].item, "partner")):
        rows = [h.items.row[h.anchor if pick == "anchor" else h.partners["clicked"].item] for h in halves]
        assert torch.cat(rows).equal(whole.items.row[part])
