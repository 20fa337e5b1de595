"""BehaviorCollator: batches of impressions with targets, jagged histories, sampled negatives and side features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmctr.data.batches import BehaviorBatch, Features, ItemBatch, jagged_rows
from mmctr.data.content import ItemContent
from mmctr.data.hashing import hashed_uniform, stream_seed
from mmctr.data.interactions import Impressions
from mmctr.features.columns import BehaviorView, FeatureColumns


class NegativeSampler:
    """Draws items that a user has never clicked, with probabilities proportional to the impressions of the items.

    Args:
        impressions: training rows. An item that the user clicks later in training is not drawn either.
        seed: seed of the run.
    """

    ROUNDS = 24
    """number of rounds in which clicked items are drawn again, before the remaining draws (for users who clicked nearly
    all items) are made one by one from the items that the user has not clicked"""

    def __init__(self, impressions: Impressions, seed: int):
        self.shown = impressions.item
        self.distinct = np.unique(self.shown)
        self.num_items = int(self.distinct[-1]) + 1
        clicked = impressions.label == 1
        self.clicked = np.unique(self._keys(impressions.user[clicked], self.shown[clicked]))
        self.seed = seed

    def __call__(self, users: np.ndarray, keys: np.ndarray, step: int) -> np.ndarray:
        """Draw one negative for every user.

        Args:
            users: (n,) user rows.
            keys: (n,) integers that identify the draws of a step over all processes.
            step: training step.

        Returns:
            (n,) catalog rows; any item for a user who has clicked every item.
        """
        items = self._draw(keys, step, 0)
        wrong = np.flatnonzero(self._is_clicked(users, items))
        for draw in range(1, self.ROUNDS):
            if not len(wrong):
                return items
            items[wrong] = self._draw(keys[wrong], step, draw)
            wrong = wrong[self._is_clicked(users[wrong], items[wrong])]
        for i in wrong:
            start, end = np.searchsorted(self.clicked, self._keys(users[i] + np.arange(2), np.zeros(2, np.int64)))
            unclicked = np.setdiff1d(self.distinct, self.clicked[start:end] % self.num_items, assume_unique=True)
            if len(unclicked):
                uniform = hashed_uniform(stream_seed(self.seed, "last negatives"), step, keys[i : i + 1])[0]
                items[i] = unclicked[int(uniform * len(unclicked))]
        return items

    def _draw(self, keys: np.ndarray, step: int, draw: int) -> np.ndarray:
        uniform = hashed_uniform(stream_seed(self.seed, "negatives", draw), step, keys)
        return self.shown[(uniform * len(self.shown)).astype(np.int64)]

    def _keys(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        return users.astype(np.int64) * self.num_items + items

    def _is_clicked(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        if not len(self.clicked):
            return np.zeros(len(users), bool)
        wanted = self._keys(users, items)
        position = np.minimum(np.searchsorted(self.clicked, wanted), len(self.clicked) - 1)
        return self.clicked[position] == wanted


def behaviors_read(part: Impressions, rows: np.ndarray | slice, max_history: int) -> tuple[Tensor, Tensor]:
    """The latest behaviours of every impression.

    Args:
        part: impressions of a split.
        rows: (n,) rows of `part`, or a slice.
        max_history: largest number of behaviours of an impression.

    Returns:
        (H,) positions in `part.history` and the (n + 1,) offsets of the impressions.
    """
    end = torch.from_numpy(part.history_end[rows])
    start = torch.maximum(torch.from_numpy(part.history_start[rows]), end - max_history)
    return jagged_rows(start, end)


@dataclass(frozen=True)
class BehaviorCollator:
    """Makes a `BehaviorBatch` from rows of a split, by operations on columns without a Python loop over rows."""

    impressions: Impressions
    """the rows of the split"""
    items: FeatureColumns
    """`item_id` and the declared item features, over the catalog"""
    user_rows: Tensor
    """(number of users,) rows of the user vocabulary"""
    users: FeatureColumns
    """declared user features, over the users table"""
    context: FeatureColumns
    """declared context features, over the interactions"""
    max_history: int
    """largest number of behaviours of an impression, the latest ones"""
    content: ItemContent | None = None
    """pictures and texts of the catalog, for a ranker that encodes items; None: no item is encoded"""
    encode_history: bool = True
    """with `content`: whether behaviours are encoded as well as targets"""
    max_encoded: int | None = None
    """with `content`: largest number of distinct items of a step that are encoded; None: all"""
    derived: tuple[Callable[[BehaviorView], Features], ...] = ()
    """functions that compute further context features: crosses, leaves of trees"""
    negatives: NegativeSampler | None = None
    """sampler of one negative per behaviour, for rankers with an auxiliary loss"""
    id_dropout: float = 0.0
    """probability that a distinct item of a batch gets the ID row of unknown items, which trains that row"""
    user_dropout: float = 0.0
    """probability that a user gets the ID row of unknown users, the same in all impressions of a step"""
    seed: int = 0
    """seed of the run"""

    def __call__(self, rows: np.ndarray, step: int = 0) -> BehaviorBatch:
        """The batch of (B,) rows of the split.

        Args:
            rows: (B,) rows of `impressions`.
            step: training step, which determines all draws.
        """
        part = self.impressions
        index, offsets = behaviors_read(part, rows, self.max_history)
        target = torch.from_numpy(part.item[rows]).long()
        history = torch.from_numpy(part.history[index.numpy()]).long()
        if self.negatives is not None:  # one for each behaviour, after all behaviours
            lengths = np.diff(offsets.numpy())
            keys = np.repeat(rows * self.max_history - offsets[:-1].numpy(), lengths) + np.arange(len(history))
            drawn = self.negatives(np.repeat(part.user[rows], lengths), keys, step)
            history = torch.cat([history, torch.from_numpy(drawn).long()])
        if self.content is None or self.encode_history:
            distinct, position = torch.unique(torch.cat([target, history]), return_inverse=True)
            num_targets = len(distinct)
        else:
            # targets alone are encoded: an item that is a behaviour as well has a slot for each
            targets, of_target = torch.unique(target, return_inverse=True)
            others, of_history = torch.unique(history, return_inverse=True)
            num_targets = len(targets)
            distinct, position = torch.cat([targets, others]), torch.cat([of_target, of_history + num_targets])

        features = self.items.take(distinct)
        if self.id_dropout:
            dropped = hashed_uniform(stream_seed(self.seed, "id dropout"), step, distinct.numpy()) < self.id_dropout
            id_rows = features["item_id"]
            assert isinstance(id_rows, Tensor)
            features["item_id"] = id_rows.masked_fill(torch.from_numpy(dropped), 0)
        if self.content is None:
            items = ItemBatch(row=distinct, features=features)
        else:
            encode = None if self.encode_history else torch.arange(num_targets)
            if self.max_encoded is not None and num_targets > self.max_encoded:
                draw = hashed_uniform(stream_seed(self.seed, "encoded items"), step, distinct[:num_targets].numpy())
                encode = torch.from_numpy(np.sort(np.argsort(draw)[: self.max_encoded]))
            items = self.content.batch(distinct, features, encode)

        user = torch.from_numpy(part.user[rows]).long()
        source = torch.from_numpy(part.source[rows])
        user_row = self.user_rows[user].long()
        if self.user_dropout:
            unknown = hashed_uniform(stream_seed(self.seed, "user dropout"), step, user.numpy()) < self.user_dropout
            user_row = user_row.masked_fill(torch.from_numpy(unknown), 0)
        targets_end, history_end = len(rows), len(rows) + int(offsets[-1])
        context = self.users.take(user) | self.context.take(source)
        if self.derived:
            ids = items.id_rows[position]
            view = BehaviorView(
                items=self.items,
                target_rows=target,
                history_rows=history[: int(offsets[-1])],
                target_ids=ids[:targets_end],
                history_ids=ids[targets_end:history_end],
                offsets=offsets,
                impression=context | {"user_id": user_row},
            )
            for make in self.derived:
                context |= make(view)
        return BehaviorBatch(
            items=items,
            target=position[:targets_end],
            history=position[targets_end:history_end],
            history_offsets=offsets,
            user=user_row,
            context=context,
            label=torch.from_numpy(part.label[rows]).float(),
            negatives=None if self.negatives is None else position[history_end:],
        )
