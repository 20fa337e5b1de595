"""Line plots as SVG: inline in the HTML pages, and as files.

Coordinates are those of a box 460 units wide that scales with the column of the page, so that labels stay readable on
a phone. The style sheet of the plots is `templates/plots.css`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from markupsafe import Markup, escape

WIDTH, DRAWN_HEIGHT, LEFT, RIGHT, TOP = 460, 208, 48, 12, 10
"""width of a plot, height of the drawn area, and margins, in SVG units"""
NUM_COLOURS = 6
"""classes `.c0` to `.c5` of `templates/plots.css`; there are as many shapes of marks"""
NUM_DASHES = 4
"""classes `.d0` to `.d3` of `templates/plots.css`"""


Point = tuple[float, float | None, tuple[float, float] | None]
"""(x, y, (low, high) of the whisker or None) of a line; y None leaves a gap"""


@dataclass(frozen=True)
class Series:
    """One line of a plot: points by x."""

    name: str
    style: int
    """Number of the line among the lines of the page: chooses colour, dashes and mark."""
    points: list[Point]
    marks: bool = True


@dataclass(frozen=True)
class Plot:
    """A plot with a caption, as a page shows them and `standalone` writes them."""

    name: str
    """Name of the plot's file without protocol and suffix: `clicks`, `epochs_auc`, ..."""
    title: str
    """Start of the caption, in bold."""
    caption: str
    """Rest of the caption, which continues the title."""
    svg: Markup | None
    """Result of `line_plot`."""


def short_number(value: float) -> str:
    """1234567 as 1.2M, 12345 as 12k: for axes and counts."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:g}"


def nice_ticks(low: float, high: float) -> list[float]:
    """Three to seven distinct round numbers from low to high."""
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
) -> Markup | None:
    """An SVG line plot, None where no point has a value.

    Args:
        uid: prefix of the ids of the SVG's title and description, unique in a page.
        title, description: read aloud by screen readers.
        ticks: (x, label, second line of the label) along the horizontal axis.
        x_range: ends of the horizontal axis.
        x_name: name of the horizontal axis.
        y_range: ends of the vertical axis before a margin is added; None: the least and the greatest value.
        reference: height of a dashed horizontal line.
    """
    values = [value for line in series for _, y, ends in line.points if y is not None for value in (y, *(ends or ()))]
    if not values:
        return None
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
        parts.append(f"<text x='{place_x(x):.1f}' y='{bottom + 17}'>{escape(label)}</text>")
        parts.append(
            f"<text class='minor' x='{place_x(x):.1f}' y='{bottom + 32}'>{escape(below)}</text>" if below else ""
        )
    name_y = bottom + (52 if any(below for _, _, below in ticks) else 36)
    parts.append(f"<text class='minor' x='{(LEFT + WIDTH - RIGHT) / 2}' y='{name_y}'>{escape(x_name)}</text>")
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
            f"<g class='{_style_classes(line.style)}'><path class='line' d='{''.join(path)}'/>"
            f"<path class='whisker' d='{''.join(whiskers)}'/>{''.join(marks)}</g>"
        )
    return Markup(
        f"<svg viewBox='0 0 {WIDTH} {name_y + 10}' role='img' aria-labelledby='{uid}-title {uid}-desc'>"
        f"<title id='{uid}-title'>{escape(title)}</title><desc id='{uid}-desc'>{escape(description)}</desc>"
        f"{''.join(parts)}</svg>"
    )


def _style_classes(index: int) -> str:
    """CSS classes of colour and dashes: 24 lines differ, and lines of one colour have different marks as well."""
    return f"c{index % NUM_COLOURS} d{index // NUM_COLOURS % NUM_DASHES}"


def _mark(index: int, x: float, y: float) -> str:
    """Circle, square, triangle, diamond, downward triangle or cross: lines differ without colours too."""
    shape = (
        "m-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z", "m-4-4h8v8h-8z", "m0-5l5 9h-10z",
        "m0-5.5l5.5 5.5l-5.5 5.5l-5.5-5.5z", "m0 5l5-9h-10z", "m-4.5-1.5h3v-3h3v3h3v3h-3v3h-3v-3h-3z",
    )[(index + index // NUM_COLOURS) % NUM_COLOURS]  # fmt: skip
    return f"<path class='mark' d='M{x:.1f} {y:.1f}{shape}'/>"


def line_offset(style: int, num_lines: int) -> float:
    """How far a line's points stand to the right of a category at 0: the whiskers of lines would hide one another."""
    return (style - (num_lines - 1) / 2) * min(0.14, 0.7 / num_lines)


def _sample(index: int) -> str:
    """A piece of a line with its mark, 26 units wide and 14 high."""
    return f"<path class='line' d='M1 7H25'/>{_mark(index, 13, 7)}"


def line_key(index: int) -> Markup:
    """The SVG of a sample of a line, for legends and tables that name the line."""
    classes = _style_classes(index)
    return Markup(f"<svg class='key {classes}' viewBox='0 0 26 14' aria-hidden='true'>{_sample(index)}</svg>")


def plot_css() -> str:
    """The style sheet of the plots."""
    return (files("mmctr.reports") / "templates" / "plots.css").read_text(encoding="utf-8")


def standalone(plot: Markup, names: Sequence[str]) -> str:
    """The content of an SVG file: style sheet, title, the plot, and a legend of the lines in the order of styles."""
    svg = str(plot)  # replacements in Markup would escape what is put in
    height = float(re.findall(r"viewBox='0 0 \S+ (\S+)'", svg)[0])
    title = re.findall(r"<title[^>]*>(.*?)</title>", svg)[0]
    top, row, half = 24, 18, -(-len(names) // 2)
    legend = "".join(
        f"<g class='{_style_classes(index)}' transform='translate({LEFT + index // half * (WIDTH - LEFT) // 2} "
        f"{top + height + index % half * row})'>{_sample(index)}"
        f"<text class='start' x='32' y='11'>{escape(name)}</text></g>"
        for index, name in enumerate(names)
    )
    drawn = svg.replace("<svg ", f"<svg y='{top}' width='{WIDTH}' height='{height:g}' ", 1)
    whole = top + height + half * row + 8
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {whole:g}' font-family='system-ui, sans-serif'>"
        f"<style>{plot_css()}\nsvg text.start {{ text-anchor: start; }} .paper {{ fill: var(--page); }}</style>"
        f"<rect class='paper' width='{WIDTH}' height='{whole:g}'/><text x='{WIDTH / 2:g}' y='17'>{title}</text>{drawn}"
        f"{legend}</svg>\n"
    )


def histogram(counts: Sequence[int], low: float, high: float) -> Markup:
    """The SVG of a histogram of items with bins of equal width from low to high; some count is not 0."""
    width, height, highest = 300 / len(counts), 40, max(counts)
    bars = "".join(
        f"<rect x='{position * width:.1f}' y='{height - height * count / highest:.1f}' width='{width - 1:.1f}' "
        f"height='{height * count / highest:.1f}' fill='var(--p0)'/>"
        for position, count in enumerate(counts)
    )
    label = f"Items by value, from {low:.2f} to {high:.2f}"
    return Markup(
        f"<svg viewBox='0 0 300 {height}' width='300' height='{height}' role='img' aria-label='{label}'>{bars}</svg>"
    )
