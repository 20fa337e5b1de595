"""Search with concepts: directions in the space of item embeddings that strengthen a named latent dimension."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmctr.files import read_json


def steering(path: Path, more: Sequence[str], less: Sequence[str], strength: float, weights: str | None) -> np.ndarray:
    """(Z,) what to add to a latent vector to go towards some words and away from others.

    Args:
        path: what `mmctr concepts` wrote.
        more, less: words that stand in a verified name.
        strength: in standard deviations of the dimension.
        weights: of the run the vectors are of; None: not known.

    Raises:
        ValueError: no such file, one of another run, or a word that names nothing.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; `mmctr concepts RUN` writes it, and --more and --less need its names")
    report = read_json(path)
    if weights is not None and report["weights"] != weights:
        raise ValueError(
            f"{path}: names of other weights than the vectors; run `mmctr concepts` and `mmctr embed` anew"
        )
    ends: dict[str, tuple[int, int]] = {}
    best: dict[str, float] = {}
    for entry in report["dimensions"]:
        name = entry["name"]
        if not entry["active"] or name is None or not name["verified"]:
            continue
        for end, sign in (("low", -1), ("high", 1)):
            for word in name[end]:
                if name["auc"] > best.get(word.lower(), 0.0):  # of two dimensions the one that is surer
                    best[word.lower()], ends[word.lower()] = name["auc"], (entry["dimension"], sign)
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
