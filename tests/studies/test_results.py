"""The results of a study are computed from the predictions of its runs, and from nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mmctr.evaluation.metrics import gauc, log_loss, paired_difference
from tests.helpers.studies import predictions
from tests.helpers.tiny import log_lines

pytestmark = pytest.mark.slow


def test_numbers_are_those_of_the_predictions(finished_study):
    study, _, results, _ = finished_study
    protocol = results.to_json()["protocols"]["held_out"]
    ids, content = ([predictions(folder) for folder in protocol["methods"][name]["folders"]] for name in study.methods)
    cold = ids[0]["cold"]
    assert protocol["rows"] == {"all": len(cold), "warm": int((~cold).sum()), "cold": int(cold.sum())}
    for split, rows in (("all", cold | True), ("warm", ~cold), ("cold", cold)):
        values = [gauc(run["label"][rows], run["score"][rows], run["user"][rows]) for run in content]
        found = protocol["methods"]["content"]["test"][split]
        assert found["gauc"]["seeds"] == pytest.approx(values, abs=1e-9)
        expected = (np.mean(values), min(values), max(values))
        assert tuple(found["gauc"][key] for key in ("mean", "low", "high")) == pytest.approx(expected, abs=1e-9)
        losses = [log_loss(run["label"][rows], run["score"][rows]) for run in content]
        assert found["log_loss"]["mean"] == pytest.approx(np.mean(losses), abs=1e-6)
        difference = protocol["methods"]["content"]["difference"][split]
        base = [gauc(run["label"][rows], run["score"][rows], run["user"][rows]) for run in ids]
        assert difference["gauc"] == pytest.approx(np.mean(values) - np.mean(base), abs=1e-12)
        for number, one in enumerate(difference["seeds"]):
            pair = (run[number]["score"][rows] for run in (ids, content))
            by_hand = paired_difference(ids[0]["label"][rows], *pair, ids[0]["user"][rows], num_samples=50)
            assert {key: one[key] for key in by_hand} == by_hand
    assert protocol["methods"]["ids"]["difference"] is None
    buckets = protocol["methods"]["ids"]["buckets"]
    assert sum(bucket["num_impressions"] for bucket in buckets) == len(cold)
    zero = ids[0]["clicks"] == 0
    expected = [gauc(run["label"][zero], run["score"][zero], run["user"][zero]) for run in ids]
    assert buckets[0]["clicks"] == "0" and buckets[0]["gauc"]["seeds"] == pytest.approx(expected, abs=1e-9)
    curve = protocol["methods"]["ids"]["validation"]
    assert [point["epoch"] for point in curve] == [1, 2]
    logs = [log_lines(Path(folder)) for folder in protocol["methods"]["ids"]["folders"]]
    last = [[line["validation"] for line in lines if "validation" in line][-1] for lines in logs]
    for name in ("gauc", "log_loss"):
        assert curve[-1][name]["seeds"] == [line[name] for line in last]
