"""Results of a ranking run: the saved task, metrics.json and predictions.parquet."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow.parquet

from mmctr.data.interactions import Impressions
from mmctr.data.prepare import Dataset
from mmctr.data.splits import Splits
from mmctr.data.tables import one_array
from mmctr.evaluation.predict import full_report, predictions_table
from mmctr.files import replace_file
from mmctr.tasks import RankingTask
from mmctr.training.context import RunContext
from mmctr.training.stages import save_stages

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankingScores:
    """Click probabilities of a trained ranker.

    Args:
        validation: (n,) of the validation impressions.
        test: (n,) of the test impressions.
        stages: (n,) of the test impressions after each stage of a `staged` split, by the name of the stage.
    """

    validation: np.ndarray
    test: np.ndarray
    stages: dict[str, np.ndarray] = field(default_factory=dict)

    def with_stages(self, stages: dict[str, np.ndarray]) -> RankingScores:
        """A copy with the test scores after each stage; the scores before the first stage have the name `cold`."""
        return replace(self, stages={"cold": self.test, **stages})


def write_ranking_results(
    context: RunContext,
    task: RankingTask,
    dataset: Dataset,
    splits: Splits,
    scores: RankingScores,
    training: dict[str, Any],
) -> None:
    """Save the task, write the metrics and predictions, and log the test metrics; only the main process writes.

    Args:
        context: run folder and processes.
        task: the trained task.
        dataset: the dataset.
        splits: the split of the log.
        scores: click probabilities.
        training: result of the training, the entry `training` of metrics.json.
    """
    if not context.is_main_process:
        return
    folder = context.folder
    task.save(folder.path)
    metrics: dict[str, Any] = {
        "validation": _report(splits, splits.validation, scores.validation),
        "test": _report(splits, splits.test, scores.test),
    }
    predictions = predictions_table(
        splits.test,
        scores.test,
        splits.is_cold(splits.test),
        splits.clicks[splits.test.item],
        one_array(dataset.users["user_id"]),
        dataset.catalog.item_ids,
    )
    replace_file(folder.predictions, lambda path: pyarrow.parquet.write_table(predictions, path))
    if scores.stages:
        metrics["stages"] = save_stages(folder, splits.test, predictions, scores.stages)
    tables = task.sparsity() if task.config.ranker.weight_dim else {}
    sparsity = {"tables": tables} if task.config.ranker.weight_dim else {}
    folder.write_metrics({**metrics, "training": training, "split": splits.report, **sparsity})
    _log_metrics(metrics, tables)


def _report(splits: Splits, part: Impressions, scores: np.ndarray) -> dict[str, Any]:
    """The metrics of a part of the split."""
    return full_report(part, scores, splits.is_cold(part), splits.clicks[part.item])


def _log_metrics(metrics: dict[str, Any], tables: dict[str, dict[str, int]]) -> None:
    """Log the test metrics, and the numbers of features that penalties have set to zero."""
    for name, count in tables.items():
        logger.info(f"{name}: {count['rows'] - count['nonzero']} of {count['rows']} features dropped")
    lines = {f"test {name:4}": metrics["test"][name] for name in ("all", "warm", "cold")}
    for name, numbers in (lines | metrics.get("stages", {})).items():
        if numbers["auc"] is not None:
            gauc = numbers["gauc"] or float("nan")
            logger.info(
                f"{name:9}  AUC {numbers['auc']:.4f}  gAUC {gauc:.4f}  log loss {numbers['log_loss']:.4f}"
                f"  users with both labels {numbers['num_users']}"
            )
