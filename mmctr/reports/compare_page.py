"""The HTML page of a comparison of ranker runs: the values of the template `compare.html`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from mmctr.reports.page import NeighbourRow, number_text, render_page
from mmctr.reports.plots import Plot, Series, line_offset, line_plot, nice_ticks, short_number
from mmctr.reports.run import Estimate, Run
from mmctr.tasks.sharing import without_paths

METRIC_NAMES = {"auc": "AUC", "gauc": "gAUC"}
SPLIT_NAMES = {"all": "All items", "warm": "Warm items (seen in training)", "cold": "Cold items (not in training)"}
MAX_CURVE_POINTS = 200
"""points of a loss curve: a log may have a million lines, a screen has not"""


@dataclass(frozen=True)
class MetricsRow:
    """Test metrics of one run on one split of the test rows."""

    style: int
    name: str
    auc: Estimate
    gauc: Estimate
    gauc_difference: Estimate
    """gAUC minus the gAUC of the first run; without a value for the first run."""
    log_loss: float | None
    calibration: float | None
    num_impressions: float | None
    num_clicks: float | None
    num_users: int | None
    """Users with both labels."""
    has_highest_gauc: bool
    """Whether no other of several runs has a higher gAUC."""


@dataclass(frozen=True)
class MetricsTable:
    """Test metrics of all runs on one split of the test rows."""

    heading: str
    rows: list[MetricsRow]


@dataclass(frozen=True)
class BucketRow:
    """A metric of one run in each click bucket."""

    name: str
    estimates: list[Estimate]


@dataclass(frozen=True)
class BucketMetric:
    """A metric of all runs by training clicks of the target item: the plot and the numbers."""

    plot: Plot
    rows: list[BucketRow]


def render_comparison(runs: Sequence[Run], neighbours: Sequence[NeighbourRow], sentences: Sequence[str]) -> str:
    """The HTML page that compares runs with the first run.

    Args:
        neighbours: sample items with the nearest items, none to leave the section out.
        sentences: text of the opening paragraph.
    """
    bucket_names, bucket_metrics = _bucket_metrics(runs)
    return render_page(
        "compare.html",
        runs=runs,
        sentences=sentences,
        metrics_tables=[_metrics_table(runs, split) for split in SPLIT_NAMES],
        bucket_names=bucket_names,
        bucket_metrics=bucket_metrics,
        training_plots=[_training_plots(run, style, runs) for style, run in enumerate(runs)],
        neighbours=neighbours,
        configs=[
            (run.name, yaml.safe_dump(without_paths(run.config), sort_keys=False, allow_unicode=True)) for run in runs
        ],
    )


def _config_text(config: dict[str, Any]) -> str:
    """A config as YAML, without the paths of this machine: pages are sent to others."""
    return yaml.safe_dump(without_paths(config), sort_keys=False, allow_unicode=True)


def _metrics_table(runs: Sequence[Run], split: str) -> MetricsTable:
    """The table of one split of the test rows."""
    values = [value for run in runs if (value := run.metric(split, "gauc")) is not None]
    highest = max(values) if values and len(runs) > 1 else None
    rows = [
        MetricsRow(
            style=style,
            name=run.name,
            auc=run.estimate(split, "auc"),
            gauc=run.estimate(split, "gauc"),
            gauc_difference=run.difference_from(runs[0], split, "gauc") if style else Estimate(None),
            log_loss=run.metric(split, "log_loss"),
            calibration=run.metric(split, "calibration"),
            num_impressions=run.metric(split, "num_impressions"),
            num_clicks=run.metric(split, "num_positives"),
            num_users=run.num_users(split),
            has_highest_gauc=highest is not None and run.metric(split, "gauc") == highest,
        )
        for style, run in enumerate(runs)
    ]
    return MetricsTable(SPLIT_NAMES[split], rows)


def _bucket_metrics(runs: Sequence[Run]) -> tuple[list[str], list[BucketMetric]]:
    """Names of all click buckets of the runs, and gAUC and AUC of the runs in these buckets; both empty without any."""
    buckets_of_runs = [{bucket.clicks: bucket for bucket in run.click_buckets()} for run in runs]
    names = list(dict.fromkeys(name for buckets in buckets_of_runs for name in buckets))
    if not names:
        return [], []
    ticks = []
    for position, name in enumerate(names):
        counts = {buckets[name].num_impressions for buckets in buckets_of_runs if name in buckets}
        count = counts.pop() if len(counts) == 1 else None
        ticks.append((float(position), name, "n differs" if count is None else f"n = {short_number(count)}"))
    metrics = []
    for metric in ("gauc", "auc"):
        series, rows = [], []
        for style, (run, buckets) in enumerate(zip(runs, buckets_of_runs, strict=True)):
            row = [buckets[name].estimate(metric) if name in buckets else Estimate(None) for name in names]
            offset = line_offset(style, len(runs))
            points = [(at + offset, one.value, one.interval) for at, one in enumerate(row)]
            series.append(Series(run.name, style, points))
            rows.append(BucketRow(run.name, row))
        title = METRIC_NAMES[metric]
        description = "; ".join(
            f"{row.name}: "
            + ", ".join(f"{name} {number_text(one.value)}" for name, one in zip(names, row.estimates, strict=True))
            for row in rows
        )
        svg = line_plot(
            f"bucket-{metric}",
            f"{title} by clicks of the item in training",
            description,
            series,
            ticks,
            x_range=(-0.5, len(names) - 0.5),
            x_name="clicks of the item in training (n: impressions)",
            reference=0.5,
        )
        caption = " with 95% intervals; the dashed line is a random order."
        metrics.append(BucketMetric(Plot(f"clicks_{metric}", title, caption, svg), rows))
    return names, metrics


def _training_plots(run: Run, style: int, runs: Sequence[Run]) -> list[Plot]:
    """Loss and validation gAUC of one run; the axes of steps and of gAUC are those of all runs, to be compared."""
    last = max([1, *(point.step for other in runs for point in (*other.training, *other.evaluations))])
    ticks = [(tick, short_number(tick), "") for tick in nice_ticks(0, last) if tick.is_integer()]
    plots = []
    losses = _averaged([(float(point.step), point.loss) for point in run.training])
    if losses:
        (first_step, first_loss), (last_step, last_loss) = losses[0], losses[-1]
        description = f"loss {first_loss:.4f} at step {first_step:.0f}, {last_loss:.4f} at step {last_step:.0f}"
        series = Series(run.name, style, [(step, loss, None) for step, loss in losses], marks=len(losses) == 1)
        svg = line_plot(
            f"loss-{style}", f"Training loss of {run.name}", description, [series], ticks, (0, last), "step"
        )
        plots.append(Plot("loss", "Training loss", ", on its own scale.", svg))
    validation = _validation_gauc(run)
    if validation:
        step, highest, epoch = max(validation, key=lambda point: point[1])
        description = f"highest {highest:.4f} at step {step:,}" + ("" if epoch is None else f", epoch {epoch:g}")
        series = Series(run.name, style, [(step, gauc, None) for step, gauc, _ in validation])
        values = [gauc for other in runs for _, gauc, _ in _validation_gauc(other)]
        svg = line_plot(
            f"validation-{style}",
            f"Validation gAUC of {run.name}",
            description,
            [series],
            ticks,
            (0, last),
            "step",
            y_range=(min(values), max(values)),
        )
        plots.append(Plot("validation", "Validation gAUC", f", {description}.", svg))
    return plots


def _validation_gauc(run: Run) -> list[tuple[int, float, float | None]]:
    """(step, gAUC, epoch) of the validation points that have a gAUC."""
    points = [(point.step, point.metric("gauc"), point.epoch) for point in run.evaluations]
    return [(step, gauc, epoch) for step, gauc, epoch in points if gauc is not None]


def _averaged(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MAX_CURVE_POINTS` means of successive points."""
    if len(points) <= MAX_CURVE_POINTS:
        return points
    parts = np.array_split(np.array(points, float), MAX_CURVE_POINTS)
    return [(float(part[:, 0].mean()), float(part[:, 1].mean())) for part in parts]
