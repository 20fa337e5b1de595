"""The HTML page of `mmctr.reports.compare`: one file, inline SVG, no script, no resource from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from mmctr.reports.page import (
    NeighbourRow,
    document,
    is_number,
    neighbour_row,
    number,
    scrolling,
    short,
    spread,
    text,
)
from mmctr.reports.plots import Series, figure, line_label, line_plot, nice_ticks
from mmctr.reports.run import finite_interval

if TYPE_CHECKING:
    from mmctr.reports.run import Run

METRIC_NAMES = {"auc": "AUC", "gauc": "gAUC"}
SPLIT_NAMES = {"all": "All items", "warm": "Warm items (seen in training)", "cold": "Cold items (not in training)"}
MAX_CURVE_POINTS = 200


def render_page(runs: Sequence[Run], neighbours: Sequence[NeighbourRow], reading: Sequence[str]) -> str:
    """The page as text. `reading` are the sentences of its opening paragraph; missing values are dashes."""
    sections = [
        f"<h1>Ranker comparison</h1>\n<p class='lead'>{text(' '.join(reading))}</p>",
        "<h2>Test metrics</h2>\n" + _metrics_table(runs),
        "<h2>By clicks of the item in training</h2>\n" + _bucket_plots(runs),
        "<h2>Training</h2>\n" + "".join(_curves(run, position, runs) for position, run in enumerate(runs)),
    ]
    if neighbours:
        rows = "".join(neighbour_row(row) for row in neighbours)
        sections.append(f"<h2>Nearest neighbours</h2>\n<p>The framed item and the items nearest to it.</p>\n{rows}")
    configs = "".join(
        f"<details><summary>{text(run.name)}</summary><pre tabindex='0'>"
        f"{text(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True))}</pre></details>\n"
        for run in runs
    )
    sections.append(f"<h2>Configs</h2>\n{configs}")
    return document(f"Ranker comparison: {', '.join(run.name for run in runs)}", sections)


def _metrics_table(runs: Sequence[Run]) -> str:
    names = ["Run", "AUC", "gAUC", "gAUC vs. first", "Log loss", "Calibration", "Impressions", "Clicks"]
    head = "".join(f"<th scope='col'>{name}</th>" for name in names)
    bodies = []
    for split, heading in SPLIT_NAMES.items():
        rows = [f"<tr class='split'><th scope='rowgroup' colspan='{len(names)}'><span>{heading}</span></th></tr>"]
        values = [run.metric(split, "gauc") for run in runs]
        best = max((value for value in values if value is not None), default=None)
        for position, run in enumerate(runs):
            cells = []
            for metric in ("auc", "gauc"):
                value = run.metric(split, metric)
                shown = number(value)
                if metric == "gauc" and value == best is not None and len(runs) > 1:
                    shown = f"<strong>{shown}</strong>"
                cells.append(shown + spread(run.interval(split, metric)))
            difference, interval = run.difference_from(runs[0], split, "gauc") if position else (None, None)
            cells.append(number(difference, "+.4f") + spread(interval, "+.4f"))
            cells += [number(run.metric(split, "log_loss")), number(run.metric(split, "calibration"), ".3f")]
            cells += [number(run.metric(split, count), ",.0f") for count in ("num_impressions", "num_positives")]
            columns = "".join(f"<td>{cell}</td>" for cell in cells)
            rows.append(f"<tr><th scope='row'>{line_label(position, run.name)}</th>{columns}</tr>")
        bodies.append(f"<tbody>{''.join(rows)}</tbody>")
    table = f"<table><thead><tr>{head}</tr></thead>{''.join(bodies)}</table>"
    note = (
        "<p class='note'>In brackets: 95% intervals from resampled test users. They do not hold the spread between "
        "training seeds. gAUC is the AUC inside each user, weighted by impressions; 0.5 is a random order. Calibration "
        "is predicted over observed clicks; 1 is right. Bold: the highest gAUC. A dash: not defined or not known.</p>"
    )
    return scrolling("Test metrics", table) + note


def _bucket_plots(runs: Sequence[Run]) -> str:
    tables = [{str(bucket.get("clicks")): bucket for bucket in run.test.get("buckets") or []} for run in runs]
    names = list(dict.fromkeys(name for table in tables for name in table))
    if not names:
        return "<p>The runs hold no metrics by clicks.</p>"
    ticks = []
    for position, name in enumerate(names):
        counts = {table[name].get("num_impressions") for table in tables if name in table}
        count = counts.pop() if len(counts) == 1 else None
        ticks.append((float(position), name, f"n = {short(count)}" if is_number(count) else "n differs"))
    figures, details = [], []
    for metric in ("gauc", "auc"):
        series = []
        for run_position, table in enumerate(tables):
            # runs stand beside each other in a bucket, or their whiskers would hide one another
            shift = (run_position - (len(runs) - 1) / 2) * min(0.14, 0.7 / len(runs))
            points = []
            for position, name in enumerate(names):
                value = table.get(name, {}).get(metric)
                interval = finite_interval(table.get(name, {}).get(f"{metric}_ci"))
                points.append((position + shift, value if is_number(value) else None, interval))
            series.append(Series(runs[run_position].name, run_position, points))
        title = METRIC_NAMES[metric]
        told = "; ".join(
            f"{line.name}: " + ", ".join(f"{name} {number(p[1])}" for name, p in zip(names, line.points, strict=True))
            for line in series
        )
        about, x_range = f"{title} by clicks of the item in training", (-0.5, len(names) - 0.5)
        x_name = "clicks of the item in training (n: impressions)"
        plot = line_plot(f"bucket-{metric}", about, told, series, ticks, x_range, x_name, reference=0.5)
        figures.append(figure(f"<b>{title}</b> with 95% intervals; the dashed line is a random order.", plot))
        head = "".join(f"<th scope='col'>{text(name)}</th>" for name in (title, *names))
        rows = "".join(
            f"<tr><th scope='row'>{text(line.name)}</th>"
            + "".join(f"<td>{number(value)}{spread(interval)}</td>" for _, value, interval in line.points)
            + "</tr>"
            for line in series
        )
        details.append(f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>")
    legend = "".join(f"<li>{line_label(position, run.name)}</li>" for position, run in enumerate(runs))
    plots = f"<ul class='legend'>{legend}</ul>\n<div class='pair'>{''.join(figures)}</div>\n"
    numbers = scrolling("AUC and gAUC by clicks", "".join(details))
    return f"{plots}<details><summary>The numbers of the plots</summary>{numbers}</details>"


def _curves(run: Run, style: int, runs: Sequence[Run]) -> str:
    """Loss and validation gAUC of one run; the axes of steps and of gAUC are those of all runs, to be compared."""
    heading = f"<h3>{line_label(style, run.name)}</h3>\n"
    losses = _binned([(line["step"], line["loss"]) for line in run.training if is_number(line["loss"])])
    checks = _validation_points(run)
    if not losses and not checks:
        return heading + "<p>No log of the training.</p>\n"
    last = max([1, *(line["step"] for other in runs for line in (*other.training, *other.evaluations))])
    ticks = [(tick, short(tick), "") for tick in nice_ticks(0, last) if tick.is_integer()]
    figures = []
    if losses:
        told = f"loss {losses[0][1]:.4f} at step {losses[0][0]:.0f}, {losses[-1][1]:.4f} at step {losses[-1][0]:.0f}"
        series = Series(run.name, style, [(x, y, None) for x, y in losses], marks=len(losses) == 1)
        plot = line_plot(f"loss-{style}", f"Training loss of {run.name}", told, [series], ticks, (0, last), "step")
        figures.append(figure("<b>Training loss</b>, on its own scale.", plot))
    if checks:
        step, highest, epoch = max(checks, key=lambda point: point[1])
        told = f"highest {highest:.4f} at step {step:,}" + (f", epoch {epoch:g}" if is_number(epoch) else "")
        series = Series(run.name, style, [(x, y, None) for x, y, _ in checks])
        every = [y for other in runs for _, y, _ in _validation_points(other)]
        title = f"Validation gAUC of {run.name}"
        span = (min(every), max(every))
        plot = line_plot(f"validation-{style}", title, told, [series], ticks, (0, last), "step", y_range=span)
        figures.append(figure(f"<b>Validation gAUC</b>, {told}.", plot))
    return f"{heading}<div class='pair'>{''.join(figures)}</div>\n"


def _validation_points(run: Run) -> list[tuple[int, float, Any]]:
    lines = [(line["step"], line["validation"].get("gauc"), line.get("epoch")) for line in run.evaluations]
    return [line for line in lines if is_number(line[1])]


def _binned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_CURVE_POINTS means of neighbouring points: a log may have a million lines, a screen has not."""
    if len(points) <= MAX_CURVE_POINTS:
        return points
    return [tuple(part.mean(axis=0).tolist()) for part in np.array_split(np.array(points, float), MAX_CURVE_POINTS)]
