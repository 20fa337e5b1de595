"""Finished ranker runs as reports read them: config, metrics, training log and predictions of a run folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from mmctr.evaluation.metrics import paired_difference
from mmctr.evaluation.user_resampling import MIN_USERS
from mmctr.run_folder import AGAIN, RunFolder

SPLITS = ("all", "warm", "cold")
"""splits of the test impressions: all, those of items seen in training, those of items unseen in training"""

Interval = tuple[float, float]
"""(low, high) of a 95% interval"""


class Estimate(NamedTuple):
    """A metric, or a difference of metrics, with its 95% interval over resampled users."""

    value: float | None
    """None where the metric is missing or not defined."""
    interval: Interval | None = None
    """None where the interval is not known."""


@dataclass(frozen=True)
class PairedDifference:
    """How much better one run ranks than another on the same rows: see `evaluation.metrics.paired_difference`."""

    num_users: int
    """Users with both labels."""
    auc: float
    auc_ci: list[float]
    gauc: float
    gauc_ci: list[float]

    def estimate(self, metric: str) -> Estimate:
        """The difference of "auc" or "gauc"; the value is None where the difference is not defined, the interval also
        for fewer than `MIN_USERS` users."""
        value = getattr(self, metric)
        ends = finite_interval(getattr(self, f"{metric}_ci")) if self.num_users >= MIN_USERS else None
        return Estimate(value if math.isfinite(value) else None, ends)


@dataclass(frozen=True)
class TrainingPoint:
    """A line of the training log with a loss."""

    step: int
    loss: float


@dataclass(frozen=True)
class ValidationPoint:
    """A line of the training log with metrics of the validation period."""

    step: int
    epoch: float | None
    metrics: Mapping[str, float | None]

    def metric(self, name: str) -> float | None:
        """A metric ("gauc"), None where it is missing or not finite."""
        return finite(self.metrics.get(name))


@dataclass(frozen=True)
class ClickBucket:
    """Test impressions whose target items have a number of training clicks in one range, with their metrics."""

    clicks: str
    """The range: "0", "1-5", ">100"."""
    metrics: Mapping[str, Any]
    """The dictionary of `evaluation.metrics.impression_metrics`."""

    @property
    def num_impressions(self) -> int | None:
        """Number of impressions, None where it is missing."""
        return self.metrics.get("num_impressions")

    def estimate(self, metric: str) -> Estimate:
        """A metric ("gauc") with its interval, which is None for fewer than `MIN_USERS` users."""
        return _estimate(self.metrics, metric)


@dataclass(frozen=True)
class Run:
    """A finished ranker run, as read from its folder."""

    name: str
    """Name of the folder, with as many parent folders as tell the run from the other runs."""
    folder: Path
    config: Mapping[str, Any]
    """Content of config.yaml."""
    test: Mapping[str, Any]
    """`test` of metrics.json: {"all": M, "warm": M, "cold": M, "buckets": [{"clicks": "1-5", **M}, ...]}, where M is
    the dictionary of `evaluation.metrics.impression_metrics`."""
    validation: Mapping[str, Any]
    """`validation` of metrics.json."""
    training: list[TrainingPoint] = field(default_factory=list)
    """Training losses, by step."""
    evaluations: list[ValidationPoint] = field(default_factory=list)
    """Validation metrics, by step."""
    difference: dict[str, PairedDifference | None] | None = None
    """By split, the paired difference to the first run of a comparison, None for a split without rows; None instead of
    the dictionary for the first run and for runs on other rows."""
    same_rows: bool | None = None
    """Whether the test rows are those of the first run of a comparison; None for the first run, and where one of the
    two runs has no predictions, so that the rows are not known."""

    def metric(self, split: str, name: str) -> float | None:
        """A metric ("gauc") of a split of the test rows, None where it is missing or undefined."""
        return finite((self.test.get(split) or {}).get(name))

    def estimate(self, split: str, name: str) -> Estimate:
        """A metric ("gauc") of a split of the test rows, with its interval, None for fewer than `MIN_USERS` users."""
        return _estimate(self.test.get(split) or {}, name)

    def num_users(self, split: str) -> int | None:
        """Number of users with both labels on a split of the test rows; None where metrics.json does not have it."""
        count = self.metric(split, "num_users")
        return None if count is None else int(count)

    def click_buckets(self) -> list[ClickBucket]:
        """The test metrics by training clicks of the target item."""
        return [ClickBucket(str(bucket.get("clicks")), bucket) for bucket in self.test.get("buckets") or []]

    def difference_from(self, first: Run, split: str, name: str) -> Estimate:
        """This run's metric minus the metric of the first run: without an interval where the rows are not known or
        fewer than `MIN_USERS` users have both labels, without a value where the rows differ."""
        if self.same_rows is False:
            return Estimate(None)
        paired = (self.difference or {}).get(split)
        if paired is not None and paired.estimate(name).value is not None:
            return paired.estimate(name)
        value, first_value = self.metric(split, name), first.metric(split, name)
        return Estimate(None if value is None or first_value is None else value - first_value)

    def to_json(self) -> dict[str, Any]:
        """Name, folder, metrics and difference for `json.dumps`; numbers that are not finite become None."""
        difference = self.difference and {split: paired and asdict(paired) for split, paired in self.difference.items()}
        return {
            "name": self.name,
            "folder": str(self.folder),
            "test": _finite_json(self.test),
            "validation": _finite_json(self.validation),
            "difference": _finite_json(difference),
            "same_rows": self.same_rows,
        }


def _estimate(metrics: Mapping[str, Any], name: str) -> Estimate:
    """A metric of a dictionary of metrics, with its interval unless fewer than `MIN_USERS` users have both labels."""
    few = (finite(metrics.get("num_users", MIN_USERS)) or 0) < MIN_USERS
    return Estimate(finite(metrics.get(name)), None if few else finite_interval(metrics.get(f"{name}_ci")))


def finite(value: Any) -> float | None:
    """A number as it is, None for a value that is no number or not finite; bool does not count as a number."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return value
    return None


def finite_interval(ends: Sequence[float | None] | None) -> Interval | None:
    """[low, high] as a tuple, None where the interval or one of its ends is missing or not finite."""
    low, high = (finite(end) for end in ends) if ends else (None, None)
    return None if low is None or high is None else (low, high)


def _finite_json(value: Any) -> Any:
    """A JSON value with None for numbers that are not finite, which JSON lacks."""
    if isinstance(value, Mapping):
        return {str(key): _finite_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def load_runs(paths: Sequence[str | Path], num_bootstrap: int = 200) -> list[Run]:
    """Read finished ranker runs; the first one is what the others are compared with.

    Runs whose `predictions.parquet` has the same user, item and label columns as the first run's get the intervals
    of their difference to the first run, from `num_bootstrap` resamples of users. Raises ValueError, naming the folder,
    what the folder lacks and the command that makes it, for a folder that is not a finished ranker run.
    """
    if not paths:
        raise ValueError("no run folders: name at least one, for example runs/toy_din_id")
    folders = [Path(path) for path in paths]
    runs = [load_run(folder, name) for folder, name in zip(folders, _short_names(folders), strict=True)]
    differences = _differences(folders, num_bootstrap)
    return [
        replace(run, same_rows=same_rows, difference=difference)
        for run, (same_rows, difference) in zip(runs, differences, strict=True)
    ]


def load_run(folder: Path, name: str) -> Run:
    """Read one finished ranker run. Errors as `load_runs`."""
    make = f"accelerate launch -m finetune.train CONFIG run_dir={folder}"
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; a ranker run is made by `{make}`")
    run = RunFolder(folder)
    if not run.is_begun:
        raise ValueError(f"{folder}: not a run folder, it has no config.yaml; a ranker run is made by `{make}`")
    if not run.metrics.is_file():
        raise ValueError(
            f"{folder}: not finished, it has no metrics.json; finish it with `{make}`, or measure what it has saved "
            f"with `mmctr evaluate {folder}`"
        )
    metrics = run.read_metrics()
    test = metrics.get("test") if isinstance(metrics, dict) else None
    test = test if isinstance(test, dict) else {}
    missing = [key for key in (*SPLITS, "buckets") if key not in test]
    if missing:
        raise ValueError(
            f"{folder}: not a ranker run, its metrics.json has no test.{missing[0]} (pretraining runs have none); "
            f"a ranker run is made by `{make}`"
        )
    training, evaluations = _read_log(run.log)
    return Run(name, folder, run.read_config(), test, metrics.get("validation") or {}, training, evaluations)


def _read_log(path: Path) -> tuple[list[TrainingPoint], list[ValidationPoint]]:
    """Training losses and validation metrics by step; none of either for a run without a log file."""
    training: dict[int, TrainingPoint] = {}
    evaluations: dict[int, ValidationPoint] = {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for line in lines:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # a run that was killed leaves half a line, then goes on after it
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            continue
        step, loss = entry["step"], finite(entry.get("loss"))
        # a resumed run logs the steps since its checkpoint again: the later line counts
        if isinstance(entry.get("validation"), dict):
            evaluations[step] = ValidationPoint(step, finite(entry.get("epoch")), entry["validation"])
        elif loss is not None:
            training[step] = TrainingPoint(step, loss)
    return [training[step] for step in sorted(training)], [evaluations[step] for step in sorted(evaluations)]


def _short_names(folders: Sequence[Path]) -> list[str]:
    """Folder names, with as many parents as needed to tell them apart; a folder given twice gets a number."""
    all_parts = [folder.resolve().parts for folder in folders]
    names = []
    for position, parts in enumerate(all_parts):
        depth = 1
        while depth < len(parts) and any(other != parts and other[-depth:] == parts[-depth:] for other in all_parts):
            depth += 1
        earlier = all_parts[:position].count(parts)
        names.append("/".join(parts[-depth:]) + (f" ({earlier + 1})" if earlier else ""))
    return names


def _differences(
    folders: Sequence[Path], num_bootstrap: int
) -> list[tuple[bool | None, dict[str, PairedDifference | None] | None]]:
    """`Run.same_rows` and `Run.difference` of each run: whether the rows are those of the first run, and the paired
    differences by split."""
    first = read_predictions(folders[0]) if len(folders) > 1 else None
    result: list[tuple[bool | None, dict[str, PairedDifference | None] | None]] = [(None, None)]
    for folder in folders[1:]:
        table = read_predictions(folder) if first is not None else None
        if first is None or table is None:
            result.append((None, None))
            continue
        if not all(table[k].equals(first[k]) for k in ("user", "item", "label", "cold")):
            result.append((False, None))
            continue
        labels, users = first["label"].to_numpy(), first["user"].to_numpy()
        first_scores, scores = first["score"].to_numpy(), table["score"].to_numpy()
        cold = first["cold"].to_numpy().astype(bool)
        differences: dict[str, PairedDifference | None] = {}
        for split, rows in (("all", np.ones_like(cold)), ("warm", ~cold), ("cold", cold)):
            columns = (labels[rows], first_scores[rows], scores[rows], users[rows])
            differences[split] = (
                PairedDifference(**paired_difference(*columns, num_samples=num_bootstrap)) if rows.any() else None
            )
        result.append((True, differences))
    return result


def read_predictions(folder: Path) -> pa.Table | None:
    """The `predictions.parquet` of a run, columns user, item, label, score and cold; None for a run without the file.

    Raises ValueError naming the file when it is damaged, cannot be read or lacks a column.
    """
    run = RunFolder(folder)
    path = run.predictions
    if not run.has_results(path):
        return None
    columns = ["user", "item", "label", "score", "cold"]
    try:
        return pyarrow.parquet.ParquetFile(path).read(columns).select(columns)
    except (pa.ArrowException, KeyError) as error:
        raise ValueError(f"{path}: cannot read the columns {', '.join(columns)}: {error}; {AGAIN}") from None
