"""Studies on tiny runs: configs, cells in forked processes, predictions with chosen scores, and results by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from mmctr.reports.run import Estimate
from mmctr.studies.config import StudyConfig
from mmctr.studies.result_types import (
    BucketSummary,
    Difference,
    EpochSummary,
    GapClosed,
    MethodDifference,
    MethodResults,
    SeedSummary,
    StageSummary,
)
from mmctr.studies.runner import Outcome, study_cells
from tests.helpers.damage import rewrite
from tests.helpers.tiny import finetune_values, start, write_config

SUMMARY = SeedSummary(0.6, 0.5, 0.7, [0.5, None, 0.7])
METRICS = {"gauc": SUMMARY, "auc": None, "log_loss": SUMMARY}
SEED_DIFFERENCE = Difference(12, Estimate(None, None), Estimate(0.02, (-0.01, 0.05)))
DIFFERENCE = MethodDifference(12, Estimate(0.01, (0.005, 0.02)), Estimate(0.03, None), {4: SEED_DIFFERENCE})


class Launcher:
    """Runs cells in forked processes and remembers them."""

    def __init__(self, kill_at_rename: int | None = None) -> None:
        self.calls: list[str] = []
        self.kill_at_rename = kill_at_rename

    def __call__(self, arguments: Sequence[str], log: Path) -> int:
        self.calls.append(str(Path(log).with_suffix("").relative_to(log.parents[2])))
        run = start(log.with_suffix(".output"), "finetune.train", *arguments, kill_at_rename=self.kill_at_rename)
        code = run.wait()
        log.write_text(run.text, encoding="utf-8")
        return code


def write_study(folder: Path, data: Path, change: Callable[[dict], None] = lambda values: None) -> Path:
    """Two methods on the toy folder, with two seeds; their configs stand beside the study."""
    write_config(folder / "ids.yaml", finetune_values(data))
    content = {"name": "table", "path": "unset", "dim": 8, "hidden": [8]}
    write_config(folder / "table.yaml", finetune_values(data, content))
    values = {
        "data": str(data),
        "protocols": {"held_out": {"name": "cold_items", "cold": 0.3, "test": 0.3}},
        "tables": {"factors": {"name": "factors"}},
        "set": ["task.max_history=8", "task.user_dim=2"],
        "methods": {
            "ids": {"config": str(folder / "ids.yaml")},
            "content": {"config": str(folder / "table.yaml"), "table": "factors", "set": ["task.user_dim=4"]},
        },
        "baseline": "ids",
        "seeds": [0, 3],
        "bootstrap": 50,
        "out": str(folder / "out"),
    }
    change(values)
    return write_config(folder / "study.yaml", values)


def predictions(folder: str | Path) -> dict[str, np.ndarray]:
    table = pq.read_table(Path(folder) / "predictions.parquet")
    return {name: table[name].to_numpy() for name in table.column_names}


def with_scores(out: Path, change: Callable[[str, int, dict], np.ndarray]) -> None:
    """Replace the scores of all runs of a study by those of (method, seed, columns)."""
    for path in out.glob("runs/*/*/seed*/predictions.parquet"):
        columns = predictions(path.parent)
        columns["score"] = change(path.parts[-3], int(path.parts[-2].removeprefix("seed")), columns).astype(np.float32)
        table = pq.read_table(path)
        place = table.column_names.index("score")
        pq.write_table(table.set_column(place, "score", [columns["score"]]), path)
        rewrite(path.with_name("metrics.json"), {})


def kept(study: StudyConfig, out: Path) -> list[Outcome]:
    return [Outcome(cell, "kept") for cell in study_cells(study, out)]


def study_config(**changes: Any) -> StudyConfig:
    """A study with an oracle whose files do not exist."""
    methods = {name: {"config": f"{name}.yaml"} for name in ("ids", "content", "true")}
    values = {"data": "toy", "protocols": {"p": {"name": "cold_items"}}, "methods": methods, "out": "out"}
    return StudyConfig.parse(values | {"baseline": "ids", "oracle": "true", "seeds": [4], "bootstrap": 20} | changes)


def method_results(**changes: Any) -> MethodResults:
    """Results of a method with every field filled."""
    values: dict[str, Any] = {
        "seeds": [4],
        "folders": [Path("out/runs/p/content/seed4")],
        "test": {split: METRICS for split in ("all", "warm", "cold")},
        "buckets": [BucketSummary("1-5", 1234, SUMMARY), BucketSummary(">100", None, None)],
        "validation": [EpochSummary(0.5, METRICS)],
        "difference": {"all": DIFFERENCE, "warm": None, "cold": DIFFERENCE},
        "gap_closed": GapClosed(0.4, (0.1, 0.8), [None]),
        "stages": {"cold": StageSummary(METRICS, {"auc": (0.5, 0.7), "gauc": None}, DIFFERENCE)},
    }
    return MethodResults(**(values | changes))
