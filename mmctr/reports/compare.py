"""Ranker runs side by side: read run folders, compare them in the terminal, as JSON, and as one HTML page.

`load_runs` reads the folders and pairs their predictions with those of the first run, `comparison_table` and
`comparison_json` show the numbers, `write_report` writes the page (see `mmctr.reports.compare_page` for how it is drawn).
Every comparison is with the first run. M is the dictionary of `metrics.impression_metrics`.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmctr.evaluation.metrics import paired_difference
from mmctr.files import read_json, write_text
from mmctr.reports.compare_page import finite_interval, render_page
from mmctr.reports.page import NeighbourRow

__all__ = ["Run", "comparison_json", "comparison_table", "load_run", "load_runs", "read_predictions", "write_report"]

SPLITS = ("all", "warm", "cold")


@dataclass(frozen=True)
class Run:
    """A finished ranker run, as read from its folder."""

    name: str
    """Name of the folder, with as many of its parents as tell it from the other runs."""
    folder: Path
    config: dict[str, Any]
    test: dict[str, Any]
    """{"all": M, "warm": M, "cold": M, "buckets": [{"clicks": "1-5", **M}, ...]} of the test period."""
    validation: dict[str, Any]
    training: list[dict[str, Any]] = field(default_factory=list)
    """Lines of the log with a loss, by step: {"step", "epoch", "loss", ...}."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """Lines of the log with validation metrics, by step: {"step", "epoch", "validation": {"gauc", ...}}."""
    difference: dict[str, dict[str, Any] | None] | None = None
    """{"all" | "warm" | "cold": `paired_difference` to the first run, None without rows}; None where rows differ."""

    def metric(self, split: str, name: str) -> float | None:
        """A metric ("gauc") of a split of the test rows, None where it is missing or undefined."""
        value = (self.test.get(split) or {}).get(name)
        return value if isinstance(value, int | float) and math.isfinite(value) else None

    def interval(self, split: str, name: str) -> tuple[float, float] | None:
        """The 95% interval of a metric, (low, high), None where it is missing or undefined."""
        return finite_interval((self.test.get(split) or {}).get(f"{name}_ci"))

    def difference_from(self, first: Run, split: str, name: str) -> tuple[float | None, tuple[float, float] | None]:
        """(this run minus the first run, its paired 95% interval); no interval where the rows of the two differ."""
        paired = (self.difference or {}).get(split)
        if paired is not None and math.isfinite(paired[name]):
            return paired[name], finite_interval(paired[f"{name}_ci"])
        ours, theirs = self.metric(split, name), first.metric(split, name)
        return (None if ours is None or theirs is None else ours - theirs), None


def load_runs(paths: Sequence[str | Path], num_bootstrap: int = 200) -> list[Run]:
    """Read finished ranker runs; the first one is what the others are compared with.

    Runs whose `predictions.parquet` has the same user, item and label columns as the first run's get the intervals
    of their difference to it, from `num_bootstrap` resamples of users. Raises ValueError, naming the folder, what it
    lacks and the command that makes it, for a folder that is not a finished ranker run.
    """
    if not paths:
        raise ValueError("no run folders: name at least one, for example runs/toy_din_id")
    folders = [Path(path) for path in paths]
    runs = [load_run(folder, name) for folder, name in zip(folders, _short_names(folders), strict=True)]
    differences = _differences(folders, num_bootstrap)
    return [replace(run, difference=found) for run, found in zip(runs, differences, strict=True)]


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


def load_run(folder: Path, name: str) -> Run:
    """Read one finished ranker run. Errors as `load_runs`."""
    make = f"accelerate launch -m finetune.train CONFIG run_dir={folder}"
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; a ranker run is made by `{make}`")
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder}: not a run folder, it has no config.yaml; a ranker run is made by `{make}`")
    if not (folder / "metrics.json").is_file():
        raise ValueError(
            f"{folder}: not finished, it has no metrics.json; finish it with `{make}`, or measure what it has saved "
            f"with `mmctr evaluate {folder}`"
        )
    found = read_json(folder / "metrics.json")
    test = found.get("test") if isinstance(found, dict) else None
    test = test if isinstance(test, dict) else {}
    missing = [key for key in (*SPLITS, "buckets") if key not in test]
    if missing:
        raise ValueError(
            f"{folder}: not a ranker run, its metrics.json has no test.{missing[0]} (pretraining runs have none); "
            f"a ranker run is made by `{make}`"
        )
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / 'config.yaml'}: not valid YAML: {error}; make the run again: `{make}`") from None
    training, evaluations = _read_log(folder / "log.jsonl")
    return Run(name, folder, config or {}, test, found.get("validation") or {}, training, evaluations)


def _read_log(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and evaluation lines by step. A run may come without its log: the curves are then left out."""
    training: dict[int, dict[str, Any]] = {}
    evaluations: dict[int, dict[str, Any]] = {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for line in lines:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # a run that was killed leaves half a line, then goes on after it
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            continue
        # a resumed run logs the steps since its checkpoint again: the later line counts
        if isinstance(entry.get("validation"), dict):
            evaluations[entry["step"]] = entry
        elif isinstance(entry.get("loss"), int | float):
            training[entry["step"]] = entry
    return [training[step] for step in sorted(training)], [evaluations[step] for step in sorted(evaluations)]


def _short_names(folders: Sequence[Path]) -> list[str]:
    """Folder names, with as many parents as needed to tell them apart; a folder given twice gets a number."""
    parts = [folder.resolve().parts for folder in folders]
    names = []
    for position, own in enumerate(parts):
        depth = 1
        while depth < len(own) and any(other != own and other[-depth:] == own[-depth:] for other in parts):
            depth += 1
        again = parts[:position].count(own)
        names.append("/".join(own[-depth:]) + (f" ({again + 1})" if again else ""))
    return names


def _differences(folders: Sequence[Path], num_bootstrap: int) -> list[dict[str, dict[str, Any] | None] | None]:
    """Paired differences to the first run: None for itself and for runs with other rows or without predictions."""
    first = read_predictions(folders[0]) if len(folders) > 1 else None
    result: list[dict[str, dict[str, Any] | None] | None] = [None]
    for folder in folders[1:]:
        own = read_predictions(folder) if first is not None else None
        if first is None or own is None or not all(own[key].equals(first[key]) for key in ("user", "item", "label")):
            result.append(None)
            continue
        labels, users = first["label"].to_numpy(), first["user"].to_numpy()
        scores = [table["score"].to_numpy() for table in (first, own)]
        cold = first["cold"].to_numpy().astype(bool)
        found: dict[str, dict[str, Any] | None] = {}
        for split, rows in (("all", np.ones_like(cold)), ("warm", ~cold), ("cold", cold)):
            pair = (labels[rows], scores[0][rows], scores[1][rows], users[rows])
            found[split] = paired_difference(*pair, num_samples=num_bootstrap) if rows.any() else None
        result.append(found)
    return result


def read_predictions(folder: Path) -> Any | None:
    """The `predictions.parquet` of a run (user, item, label, score, cold) as a pyarrow Table, None where there is none.

    Raises ValueError naming the file when it cannot be read or lacks a column.
    """
    path = folder / "predictions.parquet"
    if not path.is_file():
        return None
    columns = ["user", "item", "label", "score", "cold"]
    try:
        return pyarrow.parquet.ParquetFile(path).read(columns).select(columns)
    except (pyarrow.ArrowException, KeyError) as error:
        raise ValueError(
            f"{path}: cannot read the columns {', '.join(columns)}: {error}; write it again with "
            f"`mmctr evaluate {folder}`"
        ) from None


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
