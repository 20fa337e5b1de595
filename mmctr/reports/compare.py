"""Ranker runs side by side: read run folders, compare them in the terminal, as JSON, and as one HTML page.

`load_runs` reads the folders and pairs their predictions with those of the first run, `comparison_table` and
`comparison_json` show the numbers, `write_report` writes the page, which `mmctr.reports.compare_page` renders.
Every comparison is with the first run. M is the dictionary of `metrics.impression_metrics`.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmctr.files import write_text
from mmctr.reports.compare_page import render_page
from mmctr.reports.page import NeighbourRow
from mmctr.reports.run import SPLITS, Run, load_run, load_runs, read_predictions

__all__ = ["Run", "comparison_json", "comparison_table", "load_run", "load_runs", "read_predictions", "write_report"]


def comparison_table(runs: Sequence[Run]) -> str:
    """The test metrics as plain text, 100 columns wide: one row a run, then the differences to the first."""
    table = Table(box=box.SIMPLE_HEAD, title="Test AUC and gAUC", title_justify="left", padding=(0, 1, 0, 0))
    table.add_column("run", overflow="fold")
    for metric in ("AUC", "gAUC"):
        for split in SPLITS:
            table.add_column(f"{metric}\n{split}", justify="right", no_wrap=True)
    table.add_column("gAUC cold\n95% interval", justify="right", no_wrap=True)
    for run in runs:
        cells = [_decimals(run.metric(split, metric)) for metric in ("auc", "gauc") for split in SPLITS]
        table.add_row(Text(run.name), *cells, _interval_text(run.interval("cold", "gauc")))
    blocks = [table]
    if len(runs) > 1:
        title = Text(f"gAUC minus the gAUC of {runs[0].name} (95% interval, paired by user, where rows match)")
        second = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", padding=(0, 1, 0, 0))
        second.add_column("run", overflow="fold")
        for split in SPLITS:
            second.add_column(split, justify="right", no_wrap=True)
        for run in runs[1:]:
            second.add_row(Text(run.name), *(_difference_text(run, runs[0], split) for split in SPLITS))
        blocks.append(second)
    console = Console(width=100, file=io.StringIO(), color_system=None, highlight=False)
    for block in blocks:
        console.print(block)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines).strip("\n")


def comparison_json(runs: Sequence[Run]) -> dict[str, Any]:
    """What the table shows and more, ready for `json.dumps`: {"runs": [{"name", "folder", "test", ...}, ...]}.

    "difference" is the paired difference to the first run by split, None for the first run and where rows differ.
    """
    keys = ("name", "folder", "test", "validation", "difference")
    return {"runs": [{key: _plain(getattr(run, key)) for key in keys} for run in runs]}


def write_report(runs: Sequence[Run], path: str | Path, neighbours: Sequence[NeighbourRow] | None = None) -> None:
    """Write one HTML file that needs nothing else: reading, table, plots, nearest neighbours of items, configs.

    The file appears whole or not at all. Raises ValueError for no runs and OSError when it cannot be written.
    """
    if not runs:
        raise ValueError("no runs to report on: give at least one run of load_runs")
    write_text(Path(path), render_page(runs, neighbours or (), reading(runs)))


def reading(runs: Sequence[Run]) -> list[str]:
    """The result in plain sentences, made of the test gAUC and its intervals: on cold items, then on warm ones."""
    counts = [run.test["all"].get("num_impressions") for run in runs]
    cold, first = runs[0].test["cold"].get("num_impressions"), runs[0]
    words = [
        f"{len(runs)} runs are compared on {counts[0] or 0:,} impressions of the test period; all differences are "
        f"with the first run, {first.name}."
        if len(runs) > 1
        else f"One run, {first.name}, was tested on {counts[0] or 0:,} impressions of the test period.",
        f"{cold or 0:,} of these impressions are of cold items, which never occurred in training.",
    ]
    if len(set(counts)) > 1:
        words.append(
            f"The runs were tested on different numbers of impressions ({', '.join(f'{n or 0:,}' for n in counts)}), "
            f"so part of a difference may come from the rows and not from the run."
        )
    return [*words, *_reading_of(runs, "cold"), *_reading_of(runs, "warm")]


def _reading_of(runs: Sequence[Run], split: str) -> list[str]:
    first = runs[0]
    scored = [(value, run) for run in runs if (value := run.metric(split, "gauc")) is not None]
    if not scored:
        return [f"On {split} items gAUC is not defined: no user has both a click and a non-click there."]
    value, best = max(scored, key=lambda pair: pair[0])
    interval = best.interval(split, "gauc")
    spread = f" (95% interval {interval[0]:.4f} to {interval[1]:.4f})" if interval else ""
    if len(scored) == 1:
        words = [f"On {split} items, {best.name} has a gAUC of {value:.4f}{spread}."]
    else:
        words = [f"On {split} items, {best.name} has the highest gAUC, {value:.4f}{spread}."]
    if interval and interval[0] <= 0.5 <= interval[1]:
        words.append("That interval contains 0.5: this is not told apart from a random order.")
    elif value <= 0.5:
        words.append("That is no better than a random order, 0.5.")
    if best is first and len(scored) > 1:
        others = [pair for pair in scored if pair[1] is not first]
        rival = max(others, key=lambda pair: pair[0])[1]
        words.append(f"No other run is above the first one here; the next is {_lead(rival, first, split)}")
    elif best is not first and first.metric(split, "gauc") is not None:
        words.append(f"Against {first.name} that is {_lead(best, first, split, named=False)}")
        near = [run.name for score, run in scored if run not in (best, first) and interval and score >= interval[0]]
        if near:
            words.append(f"Within the interval of {best.name} is also the gAUC of {' and of '.join(near)}.")
    return words


def _lead(run: Run, first: Run, split: str, named: bool = True) -> str:
    """The end of a sentence: a difference to the first run and what its interval allows to say."""
    difference, interval = run.difference_from(first, split, "gauc")
    words = (f"{run.name}, with " if named else "") + f"a difference of {difference or 0:+.4f}"
    if interval is None:
        return f"{words}, without an interval: the predictions of the two runs are not of the same rows."
    words += f" (paired 95% interval {interval[0]:+.4f} to {interval[1]:+.4f})"
    if interval[0] <= 0 <= interval[1]:
        return f"{words}; the interval contains zero, so these test users do not tell the two apart."
    return f"{words}; the interval does not contain zero."


def _plain(value: Any) -> Any:
    """Paths as text and numbers that are not finite as None: JSON has neither."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _decimals(value: float | None, sign: str = "") -> str:
    return "–" if value is None else format(value, f"{sign}.4f")


def _interval_text(interval: tuple[float, float] | None, sign: str = "") -> str:
    return "–" if interval is None else f"[{_decimals(interval[0], sign)}, {_decimals(interval[1], sign)}]"


def _difference_text(run: Run, first: Run, split: str) -> Text:
    value, interval = run.difference_from(first, split, "gauc")
    # without the leading zeros three differences with their intervals fit 100 columns
    words = _decimals(value, "+") + (f" {_interval_text(interval, '+')}" if interval else "")
    return Text(words.replace("+0.", "+.").replace("-0.", "-."))
