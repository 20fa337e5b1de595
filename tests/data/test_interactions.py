from __future__ import annotations

import numpy as np
import pytest

from mmctr.data.interactions import Interactions
from tests.helpers.worlds import clicks_before, log_of, random_log


def test_from_columns_sorts_by_user_and_time():
    user, time = np.array([2, 1, 2, 1, 2]), np.array([5, 9, 4, 8, 6])
    log, order = Interactions.from_columns(user, np.arange(5), time, np.array([0, 1, 0, 1, 1]))
    assert order.tolist() == [3, 1, 2, 0, 4] and log.item.tolist() == order.tolist()
    assert log.user.tolist() == [1, 1, 2, 2, 2] and log.time.tolist() == [8, 9, 4, 5, 6]
    assert log.label.tolist() == [1, 1, 0, 0, 1]
    assert (log.user.dtype, log.item.dtype, log.time.dtype, log.label.dtype) == (np.int32, np.int32, np.int64, np.uint8)


def test_rows_with_equal_times_are_in_an_order_that_neither_file_nor_label_determines():
    """One moment of 2000 rows of each of 50 users: clicks come first as often as last, whatever the given order."""
    rng = np.random.default_rng(0)
    user, item = np.divmod(np.arange(100_000), 2000)
    label = rng.random(100_000) < 0.3
    whole = None
    for order in (np.argsort(label), np.argsort(~label), rng.permutation(100_000)):
        log, picked = Interactions.from_columns(user[order], item[order], np.zeros(100_000, int), label[order])
        again = (log.user.tolist(), log.item.tolist(), log.label.tolist())
        assert whole is None or again == whole
        assert np.array_equal(user[order][picked], log.user)
        whole = again
    position, _ = log.user_position()
    assert abs(position[log.label == 1].mean() - 999.5) < 15  # deviation 3.3
    assert abs(np.corrcoef(position, log.item)[0, 1]) < 0.02
    ranks = position.reshape(50, 2000)[np.arange(50)[:, None], np.argsort(log.item.reshape(50, 2000), axis=1)]
    assert abs(np.corrcoef(ranks[0], ranks[1])[0, 1]) < 0.1  # an item goes not first with all users


def test_save_and_load(tmp_path):
    log = random_log()
    log.save(tmp_path)
    again = Interactions.load(tmp_path)
    for name in Interactions.NAMES:
        assert isinstance(getattr(again, name), np.memmap) and np.array_equal(getattr(again, name), getattr(log, name))


def test_user_position():
    log = log_of([(0, 1, 1, 1), (3, 1, 1, 1), (3, 1, 2, 1), (3, 1, 2, 0), (9, 1, 1, 0)])
    place, size = log.user_position()
    assert place.tolist() == [0, 0, 1, 2, 0] and size.tolist() == [1, 3, 3, 3, 1]


@pytest.mark.parametrize("kept", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("num_times", [1, 8, 10_000])
def test_histories_are_the_clicks_strictly_before(kept, num_times):
    log = random_log(num_rows=400, num_times=num_times)
    keep = np.random.default_rng(1).random(len(log)) < kept
    values, start, end = log.histories(keep)
    assert [values[s:e].tolist() for s, e in zip(start, end, strict=True)] == [
        clicks_before(log, i, keep) for i in range(len(log))
    ]
    assert len(values) == (keep & (log.label == 1)).sum()
    if num_times == 1:
        assert (start == end).all()  # everything at once: nothing is before anything


def test_histories_of_one_row():
    values, start, end = log_of([(5, 7, 3, 1)]).histories(np.ones(1, bool))
    assert values.tolist() == [7] and start.tolist() == end.tolist() == [0]
