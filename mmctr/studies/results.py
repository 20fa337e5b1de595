"""The numbers of a study: means over seeds, paired differences to the baseline, the share of a gap that is closed.

Everything is read from the run folders: metrics.json, log.jsonl, predictions.parquet and, of a `staged` protocol,
stages.parquet. A summary S of a value over
seeds is {"mean", "low", "high", "seeds": [one value a seed, None where it is not defined]}, or None without any value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from mmctr.evaluation.metrics import interval, paired_samples
from mmctr.files import read_json
from mmctr.reports.page import is_number
from mmctr.reports.run import SPLITS, Run, load_run, read_predictions
from mmctr.run_folder import RunFolder
from mmctr.studies.config import StudyConfig
from mmctr.studies.runner import Cell, Outcome

Scores = dict[tuple[str, int], np.ndarray]
"""by method and seed"""
METRICS = ("gauc", "auc", "log_loss")
MIN_USERS = 10
"""with clicked and other rows, that a star takes: where nothing differs at all, resampling two users marks every second
difference, three to six users one in five, and ten and more about one in ten or less"""
RULE = (
    "The difference of a method is its gAUC minus that of the baseline on the same rows, averaged over seeds, seed by "
    "seed. Its 95% interval comes from {samples} resamples: each draws users with replacement, the same for both "
    "methods and all seeds, and then as many seeds as there are, with replacement. A star marks an interval without "
    "zero over {users} or more users with clicked and other rows. With few seeds their spread is underestimated, so an "
    "interval that ends near zero decides nothing; and of many methods that change nothing some have a star by chance."
)


def study_results(study: StudyConfig, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What the finished cells of a study say, ready for JSON.

    {"study", "rule", "failed": [{"protocol", "method", "seed", "log", "said"}], "protocols": {protocol: {"rows":
    {"all", "warm", "cold"}, "methods": {method: R}}}}, where R of a method with a finished seed is {"seeds", "folders",
    "test": {split: {metric: S}}, "buckets": [{"clicks", "num_impressions", "gauc": S}], "validation": [{"epoch",
    metric: S}] of the epochs that all seeds reached, "difference": {split: D} or None, "gap_closed": G or None,
    "stages": {stage: {metric: S, "auc_ci": I, "gauc_ci": I, "difference": D or None}}}.

    Stages are those of a `staged` protocol, in order, else there are none; all their rows are of new items. I is the
    interval over users of one run, its ends averaged over seeds.

    D is {"num_users", "auc", "auc_ci", "gauc", "gauc_ci", "seeds": [{"seed", the same keys}]}, None where the split has
    no rows; its users are those with clicked and other rows. G is the difference on cold gAUC over that of the oracle,
    {"share", "share_ci", "seeds"}; None where there is no oracle, or it is not above the baseline beyond doubt. Raises
    ValueError for runs of other rows, naming them.
    """
    protocols = {}
    for protocol in study.protocols:
        cells = [one.cell for one in outcomes if one.cell.protocol == protocol and one.state != "failed"]
        protocols[protocol] = _protocol_results(study, cells)
    failed = [
        {**{key: getattr(one.cell, key) for key in ("protocol", "method", "seed")}, "log": str(one.cell.log)}
        | {"said": one.said}
        for one in outcomes
        if one.state == "failed"
    ]
    rule = RULE.format(samples=study.bootstrap, users=MIN_USERS)
    return {"study": study.model_dump(mode="json"), "rule": rule, "failed": failed, "protocols": protocols}


def summary(values: Sequence[Any]) -> dict[str, Any] | None:
    """S of one value a seed."""
    known = [float(value) for value in values if is_number(value)]
    if not known:
        return None
    seeds = [value if is_number(value) else None for value in values]
    return {"mean": sum(known) / len(known), "low": min(known), "high": max(known), "seeds": seeds}


def _protocol_results(study: StudyConfig, cells: Sequence[Cell]) -> dict[str, Any]:
    if not cells:
        return {"rows": dict.fromkeys(SPLITS, 0), "methods": {}}
    rows = _Rows(cells)
    methods = {}
    for name in study.methods:
        own = [cell for cell in cells if cell.method == name]
        if not own:
            continue
        runs = [load_run(cell.folder, name) for cell in own]
        methods[name] = {
            "seeds": [cell.seed for cell in own],
            "folders": [str(cell.folder) for cell in own],
            "test": {
                split: {metric: summary([run.metric(split, metric) for run in runs]) for metric in METRICS}
                for split in SPLITS
            },
            "buckets": _buckets(runs),
            "validation": _validation(runs),
            "difference": None if name == study.baseline else rows.differences(name, study),
            "gap_closed": rows.gap_closed(name, study),
            "stages": _stages(name, own, rows, study),
        }
    return {"rows": rows.counts(), "methods": methods}


def _buckets(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The rows of a protocol are the same for all seeds, and so are the buckets."""
    result = []
    for parts in zip(*(run.test["buckets"] for run in runs), strict=True):
        counts = {key: parts[0].get(key) for key in ("clicks", "num_impressions")}
        result.append(counts | {"gauc": summary([part.get("gauc") for part in parts])})
    return result


def _validation(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """By epoch. A mean over the seeds that happened to go on longer would be of other runs, so it stops before."""
    curves = [{round(line["epoch"], 4): line["validation"] for line in run.evaluations} for run in runs]
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    return [
        {"epoch": epoch} | {name: summary([curve[epoch].get(name) for curve in curves]) for name in METRICS}
        for epoch in shared
    ]


def _stages(name: str, cells: Sequence[Cell], rows: _Rows, study: StudyConfig) -> dict[str, Any]:
    runs = [read_json(cell.folder / "metrics.json").get("stages", {}) for cell in cells]
    result = {}
    for stage in rows.stages:
        found: dict[str, Any] = {key: summary([run[stage][key] for run in runs]) for key in METRICS}
        for key in ("auc_ci", "gauc_ci"):
            ends = [run[stage][key] for run in runs if run[stage][key]]
            found[key] = np.mean(ends, axis=0).tolist() if ends else None
        seeds = rows.shared_seeds(name, study.baseline)
        other = name != study.baseline and seeds
        found["difference"] = rows.difference(name, study, seeds, "all", rows.stages[stage]) if other else None
        result[stage] = found
    return result


class _Rows:
    """The test rows of a protocol, and the scores each run gives them."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.scores: Scores = {}
        self.stages: dict[str, Scores] = {}
        first: tuple[Cell, pa.Table] | None = None
        for cell in cells:
            table = read_predictions(cell.folder)
            if table is None:
                raise ValueError(
                    f"{cell.folder}: has no predictions.parquet; write it with `mmctr evaluate {cell.folder}`"
                )
            first = first or (cell, table)
            if not all(table[key].equals(first[1][key]) for key in ("user", "item", "label", "cold")):
                raise ValueError(
                    f"{cell.folder}: its test rows are not those of {first[0].folder}, as the dataset has changed "
                    f"between the two; delete the older one of them and start the study again"
                )
            self.scores[cell.method, cell.seed] = table["score"].to_numpy()
            if RunFolder(cell.folder).stages.is_file():
                staged = pyarrow.parquet.read_table(RunFolder(cell.folder).stages)
                for name in staged.column_names[3:]:  # behind user, item and label
                    self.stages.setdefault(name, {})[cell.method, cell.seed] = staged[name].to_numpy()
        assert first is not None
        self.labels, self.users = (first[1][key].to_numpy() for key in ("label", "user"))
        cold = first[1]["cold"].to_numpy().astype(bool)
        self.masks = {"all": np.ones_like(cold), "warm": ~cold, "cold": cold}
        self.num_users = {split: self._num_users(mask) for split, mask in self.masks.items()}

    def _num_users(self, mask: np.ndarray) -> int:
        """With clicked and other rows."""
        clicked, others = (self.users[mask & (self.labels == label)] for label in (1, 0))
        return len(np.intersect1d(clicked, others))

    def counts(self) -> dict[str, int]:
        return {split: int(mask.sum()) for split, mask in self.masks.items()}

    def shared_seeds(self, *methods: str) -> list[int]:
        """Seeds of which all these methods are finished."""
        seeds = dict.fromkeys(seed for _, seed in self.scores)
        return [seed for seed in seeds if all((method, seed) in self.scores for method in methods)]

    def samples(
        self, method: str, study: StudyConfig, seeds: Sequence[int], split: str, scores: Scores | None = None
    ) -> dict[str, Any]:
        """`paired_samples` of seeds, the baseline first; the users of a sample depend on the split alone."""
        mask, scores = self.masks[split], scores or self.scores
        a, b = ([scores[name, seed][mask] for seed in seeds] for name in (study.baseline, method))
        return paired_samples(self.labels[mask], a, b, self.users[mask], study.bootstrap)

    def differences(self, method: str, study: StudyConfig) -> dict[str, Any] | None:
        seeds = self.shared_seeds(method, study.baseline)
        return {split: self.difference(method, study, seeds, split) for split in self.masks} if seeds else None

    def difference(
        self, method: str, study: StudyConfig, seeds: Sequence[int], split: str, scores: Scores | None = None
    ) -> dict[str, Any] | None:
        """D of a split, of other scores than those of predictions.parquet if they are given."""
        if not self.masks[split].any():
            return None
        together: dict[str, Any] = {"num_users": self.num_users[split]}
        one_by_one: list[dict[str, Any]] = [{"seed": seed, **together} for seed in seeds]
        for metric, (values, samples) in self.samples(method, study, seeds, split, scores).items():
            together |= {metric: _number(values.mean()), f"{metric}_ci": _ends(_over_seeds(samples))}
            for place, one in enumerate(one_by_one):
                one |= {metric: _number(values[place]), f"{metric}_ci": _ends(samples[:, place])}
        return together | {"seeds": one_by_one}

    def gap_closed(self, method: str, study: StudyConfig) -> dict[str, Any] | None:
        if study.oracle is None or method in (study.baseline, study.oracle) or not self.masks["cold"].any():
            return None
        seeds = self.shared_seeds(method, study.baseline, study.oracle)
        if not seeds:
            return None
        own, gap = (self.samples(name, study, seeds, "cold")["gauc"] for name in (method, study.oracle))
        low = _ends(_over_seeds(gap[1]))
        if low is None or low[0] <= 0:
            return None
        # both see the same users and seeds in a sample, so their ratio is one of it
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn, each = _over_seeds(own[1]) / _over_seeds(gap[1]), own[0] / gap[0]
        share = _number(own[0].mean() / gap[0].mean())
        return {"share": share, "share_ci": _ends(drawn), "seeds": [_number(value) for value in each]}


def _over_seeds(samples: np.ndarray) -> np.ndarray:
    """(num_samples, S) -> (num_samples,): the mean over as many seeds, drawn with replacement in each sample."""
    count = samples.shape[1]
    drawn = np.random.default_rng(count).integers(0, count, samples.shape)
    return np.take_along_axis(samples, drawn, axis=1).mean(axis=1)


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _ends(samples: np.ndarray) -> list[float] | None:
    ends = interval(samples)
    return ends if np.isfinite(ends).all() else None
