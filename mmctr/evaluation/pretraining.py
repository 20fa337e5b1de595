"""What a pretraining run is judged by: validation items and clicks, and the numbers on them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from mmctr.data.batches import ItemBatch
from mmctr.data.content import Content
from mmctr.data.splits import Splits
from mmctr.encoders.heads import VariationalHead
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
"""validation pairs of clicks that are ranked"""
MAX_CANDIDATES = 20_000
"""items they are ranked among"""
MAX_PROMPTS = 256
"""values of an attribute told apart without training, the commonest"""


@dataclass(frozen=True)
class ValidationCoClicks:
    """Pairs of the validation part of the log: the item a user clicked last, and the one clicked then."""

    rows: np.ndarray
    """(n,) catalog rows of the candidates, among which are all anchors and targets"""
    anchors: np.ndarray
    """(P,) positions in `rows`"""
    targets: np.ndarray
    cold: np.ndarray
    """(P,) bool: the target has no training click"""

    @classmethod
    def make(cls, splits: Splits, has_content: np.ndarray) -> ValidationCoClicks | None:
        """None when there are no such pairs. Which are taken does not depend on the training seed."""
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
        at_anchor, at_target = np.searchsorted(candidates, anchor), np.searchsorted(candidates, target)
        return cls(candidates, at_anchor, at_target, splits.seen[target] == 0)


@dataclass(frozen=True)
class ValidationItems:
    """What the embeddings are judged by."""

    content: Content
    rows: np.ndarray
    """(m,) items with picture and text that training does not see"""
    attributes: dict[str, list[str | None]]
    """values of each"""
    coclicks: ValidationCoClicks | None = None


def evaluate_pretraining(task: PretrainTask, validation: ValidationItems, accelerator: Accelerator) -> dict[str, float]:
    """Numbers on validation items and clicks, all processes taking part:

    retrieval both ways; for each attribute how often neighbours share it, and the accuracy of naming it from the
    picture without training; `alignment`, `uniformity`, `modality_gap`; and, where there is a log, how often the item a
    user clicks next is among the 10 nearest of the last one, and the chance that it is nearer than another one, for
    warm items among warm and cold items among cold ones. With a head `head_...`: see `VariationalHead.numbers`; items
    are then near by the directions of their latents.
    """
    if not (task.shares_space or task.config.item_vector == "concat" or task.head is not None):
        return {"mean_recall": 0.0}  # two spaces, and no vector of both
    content, rows = validation.content, validation.rows
    images, has = embed_rows(task, content, rows, accelerator, "image")
    texts, _ = embed_rows(task, content, rows, accelerator, "text")
    pair = torch.from_numpy(images), torch.from_numpy(texts)
    both = torch.from_numpy(has)  # all of them have
    if task.head is None:
        items = task.item_vectors(pair[0], both, pair[1], both).numpy()
    else:
        items, in_nats = _head_numbers(task.head, *pair, accelerator)
    numbers = retrieval_both_ways(images, texts) if task.shares_space else {"mean_recall": 0.0}
    if task.shares_space:
        numbers |= {"alignment": alignment(images, texts), "modality_gap": modality_gap(images, texts)}
    if task.head is not None:
        numbers |= in_nats
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
        # cold items among cold ones: beside those that training pulled together, all cold ones stand back
        for name, mask in (("warm", ~clicks.cold), ("cold", clicks.cold)):
            of_kind = np.unique(clicks.targets[mask])
            if len(of_kind) > 1:
                anchors, targets = clicks.anchors[mask], clicks.targets[mask]
                numbers[f"coclick_auc_{name}"] = coclick_auc(vectors, anchors, targets, of_kind)
    return numbers


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """(n, D) scaled to unit norm; zeros stay."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)


@torch.inference_mode()
def _head_numbers(
    head: VariationalHead, images: Tensor, texts: Tensor, accelerator: Accelerator
) -> tuple[np.ndarray, dict[str, float]]:
    features = {"image": images.to(accelerator.device), "text": texts.to(accelerator.device)}
    has = {name: torch.ones(len(values), dtype=torch.bool, device=values.device) for name, values in features.items()}
    mu, _ = head.posterior(features, has)
    numbers = {f"head_{name}": value for name, value in head.numbers(features, has).items()}
    return unit_rows(mu.cpu().numpy()), numbers


def _prompts(values: list[str | None]) -> tuple[list[str], np.ndarray]:
    """The commonest values as prompts, and the (n,) prompt of each item, -1 for none."""
    known = [value for value in values if value]
    names, counts = np.unique(known, return_counts=True) if known else (np.empty(0, str), np.empty(0, int))
    kept = [str(name) for name in names[np.argsort(-counts, kind="stable")[:MAX_PROMPTS]]]
    place = {name: number for number, name in enumerate(kept)}
    return kept, np.array([place.get(value or "", -1) for value in values])


@torch.inference_mode()
def _text_vectors(task: PretrainTask, texts: list[str], accelerator: Accelerator) -> np.ndarray:
    items = ItemBatch(
        row=torch.zeros(len(texts), dtype=torch.int64),
        input_ids=task.encoder.tokenize(texts).long(),
        has_text=torch.ones(len(texts), dtype=torch.bool),
    )
    return task.text_features(items.to(accelerator.device)).cpu().numpy()
