"""Impressions of a click log -> BehaviorBatch: targets, jagged histories, drawn negatives, features."""

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
    """Items a user has never clicked, drawn as often as they are shown in the training impressions.

    Args:
        impressions: the training rows. Items clicked later on are no negatives either.
    """

    ROUNDS = 24
    """draws, of what collides alone, before what is left (users who clicked nearly all there is) is done one by one"""

    def __init__(self, impressions: Impressions, seed: int):
        self.shown = impressions.item
        self.distinct = np.unique(self.shown)
        self.num_items = int(self.distinct[-1]) + 1
        clicked = impressions.label == 1
        self.clicked = np.unique(self._keys(impressions.user[clicked], self.shown[clicked]))
        self.seed = seed

    def __call__(self, users: np.ndarray, keys: np.ndarray, step: int) -> np.ndarray:
        """(n,) catalog rows for users (n,); `keys` (n,) tell the draws of a step apart, in whatever process they are.

        A user who has clicked every item there is gets any item.
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
            left = np.setdiff1d(self.distinct, self.clicked[start:end] % self.num_items, assume_unique=True)
            if len(left):
                uniform = hashed_uniform(stream_seed(self.seed, "last negatives"), step, keys[i : i + 1])[0]
                items[i] = left[int(uniform * len(left))]
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
        place = np.minimum(np.searchsorted(self.clicked, wanted), len(self.clicked) - 1)
        return self.clicked[place] == wanted


def behaviors_read(part: Impressions, rows: np.ndarray | slice, max_history: int) -> tuple[Tensor, Tensor]:
    """The latest behaviours of each impression: (H,) places in `part.history` and the (n + 1,) offsets."""
    end = torch.from_numpy(part.history_end[rows])
    start = torch.maximum(torch.from_numpy(part.history_start[rows]), end - max_history)
    return jagged_rows(start, end)


@dataclass(frozen=True)
class BehaviorCollator:
    """Rows of a split -> BehaviorBatch. Everything is columns; there is no Python per row.

    `content` is given when items are encoded inside the ranker; `encode_history` says whether behaviours are too.
    """

    impressions: Impressions
    items: FeatureColumns
    """`item_id` and the declared item features"""
    user_rows: Tensor
    """(num users,) rows of the user vocabulary"""
    users: FeatureColumns
    context: FeatureColumns
    max_history: int
    content: ItemContent | None = None
    encode_history: bool = True
    max_encoded: int | None = None
    """at most this many distinct items of a step are encoded"""
    derived: tuple[Callable[[BehaviorView], Features], ...] = ()
    """make further context features: crosses, leaves of trees"""
    negatives: NegativeSampler | None = None
    """for rankers with an auxiliary loss"""
    id_dropout: float = 0.0
    """chance that a distinct item of a batch shows the ID of an unknown item, so that this row is trained too"""
    user_dropout: float = 0.0
    seed: int = 0

    def __call__(self, rows: np.ndarray, step: int = 0) -> BehaviorBatch:
        part = self.impressions
        index, offsets = behaviors_read(part, rows, self.max_history)
        target = torch.from_numpy(part.item[rows]).long()
        history = torch.from_numpy(part.history[index.numpy()]).long()
        if self.negatives is not None:  # one for each behaviour, behind them
            lengths = np.diff(offsets.numpy())
            place = np.repeat(rows * self.max_history - offsets[:-1].numpy(), lengths) + np.arange(len(history))
            drawn = self.negatives(np.repeat(part.user[rows], lengths), place, step)
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
