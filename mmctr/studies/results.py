"""The results of a study from its run folders: means over seeds and paired differences to the baseline.

The files read are metrics.json, log.jsonl, predictions.parquet and, under a `staged` protocol, stages.parquet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmctr.reports.run import SPLITS, Interval, Run, finite, load_run
from mmctr.run_folder import RunFolder
from mmctr.studies.config import StudyConfig
from mmctr.studies.paired_rows import PairedRows
from mmctr.studies.result_types import (
    METRICS,
    PAIRED_METRICS,
    BucketSummary,
    EpochSummary,
    FailedCell,
    MethodResults,
    ProtocolResults,
    SeedSummary,
    StageSummary,
    StudyResults,
)
from mmctr.studies.runner import Cell, Outcome


def study_results(study: StudyConfig, outcomes: Sequence[Outcome]) -> StudyResults:
    """The results of the finished cells of a study, and the cells that failed.

    Raises ValueError for a run without predictions, and for runs of one protocol with different test rows.
    """
    protocols = {
        protocol: _protocol_results(
            study, [one.cell for one in outcomes if one.cell.protocol == protocol and one.state != "failed"]
        )
        for protocol in study.protocols
    }
    failed = [
        FailedCell(one.cell.protocol, one.cell.method, one.cell.seed, one.cell.log, one.reason)
        for one in outcomes
        if one.state == "failed"
    ]
    return StudyResults(study, failed, protocols)


def seed_summary(values: Sequence[Any]) -> SeedSummary | None:
    """The summary of one value a seed, None where no value is a finite number."""
    seeds = [finite(value) for value in values]
    defined = [float(value) for value in seeds if value is not None]
    return SeedSummary(sum(defined) / len(defined), min(defined), max(defined), seeds) if defined else None


def _protocol_results(study: StudyConfig, cells: Sequence[Cell]) -> ProtocolResults:
    """The results of the finished cells of one protocol."""
    if not cells:
        return ProtocolResults(dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0), {})
    rows = PairedRows.read(study, cells)
    methods = {}
    for name in study.methods:
        method_cells = [cell for cell in cells if cell.method == name]
        if method_cells:
            methods[name] = _method_results(name, method_cells, rows)
    return ProtocolResults(rows.num_rows(), {split: rows.num_users(split) for split in SPLITS}, methods)


def _method_results(name: str, cells: Sequence[Cell], rows: PairedRows) -> MethodResults:
    """The results of the finished cells of one method under one protocol."""
    runs = [load_run(cell.folder, name) for cell in cells]
    return MethodResults(
        seeds=[cell.seed for cell in cells],
        folders=[cell.folder for cell in cells],
        test={
            split: {metric: seed_summary([run.metric(split, metric) for run in runs]) for metric in METRICS}
            for split in SPLITS
        },
        buckets=_bucket_summaries(runs),
        validation=_epoch_summaries(runs),
        difference=rows.differences(name),
        gap_closed=rows.gap_closed(name),
        stages=_stage_summaries(name, cells, rows),
    )


def _bucket_summaries(runs: Sequence[Run]) -> list[BucketSummary]:
    """gAUC by click bucket; the runs have the same test rows, so the buckets are the same too."""
    return [
        BucketSummary(
            buckets[0].clicks,
            buckets[0].num_impressions,
            seed_summary([bucket.estimate("gauc").value for bucket in buckets]),
        )
        for buckets in zip(*(run.click_buckets() for run in runs), strict=True)
    ]


def _epoch_summaries(runs: Sequence[Run]) -> list[EpochSummary]:
    """Validation metrics of the epochs that all runs reached: a mean over the others would be of fewer runs."""
    curves = [{round(point.epoch, 4): point for point in run.evaluations if point.epoch is not None} for run in runs]
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    return [
        EpochSummary(
            epoch, {metric: seed_summary([curve[epoch].metric(metric) for curve in curves]) for metric in METRICS}
        )
        for epoch in shared
    ]


def _stage_summaries(name: str, cells: Sequence[Cell], rows: PairedRows) -> dict[str, StageSummary]:
    """Metrics of a method by stage of a `staged` protocol, from metrics.json and the scores in stages.parquet."""
    if not rows.stage_scores:
        return {}
    stages_of_runs = [RunFolder(cell.folder).read_metrics()["stages"] for cell in cells]
    result = {}
    for stage in rows.stage_scores:
        runs = [stages[stage] for stages in stages_of_runs]
        metrics = {metric: seed_summary([run[metric] for run in runs]) for metric in METRICS}
        intervals = {metric: _mean_interval([run[f"{metric}_ci"] for run in runs]) for metric in PAIRED_METRICS}
        result[stage] = StageSummary(metrics, intervals, rows.stage_difference(name, stage))
    return result


def _mean_interval(intervals: Sequence[list[float] | None]) -> Interval | None:
    """The ends of intervals averaged over the intervals that are defined, None without any."""
    defined = [ends for ends in intervals if ends]
    if not defined:
        return None
    low, high = np.mean(defined, axis=0).tolist()
    return low, high
