from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from mmctr.data.stream import StreamPlan
from tests.helpers.streams import epoch_of, numbers


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
    held_out = np.concatenate([plan.rows_of(group, validation=True) for group in range(20)])
    assert abs(len(held_out) - 1000) < 120  # deviation 30
    other = StreamPlan((*(250,) * 40, 777), 6, seed=9, world_size=2, rank=1, validation=0.1)
    same = np.concatenate([other.rows_of(group, validation=True) for group in range(40)])
    assert held_out.tolist() == same.tolist()
    trained = epoch_of(plan, 0)
    assert len(np.intersect1d(trained, held_out)) == 0 and len(trained) + len(held_out) > 9990
    assert plan.train_rows.sum() + len(held_out) == 10_000
    assert not len(StreamPlan(sizes, 10, seed=0).rows_of(0, validation=True))


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
