"""Latent values of catalog items, prevalence of extreme values, traversals of a dimension, similarity to prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator

from mmctr.data.batches import ItemBatch
from mmctr.data.catalog import Catalog
from mmctr.evaluation.predict import embed_rows
from mmctr.tasks import PretrainTask

STEPS = (0.02, 0.25, 0.5, 0.75, 0.98)
"""quantiles of a dimension that a traversal shows items at"""
ITEMS_PER_STEP = 2
"""items shown at each quantile of a traversal"""


def sample_rows(count: int, limit: int, seed: int) -> np.ndarray:
    """`limit` of `count` row numbers, drawn at random and sorted; all of them where there are no more than `limit`."""
    return np.sort(np.random.default_rng(seed).permutation(count)[:limit])


def standardize(mu: np.ndarray) -> np.ndarray:
    """(n, Z) latents with mean 0 and standard deviation 1 in each dimension that varies."""
    return (mu - mu.mean(0)) / mu.std(0).clip(min=1e-12)


@dataclass(frozen=True)
class Latents:
    """The latents of the n items of a catalog that have content."""

    rows: np.ndarray
    """(n,) catalog rows of the items"""
    mu: np.ndarray
    """(n, Z) means of the posterior"""
    has_image: np.ndarray
    """(n,) bool: whether an item has a picture"""
    images: np.ndarray | None
    """(n, D) picture features, zeros for an item without a picture; None where texts have no features in that space"""


def encode_latents(task: PretrainTask, catalog: Catalog, content: Any, accelerator: Accelerator) -> Latents:
    """The latents of the items of a catalog whose content, pictures or texts, a pretrained encoder with a head reads.

    Raises ValueError for a task without a head, and where fewer than 50 items have content.
    """
    if task.head is None:
        raise ValueError(
            "this run has no head, so its dimensions have no meaning of their own: train one with task.head"
        )
    mu, has_content = embed_rows(task, content, np.arange(len(catalog)), accelerator)
    rows = np.flatnonzero(has_content)
    if len(rows) < 50:
        raise ValueError(f"{len(rows)} items have content; names need 50 or more")
    has_image = np.zeros(len(rows), bool) if content.has_image is None else np.asarray(content.has_image)[rows]
    images = None
    if has_image.any() and task.shares_space:
        images = embed_rows(task, content, rows, accelerator, "image")[0]
    return Latents(rows, mu[rows].astype(np.float64), has_image, images)


def prevalence(latent: np.ndarray) -> dict[Literal["low", "high"], float]:
    """{"low", "high"}: shares of items more than a standard deviation below and above the mean, of (n,) values."""
    z = (latent - latent.mean()) / latent.std()
    return {"low": float((z < -1).mean()), "high": float((z > 1).mean())}


def traversal(mu: np.ndarray, dimension: int, has_image: np.ndarray) -> list[np.ndarray]:
    """Items along one dimension: for each quantile of `STEPS`, `ITEMS_PER_STEP` positions among the n items.

    The items are near the quantile on the dimension and near the mean on the other dimensions. Only items with a
    picture are taken where enough items have one.
    """
    z = standardize(mu)
    others = np.delete(z, dimension, 1)
    off_axis = (others**2).mean(1) if others.shape[1] else np.zeros(len(z))
    result, taken = [], ~has_image if has_image.sum() >= 20 * ITEMS_PER_STEP else np.zeros(len(z), bool)
    for q in STEPS:
        distance = (z[:, dimension] - np.quantile(z[:, dimension], q)) ** 2 * 4 + off_axis
        rows = np.argsort(np.where(taken, np.inf, distance))[:ITEMS_PER_STEP]
        taken[rows] = True
        result.append(rows)
    return result


@torch.inference_mode()
def prompt_similarity(
    task: PretrainTask, images: np.ndarray, prompts: Sequence[str], accelerator: Accelerator
) -> np.ndarray:
    """(n, P) cosine similarities of the picture features (n, D) of items and P text prompts."""
    has_text = torch.ones(len(prompts), dtype=torch.bool)
    tokens = task.encoder.tokenize(list(prompts)).long()
    items = ItemBatch(row=torch.zeros(len(prompts), dtype=torch.int64), input_ids=tokens, has_text=has_text)
    return images @ task.text_features(items.to(accelerator.device)).cpu().numpy().T
