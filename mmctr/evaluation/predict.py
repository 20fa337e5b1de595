"""Scores of impressions and vectors of a catalog: everything that only reads a task."""

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


class Scores(Protocol):
    """What gives (B,) logits of a batch, and losses that are not looked at."""

    def logits(self, batch: BehaviorBatch, /) -> tuple[Tensor, dict[str, Tensor]]: ...


@torch.inference_mode()
def predict(task: Scores, collator: BehaviorCollator, accelerator: Accelerator, batch_size: int = 4096) -> np.ndarray:
    """(n,) click probabilities of all impressions of a collator, the work divided over processes. fp32."""
    num_rows = len(collator.impressions)
    starts = range(0, num_rows, batch_size)
    own: list[tuple[int, np.ndarray]] = []
    for start in starts[accelerator.process_index :: accelerator.num_processes]:
        batch: BehaviorBatch = collator(np.arange(start, min(start + batch_size, num_rows)))
        logits, _ = task.logits(batch.to(accelerator.device))
        own.append((start, torch.sigmoid(logits.double()).cpu().numpy()))
    parts = gather_object(own) if accelerator.num_processes > 1 else own
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
    """Embeddings of catalog rows: (n, D) float32 unit norm, zeros where there is no content, and the (n,) mask."""
    vectors, masks = [], []
    for start in range(0, len(rows), batch_size):
        items = content.batch(torch.from_numpy(rows[start : start + batch_size])).to(device)
        part, has = embed_batch(task, items, modality)
        vectors.append(torch.where(has[:, None], part, 0.0).float().cpu().numpy())
        masks.append(has.cpu().numpy())
    return np.concatenate(vectors), np.concatenate(masks)


def embed_batch(task: PretrainTask, items: ItemBatch, modality: Modality) -> tuple[Tensor, Tensor]:
    """Item vectors from both modalities or one alone, and the mask of items that have it."""
    if modality == "both":
        return task.embed(items)
    mask = items.has_image if modality == "image" else items.has_text
    if mask is None:
        raise ValueError(f"modality {modality!r}: the dataset has none")
    return (task.image_features(items) if modality == "image" else task.text_features(items)), mask


def embed_rows(
    task: PretrainTask, content: Content, rows: np.ndarray, accelerator: Accelerator, modality: Modality = "both"
) -> tuple[np.ndarray, np.ndarray]:
    """As `embed_items`, each process encoding a part of the rows and all getting the whole."""
    number = accelerator.process_index
    own = (
        number,
        *embed_items(
            task, content, np.array_split(rows, accelerator.num_processes)[number], accelerator.device, modality
        ),
    )
    parts = sorted(gather_object([own]) if accelerator.num_processes > 1 else [own], key=lambda part: part[0])
    return np.concatenate([part[1] for part in parts]), np.concatenate([part[2] for part in parts])


def embed_catalog(
    task: PretrainTask, content: ItemContent, num_items: int, accelerator: Accelerator
) -> tuple[Tensor, Tensor]:
    """Vectors of a whole catalog as tensors: (N, D) and the (N,) mask."""
    vectors, has = embed_rows(task, content, np.arange(num_items), accelerator)
    return torch.from_numpy(vectors), torch.from_numpy(has)


def quick_metrics(impressions: Impressions, scores: np.ndarray, cold: np.ndarray) -> dict[str, float]:
    """The numbers early stopping looks at: no intervals. Undefined ones are left out."""
    labels, users = np.asarray(impressions.label), np.asarray(impressions.user)
    numbers = {"auc": auc(labels, scores), "gauc": gauc(labels, scores, users), "log_loss": log_loss(labels, scores)}
    if cold.any() and not cold.all():
        numbers |= {"gauc_warm": gauc(labels[~cold], scores[~cold], users[~cold])}
        numbers |= {"gauc_cold": gauc(labels[cold], scores[cold], users[cold])}
    return {name: float(value) for name, value in numbers.items() if value == value}


def full_report(impressions: Impressions, scores: np.ndarray, cold: np.ndarray, clicks: np.ndarray) -> dict[str, Any]:
    """`metrics.json`'s numbers of one split: all, warm, cold and by clicks seen in training, with intervals."""
    return ranking_report(np.asarray(impressions.label), scores, np.asarray(impressions.user), cold, clicks)


def predictions_table(
    impressions: Impressions,
    scores: np.ndarray,
    cold: np.ndarray,
    clicks: np.ndarray,
    user_ids: pa.Array,
    item_ids: pa.Array,
) -> pa.Table:
    """One row an impression, with raw ids, so that runs can be compared on the same rows."""
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
