"""The JSON of a concepts report is a stable file format: keys, their order, and values."""

from __future__ import annotations

import json

from mmctr.concepts.naming import Name
from mmctr.concepts.report_types import (
    ClickReason,
    ConceptsReport,
    Correlation,
    Description,
    Dimension,
    Histogram,
    RankerEffects,
    RunScore,
    Scores,
    TraversalStep,
    UserReasons,
    Variation,
)

NAME = Name(["dark"], ["bright"], "word", None, 0.9, (0.8, 0.95), (30, 40))
VARIATION = Variation(
    Histogram([1, 2], -1.0, 1.5), [TraversalStep(0.5, [7, 9])], Correlation(1, -0.25), {"low": 0.1, "high": 0.2}
)
DIMENSIONS = [
    Dimension(0, 1.25, NAME, VARIATION, click_effect=0.01),
    Dimension(1, 0.75, None, Variation(Histogram([3], 0.0, 1.0), [], None, None)),
    Dimension(2, 0.0, None, None),
]


def test_the_json_of_a_report():
    scores = Scores({"mig": 0.5}, {"mig": 0.1}, ["colour"], [[1.0]])
    report = ConceptsReport(
        run="runs/a",
        data="data/toy",
        weights="key",
        description=Description(100, DIMENSIONS, scores),
        refused_columns={"brand": "the same for all items"},
        mean=[0.0, 0.1, 0.2],
        std=[1.0, 0.9, 0.0],
        runs=[RunScore("runs/a", 0.5, {"udr": 0.5})],
        ranker=RankerEffects("runs/din", 500),
        user=UserReasons(5, [ClickReason(0, "high", ["bright"], 0.02, [7])]),
    )
    written = report.to_json()
    assert json.loads(json.dumps(written)) == {
        "run": "runs/a",
        "data": "data/toy",
        "weights": "key",
        "items": 100,
        "active": 2,
        "dimensions": [
            {
                "dimension": 0,
                "active": True,
                "variance": 1.25,
                "name": {
                    "low": ["dark"],
                    "high": ["bright"],
                    "source": "word",
                    "column": None,
                    "auc": 0.9,
                    "interval": [0.8, 0.95],
                    "num_items": [30, 40],
                    "text": "dark ↔ bright",
                    "verified": True,
                },
                "histogram": {"counts": [1, 2], "from": -1.0, "to": 1.5},
                "traversal": [{"quantile": 0.5, "items": [7, 9]}],
                "correlates": {"dimension": 1, "r": -0.25},
                "prevalence": {"low": 0.1, "high": 0.2},
                "click_effect": 0.01,
            },
            {
                "dimension": 1,
                "active": True,
                "variance": 0.75,
                "name": None,
                "histogram": {"counts": [3], "from": 0.0, "to": 1.0},
                "traversal": [],
                "correlates": None,
            },
            {"dimension": 2, "active": False, "variance": 0.0, "name": None},
        ],
        "scores": {"mig": 0.5},
        "chance": {"mig": 0.1},
        "dependency": {"columns": ["colour"], "matrix": [[1.0]]},
        "columns set aside": {"brand": "the same for all items"},
        "spread": {"mean": [0.0, 0.1, 0.2], "std": [1.0, 0.9, 0.0]},
        "runs": [{"run": "runs/a", "score": 0.5, "udr": 0.5}],
        "ranker": {"run": "runs/din", "impressions": 500},
        "user": {
            "user_id": 5,
            "reasons": [
                {"dimension": 0, "end": "high", "likes": ["bright"], "click_effect": 0.02, "because_of": [7]},
            ],
        },
    }


def test_parts_that_are_not_known_have_no_keys():
    description = Description(100, DIMENSIONS[2:], None)
    written = ConceptsReport("a", "d", "w", description, {}, [0.0], [0.0], []).to_json()
    keys = ["run", "data", "weights", "items", "active", "dimensions", "warning", "columns set aside", "spread"]
    assert list(written) == keys
    assert "posterior collapse" in written["warning"] and description.warning == written["warning"]
