"""The splits of the logs that pretraining on behaviour has read, and the check that a ranker tests on none of their
training rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from mmctr.data.embeddings import read_identity
from mmctr.data.interactions import Interactions
from mmctr.data.prepare import Dataset
from mmctr.data.splits import SplitConfig, Splits
from mmctr.run_folder import RunFolder
from mmctr.runs.config import PretrainConfig

logger = logging.getLogger(__name__)

BehaviorSplits = list[dict[str, Any]]
"""[{"data": dataset folder, "split": the section `split`}, ...] of all logs that vectors have learned from"""


def behavior_splits(config: PretrainConfig, source: str | None) -> BehaviorSplits:
    """The splits that a pretraining run reads behaviour of: by objectives of the run, by the run of `init_from`, and by
    the teacher of a distillation.

    Args:
        config: the config of the run.
        source: the dataset folder that the run reads, or that a prepared folder was made from; None for shards.
    """
    objectives = config.task.objectives
    found: BehaviorSplits = []
    if objectives.read_behavior and source is not None:
        found.append({"data": str(Path(source).resolve()), "split": config.split.model_dump(mode="json")})
    if config.init_from is not None:
        found += behavior_splits_of_run(config.init_from)
    if objectives.distillation is not None:
        found += behavior_splits_of_table(objectives.distillation.path)
    return [entry for number, entry in enumerate(found) if entry not in found[:number]]


def behavior_splits_of_run(run: str | Path) -> BehaviorSplits:
    """The splits that a pretraining run has read behaviour of; those of the config for a run without a record."""
    folder = RunFolder(Path(run))
    if folder.metrics.is_file():
        recorded = folder.read_metrics().get("behavior_splits")
        if recorded is not None:
            return recorded
    if not folder.is_begun:  # `save_pretrained` leaves the config of the run out
        return []
    values = folder.read_config()
    objectives = (values.get("task") or {}).get("objectives") or {}
    if not (objectives.get("behavior") or objectives.get("query")):
        return []
    return [{"data": str(Path(values["data"]["path"]).resolve()), "split": values["split"]}]


def behavior_splits_of_table(path: str | Path) -> BehaviorSplits:
    """The splits that the run of an embedding folder has read behaviour of; none for a file of another program."""
    return read_identity(path).behavior_splits or []


def check_behavior_splits(known: BehaviorSplits, dataset: Dataset, splits: Splits, source: str) -> None:
    """Check that content vectors have not learned from the rows that a ranker is tested on, nor from rows of the items
    that are cold in the test.

    Args:
        known: the splits that the vectors have learned from.
        dataset: the dataset of the ranker.
        splits: the split of the ranker.
        source: key and path of the content, for the message.

    Raises:
        ValueError: pretraining has read test rows of the ranker, or rows of cold items.
    """
    folders = {str(Path(path).resolve()) for path in (dataset.catalog.root or dataset.report["source"], dataset.folder)}
    log = dataset.interactions
    parts = {"test": [splits.test, *splits.stages.values()], "validation": [splits.validation]}
    for entry in known:
        if entry["data"] not in folders:
            logger.warning(
                f"{source} was pretrained on behaviour of another dataset, {entry['data']}: whether test rows of this "
                f"run were among its training rows is not known"
            )
            continue
        config = TypeAdapter(SplitConfig).validate_python(entry["split"])
        read = np.zeros(len(log), bool)
        read[dataset.split(config).train.source] = True
        for name, impressions in parts.items():
            rows = np.concatenate([part.source for part in impressions])
            cold = np.unique(log.item[rows])
            cold = cold[splits.seen[cold] == 0]
            counts = {f"{name} rows": int(read[rows].sum()), f"rows of cold {name} items": _rows_of(log, read, cold)}
            if not any(counts.values()):
                continue
            text = (
                f"{source} was pretrained on behaviour under the split {_words(entry['split'])}, whose training rows "
                f"hold {' and '.join(f'{count:,} {what}' for what, count in counts.items())} of this run; give both "
                f"runs the same split"
            )
            if name == "test":
                raise ValueError(text)
            logger.warning(text)


def _rows_of(log: Interactions, rows: np.ndarray, items: np.ndarray) -> int:
    """The number of rows of the (n,) mask `rows` whose item is one of `items`."""
    return int(np.isin(log.item[rows], items).sum())


def check_content(paths: Sequence[str], run: str | None, dataset: Dataset, splits: Splits) -> None:
    """`check_behavior_splits` for the content of a ranker.

    Args:
        paths: embedding folders or files.
        run: a pretraining run whose encoder the ranker holds; None: no encoder.
        dataset: the dataset of the ranker.
        splits: the split of the ranker.

    Raises:
        ValueError: pretraining has read test rows of the ranker, or rows of cold items.
    """
    for path in paths:
        known = behavior_splits_of_table(path)
        check_behavior_splits(known, dataset, splits, f"task.embedder.content.path: {path}")
    if run is not None:
        check_behavior_splits(behavior_splits_of_run(run), dataset, splits, f"task.embedder.content.run: {run}")


def _words(split: dict[str, Any]) -> str:
    """A dumped split as on the command line."""
    return "{" + ", ".join(f"{key}: {value}" for key, value in split.items() if value is not None) + "}"
