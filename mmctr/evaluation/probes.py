"""What item vectors know, measured on validation items and clicks: functions of arrays, in chunks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mmctr.evaluation.metrics import recall_at_k


def neighbour_agreement(vectors: np.ndarray, values: list[str | None], k: int = 10, chunk: int = 1024) -> float:
    """How often an item's k nearest neighbours (inner product) share its attribute value, averaged over items that
    have one. Neighbours without a value count as not sharing it.

    Args:
        vectors: (n, D) unit norm; values: (n,) attribute values.

    nan where an item has no other one beside it.
    """
    k = min(k, len(vectors) - 1)
    if k < 1:
        return float("nan")
    codes = np.unique([value or "" for value in values], return_inverse=True)[1]
    known = np.array([value is not None for value in values])
    shares = []
    for start in range(0, len(vectors), chunk):
        rows = np.arange(start, min(start + chunk, len(vectors)))
        scores = vectors[rows] @ vectors.T
        scores[np.arange(len(rows)), rows] = -np.inf  # an item is not its own neighbour
        nearest = np.argpartition(-scores, k, axis=1)[:, :k]
        same = (codes[nearest] == codes[rows][:, None]) & known[nearest]
        shares.append(same.mean(1)[known[rows]])
    return float(np.concatenate(shares).mean())


def zero_shot_accuracy(images: np.ndarray, prompts: np.ndarray, labels: np.ndarray) -> float:
    """How often the prompt nearest to a picture is the one of its own value.

    Args:
        images: (n, D) and prompts: (C, D) unit norm; labels: (n,) the right prompt, negative for items without a
            value, which do not count. Ties go against: an encoder that gives all prompts one vector gets 0.
    """
    there = labels >= 0
    scores = images[there] @ prompts.T
    right = np.take_along_axis(scores, labels[there, None], axis=1)
    wrong_at_least = (scores >= right - 1e-6).sum(1) > 1
    return float((~wrong_at_least).mean()) if there.any() else float("nan")


def coclick_recall(
    vectors: np.ndarray, anchors: np.ndarray, targets: np.ndarray, k: int = 10, chunk: int = 1024
) -> NDArray[np.bool_]:
    """(P,) whether the target is among the k nearest of its anchor, the anchor itself aside.

    Args:
        vectors: (n, D) unit norm; anchors, targets: (P,) rows of it. Ties go against.
    """
    hit = np.zeros(len(anchors), bool)
    for start in range(0, len(anchors), chunk):
        anchor, target = anchors[start : start + chunk], targets[start : start + chunk]
        scores = vectors[anchor] @ vectors.T
        scores[np.arange(len(anchor)), anchor] = -np.inf
        right = np.take_along_axis(scores, target[:, None], axis=1)
        hit[start : start + chunk] = (scores >= right - 1e-6).sum(1) - 1 < k
    return hit


def coclick_auc(
    vectors: np.ndarray, anchors: np.ndarray, targets: np.ndarray, candidates: np.ndarray, chunk: int = 1024
) -> float:
    """The chance that a target is nearer to its anchor than another candidate is: 1/2 for vectors that know nothing.

    Args:
        vectors: (n, D) unit norm; anchors, targets: (P,) rows of it; candidates: (C,) rows, the targets among them.
            Ties count half; the anchor and the target itself are no candidates. nan where there is nothing to compare.
    """
    better = total = 0.0
    place = np.full(len(vectors), -1)
    place[candidates] = np.arange(len(candidates))
    for start in range(0, len(anchors), chunk):
        anchor, target = anchors[start : start + chunk], targets[start : start + chunk]
        scores = vectors[anchor] @ vectors[candidates].T
        right = np.take_along_axis(scores, place[target][:, None], axis=1)
        below, level = (scores < right - 1e-6), np.abs(scores - right) <= 1e-6
        compared = np.ones_like(below)
        compared[np.arange(len(anchor)), place[target]] = False
        inside = np.flatnonzero(place[anchor] >= 0)
        compared[inside, place[anchor[inside]]] = False
        better += float((below & compared).sum() + 0.5 * (level & compared).sum())
        total += float(compared.sum())
    return better / total if total else float("nan")


def alignment(images: np.ndarray, texts: np.ndarray) -> float:
    """Mean squared distance of the picture and the text of an item, (n, D) unit norm each (Wang & Isola 2020)."""
    return float(np.square(images - texts).sum(1).mean())


def uniformity(vectors: np.ndarray, limit: int = 2048, seed: int = 0) -> float:
    """log of the mean of exp(-2 |x - y|^2) over pairs of different rows (Wang & Isola 2020): 0 when all are one point,
    lower the better they spread. Over at most `limit` rows, drawn with `seed`.
    """
    if len(vectors) > limit:
        vectors = vectors[np.random.default_rng(seed).choice(len(vectors), limit, replace=False)]
    squared = 2 - 2 * np.clip(vectors @ vectors.T, -1, 1)
    off = ~np.eye(len(vectors), dtype=bool)
    return float(np.log(np.exp(-2 * squared[off]).mean()))


def modality_gap(images: np.ndarray, texts: np.ndarray) -> float:
    """Distance of the mean picture from the mean text, of (n, D) unit-norm vectors (Liang et al. 2022)."""
    return float(np.linalg.norm(images.mean(0) - texts.mean(0)))


def retrieval_both_ways(images: np.ndarray, texts: np.ndarray) -> dict[str, float]:
    """R@1, 5, 10 both ways among the pictures and texts of the same items, and their mean."""
    numbers = {f"text_to_image_{name}": value for name, value in recall_at_k(texts, images).items()}
    numbers |= {f"image_to_text_{name}": value for name, value in recall_at_k(images, texts).items()}
    return numbers | {"mean_recall": float(np.mean(list(numbers.values())))}
