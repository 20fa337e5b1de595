"""Finished ranking runs as reports read them: config, metrics, log and predictions."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet
import yaml

from mmctr.evaluation.metrics import paired_difference
from mmctr.files import read_json
from mmctr.reports.page import (
    is_number,
)

if TYPE_CHECKING:
    from mmctr.reports.run import Run


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


def finite_interval(ends: Sequence[float | None] | None) -> tuple[float, float] | None:
    """[low, high] as a tuple, None where it or one of its ends is missing or not finite."""
    low, high = ends if ends else (None, None)
    return (low, high) if is_number(low) and is_number(high) else None
