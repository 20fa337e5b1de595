"""Evaluation of a pretraining run: validation items, validation clicks, and the metrics on both."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from mmctr.data.batches import ItemBatch
from mmctr.data.content import Content
from mmctr.data.splits import Splits
from mmctr.encoders.variational_head import VariationalHead
from mmctr.evaluation.predict import embed_rows
from mmctr.evaluation.probes import (
    alignment,
    coclick_auc,
    coclick_recall,
    modality_gap,
    neighbour_agreement,
    retrieval_both_ways,
    uniformity,
    zero_shot_accuracy,
)
from mmctr.tasks import PretrainTask

MAX_COCLICKS = 5000
"""largest number of pairs of clicks that are ranked"""
MAX_CANDIDATES = 20_000
"""number of items among which the targets of the pairs are ranked"""
MAX_PROMPTS = 256
"""largest number of values of an attribute in zero-shot classification, the most frequent values"""


@dataclass(frozen=True)
class ValidationCoClicks:
    """Pairs of items from the validation part of the log: a clicked item and the latest item clicked before."""

    rows: np.ndarray
    """(n,) catalog rows of the candidates, all anchors and targets included"""
    anchors: np.ndarray
    """(P,) positions in `rows` of the items clicked before"""
    targets: np.ndarray
    """(P,) positions in `rows` of the clicked items"""
    cold: np.ndarray
    """(P,) bool, whether the target has no training click"""

    @classmethod
    def make(cls, splits: Splits, has_content: np.ndarray) -> ValidationCoClicks | None:
        """The pairs of a split, which do not depend on the training seed; None where the split has no pairs.

        Args:
            splits: the split of the log.
            has_content: (N,) bool, the items of the catalog with content.
        """
        part = splits.validation
        rows = np.flatnonzero((part.label == 1) & (part.history_end > part.history_start))
        anchor, target = part.history[part.history_end[rows] - 1], part.item[rows]
        usable = has_content[anchor] & has_content[target] & (anchor != target)
        anchor, target = anchor[usable].astype(np.int64), target[usable].astype(np.int64)
        if not len(anchor):
            return None
        rng = np.random.default_rng(len(anchor))
        picked = np.sort(rng.permutation(len(anchor))[:MAX_COCLICKS])
        anchor, target = anchor[picked], target[picked]
        needed = np.unique(np.concatenate([anchor, target]))
        others = rng.permutation(np.setdiff1d(np.flatnonzero(has_content), needed))
        candidates = np.sort(np.concatenate([needed, others[: max(0, MAX_CANDIDATES - len(needed))]]))
        anchors, targets = np.searchsorted(candidates, anchor), np.searchsorted(candidates, target)
        return cls(candidates, anchors, targets, splits.seen[target] == 0)


@dataclass(frozen=True)
class ValidationItems:
    """The validation items and clicks of a pretraining run."""

    content: Content
    """pictures and texts of the catalog"""
    rows: np.ndarray
    """(m,) catalog rows of items with picture and text that are not in training"""
    attributes: dict[str, list[str | None]]
    """m values, of the items `rows`, by the name of the attribute"""
    coclicks: ValidationCoClicks | None = None
    """pairs of clicks; None without a log"""


def evaluate_pretraining(task: PretrainTask, validation: ValidationItems, accelerator: Accelerator) -> dict[str, float]:
    """Validation metrics of a pretraining task; all processes call this.

    Args:
        task: the task, in evaluation mode.
        validation: validation items and clicks.
        accelerator: processes and device.

    Returns:
        Metrics by name: retrieval of texts by pictures and of pictures by texts; for each attribute the fraction of
        neighbours with the same value, and the accuracy of zero-shot classification of pictures; `alignment`,
        `uniformity` and `modality_gap`; with a log, `coclick_recall`, the fraction of pairs whose target is among the
        10 nearest items of the anchor, and `coclick_auc_warm` and `coclick_auc_cold`, the probability that the target
        is nearer to the anchor than another warm or cold item; with a head the metrics of `VariationalHead.numbers`
        with the prefix `head_`, and neighbours by the direction of the latents. `mean_recall` is 0 where the towers
        share no space, and has no meaning then (`reported`).
    """
    if not (task.shares_space or task.config.item_vector == "concat" or task.head is not None):
        return {"mean_recall": 0.0}  # features are in two spaces, and items have no common vector
    content, rows = validation.content, validation.rows
    images, has = embed_rows(task, content, rows, accelerator, "image")
    texts, _ = embed_rows(task, content, rows, accelerator, "text")
    pair = torch.from_numpy(images), torch.from_numpy(texts)
    both = torch.from_numpy(has)  # all validation items have picture and text
    if task.head is None:
        items = task.item_vectors(pair[0], both, pair[1], both).numpy()
    else:
        items, head_metrics = _head_metrics(task.head, *pair, accelerator)
    numbers = retrieval_both_ways(images, texts) if task.shares_space else {"mean_recall": 0.0}
    if task.shares_space:
        numbers |= {"alignment": alignment(images, texts), "modality_gap": modality_gap(images, texts)}
    if task.head is not None:
        numbers |= head_metrics
    numbers["uniformity"] = uniformity(items)
    for name, values in validation.attributes.items():
        numbers[f"neighbours_share_{name}"] = neighbour_agreement(items, values)
        prompts, labels = _prompts(values)
        if len(prompts) > 1 and task.shares_space:
            numbers[f"zero_shot_{name}"] = zero_shot_accuracy(images, _text_vectors(task, prompts, accelerator), labels)
    if validation.coclicks is not None:
        clicks = validation.coclicks
        vectors = unit_rows(embed_rows(task, content, clicks.rows, accelerator)[0])
        hit = coclick_recall(vectors, clicks.anchors, clicks.targets)
        numbers["coclick_recall"] = float(hit.mean())
        # cold items are compared with cold items: training has pulled warm items together, so that cold items are far
        for name, mask in (("warm", ~clicks.cold), ("cold", clicks.cold)):
            candidates = np.unique(clicks.targets[mask])
            if len(candidates) > 1:
                anchors, targets = clicks.anchors[mask], clicks.targets[mask]
                numbers[f"coclick_auc_{name}"] = coclick_auc(vectors, anchors, targets, candidates)
    return numbers


def reported(task: PretrainTask, numbers: dict[str, float]) -> dict[str, float]:
    """The metrics without `mean_recall` where the towers share no space: `fit` then chooses weights by a constant, not
    by a measurement.

    Args:
        task: the task.
        numbers: the result of `evaluate_pretraining`.
    """
    return {name: value for name, value in numbers.items() if name != "mean_recall" or task.shares_space}


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """The rows of (n, D) scaled to unit norm; rows of zeros stay zeros."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)


@torch.inference_mode()
def _head_metrics(
    head: VariationalHead, images: Tensor, texts: Tensor, accelerator: Accelerator
) -> tuple[np.ndarray, dict[str, float]]:
    """The means of the latents (m, Z) of items, scaled to unit norm, and the metrics of the head."""
    features = {"image": images.to(accelerator.device), "text": texts.to(accelerator.device)}
    has = {name: torch.ones(len(values), dtype=torch.bool, device=values.device) for name, values in features.items()}
    mu, _ = head.posterior(features, has)
    numbers = {f"head_{name}": value for name, value in head.numbers(features, has).items()}
    return unit_rows(mu.cpu().numpy()), numbers


def _prompts(values: list[str | None]) -> tuple[list[str], np.ndarray]:
    """The most frequent values as prompts, and the number (n,) of the prompt of each item, -1 for no prompt."""
    known = [value for value in values if value]
    names, counts = np.unique(known, return_counts=True) if known else (np.empty(0, str), np.empty(0, int))
    prompts = [str(name) for name in names[np.argsort(-counts, kind="stable")[:MAX_PROMPTS]]]
    numbers = {name: number for number, name in enumerate(prompts)}
    return prompts, np.array([numbers.get(value or "", -1) for value in values])


@torch.inference_mode()
def _text_vectors(task: PretrainTask, texts: list[str], accelerator: Accelerator) -> np.ndarray:
    """Unit-norm features (n, D) of texts."""
    items = ItemBatch(
        row=torch.zeros(len(texts), dtype=torch.int64),
        input_ids=task.encoder.tokenize(texts).long(),
        has_text=torch.ones(len(texts), dtype=torch.bool),
    )
    return task.text_features(items.to(accelerator.device)).cpu().numpy()
