from __future__ import annotations

import numpy as np
import pytest

from mmctr.data.loaders import BatchPlan, TrainBatches
from tests.helpers.behaviors import collator, equal, impressions


def test_each_row_at_most_once_an_epoch_and_all_but_the_rest():
    plan = BatchPlan(num_rows=103, batch_size=10, seed=1)
    assert plan.steps_per_epoch == 10
    epochs = [np.concatenate([plan.rows(10 * e + s, plan.order(e)) for s in range(10)]) for e in range(30)]
    for rows in epochs:
        assert len(set(rows.tolist())) == 100 and rows.min() >= 0 and rows.max() < 103
    assert (epochs[0] != epochs[1]).any()
    assert len(set(np.concatenate(epochs).tolist())) == 103  # what is left out differs
    whole = BatchPlan(num_rows=100, batch_size=10, seed=1)
    assert sorted(np.concatenate([whole.rows(s, whole.order(0)) for s in range(10)])) == list(range(100))
    assert (BatchPlan(103, 10, seed=1).order(3) == plan.order(3)).all()
    assert (BatchPlan(103, 10, seed=2).order(3) != plan.order(3)).any()


@pytest.mark.parametrize("world_size", [2, 5])
def test_the_slices_of_all_ranks_are_the_batch_of_one(world_size):
    one = BatchPlan(num_rows=57, batch_size=10, seed=4)
    ranks = [BatchPlan(57, 10, 4, rank, world_size) for rank in range(world_size)]
    for step in range(12):
        order = one.order(step // 5)
        slices = [plan.rows(step, plan.order(step // 5)) for plan in ranks]
        assert {len(rows) for rows in slices} == {10 // world_size}
        assert (np.concatenate(slices) == one.rows(step, order)).all()


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({"batch_size": 11}, "batch_size=11 is more than the 10 training rows; lower it"),
        ({"batch_size": 9, "world_size": 2}, "batch_size=9 is not a multiple of the 2 processes"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": -3}, "batch_size=-3"),
    ],
)
def test_a_batch_that_does_not_fit(args, expected):
    with pytest.raises(ValueError, match=expected):
        BatchPlan(num_rows=10, seed=0, **args)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_gives_the_same_batches(num_workers):
    part = impressions()
    plan = BatchPlan(len(part), 100, seed=3)
    collate = collator(part, id_dropout=0.2)
    steps = plan.steps_per_epoch
    stop = 2 * steps + 2
    # by the definition
    expected = [collate(plan.rows(step, plan.order(step // steps)), step) for step in range(stop)]
    batches = TrainBatches(plan, collate, num_workers)
    assert batches.steps_per_epoch == steps == len(part) // 100
    for start in (0, steps - 1, steps, steps + 3, stop):
        found = list(batches.iterate(start, stop))
        assert [step for step, _ in found] == list(range(start, stop))
        assert all(equal(batch, expected[step]) for step, batch in found)
    assert not equal(expected[0], expected[steps])  # another epoch, other batches


def test_ranks_together_see_what_one_process_sees():
    part = impressions()
    one = TrainBatches(BatchPlan(len(part), 100, 3), lambda rows, step: rows)
    two = [TrainBatches(BatchPlan(len(part), 100, 3, rank, 2), lambda rows, step: rows) for rank in range(2)]
    for (_, whole), (_, a), (_, b) in zip(one.iterate(2, 9), *(batches.iterate(2, 9) for batches in two), strict=True):
        assert np.concatenate([a, b]).tolist() == whole.tolist()
