"""A synthetic click log of the size rankers are compared on: items with Zipf-like popularity, users with favourite
categories, jagged histories. NumPy alone, so that it runs in any library's environment."""

from __future__ import annotations

from pathlib import Path

import numpy as np

NUM_USERS, NUM_ITEMS, NUM_CATEGORIES, MAX_HISTORY = 50_000, 100_000, 1_000, 50
"""ids of users, items and categories start at 1; 0 is padding"""

Columns = dict[str, np.ndarray]


def make_log(num_rows: int, seed: int) -> Columns:
    """Columns of impressions: `user`, `item`, `label` (n,); `offsets` (n + 1,) of `history` and of `negatives`, items
    drawn by popularity; `sizes`: how many users, items and categories, and the longest history. The world (`category`
    of each item, tastes) is the same for every seed."""
    world, draw = np.random.default_rng(0), np.random.default_rng([1, seed])
    by_popularity = world.permutation(NUM_ITEMS) + 1
    category = np.zeros(NUM_ITEMS + 1, np.int64)
    category[by_popularity] = np.arange(NUM_ITEMS) % NUM_CATEGORIES + 1
    appeal = world.normal(0, 0.7, NUM_ITEMS + 1)
    favourites = _draw(NUM_CATEGORIES, 20, (NUM_USERS + 1, 4), world)

    def items(user: np.ndarray, from_favourites: float) -> np.ndarray:
        rank = _draw(NUM_ITEMS, 20, len(user), draw)
        liked = draw.random(len(user)) < from_favourites
        favourite = favourites[user[liked], draw.integers(0, 4, liked.sum())]
        rank[liked] = favourite + NUM_CATEGORIES * _draw(NUM_ITEMS // NUM_CATEGORIES, 2, liked.sum(), draw)
        return by_popularity[rank]

    user = draw.integers(1, NUM_USERS + 1, num_rows)
    lengths = np.minimum(draw.geometric(1 / 22.5, num_rows), MAX_HISTORY)  # 20 on average
    history = items(np.repeat(user, lengths), 0.6)
    item = items(user, 0.5)
    likes = (favourites[user] + 1 == category[item][:, None]).any(1)
    click = draw.random(num_rows) < 1 / (1 + np.exp(1.6 - 2.0 * likes - appeal[item]))
    return {
        "user": user,
        "item": item,
        "label": click.astype(np.float32),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]),
        "history": history,
        "negatives": by_popularity[_draw(NUM_ITEMS, 20, len(history), draw)],
        "category": category,
        "sizes": np.array([NUM_USERS, NUM_ITEMS, NUM_CATEGORIES, MAX_HISTORY]),
    }


def _draw(num: int, shift: int, size: int | tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Ranks 0 ... num - 1 in proportion to 1 / (rank + shift)."""
    cumulative = np.cumsum(1.0 / (np.arange(num) + shift))
    return np.searchsorted(cumulative / cumulative[-1], rng.random(size))


def padded(values: np.ndarray, offsets: np.ndarray, length: int = MAX_HISTORY) -> np.ndarray:
    """(n, length) with zeros behind each list."""
    out = np.zeros((len(offsets) - 1, length), np.int64)
    out[np.arange(length) < np.diff(offsets)[:, None]] = values
    return out


def write_logs(folder: Path, num_train: int, num_eval: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, num_rows, seed in (("train", num_train, 0), ("eval", num_eval, 1)):
        np.savez(folder / f"{name}.npz", **make_log(num_rows, seed))


def read_log(folder: Path, name: str) -> Columns:
    return dict(np.load(folder / f"{name}.npz"))
