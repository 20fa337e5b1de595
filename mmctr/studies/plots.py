"""The plots of a study: gAUC by clicks of the item, validation by epoch, warm-up by stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmctr.files import write_text
from mmctr.reports.page import is_number, number, short
from mmctr.reports.plots import Series, line_plot, nice_ticks, standalone

STAGE_METRICS = {"gauc": "gAUC", "auc": "AUC"}
"""what is shown by stage"""
EPOCH_METRICS = {"gauc": "Validation gAUC", "auc": "Validation AUC", "log_loss": "Validation log loss"}
"""what is shown by epoch"""


@dataclass(frozen=True)
class Plot:
    name: str
    """of its file: `clicks`, `epochs_auc`, `stages_gauc`, ..."""
    caption: str
    """HTML"""
    svg: str
    """as `line_plot` gives it: a paragraph instead where there is nothing to draw"""


def write_figures(results: dict[str, Any], folder: str | Path) -> list[Path]:
    """Write each plot of a study as FOLDER/PROTOCOL_NAME.svg, with its legend; where nothing is drawn there is none."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    written = []
    for protocol, found in results["protocols"].items():
        if not found["methods"]:
            continue
        for plot in [*stage_plots(found["methods"]), *plots(found)]:
            if plot.svg.startswith("<svg"):
                written.append(Path(folder) / f"{protocol}_{plot.name}.svg")
                write_text(written[-1], standalone(plot.svg, list(found["methods"])))
    return written


def plots(protocol: dict[str, Any], place: int = 0) -> list[Plot]:
    """A line a method, whiskers from seed to seed. `place` keeps the ids of two protocols on one page apart."""
    methods = protocol["methods"]
    names = [bucket["clicks"] for bucket in next(iter(methods.values()))["buckets"]]
    counts = [bucket["num_impressions"] for bucket in next(iter(methods.values()))["buckets"]]
    lines = []
    for style, (name, found) in enumerate(methods.items()):
        values = [bucket["gauc"] for bucket in found["buckets"]]
        shift = _beside(style, len(methods))
        lines.append(Series(name, style, [_point(at + shift, value) for at, value in enumerate(values)]))
    ticks = [
        (float(at), str(name), f"n = {short(n or 0)}") for at, (name, n) in enumerate(zip(names, counts, strict=True))
    ]
    title, x_range = "gAUC by clicks of the item in training", (-0.5, len(names) - 0.5)
    x_name = "clicks of the item in training (n: impressions)"
    svg = line_plot(f"clicks-{place}", title, _told(lines), lines, ticks, x_range, x_name, reference=0.5)
    drawn = [Plot("clicks", "<b>gAUC</b> on the test rows; the dashed line is a random order.", svg)]
    for metric, name in EPOCH_METRICS.items():
        caption = f"<b>{name}</b> after each epoch that all seeds reached."
        drawn.append(Plot(f"epochs_{metric}", caption, _epoch_plot(f"{metric}-{place}", name, metric, methods)))
    return drawn


def stage_plots(methods: dict[str, Any], place: int = 0) -> list[Plot]:
    """Of a `staged` protocol, else none; whiskers are intervals over users."""
    stages = stage_names(methods)
    ticks = [(float(at), stage, "") for at, stage in enumerate(stages)]
    drawn = []
    for metric, shown in (STAGE_METRICS if stages else {}).items():
        lines = []
        for style, (name, found) in enumerate(methods.items()):
            shift = _beside(style, len(methods))
            lines.append(Series(name, style, [(at + shift, *both) for at, both in enumerate(by_stage(found, metric))]))
        x_range = (-0.5, len(stages) - 0.5)
        uid, title = f"stages-{metric}-{place}", f"{shown} by stage"
        svg = line_plot(uid, title, _told(lines), lines, ticks, x_range, "stage")
        drawn.append(
            Plot(f"stages_{metric}", f"<b>{shown}</b> of the same test rows before and after each stage.", svg)
        )
    return drawn


def stage_names(methods: dict[str, Any]) -> list[str]:
    """Of a `staged` protocol, in order."""
    return list(next(iter(methods.values()))["stages"])


def by_stage(found: dict[str, Any], metric: str) -> list[tuple[float | None, tuple[float, float] | None]]:
    """A method's mean over seeds, and its interval, for each stage."""
    return [((one[metric] or {}).get("mean"), pair(one[f"{metric}_ci"])) for one in found["stages"].values()]


def epochs_of(methods: dict[str, Any]) -> list[float]:
    return sorted({point["epoch"] for found in methods.values() for point in found["validation"]})


def pair(ends: Sequence[float] | None) -> tuple[float, float] | None:
    return (ends[0], ends[1]) if ends else None


def _epoch_plot(uid: str, title: str, metric: str, methods: dict[str, Any]) -> str:
    lines = []
    for style, (name, found) in enumerate(methods.items()):
        lines.append(Series(name, style, [_point(point["epoch"], point[metric]) for point in found["validation"]]))
    epochs = epochs_of(methods)
    ends = (min([0.5, *epochs]), max([1.0, *epochs]) + 0.5)
    ticks = [(tick, short(tick), "") for tick in nice_ticks(*ends) if tick.is_integer()]
    return line_plot(uid, f"{title} by epoch", _told(lines), lines, ticks, ends, "epoch")


def _beside(style: int, count: int) -> float:
    """Methods stand beside each other, or their whiskers would hide one another."""
    return (style - (count - 1) / 2) * min(0.14, 0.7 / count)


def _told(lines: Sequence[Series]) -> str:
    return "; ".join(f"{line.name}: {', '.join(number(y) for _, y, _ in line.points)}" for line in lines)


def _point(x: float, found: dict[str, Any] | None) -> tuple[float, float | None, tuple[float, float] | None]:
    if found is None or not is_number(found["mean"]):
        return x, None, None
    return x, found["mean"], (found["low"], found["high"]) if len(found["seeds"]) > 1 else None
