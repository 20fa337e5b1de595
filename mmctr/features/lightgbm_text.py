"""Check of the text format of LightGBM models before LightGBM reads a text of unknown origin.

LightGBM trusts the text: children that point back make a prediction run for ever, and numbers out of range end the
process. Only models of binary classification with one tree per iteration are accepted, as `Trees.fit` makes them.
"""

from __future__ import annotations

import numpy as np

MOST_TREES = 100_000


def checked_model(text: str, num_columns: int | None = None, most_leaves: int | None = None) -> str:
    """The part of a model text that LightGBM needs to predict, after a check of every tree.

    Args:
        text: the text of `lightgbm.Booster.model_to_string`.
        num_columns: number of columns that the trees may read; None: as many as the header says.
        most_leaves: largest number of leaves of a tree; None: any number.

    Returns:
        The text without sizes of trees, importances and training parameters, none of which prediction needs.

    Raises:
        ValueError: the text is no model of binary classification, or a tree is malformed; the message names the tree
            and the entry.
    """
    body, end, _ = text.partition("\nend of trees")
    header, *trees = body.split("\nTree=")
    if not end or not trees or len(trees) > MOST_TREES or not header.startswith("tree\n"):
        raise ValueError("is no text of a LightGBM model with trees")
    entries = _entries(header)
    if entries.get("num_class") != "1" or entries.get("num_tree_per_iteration") != "1":
        raise ValueError("is no model of binary classification with one tree per iteration")
    columns = _number(entries, "max_feature_idx", 0, 10_000_000, "the header") + 1
    if num_columns is not None and columns != num_columns:
        raise ValueError(f"has trees over {columns} columns where {num_columns} are given")
    for number, tree in enumerate(trees):
        first, _, rest = tree.partition("\n")
        if first != str(number):
            raise ValueError(f"tree {number}: the trees are not numbered in order")
        _check_tree(_entries(rest), columns, most_leaves, f"tree {number}")
    kept = "\n".join(line for line in header.splitlines() if not line.startswith("tree_sizes="))
    return "\nTree=".join([kept + "\n", *trees]) + end + "\n"


def _check_tree(entries: dict[str, str], columns: int, most_leaves: int | None, name: str) -> None:
    leaves = _number(entries, "num_leaves", 1, most_leaves or 1_000_000, name)
    _array(entries, "leaf_value", leaves, np.float64, name)
    if entries.get("is_linear", "0") != "0":
        raise ValueError(f"{name}: is a linear tree")
    if leaves == 1:
        return
    nodes = leaves - 1
    split = _array(entries, "split_feature", nodes, np.int64, name)
    if split.min() < 0 or split.max() >= columns:
        raise ValueError(f"{name}: split_feature is none of the {columns} columns")
    kind = _array(entries, "decision_type", nodes, np.int64, name)
    threshold = _array(entries, "threshold", nodes, np.float64, name)
    position = np.arange(nodes)
    reached = []
    for side in ("left_child", "right_child"):
        child = _array(entries, side, nodes, np.int64, name)
        # a node is made after the node above it, and -1 - leaf stands for a leaf
        if ((child >= 0) & (child <= position)).any() or child.max() >= nodes or child.min() < -leaves:
            raise ValueError(f"{name}: {side} leads to no node below")
        reached.append(child)
    if len(np.unique(np.concatenate(reached))) != 2 * nodes:
        raise ValueError(f"{name}: two nodes lead to one node")
    categories = _number(entries, "num_cat", 0, nodes, name)
    is_category = (kind & 1) == 1
    if is_category.sum() > 0 and not categories:
        raise ValueError(f"{name}: num_cat is 0, but nodes split categories")
    if categories:
        bounds = _array(entries, "cat_boundaries", categories + 1, np.int64, name)
        if bounds[0] != 0 or (np.diff(bounds) <= 0).any() or bounds[-1] > 10_000_000:
            raise ValueError(f"{name}: cat_boundaries do not ascend from 0")
        _array(entries, "cat_threshold", int(bounds[-1]), np.int64, name)
        index = threshold[is_category]
        if len(index) and (index.min() < 0 or index.max() >= categories or (index % 1 != 0).any()):
            raise ValueError(f"{name}: threshold names none of the {categories} sets of categories")


def _entries(text: str) -> dict[str, str]:
    """The lines KEY=VALUE of a part of the text."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {key: value for key, _, value in pairs}


def _number(entries: dict[str, str], key: str, least: int, most: int, name: str) -> int:
    text = entries.get(key, "")
    if not text.isdecimal() or len(text) > 9 or not least <= int(text) <= most:
        raise ValueError(f"{name}: {key} is {text[:20]!r}, but must be a number from {least} to {most}")
    return int(text)


def _array(entries: dict[str, str], key: str, length: int, kind: type[np.generic], name: str) -> np.ndarray:
    try:
        values = np.array(entries.get(key, "").split(" ") if entries.get(key) else [], dtype=kind)
    except (ValueError, OverflowError):
        raise ValueError(f"{name}: {key} holds something else than numbers") from None
    if len(values) != length:
        raise ValueError(f"{name}: {key} has {len(values)} values where {length} belong")
    return values
