"""Metrics of item vectors on validation items and clicks, as functions of NumPy arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mmctr.evaluation.retrieval_metrics import recall_at_k


def neighbour_agreement(vectors: np.ndarray, values: list[str | None], k: int = 10, chunk: int = 1024) -> float:
    """The fraction of the k nearest neighbours of an item with the attribute value of the item, averaged over items.

    Items without a value are left out of the average; neighbours without a value count as neighbours with another
    value.

    Args:
        vectors: (n, D) of unit norm; neighbours have the largest inner products.
        values: n attribute values.
        k: number of neighbours.
        chunk: number of items compared at once.

    Returns:
        A number in [0, 1]; nan for fewer than two items.
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
        scores[np.arange(len(rows)), rows] = -np.inf  # an item is no neighbour of itself
        nearest = np.argpartition(-scores, k, axis=1)[:, :k]
        same = (codes[nearest] == codes[rows][:, None]) & known[nearest]
        shares.append(same.mean(1)[known[rows]])
    return float(np.concatenate(shares).mean())


def zero_shot_accuracy(images: np.ndarray, prompts: np.ndarray, labels: np.ndarray) -> float:
    """The fraction of pictures whose nearest prompt is the prompt of the attribute value of the picture.

    A tie counts as an error: an encoder that gives all prompts the same vector gets 0.

    Args:
        images: (n, D) of unit norm.
        prompts: (C, D) of unit norm.
        labels: (n,) number of the correct prompt, negative for items without a value, which are left out.

    Returns:
        A number in [0, 1]; nan where no item has a value.
    """
    has_label = labels >= 0
    scores = images[has_label] @ prompts.T
    correct = np.take_along_axis(scores, labels[has_label, None], axis=1)
    is_wrong = (scores >= correct - 1e-6).sum(1) > 1
    return float((~is_wrong).mean()) if has_label.any() else float("nan")


def coclick_recall(
    vectors: np.ndarray, anchors: np.ndarray, targets: np.ndarray, k: int = 10, chunk: int = 1024
) -> NDArray[np.bool_]:
    """Whether the target of a pair is among the k nearest items of the anchor, the anchor excluded.

    A tie counts against the target.

    Args:
        vectors: (n, D) of unit norm.
        anchors: (P,) rows of `vectors`.
        targets: (P,) rows of `vectors`.
        k: number of nearest items.
        chunk: number of pairs compared at once.

    Returns:
        (P,) bool.
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
    """The probability that a target is nearer to the anchor than another candidate is: 1/2 for random vectors.

    A tie counts one half; anchor and target are not compared with the target.

    Args:
        vectors: (n, D) of unit norm.
        anchors: (P,) rows of `vectors`.
        targets: (P,) rows of `vectors`.
        candidates: (C,) rows of `vectors`, all targets included.
        chunk: number of pairs compared at once.

    Returns:
        A number in [0, 1]; nan where there is no candidate to compare.
    """
    better = total = 0.0
    position = np.full(len(vectors), -1)
    position[candidates] = np.arange(len(candidates))
    for start in range(0, len(anchors), chunk):
        anchor, target = anchors[start : start + chunk], targets[start : start + chunk]
        scores = vectors[anchor] @ vectors[candidates].T
        right = np.take_along_axis(scores, position[target][:, None], axis=1)
        below, level = (scores < right - 1e-6), np.abs(scores - right) <= 1e-6
        compared = np.ones_like(below)
        compared[np.arange(len(anchor)), position[target]] = False
        inside = np.flatnonzero(position[anchor] >= 0)
        compared[inside, position[anchor[inside]]] = False
        better += float((below & compared).sum() + 0.5 * (level & compared).sum())
        total += float(compared.sum())
    return better / total if total else float("nan")


def alignment(images: np.ndarray, texts: np.ndarray) -> float:
    """Mean squared distance of the picture and the text of an item (Wang & Isola 2020).

    Args:
        images: (n, D) of unit norm.
        texts: (n, D) of unit norm.
    """
    return float(np.square(images - texts).sum(1).mean())


def uniformity(vectors: np.ndarray, limit: int = 2048, seed: int = 0) -> float:
    """The logarithm of the mean of exp(-2 |x - y|^2) over pairs of different rows (Wang & Isola 2020).

    Args:
        vectors: (n, D) of unit norm.
        limit: largest number of rows to compare; of more rows a random sample is compared.
        seed: seed of the sample.

    Returns:
        0 when all vectors are equal; the lower, the more evenly the vectors are spread.
    """
    if len(vectors) > limit:
        vectors = vectors[np.random.default_rng(seed).choice(len(vectors), limit, replace=False)]
    squared = 2 - 2 * np.clip(vectors @ vectors.T, -1, 1)
    off = ~np.eye(len(vectors), dtype=bool)
    return float(np.log(np.exp(-2 * squared[off]).mean()))


def modality_gap(images: np.ndarray, texts: np.ndarray) -> float:
    """Distance of the mean picture vector from the mean text vector (Liang et al. 2022).

    Args:
        images: (n, D) of unit norm.
        texts: (n, D) of unit norm.
    """
    return float(np.linalg.norm(images.mean(0) - texts.mean(0)))


def retrieval_both_ways(images: np.ndarray, texts: np.ndarray) -> dict[str, float]:
    """R@1, R@5 and R@10 of the retrieval of pictures by texts and of texts by pictures, and the mean of all six.

    Args:
        images: (n, D) of unit norm.
        texts: (n, D) of unit norm, of the same items.
    """
    numbers = {f"text_to_image_{name}": value for name, value in recall_at_k(texts, images).items()}
    numbers |= {f"image_to_text_{name}": value for name, value in recall_at_k(images, texts).items()}
    return numbers | {"mean_recall": float(np.mean(list(numbers.values())))}
