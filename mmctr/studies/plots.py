"""The plots of a study: gAUC by training clicks of the item, validation by epoch, test metrics by warm-up stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from mmctr.files import write_text
from mmctr.reports.page import number_text
from mmctr.reports.plots import Plot, Point, Series, line_offset, line_plot, nice_ticks, short_number, standalone
from mmctr.reports.run import Estimate
from mmctr.studies.result_types import ProtocolResults, SeedSummary, StudyResults

STAGE_METRICS = {"gauc": "gAUC", "auc": "AUC"}
"""metrics shown by stage"""
EPOCH_METRICS = {"gauc": "Validation gAUC", "auc": "Validation AUC", "log_loss": "Validation log loss"}
"""metrics shown by epoch"""


def write_figures(results: StudyResults, folder: str | Path) -> list[Path]:
    """Write each plot of a study as FOLDER/PROTOCOL_NAME.svg with a legend; a plot without any value is left out."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    written = []
    for name, protocol in results.protocols.items():
        for plot in [*stage_plots(protocol), *protocol_plots(protocol)]:
            if plot.svg is not None:
                written.append(Path(folder) / f"{name}_{plot.name}.svg")
                write_text(written[-1], standalone(plot.svg, list(protocol.methods)))
    return written


def protocol_plots(protocol: ProtocolResults, position: int = 0) -> list[Plot]:
    """gAUC by training clicks and validation by epoch: a line a method, whiskers from the lowest seed to the highest.

    Args:
        position: number of the protocol in the study, which keeps the ids of two protocols on one page apart.
    """
    if not protocol.methods:
        return []
    return [
        _bucket_plot(protocol, position),
        *(
            Plot(
                f"epochs_{metric}",
                title,
                " after each epoch that all seeds reached.",
                _epoch_svg(f"{metric}-{position}", title, metric, protocol),
            )
            for metric, title in EPOCH_METRICS.items()
        ),
    ]


def stage_plots(protocol: ProtocolResults, position: int = 0) -> list[Plot]:
    """Test metrics by stage of a `staged` protocol, none for other protocols; whiskers are intervals over users."""
    stages = protocol.stage_names
    if not stages:
        return []
    ticks = [(float(at), stage, "") for at, stage in enumerate(stages)]
    plots = []
    for metric, metric_name in STAGE_METRICS.items():
        lines = []
        for style, (name, method) in enumerate(protocol.methods.items()):
            offset = line_offset(style, len(protocol.methods))
            estimates = [stage.estimate(metric) for stage in method.stages.values()]
            lines.append(Series(name, style, _points(estimates, offset)))
        svg = line_plot(
            f"stages-{metric}-{position}",
            f"{metric_name} by stage",
            _values_text(lines),
            lines,
            ticks,
            (-0.5, len(stages) - 0.5),
            "stage",
        )
        caption = " of the same test rows before and after each stage."
        plots.append(Plot(f"stages_{metric}", metric_name, caption, svg))
    return plots


def _bucket_plot(protocol: ProtocolResults, position: int) -> Plot:
    """gAUC by training clicks of the item."""
    buckets = next(iter(protocol.methods.values())).buckets
    lines = []
    for style, (name, method) in enumerate(protocol.methods.items()):
        offset = line_offset(style, len(protocol.methods))
        estimates = [_seed_estimate(bucket.gauc) for bucket in method.buckets]
        lines.append(Series(name, style, _points(estimates, offset)))
    ticks = [
        (float(at), bucket.clicks, f"n = {short_number(bucket.num_impressions or 0)}")
        for at, bucket in enumerate(buckets)
    ]
    svg = line_plot(
        f"clicks-{position}",
        "gAUC by clicks of the item in training",
        _values_text(lines),
        lines,
        ticks,
        (-0.5, len(buckets) - 0.5),
        "clicks of the item in training (n: impressions)",
        reference=0.5,
    )
    return Plot("clicks", "gAUC", " on the test rows; the dashed line is a random order.", svg)


def _epoch_svg(uid: str, title: str, metric: str, protocol: ProtocolResults) -> Markup | None:
    """The plot of a validation metric by epoch."""
    lines = []
    for style, (name, method) in enumerate(protocol.methods.items()):
        estimates = [(point.epoch, _seed_estimate(point.metrics[metric])) for point in method.validation]
        points = [(epoch, one.value, one.interval) for epoch, one in estimates]
        lines.append(Series(name, style, points))
    ends = (min([0.5, *protocol.epochs]), max([1.0, *protocol.epochs]) + 0.5)
    ticks = [(tick, short_number(tick), "") for tick in nice_ticks(*ends) if tick.is_integer()]
    return line_plot(uid, f"{title} by epoch", _values_text(lines), lines, ticks, ends, "epoch")


def _points(estimates: Sequence[Estimate], offset: float) -> list[Point]:
    """Points of a line over categories: estimates at 0, 1, 2, ... plus an offset."""
    return [(at + offset, one.value, one.interval) for at, one in enumerate(estimates)]


def _seed_estimate(summary: SeedSummary | None) -> Estimate:
    """The mean over seeds, with the range of several seeds as the interval."""
    return Estimate(None) if summary is None else Estimate(summary.mean, summary.range)


def _values_text(lines: Sequence[Series]) -> str:
    """The values of all lines, as the description of a plot."""
    return "; ".join(f"{line.name}: {', '.join(number_text(y) for _, y, _ in line.points)}" for line in lines)
