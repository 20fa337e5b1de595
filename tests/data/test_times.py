"""Times of a log, and requests in the unit of the log."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mmctr.data.prepare import prepare
from mmctr.data.times import read_times, scaled_time
from tests.helpers.worlds import log_columns, write_dataset

ITEMS = {"item_id": [10, 20, 30]}


def notes(values: pa.Array) -> list[str]:
    return read_times(pa.chunked_array([values]), Path("log.parquet")).notes


def test_a_time_asked_for_has_the_unit_of_the_column(tmp_path):
    """Times with fractions are stored in millionths: a request for 1.7e9 + 0.5 must lie between two such rows."""
    begin = 1_700_000_000
    log = log_columns([(1, 10, begin + 0.25, 1), (1, 20, begin + 0.75, 1), (1, 30, begin + 2.5, 1)])
    dataset = prepare(write_dataset(tmp_path / "d", ITEMS, log), tmp_path / "out")
    asked = [begin, begin + 0.5, begin + 1, begin + 2.5, begin + 3]
    counts = [len(dataset.interactions.clicked_before(0, dataset.time(at))) for at in asked]
    assert counts == [0, 1, 2, 2, 3]
    assert dataset.time(None) is None and dataset.report["interactions"]["time scale"] == 1_000_000


def test_whole_times_keep_their_unit(tmp_path):
    log = log_columns([(1, 10, 5.0, 1), (1, 20, 7.0, 1)])
    dataset = prepare(write_dataset(tmp_path / "d", ITEMS, log), tmp_path / "out")
    assert dataset.time(7) == 7 and dataset.time(6.5) == 6


@pytest.mark.parametrize("at", [float("nan"), float("inf"), 1e300, 2**62])
def test_what_is_no_time(at):
    with pytest.raises(ValueError, match=r"at: .* is no time"):
        scaled_time(at, 1_000_000)


def test_times_that_look_wrong_have_a_note():
    seconds = 1_700_000_000
    assert notes(pa.array([seconds, seconds + 60, None])) == []
    assert notes(pa.array([1, 2, 3])) == []
    (note,) = notes(pa.array([5, 5, 5]))
    assert note.startswith("all 3 times are 5")
    (note,) = notes(pa.array(np.array([seconds, seconds + 1000], np.float32)))
    assert "float" in note and "multiples of 128" in note
    (note,) = notes(pa.array([seconds, seconds + 1, seconds * 1000]))
    assert "2 like seconds, 1 like milliseconds" in note
    (note,) = notes(pa.array([float(seconds), seconds * 1e6]))
    assert "1 like seconds, 1 like microseconds" in note


def test_notes_reach_the_report(tmp_path):
    log = log_columns([(1, 10, 5, 1), (1, 20, 5, 0)])
    dataset = prepare(write_dataset(tmp_path / "d", ITEMS, log), tmp_path / "out")
    assert any("all 2 times are 5" in note for note in dataset.report["interactions"]["notes"])
