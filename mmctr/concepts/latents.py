"""Latent values of catalog items: their prevalence, traversals along a dimension, likeness to text prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from mmctr.data.batches import ItemBatch
from mmctr.data.catalog import Catalog
from mmctr.evaluation.predict import embed_rows
from mmctr.tasks import PretrainTask

STEPS = (0.02, 0.25, 0.5, 0.75, 0.98)
"""quantiles of a dimension that its traversal stops at"""


PER_STEP = 2
"""items shown at each"""


def sampled_rows(count: int, limit: int, seed: int) -> np.ndarray:
    """`limit` of so many rows, or all of them, in order."""
    return np.sort(np.random.default_rng(seed).permutation(count)[:limit])


def standardised(mu: np.ndarray) -> np.ndarray:
    return (mu - mu.mean(0)) / mu.std(0).clip(min=1e-12)


@dataclass(frozen=True)
class Latents:
    """The latents of a catalog's items that have content."""

    rows: np.ndarray
    """(n,) catalog rows"""
    mu: np.ndarray
    """(n, Z)"""
    has_image: np.ndarray
    """(n,) bool"""
    images: np.ndarray | None
    """(n, D) picture features, zeros where there is none; None where texts cannot be compared with them"""


def latents_of(task: PretrainTask, catalog: Catalog, content: Any, accelerator: Accelerator) -> Latents:
    """Raises ValueError for a task without a head."""
    if task.head is None:
        raise ValueError(
            "this run has no head, so its dimensions have no meaning of their own: train one with task.head"
        )
    mu, has = embed_rows(task, content, np.arange(len(catalog)), accelerator)
    rows = np.flatnonzero(has)
    if len(rows) < 50:
        raise ValueError(f"{len(rows)} items have content; names need 50 or more")
    has_image = np.zeros(len(rows), bool) if content.has_image is None else np.asarray(content.has_image)[rows]
    images = None
    if has_image.any() and task.shares_space:
        images = embed_rows(task, content, rows, accelerator, "image")[0]
    return Latents(rows, mu[rows].astype(np.float64), has_image, images)


def prevalence(latent: np.ndarray) -> dict[str, float]:
    """The shares of items more than a standard deviation below and above the mean."""
    z = (latent - latent.mean()) / latent.std()
    return {"low": float((z < -1).mean()), "high": float((z > 1).mean())}


def traversal(mu: np.ndarray, dimension: int, has_image: np.ndarray) -> list[np.ndarray]:
    """At each of `STEPS`, the rows of items that are there on one dimension and near the middle on the others; those
    with a picture first, where there are any."""
    z = standardised(mu)
    others = np.delete(z, dimension, 1)
    off = (others**2).mean(1) if others.shape[1] else np.zeros(len(z))
    result, taken = [], ~has_image if has_image.sum() >= 20 * PER_STEP else np.zeros(len(z), bool)
    for q in STEPS:
        distance = (z[:, dimension] - np.quantile(z[:, dimension], q)) ** 2 * 4 + off
        rows = np.argsort(np.where(taken, np.inf, distance))[:PER_STEP]
        taken[rows] = True
        result.append(rows)
    return result


@torch.inference_mode()
def prompt_likeness(
    task: PretrainTask, images: np.ndarray, prompts: Sequence[str], accelerator: Accelerator
) -> np.ndarray:
    """(n, P) cosines of picture features and prompts."""
    there = torch.ones(len(prompts), dtype=torch.bool)
    tokens = task.encoder.tokenize(list(prompts)).long()
    items = ItemBatch(row=torch.zeros(len(prompts), dtype=torch.int64), input_ids=tokens, has_text=there)
    return images @ task.text_features(items.to(accelerator.device)).cpu().numpy().T
