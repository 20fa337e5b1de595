"""Ranker runs compared with the first run: as a text table, as JSON, and as one HTML page with opening sentences.

`mmctr.reports.run` reads the runs; `mmctr.reports.compare_page` renders the page.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmctr.evaluation.user_resampling import MIN_USERS
from mmctr.files import write_text
from mmctr.reports.compare_page import render_comparison
from mmctr.reports.page import NeighbourRow
from mmctr.reports.run import SPLITS, Interval, Run

TABLE_WIDTH = 100
"""columns of a text table"""


def comparison_table(runs: Sequence[Run]) -> str:
    """The test metrics as plain text, 100 columns wide: one row a run, then the differences to the first run."""
    table = Table(box=box.SIMPLE_HEAD, title="Test AUC and gAUC", title_justify="left", padding=(0, 1, 0, 0))
    table.add_column("run", overflow="fold")
    for metric in ("AUC", "gAUC"):
        for split in SPLITS:
            table.add_column(f"{metric}\n{split}", justify="right", no_wrap=True)
    table.add_column("gAUC cold\n95% interval", justify="right", no_wrap=True)
    for run in runs:
        cells = [_decimals(run.metric(split, metric)) for metric in ("auc", "gauc") for split in SPLITS]
        table.add_row(Text(run.name), *cells, _interval_text(run.estimate("cold", "gauc").interval))
    blocks: list[Table | Text] = [table, *map(Text, _user_lines(runs))]
    if len(runs) > 1:
        title = Text(f"\ngAUC minus the gAUC of {runs[0].name} (95% interval, paired by user)")
        second = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", padding=(0, 1, 0, 0))
        second.add_column("run", overflow="fold")
        for split in SPLITS:
            second.add_column(split, justify="right", no_wrap=True)
        for run in runs[1:]:
            second.add_row(Text(run.name), *(_difference_text(run, runs[0], split) for split in SPLITS))
        blocks += [second, *map(Text, row_notes(runs))]
    return plain_text(blocks)


def _user_lines(runs: Sequence[Run]) -> list[str]:
    """A line with the numbers of users with both labels, or one line a run where the numbers differ."""
    counts = {run.name: tuple(run.num_users(split) for split in SPLITS) for run in runs}
    lines = []
    for name, numbers in counts.items():
        words = ", ".join(f"{split} {'–' if n is None else f'{n:,}'}" for split, n in zip(SPLITS, numbers, strict=True))
        lines.append(f"users with both labels{'' if len(set(counts.values())) == 1 else f' ({name})'}: {words}")
    if any(n is not None and n < MIN_USERS for numbers in counts.values() for n in numbers):
        lines.append(f"no intervals from fewer than {MIN_USERS} users with both labels")
    return list(dict.fromkeys(lines))


def row_notes(runs: Sequence[Run]) -> list[str]:
    """A sentence for each run whose test rows are not those of the first run, or are not known to be."""
    notes = []
    for run in runs[1:]:
        if run.same_rows is False:
            notes.append(
                f"{run.name} was tested on other rows than {runs[0].name}: the two are not compared. Train both on the "
                f"same dataset and split."
            )
        elif run.same_rows is None:
            notes.append(
                f"{run.name} or {runs[0].name} has no predictions.parquet: whether the two have the same test rows is "
                f"not known."
            )
    return notes


def plain_text(blocks: Sequence[Table | Text]) -> str:
    """Tables and texts of rich as plain text without colours, one below the other, `TABLE_WIDTH` columns wide."""
    output = io.StringIO()
    console = Console(width=TABLE_WIDTH, file=output, color_system=None, highlight=False)
    for block in blocks:
        console.print(block)
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines()).strip("\n")


def comparison_json(runs: Sequence[Run]) -> dict[str, Any]:
    """Metrics and differences of the runs for `json.dumps`: {"runs": [{"name", "folder", "test", ...}, ...], "notes"}.

    "difference" is the paired difference to the first run by split, None for the first run and where rows differ;
    "notes" are sentences about runs with other test rows than the first run.
    """
    return {"runs": [run.to_json() for run in runs], "notes": row_notes(runs)}


def write_report(runs: Sequence[Run], path: str | Path, neighbours: Sequence[NeighbourRow] | None = None) -> None:
    """Write the HTML page of a comparison: opening sentences, metrics, plots, nearest neighbours of items, configs.

    The file appears whole or not at all. Raises ValueError for no runs and OSError when it cannot be written.
    """
    if not runs:
        raise ValueError("no runs to report on: give at least one run of load_runs")
    write_text(Path(path), render_comparison(runs, neighbours or (), result_sentences(runs)))


def result_sentences(runs: Sequence[Run]) -> list[str]:
    """The result in sentences, from the test gAUC and its intervals: on cold items, then on warm ones."""
    counts = [run.metric("all", "num_impressions") for run in runs]
    num_cold, first = runs[0].metric("cold", "num_impressions"), runs[0]
    sentences = [
        f"{len(runs)} runs are compared on {counts[0] or 0:,} impressions of the test period; all differences are "
        f"with the first run, {first.name}."
        if len(runs) > 1
        else f"One run, {first.name}, was tested on {counts[0] or 0:,} impressions of the test period.",
        f"{num_cold or 0:,} of these impressions are of cold items, which never occurred in training.",
    ]
    sentences += row_notes(runs)
    return [*sentences, *_split_sentences(runs, "cold"), *_split_sentences(runs, "warm")]


def _split_sentences(runs: Sequence[Run], split: str) -> list[str]:
    """The result on one split: the run with the highest gAUC, and how that run compares with the first run."""
    first = runs[0]
    scored = [(value, run) for run in runs if (value := run.metric(split, "gauc")) is not None]
    if not scored:
        return [f"On {split} items gAUC is not defined: no user has both a click and a non-click there."]
    value, best = max(scored, key=lambda pair: pair[0])
    interval = best.estimate(split, "gauc").interval
    interval_words = f" (95% interval {interval[0]:.4f} to {interval[1]:.4f})" if interval else ""
    num_users = best.num_users(split)
    if num_users is not None:
        interval_words += f" over {num_users:,} users with both labels"
    if len(scored) == 1:
        sentences = [f"On {split} items, {best.name} has a gAUC of {value:.4f}{interval_words}."]
    else:
        sentences = [f"On {split} items, {best.name} has the highest gAUC, {value:.4f}{interval_words}."]
    if interval and interval[0] <= 0.5 <= interval[1]:
        sentences.append("That interval contains 0.5: this is not told apart from a random order.")
    elif value <= 0.5:
        sentences.append("That is no better than a random order, 0.5.")
    if best is first and len(scored) > 1:
        second = max((pair for pair in scored if pair[1] is not first), key=lambda pair: pair[0])[1]
        clause = f"{second.name}, with {_difference_clause(second, first, split)}"
        sentences.append(f"No other run is above the first one here; the next is {clause}")
    elif best is not first and first.metric(split, "gauc") is not None:
        sentences.append(f"Against {first.name} that is {_difference_clause(best, first, split)}")
        near = [run.name for score, run in scored if run not in (best, first) and interval and score >= interval[0]]
        if near:
            sentences.append(f"Within the interval of {best.name} is also the gAUC of {' and of '.join(near)}.")
    return sentences


def _difference_clause(run: Run, first: Run, split: str) -> str:
    """The end of a sentence: a run's difference to the first run in gAUC, and whether the interval contains zero."""
    difference, interval = run.difference_from(first, split, "gauc")
    if run.same_rows is False:
        return "a number on other rows, so that no difference is given."
    clause = f"a difference of {difference or 0:+.4f}"
    if interval is None and run.same_rows is None:
        return f"{clause}, without an interval: whether the two runs have the same test rows is not known."
    if interval is None:
        return f"{clause}, without an interval: fewer than {MIN_USERS} users have both labels."
    clause += f" (paired 95% interval {interval[0]:+.4f} to {interval[1]:+.4f})"
    if interval[0] <= 0 <= interval[1]:
        return f"{clause}; the interval contains zero, so these test users do not tell the two apart."
    return f"{clause}; the interval does not contain zero."


def _decimals(value: float | None, sign: str = "") -> str:
    """A number with four decimals, a dash for None."""
    return "–" if value is None else format(value, f"{sign}.4f")


def _interval_text(interval: Interval | None, sign: str = "") -> str:
    """An interval in brackets, a dash for None."""
    return "–" if interval is None else f"[{_decimals(interval[0], sign)}, {_decimals(interval[1], sign)}]"


def _difference_text(run: Run, first: Run, split: str) -> Text:
    """A run's difference to the first run in gAUC, with the interval where it is known; words for other rows."""
    value, interval = run.difference_from(first, split, "gauc")
    # without the leading zeros three differences with their intervals fit 100 columns
    if run.same_rows is False:
        return Text("other rows")
    words = _decimals(value, "+") + (f" {_interval_text(interval, '+')}" if interval else "")
    return Text(words.replace("+0.", "+.").replace("-0.", "-."))
