"""The HTML page of a study: the values of the template `study.html`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from mmctr.files import write_text
from mmctr.reports.page import render_page
from mmctr.reports.plots import Plot
from mmctr.reports.run import SPLITS, Interval
from mmctr.studies.config import StudyConfig
from mmctr.studies.plots import STAGE_METRICS, protocol_plots, stage_plots
from mmctr.studies.result_types import Difference, GapClosed, ProtocolResults, StudyResults
from mmctr.studies.table import TEST_COLUMNS, share_text


@dataclass(frozen=True)
class MeanCell:
    """The mean of a test metric over seeds."""

    mean: float | None
    range: Interval | None
    """(lowest, highest) of several seeds."""
    is_best: bool
    """Whether no other of several methods has a better mean."""


@dataclass(frozen=True)
class MetricsRow:
    """Test metrics of one method."""

    style: int
    method: str
    cells: list[MeanCell]
    num_seeds: int


@dataclass(frozen=True)
class DifferenceRow:
    """The differences of one method, or of one of its seeds, to the baseline by split."""

    style: int
    method: str
    seed: int | None
    cells: list[Difference | None]
    gap_closed: GapClosed | None = None


@dataclass(frozen=True)
class ProtocolSection:
    """One protocol on the page."""

    name: str
    results: ProtocolResults
    metrics: list[MetricsRow]
    differences: list[DifferenceRow]
    seed_differences: list[DifferenceRow]
    stage_plots: list[Plot]
    plots: list[Plot]


def write_study_page(results: StudyResults, path: str | Path) -> None:
    """Write the HTML page of a study. The file appears whole or not at all; OSError when it cannot be written."""
    write_text(Path(path), render_study(results))


def render_study(results: StudyResults) -> str:
    """The HTML page of a study."""
    study = results.study
    return render_page(
        "study.html",
        "mmctr.studies",
        study=study,
        sentences=result_sentences(results),
        failed=results.failed,
        sections=[
            _protocol_section(name, protocol, position)
            for position, (name, protocol) in enumerate(results.protocols.items())
        ],
        splits=list(SPLITS),
        test_columns=list(TEST_COLUMNS),
        stage_metrics=STAGE_METRICS,
        rule=results.rule,
        config=yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
    )


def result_sentences(results: StudyResults) -> list[str]:
    """The result on cold items, a sentence a protocol."""
    return [_protocol_sentence(name, protocol, results.study) for name, protocol in results.protocols.items()]


def _protocol_sentence(name: str, protocol: ProtocolResults, study: StudyConfig) -> str:
    """The method with the highest gAUC on cold items besides baseline and oracle, and how it compares with these."""
    summaries = {method: results.test["cold"]["gauc"] for method, results in protocol.methods.items()}
    means = [
        (summary.mean, method)
        for method, summary in summaries.items()
        if summary and method not in (study.baseline, study.oracle)
    ]
    if not means:
        return f"{name}: no gAUC on cold items to compare."
    mean, best = max(means)
    rows, users = protocol.num_rows["cold"], protocol.num_users["cold"]
    sentence = (
        f"{name}: on {rows:,} rows of cold items ({users:,} users with both labels) {best} has the highest gAUC, "
    )
    sentence += f"{mean:.4f}"
    difference = protocol.methods[best].split_difference("cold")
    if difference and difference.gauc.value is not None and difference.gauc.interval:
        low, high = difference.gauc.interval
        sentence += f", {difference.gauc.value:+.4f} against {study.baseline} (95% interval {low:+.4f} to {high:+.4f})"
        sentence += "" if difference.is_marked() else ", which does not tell the two apart"
    gap_closed = protocol.methods[best].gap_closed
    if gap_closed:
        sentence += f"; that is {share_text(gap_closed)} of the way to {study.oracle}"
    return sentence + "."


def _protocol_section(name: str, protocol: ProtocolResults, position: int) -> ProtocolSection:
    """The tables and plots of one protocol; `position` is the number of the protocol in the study."""
    differences, seed_differences = _difference_rows(protocol)
    return ProtocolSection(
        name=name,
        results=protocol,
        metrics=_metrics_rows(protocol),
        differences=differences,
        seed_differences=seed_differences,
        stage_plots=stage_plots(protocol, position),
        plots=protocol_plots(protocol, position),
    )


def _metrics_rows(protocol: ProtocolResults) -> list[MetricsRow]:
    """Test metrics by method; the best mean of a column is marked among several methods."""
    best = {}
    for split, metric in TEST_COLUMNS.values():
        summaries = [results.test[split][metric] for results in protocol.methods.values()]
        means = [summary.mean for summary in summaries if summary]
        if len(protocol.methods) > 1 and means:
            best[split, metric] = min(means) if metric == "log_loss" else max(means)
    rows = []
    for style, (name, results) in enumerate(protocol.methods.items()):
        cells = []
        for split, metric in TEST_COLUMNS.values():
            summary = results.test[split][metric]
            if summary is None:
                cells.append(MeanCell(None, None, False))
            else:
                cells.append(MeanCell(summary.mean, summary.range, best.get((split, metric)) == summary.mean))
        rows.append(MetricsRow(style, name, cells, len(results.seeds)))
    return rows


def _difference_rows(protocol: ProtocolResults) -> tuple[list[DifferenceRow], list[DifferenceRow]]:
    """Differences to the baseline by method, and by method and seed."""
    rows, seed_rows = [], []
    for style, (name, results) in enumerate(protocol.methods.items()):
        overall = results.split_difference("all")
        if overall is None:
            continue
        differences = [results.split_difference(split) for split in SPLITS]
        rows.append(DifferenceRow(style, name, None, [*differences], results.gap_closed))
        for seed in overall.by_seed:
            cells = [difference and difference.by_seed[seed] for difference in differences]
            seed_rows.append(DifferenceRow(style, name, seed, cells))
    return rows, seed_rows
