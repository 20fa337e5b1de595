"""The JSON of a study's results is a stable file format: keys, their order, and values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmctr.reports.run import Estimate
from mmctr.studies.result_types import MIN_USERS, Difference, FailedCell, ProtocolResults, StudyResults
from tests.helpers.studies import method_results, study_config

SUMMARY_JSON = {"mean": 0.6, "low": 0.5, "high": 0.7, "seeds": [0.5, None, 0.7]}
METRICS_JSON = {"gauc": SUMMARY_JSON, "auc": None, "log_loss": SUMMARY_JSON}
SEED_DIFFERENCE_JSON = {"num_users": 12, "auc": None, "auc_ci": None, "gauc": 0.02, "gauc_ci": [-0.01, 0.05]}
DIFFERENCE_JSON = {
    "num_users": 12,
    "auc": 0.01,
    "auc_ci": [0.005, 0.02],
    "gauc": 0.03,
    "gauc_ci": None,
    "seeds": [{"seed": 4, **SEED_DIFFERENCE_JSON}],
}


def test_the_json_of_a_method():
    assert method_results().to_json() == {
        "seeds": [4],
        "folders": ["out/runs/p/content/seed4"],
        "test": {split: METRICS_JSON for split in ("all", "warm", "cold")},
        "buckets": [
            {"clicks": "1-5", "num_impressions": 1234, "gauc": SUMMARY_JSON},
            {"clicks": ">100", "num_impressions": None, "gauc": None},
        ],
        "validation": [{"epoch": 0.5, **METRICS_JSON}],
        "difference": {"all": DIFFERENCE_JSON, "warm": None, "cold": DIFFERENCE_JSON},
        "gap_closed": {"share": 0.4, "share_ci": [0.1, 0.8], "seeds": [None]},
        "stages": {"cold": {**METRICS_JSON, "auc_ci": [0.5, 0.7], "gauc_ci": None, "difference": DIFFERENCE_JSON}},
    }
    baseline = method_results(difference=None, gap_closed=None, stages={}).to_json()
    assert baseline["difference"] is None and baseline["gap_closed"] is None and baseline["stages"] == {}


def test_the_json_of_a_study():
    study = study_config()
    failed = FailedCell("p", "ids", 4, Path("out/seed4.log"), "last words")
    protocol = ProtocolResults(
        {"all": 9, "warm": 6, "cold": 3}, {"all": 3, "warm": 2, "cold": 1}, {"content": method_results()}
    )
    written = StudyResults(study, [failed], {"p": protocol}).to_json()
    assert list(written) == ["study", "rule", "failed", "protocols"]
    assert written["study"] == study.model_dump(mode="json") and "20 resamples" in written["rule"]
    assert written["failed"] == [
        {"protocol": "p", "method": "ids", "seed": 4, "log": "out/seed4.log", "said": "last words"}
    ]
    assert written["protocols"] == {
        "p": {
            "rows": {"all": 9, "warm": 6, "cold": 3},
            "users": {"all": 3, "warm": 2, "cold": 1},
            "methods": {"content": method_results().to_json()},
        }
    }
    assert json.loads(json.dumps(written, allow_nan=False)) == written


@pytest.mark.parametrize(
    ("num_users", "interval", "marked"),
    [
        (MIN_USERS, (0.1, 0.2), True),
        (MIN_USERS, (-0.2, -0.1), True),
        (MIN_USERS, (-0.1, 0.1), False),
        (MIN_USERS, (0.0, 0.1), False),
        (MIN_USERS, None, False),
        (MIN_USERS - 1, (0.1, 0.2), False),
    ],
)
def test_a_difference_is_marked_where_the_interval_leaves_out_zero(num_users, interval, marked):
    assert Difference(num_users, Estimate(None), Estimate(0.1, interval)).is_marked() == marked
