"""Line plots of the HTML pages as inline SVG.

They are drawn in the units of a 460-wide box that scales with its column, so that their letters stay readable on a
phone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from mmctr.reports.page import DASHES, NUM_STYLES, PLOT_CSS, text

WIDTH, DRAWN_HEIGHT, LEFT, RIGHT, TOP = 460, 208, 48, 12, 10  # of a plot and its margins, in SVG units


@dataclass(frozen=True)
class Series:
    """One line of a plot: points (x, y, (low, high) of the whisker or None), by x; y None leaves a gap."""

    name: str
    style: int
    points: list[tuple[float, float | None, tuple[float, float] | None]]
    marks: bool = True


def nice_ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers from low to high, which differ."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    return [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def line_plot(
    uid: str,
    title: str,
    description: str,
    series: Sequence[Series],
    ticks: Sequence[tuple[float, str, str]],
    x_range: tuple[float, float],
    x_name: str,
    y_range: tuple[float, float] | None = None,
    reference: float | None = None,
) -> str:
    """An SVG line plot; ticks are (x, label, second line of the label), reference a dashed horizontal line."""
    values = [value for line in series for _, y, ends in line.points if y is not None for value in (y, *(ends or ()))]
    if not values:
        return "<p class='empty'>Nothing to draw: not defined for these rows.</p>"
    low, high = y_range or (min(values), max(values))
    if reference is not None:
        low, high = min(low, reference), max(high, reference)
    pad = 0.06 * (high - low) or 0.02 * abs(high) or 0.02
    low, high = low - pad, high + pad

    def place_x(x: float) -> float:
        return LEFT + (x - x_range[0]) / (x_range[1] - x_range[0]) * (WIDTH - LEFT - RIGHT)

    def place_y(y: float) -> float:
        return TOP + (high - y) / (high - low) * DRAWN_HEIGHT

    bottom, parts = TOP + DRAWN_HEIGHT, []
    levels = nice_ticks(low, high)
    decimals = max(0, -math.floor(math.log10(levels[1] - levels[0]) + 1e-9)) if len(levels) > 1 else 3
    for level in levels:
        y = place_y(level)
        parts.append(f"<path class='grid' d='M{LEFT} {y:.1f}H{WIDTH - RIGHT}'/>")
        parts.append(f"<text class='end' x='{LEFT - 6}' y='{y + 4:.1f}'>{level:.{decimals}f}</text>")
    if reference is not None:
        parts.append(f"<path class='reference' d='M{LEFT} {place_y(reference):.1f}H{WIDTH - RIGHT}'/>")
    for x, label, below in ticks:
        parts.append(f"<text x='{place_x(x):.1f}' y='{bottom + 17}'>{text(label)}</text>")
        parts.append(
            f"<text class='minor' x='{place_x(x):.1f}' y='{bottom + 32}'>{text(below)}</text>" if below else ""
        )
    name_y = bottom + (52 if any(below for _, _, below in ticks) else 36)
    parts.append(f"<text class='minor' x='{(LEFT + WIDTH - RIGHT) / 2}' y='{name_y}'>{text(x_name)}</text>")
    for line in series:
        path, pen, whiskers, marks = [], "M", [], []
        for x, y, ends in line.points:
            if y is None:
                pen = "M"
                continue
            left, top = place_x(x), place_y(y)
            path.append(f"{pen}{left:.1f} {top:.1f}")
            pen = "L"
            if ends:
                whiskers += [f"M{left:.1f} {place_y(ends[0]):.1f}V{place_y(ends[1]):.1f}"]
                whiskers += [f"M{left - 3:.1f} {place_y(end):.1f}h6" for end in ends]
            marks.append(_mark(line.style, left, top) if line.marks else "")
        parts.append(
            f"<g class='{_style(line.style)}'><path class='line' d='{''.join(path)}'/>"
            f"<path class='whisker' d='{''.join(whiskers)}'/>{''.join(marks)}</g>"
        )
    return (
        f"<svg viewBox='0 0 {WIDTH} {name_y + 10}' role='img' aria-labelledby='{uid}-title {uid}-desc'>"
        f"<title id='{uid}-title'>{text(title)}</title><desc id='{uid}-desc'>{text(description)}</desc>"
        f"{''.join(parts)}</svg>"
    )


def _style(index: int) -> str:
    """Colour and dashes: 24 lines differ, and those of one colour have different marks as well."""
    return f"c{index % NUM_STYLES} d{index // NUM_STYLES % len(DASHES)}"


def _mark(index: int, x: float, y: float) -> str:
    """Circle, square, triangle, diamond, downward triangle, cross: runs differ without their colours too."""
    shape = (
        "m-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z", "m-4-4h8v8h-8z", "m0-5l5 9h-10z",
        "m0-5.5l5.5 5.5l-5.5 5.5l-5.5-5.5z", "m0 5l5-9h-10z", "m-4.5-1.5h3v-3h3v3h3v3h-3v3h-3v-3h-3z",
    )[(index + index // NUM_STYLES) % NUM_STYLES]  # fmt: skip
    return f"<path class='mark' d='M{x:.1f} {y:.1f}{shape}'/>"


def _key(index: int) -> str:
    """A piece of a line with its mark, 26 wide and 14 high."""
    return f"<path class='line' d='M1 7H25'/>{_mark(index, 13, 7)}"


def line_label(index: int, name: str) -> str:
    """The name of a line beside its mark, for legends and tables."""
    svg = f"<svg class='key {_style(index)}' viewBox='0 0 26 14' aria-hidden='true'>{_key(index)}</svg>"
    return f"<span class='run'>{svg}<span>{text(name)}</span></span>"


def standalone(svg: str, names: Sequence[str]) -> str:
    """An SVG file of a line plot: colours, the title above, and below a legend of the lines, by style."""
    height = float(re.findall(r"viewBox='0 0 \S+ (\S+)'", svg)[0])
    title = re.findall(r"<title[^>]*>(.*?)</title>", svg)[0]
    top, row, half = 24, 18, -(-len(names) // 2)
    legend = "".join(
        f"<g class='{_style(index)}' transform='translate({LEFT + index // half * (WIDTH - LEFT) // 2} "
        f"{top + height + index % half * row})'>{_key(index)}"
        f"<text class='start' x='32' y='11'>{text(name)}</text></g>"
        for index, name in enumerate(names)
    )
    drawn = svg.replace("<svg ", f"<svg y='{top}' width='{WIDTH}' height='{height:g}' ", 1)
    whole = top + height + half * row + 8
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {whole:g}' font-family='system-ui, sans-serif'>"
        f"<style>{PLOT_CSS}\nsvg text.start {{ text-anchor: start; }} .paper {{ fill: var(--page); }}</style>"
        f"<rect class='paper' width='{WIDTH}' height='{whole:g}'/><text x='{WIDTH / 2:g}' y='17'>{title}</text>{drawn}"
        f"{legend}</svg>\n"
    )


def figure(caption: str, content: str) -> str:
    """A plot under its caption; both are HTML."""
    return f"<figure><figcaption>{caption}</figcaption>{content}</figure>"
