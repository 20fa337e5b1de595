"""Search by named latent dimensions: vectors that move a query towards some words and away from others."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmctr.files import read_json
from mmctr.manifests import require_types


def steering_vector(
    path: Path, more: Sequence[str], less: Sequence[str], strength: float, weights: str | None
) -> np.ndarray:
    """The vector (Z,) to add to a latent vector so that it moves towards some words and away from others.

    Args:
        path: the concepts.json of `mmctr concepts`.
        more, less: words of the verified names to move towards and away from.
        strength: length of a move, in standard deviations of the dimension.
        weights: key of the weights that the latent vectors were computed with; None where it is not known.

    Raises:
        ValueError: the file does not exist or names dimensions of other weights, or a word is in no verified name.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; `mmctr concepts RUN` writes it, and --more and --less need its names")
    report = read_json(path)
    require_types(report, path, weights=(str, type(None)), dimensions=list, spread=dict)
    if weights is not None and report["weights"] != weights:
        raise ValueError(
            f"{path}: names of other weights than the vectors; run `mmctr concepts` and `mmctr embed` anew"
        )
    ends: dict[str, tuple[int, int]] = {}
    best_auc: dict[str, float] = {}
    for entry in report["dimensions"]:
        name = entry["name"]
        if not entry["active"] or name is None or not name["verified"]:
            continue
        for end, sign in (("low", -1), ("high", 1)):
            for word in name[end]:
                if name["auc"] > best_auc.get(word.lower(), 0.0):  # of two dimensions the one with the higher AUC
                    best_auc[word.lower()], ends[word.lower()] = name["auc"], (entry["dimension"], sign)
    std = np.array(report["spread"]["std"])
    shift = np.zeros(len(std), np.float32)
    for words, direction in ((more, 1), (less, -1)):
        for word in words:
            if word.lower() not in ends:
                near = difflib.get_close_matches(word.lower(), ends, 1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ValueError(f"{word!r} names no dimension here; {hint}There are: {', '.join(sorted(ends))}")
            dimension, sign = ends[word.lower()]
            shift[dimension] += direction * sign * strength * std[dimension]
    return shift
