"""The results of a study as frozen dataclasses, and the JSON they are written as."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmctr.evaluation.user_resampling import MIN_USERS
from mmctr.reports.run import Estimate, Interval
from mmctr.studies.config import StudyConfig

METRICS = ("gauc", "auc", "log_loss")
"""metrics of the test rows, of validation and of stages"""
PAIRED_METRICS = ("auc", "gauc")
"""metrics that methods are compared by, with intervals"""
RULE = (
    "The difference of a method is its gAUC minus that of the baseline on the same rows, averaged over seeds, seed by "
    "seed. Its 95% interval is mean ± t · sqrt(user variance + seed variance / seeds): the user variance from "
    "{samples} resamples of users, the same for both methods and all seeds, the seed variance from the seeds, and t "
    "with Satterthwaite's degrees of freedom. A star marks an interval without zero over {users} or more users with "
    "clicked and other rows. Of twenty methods that change nothing, one or two have a star by chance."
)


@dataclass(frozen=True)
class SeedSummary:
    """The values of a metric over training seeds."""

    mean: float
    low: float
    high: float
    seeds: list[float | None]
    """One value a seed, None where the metric is not defined; the other fields are of the values that are defined."""

    @property
    def range(self) -> Interval | None:
        """(lowest, highest) of several seeds, None for a single seed."""
        return (self.low, self.high) if len(self.seeds) > 1 else None


@dataclass(frozen=True)
class Difference:
    """A method's metrics minus those of the baseline on the same rows."""

    num_users: int
    """Users with clicked and other rows."""
    auc: Estimate
    gauc: Estimate

    def estimate(self, metric: str) -> Estimate:
        """The difference of "auc" or "gauc"."""
        return {"auc": self.auc, "gauc": self.gauc}[metric]

    def is_marked(self, metric: str = "gauc") -> bool:
        """Whether the interval of a metric leaves out zero and comes from at least `MIN_USERS` users."""
        interval = self.estimate(metric).interval
        return self.num_users >= MIN_USERS and interval is not None and not interval[0] <= 0 <= interval[1]

    def to_json(self) -> dict[str, Any]:
        """{"num_users", "auc", "auc_ci", "gauc", "gauc_ci"}."""
        result: dict[str, Any] = {"num_users": self.num_users}
        for metric in PAIRED_METRICS:
            value, interval = self.estimate(metric)
            result |= {metric: value, f"{metric}_ci": _interval_json(interval)}
        return result


@dataclass(frozen=True)
class MethodDifference(Difference):
    """A method's metrics minus those of the baseline: the mean over the seeds both have finished, and each seed."""

    by_seed: dict[int, Difference]

    def to_json(self) -> dict[str, Any]:
        """`Difference.to_json` and {"seeds": [{"seed", ...}]}."""
        seeds = [{"seed": seed, **difference.to_json()} for seed, difference in self.by_seed.items()]
        return super().to_json() | {"seeds": seeds}


@dataclass(frozen=True)
class GapClosed:
    """A method's difference on cold gAUC as a share of the oracle's difference."""

    share: float | None
    interval: Interval | None
    seeds: list[float | None]

    def to_json(self) -> dict[str, Any]:
        """{"share", "share_ci", "seeds"}."""
        return {"share": self.share, "share_ci": _interval_json(self.interval), "seeds": self.seeds}


@dataclass(frozen=True)
class BucketSummary:
    """gAUC on the test rows whose items have a number of training clicks in one range."""

    clicks: str
    num_impressions: int | None
    gauc: SeedSummary | None


@dataclass(frozen=True)
class EpochSummary:
    """Validation metrics after one epoch."""

    epoch: float
    metrics: dict[str, SeedSummary | None]

    def to_json(self) -> dict[str, Any]:
        """{"epoch", "gauc", "auc", "log_loss"}."""
        return {"epoch": self.epoch} | {metric: _summary_json(value) for metric, value in self.metrics.items()}


@dataclass(frozen=True)
class StageSummary:
    """Metrics of the test rows at one stage of a `staged` protocol; all these rows are of new items."""

    metrics: dict[str, SeedSummary | None]
    intervals: dict[str, Interval | None]
    """By paired metric, the interval over users of one run, its ends averaged over seeds."""
    difference: MethodDifference | None

    def estimate(self, metric: str) -> Estimate:
        """The mean over seeds of "auc" or "gauc", with the interval over users."""
        summary = self.metrics[metric]
        return Estimate(summary.mean if summary else None, self.intervals[metric])

    def to_json(self) -> dict[str, Any]:
        """{"gauc", "auc", "log_loss", "auc_ci", "gauc_ci", "difference"}."""
        result: dict[str, Any] = {metric: _summary_json(value) for metric, value in self.metrics.items()}
        result |= {f"{metric}_ci": _interval_json(self.intervals[metric]) for metric in PAIRED_METRICS}
        return result | {"difference": self.difference and self.difference.to_json()}


@dataclass(frozen=True)
class MethodResults:
    """The finished runs of one method under one protocol."""

    seeds: list[int]
    folders: list[Path]
    """Run folders, one a seed."""
    test: dict[str, dict[str, SeedSummary | None]]
    """Test metrics by split and metric."""
    buckets: list[BucketSummary]
    validation: list[EpochSummary]
    """Of the epochs that all seeds reached."""
    difference: dict[str, MethodDifference | None] | None
    """By split, the difference to the baseline, None for a split without rows; None instead of the dictionary for the
    baseline, and where no seed is finished for both."""
    gap_closed: GapClosed | None
    """None without an oracle, and where the oracle is not above the baseline beyond doubt."""
    stages: dict[str, StageSummary]
    """By stage in order; empty unless the protocol is `staged`."""

    def split_difference(self, split: str) -> MethodDifference | None:
        """The difference to the baseline on a split, None where it is not known."""
        return self.difference[split] if self.difference else None

    def to_json(self) -> dict[str, Any]:
        """{"seeds", "folders", "test", "buckets", "validation", "difference", "gap_closed", "stages"}."""
        return {
            "seeds": self.seeds,
            "folders": [str(folder) for folder in self.folders],
            "test": {
                split: {metric: _summary_json(value) for metric, value in metrics.items()}
                for split, metrics in self.test.items()
            },
            "buckets": [asdict(bucket) for bucket in self.buckets],
            "validation": [epoch.to_json() for epoch in self.validation],
            "difference": None
            if self.difference is None
            else {split: one and one.to_json() for split, one in self.difference.items()},
            "gap_closed": self.gap_closed and self.gap_closed.to_json(),
            "stages": {name: stage.to_json() for name, stage in self.stages.items()},
        }


@dataclass(frozen=True)
class ProtocolResults:
    """The results of all methods under one protocol."""

    num_rows: dict[str, int]
    """Test rows by split."""
    num_users: dict[str, int]
    """Users with clicked and other test rows by split."""
    methods: dict[str, MethodResults]
    """Methods with a finished run."""

    @property
    def stage_names(self) -> list[str]:
        """Stages of a `staged` protocol in order, none for other protocols."""
        return list(next(iter(self.methods.values())).stages) if self.methods else []

    @property
    def epochs(self) -> list[float]:
        """Epochs that some method has validation metrics of, in order."""
        return sorted({point.epoch for method in self.methods.values() for point in method.validation})

    def to_json(self) -> dict[str, Any]:
        """{"rows", "users", "methods"}."""
        methods = {name: method.to_json() for name, method in self.methods.items()}
        return {"rows": self.num_rows, "users": self.num_users, "methods": methods}


@dataclass(frozen=True)
class FailedCell:
    """A run of the study that failed."""

    protocol: str
    method: str
    seed: int
    log: Path
    reason: str
    """Last lines of the log, or the failed run that the run reads."""

    @property
    def name(self) -> str:
        """Protocol, method and seed for the reader."""
        return f"{self.protocol} / {self.method} / seed {self.seed}"

    def to_json(self) -> dict[str, Any]:
        """{"protocol", "method", "seed", "log", "said"}."""
        place = {"protocol": self.protocol, "method": self.method, "seed": self.seed}
        return place | {"log": str(self.log), "said": self.reason}


@dataclass(frozen=True)
class StudyResults:
    """The results of a study by protocol, and the runs that failed."""

    study: StudyConfig
    failed: list[FailedCell]
    protocols: dict[str, ProtocolResults]

    @property
    def rule(self) -> str:
        """How differences and intervals are computed, in sentences."""
        return RULE.format(samples=self.study.bootstrap, users=MIN_USERS)

    def to_json(self) -> dict[str, Any]:
        """The content of results.json: {"study", "rule", "failed", "protocols"}."""
        return {
            "study": self.study.model_dump(mode="json"),
            "rule": self.rule,
            "failed": [cell.to_json() for cell in self.failed],
            "protocols": {name: protocol.to_json() for name, protocol in self.protocols.items()},
        }


def _summary_json(summary: SeedSummary | None) -> dict[str, Any] | None:
    """{"mean", "low", "high", "seeds"}, None without any value."""
    return None if summary is None else asdict(summary)


def _interval_json(interval: Interval | None) -> list[float] | None:
    """[low, high], None where the interval is not defined."""
    return None if interval is None else list(interval)
