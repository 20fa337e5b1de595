"""Inference with a task: click probabilities of impressions, and item vectors of a catalog."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from mmctr.data.batches import BehaviorBatch, ItemBatch
from mmctr.data.content import Content, ItemContent
from mmctr.data.interactions import Impressions
from mmctr.evaluation.metrics import auc, gauc, log_loss, ranking_report
from mmctr.features.behavior_collator import BehaviorCollator
from mmctr.tasks import PretrainTask

Modality = Literal["both", "image", "text"]


class LogitModel(Protocol):
    """A model that gives logits of a batch."""

    def logits(self, batch: BehaviorBatch, /) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B,), and losses by name, which `predict` ignores."""
        ...


@torch.inference_mode()
def predict(
    task: LogitModel, collator: BehaviorCollator, accelerator: Accelerator, batch_size: int = 4096
) -> np.ndarray:
    """Click probabilities of all impressions of a collator, computed in fp32 and divided over processes.

    Args:
        task: gives logits.
        collator: makes batches of n impressions.
        accelerator: processes and device.
        batch_size: impressions of a batch.

    Returns:
        (n,) float64, in every process.
    """
    num_rows = len(collator.impressions)
    starts = range(0, num_rows, batch_size)
    local: list[tuple[int, np.ndarray]] = []
    for start in starts[accelerator.process_index :: accelerator.num_processes]:
        batch: BehaviorBatch = collator(np.arange(start, min(start + batch_size, num_rows)))
        logits, _ = task.logits(batch.to(accelerator.device))
        local.append((start, torch.sigmoid(logits.double()).cpu().numpy()))
    parts = gather_object(local) if accelerator.num_processes > 1 else local
    return np.concatenate([scores for _, scores in sorted(parts, key=lambda part: part[0])])


@torch.inference_mode()
def embed_items(
    task: PretrainTask,
    content: Content,
    rows: np.ndarray,
    device: Any,
    modality: Modality = "both",
    batch_size: int = 256,
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of items of a catalog, in one process.

    Args:
        task: the pretrained task.
        content: pictures and texts of the catalog.
        rows: (n,) catalog rows.
        device: device of the task.
        modality: the part of the content to read.
        batch_size: items of a batch.

    Returns:
        Vectors (n, D) float32, zeros for items without content, and the (n,) bool mask of items with content.

    Raises:
        ValueError: the dataset lacks the modality.
    """
    vectors, masks = [], []
    for start in range(0, len(rows), batch_size):
        items = content.batch(torch.from_numpy(rows[start : start + batch_size])).to(device)
        part, has = embed_batch(task, items, modality)
        vectors.append(torch.where(has[:, None], part, 0.0).float().cpu().numpy())
        masks.append(has.cpu().numpy())
    return np.concatenate(vectors), np.concatenate(masks)


def embed_batch(task: PretrainTask, items: ItemBatch, modality: Modality) -> tuple[Tensor, Tensor]:
    """Vectors (E, D) of the items of a batch, and the (E,) bool mask of items with content.

    Args:
        task: the pretrained task.
        items: E items.
        modality: the part of the content to read.

    Raises:
        ValueError: the batch lacks the modality.
    """
    if modality == "both":
        return task.embed(items)
    mask = items.has_image if modality == "image" else items.has_text
    if mask is None:
        raise ValueError(f"modality {modality!r}: the dataset has none")
    return (task.image_features(items) if modality == "image" else task.text_features(items)), mask


def embed_rows(
    task: PretrainTask, content: Content, rows: np.ndarray, accelerator: Accelerator, modality: Modality = "both"
) -> tuple[np.ndarray, np.ndarray]:
    """As `embed_items`, with the rows divided over processes; every process gets the vectors of all rows."""
    number = accelerator.process_index
    local = (
        number,
        *embed_items(
            task, content, np.array_split(rows, accelerator.num_processes)[number], accelerator.device, modality
        ),
    )
    parts = sorted(gather_object([local]) if accelerator.num_processes > 1 else [local], key=lambda part: part[0])
    return np.concatenate([part[1] for part in parts]), np.concatenate([part[2] for part in parts])


def embed_catalog(
    task: PretrainTask, content: ItemContent, num_items: int, accelerator: Accelerator
) -> tuple[Tensor, Tensor]:
    """Vectors (N, D) of a whole catalog, and the (N,) bool mask of items with content, as tensors."""
    vectors, has = embed_rows(task, content, np.arange(num_items), accelerator)
    return torch.from_numpy(vectors), torch.from_numpy(has)


def quick_metrics(impressions: Impressions, scores: np.ndarray, cold: np.ndarray) -> dict[str, float]:
    """The validation metrics for early stopping, without intervals; undefined metrics are left out.

    Args:
        impressions: n impressions.
        scores: (n,) click probabilities.
        cold: (n,) bool, whether the target is cold.
    """
    labels, users = np.asarray(impressions.label), np.asarray(impressions.user)
    numbers = {"auc": auc(labels, scores), "gauc": gauc(labels, scores, users), "log_loss": log_loss(labels, scores)}
    if cold.any() and not cold.all():
        numbers |= {"gauc_warm": gauc(labels[~cold], scores[~cold], users[~cold])}
        numbers |= {"gauc_cold": gauc(labels[cold], scores[cold], users[cold])}
    return {name: float(value) for name, value in numbers.items() if value == value}


def full_report(impressions: Impressions, scores: np.ndarray, cold: np.ndarray, clicks: np.ndarray) -> dict[str, Any]:
    """The metrics of one part of a split for metrics.json: all, warm, cold and by training clicks, with intervals.

    Args:
        impressions: n impressions.
        scores: (n,) click probabilities.
        cold: (n,) bool, whether the target is cold.
        clicks: (n,) training clicks of the target.
    """
    return ranking_report(np.asarray(impressions.label), scores, np.asarray(impressions.user), cold, clicks)


def predictions_table(
    impressions: Impressions,
    scores: np.ndarray,
    cold: np.ndarray,
    clicks: np.ndarray,
    user_ids: pa.Array,
    item_ids: pa.Array,
) -> pa.Table:
    """A table of impressions with raw ids, by which runs can be compared on the same rows.

    Args:
        impressions: n impressions.
        scores: (n,) click probabilities.
        cold: (n,) bool, whether the target is cold.
        clicks: (n,) training clicks of the target.
        user_ids: raw ids of the users of the dataset.
        item_ids: (N,) raw ids of the catalog.
    """
    return pa.table(
        {
            "user": user_ids.take(pa.array(impressions.user)),
            "item": item_ids.take(pa.array(impressions.item)),
            "label": np.asarray(impressions.label),
            "score": scores.astype(np.float32),
            "cold": cold,
            "clicks": clicks,
        }
    )
