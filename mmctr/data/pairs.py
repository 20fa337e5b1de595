"""Partners of items for pretraining: co-clicked items, queries, shown but not clicked items, items of the same group.

Every draw is a pure function of (seed, step, item): the same in any process, worker or resumed run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mmctr.data.batches import PairBatch, PartnerBatch
from mmctr.data.content import ItemContent
from mmctr.data.hashing import hashed_uniform, stream_seed
from mmctr.data.interactions import Impressions, Interactions


class PartnerSampler(Protocol):
    """Draws a partner for items."""

    @property
    def log_q(self) -> np.ndarray | None:
        """(N,) log of how often a catalog row is drawn over how often it would be were all drawn alike"""
        ...

    def __call__(self, rows: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(n,) catalog rows -> (n,) partners' catalog rows and the (n,) bool mask of rows that have one."""
        ...


@dataclass(frozen=True)
class _Clicks:
    """The clicks of training in the order of their users and times, and where each item was clicked."""

    user: np.ndarray
    """(C,)"""
    item: np.ndarray
    """(C,) catalog rows"""
    source: np.ndarray
    """(C,) rows of the interactions"""
    by_item: np.ndarray
    """(C,) clicks sorted by item"""
    start: np.ndarray
    """(N + 1,) the slice of `by_item` of each item"""

    @classmethod
    def of(cls, train: Impressions, num_items: int) -> _Clicks:
        """Rows of a split keep the order (user, time) of the log."""
        clicked = np.flatnonzero(train.label == 1)
        item = train.item[clicked].astype(np.int64)
        start = np.concatenate([[0], np.cumsum(np.bincount(item, minlength=num_items))])
        by_item = np.argsort(item, kind="stable")
        return cls(train.user[clicked].astype(np.int64), item, train.source[clicked], by_item, start)

    def draw(self, rows: np.ndarray, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """One click of each item, all alike: (n,) positions of clicks, and the (n,) mask of items that have any."""
        count = self.start[rows + 1] - self.start[rows]
        place = self.start[rows] + (hashed_uniform(seed, step, rows) * count).astype(np.int64)
        return self.by_item[np.minimum(place, max(len(self.item) - 1, 0))] if len(self.item) else place, count > 0


class CoClicks:
    """Draws an item that a user clicked near a click on the given one.

    A click of the item is drawn, all alike, then one of the same user's clicks at most `window` clicks before or after
    it. So P(j | i) is proportional to how often j was clicked near i, and items with few clicks are trained as often
    as popular ones.

    Args:
        train: training impressions alone: pairs of the test period, or of cold items, must not be seen.
        max_gap: longest time between the two clicks, in the unit of the log; None: any.
        allowed: (N,) bool, the items that may be drawn.
    """

    def __init__(
        self,
        train: Impressions,
        log: Interactions,
        num_items: int,
        window: int,
        max_gap: int | None,
        seed: int,
        allowed: np.ndarray,
    ):
        train = train.take(np.flatnonzero(allowed[train.item]))
        self.clicks, self.seed = _Clicks.of(train, num_items), seed
        user, item = self.clicks.user, self.clicks.item
        time = np.asarray(log.time)[self.clicks.source]
        before, after = np.zeros(len(item), np.int64), np.zeros(len(item), np.int64)
        for distance in range(1, min(window, max(len(item) - 1, 0)) + 1):
            near = user[distance:] == user[:-distance]
            if max_gap is not None:
                near &= time[distance:] - time[:-distance] <= max_gap
            if not near.any():
                break
            before[distance:] += near
            after[:-distance] += near
        self.before, self.after = before, after
        self.num_pairs = int(after.sum())
        self.log_q = self._log_q(num_items)

    def __call__(self, rows: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        click, has = self.clicks.draw(rows, stream_seed(self.seed, "click of an item"), step)
        if not len(self.clicks.item):
            return rows, has
        before, after = self.before[click], self.after[click]
        # 0 .. before - 1 are the clicks before, the others those after
        place = (hashed_uniform(stream_seed(self.seed, "co-click"), step, rows) * (before + after)).astype(np.int64)
        partner = self.clicks.item[np.minimum(click - before + place + (place >= before), len(self.clicks.item) - 1)]
        has = has & (before + after > 0) & (partner != rows)  # twice the same item says nothing
        return np.where(has, partner, rows), has

    def _log_q(self, num_items: int) -> np.ndarray:
        """Exact: the mean over the items of P(j | i), times their number; unseen items as if drawn once in a while."""
        item = self.clicks.item
        count = np.diff(self.clicks.start)
        weight = 1.0 / (np.maximum(count[item], 1) * np.maximum(self.before + self.after, 1))
        q = np.zeros(num_items)
        for distance in range(1, int(max(self.before.max(initial=0), self.after.max(initial=0))) + 1):
            for click, partner in (
                (np.flatnonzero(self.after >= distance), distance),
                (np.flatnonzero(self.before >= distance), -distance),
            ):
                click = click[item[click + partner] != item[click]]
                q += np.bincount(item[click + partner], weight[click], num_items)
        drawn = q > 0
        relative = q * drawn.sum() / max(q.sum(), 1e-12)
        smallest = relative[drawn].min() if drawn.any() else 1.0
        return np.log(np.where(drawn, relative, smallest)).astype(np.float32)


class ShownNotClicked:
    """Draws an item that was shown to a user who clicked the given one, near that click, and was not clicked.

    Args:
        window: how many impressions before or after the click are looked at; one is drawn, all alike, and the item
            has no hard negative this time when that one was clicked.
    """

    log_q = None

    def __init__(self, train: Impressions, num_items: int, window: int, seed: int, allowed: np.ndarray):
        train = train.take(np.flatnonzero(allowed[train.item]))
        self.train, self.window, self.seed = train, window, seed
        self.clicks = _Clicks.of(train, num_items)
        self.place = np.flatnonzero(train.label == 1)

    def __call__(self, rows: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        # the draw of CoClicks: the negative belongs to the same click as the positive
        click, has = self.clicks.draw(rows, stream_seed(self.seed, "click of an item"), step)
        if not len(self.clicks.item):
            return rows, has
        place = self.place[click]
        shift = (hashed_uniform(stream_seed(self.seed, "hard negative"), step, rows) * 2 * self.window).astype(
            np.int64
        ) - self.window
        other = place + shift + (shift >= 0)
        inside = (other >= 0) & (other < len(self.train))
        other = np.where(inside, other, place)
        negative = self.train.item[other].astype(np.int64)
        same_user = self.train.user[other] == self.train.user[place]
        has = has & inside & same_user & (self.train.label[other] == 0) & (negative != rows)
        return np.where(has, negative, rows), has


class GroupMates:
    """Draws another item with the same value in a column of the catalog, all alike.

    Args:
        codes: (N,) group of each catalog row, negative for none.
        allowed: (N,) bool, the items that may be drawn: those of training.
    """

    log_q = None

    def __init__(self, codes: np.ndarray, allowed: np.ndarray, seed: int):
        self.codes, self.seed = codes, seed
        members = np.flatnonzero(allowed & (codes >= 0))
        self.members = members[np.argsort(codes[members], kind="stable")]
        self.start = np.searchsorted(codes[self.members], np.arange(codes.max(initial=-1) + 2))

    def __call__(self, rows: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        code = self.codes[rows]
        group = np.maximum(code, 0)
        if not len(self.members):
            return rows, np.zeros(len(rows), bool)
        first, last = self.start[group], self.start[group + 1]
        place = first + (hashed_uniform(stream_seed(self.seed, "group mate"), step, rows) * (last - first)).astype(
            np.int64
        )
        mate = self.members[np.minimum(place, len(self.members) - 1)]
        has = (code >= 0) & (last > first) & (mate != rows)
        return np.where(has, mate, rows), has


class ClickedQueries:
    """Draws the query of one of an item's clicks.

    Args:
        query: (n,) row of each interaction's query in `input_ids`, negative for none.
        input_ids: (Q, T) tokens of the distinct queries.
    """

    def __init__(self, train: Impressions, num_items: int, query: np.ndarray, input_ids: Tensor, seed: int):
        asked = train.take(np.flatnonzero((train.label == 1) & (query[train.source] >= 0)))
        self.clicks, self.query, self.input_ids, self.seed = _Clicks.of(asked, num_items), query, input_ids, seed

    def __call__(self, rows: np.ndarray, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """(n, T) tokens, the (n,) mask of items that have a query, and the (n,) query's row."""
        click, has = self.clicks.draw(rows, stream_seed(self.seed, "query"), step)
        number = np.zeros(len(rows), np.int64)
        if len(self.clicks.item):
            number = np.where(has, self.query[self.clicks.source[click]], 0)
        return self.input_ids[torch.from_numpy(number)].long(), torch.from_numpy(has), torch.from_numpy(number)


@dataclass(frozen=True)
class PairCollator:
    """Training rows -> PairBatch: the items of the rows, and the partners that the objectives ask for.

    Args:
        catalog_rows: catalog row of each training row.
        keys: (N, K) what tells items apart, see `mmctr.losses.contrastive`; the first column is the catalog row.
        samplers: by the name under which an objective looks for its partners.
    """

    content: ItemContent
    catalog_rows: np.ndarray
    keys: Tensor
    samplers: Mapping[str, PartnerSampler]
    queries: ClickedQueries | None = None
    groups: Mapping[str, Tensor] | None = None
    teacher: tuple[Tensor, Tensor] | None = None
    """(N, D') unit-norm vectors of a teacher and the (N,) mask of items that have one"""
    seed: int = 0

    def __call__(self, rows: np.ndarray, step: int = 0) -> PairBatch:
        anchors = self.catalog_rows[rows]
        drawn = {name: sampler(anchors, step) for name, sampler in self.samplers.items()}
        every = np.concatenate([anchors, *(partner for partner, _ in drawn.values())])
        distinct, position = np.unique(every, return_inverse=True)
        at = torch.from_numpy(position).split(len(anchors))
        partners = {
            name: PartnerBatch(
                item=at[place],
                there=torch.from_numpy(has),
                log_q=None if sampler.log_q is None else torch.from_numpy(sampler.log_q[partner]),
            )
            for place, ((name, (partner, has)), sampler) in enumerate(
                zip(drawn.items(), self.samplers.values(), strict=True), start=1
            )
        }
        picked = torch.from_numpy(distinct)
        query = self.queries(anchors, step) if self.queries is not None else (None, None, None)
        return PairBatch(
            items=self.content.batch(picked, draw=(self.seed, step)),
            anchor=at[0],
            keys=self.keys[picked],
            partners=partners,
            query_ids=query[0],
            has_query=query[1],
            query=query[2],
            groups={name: codes[picked] for name, codes in (self.groups or {}).items()},
            teacher=None if self.teacher is None else self.teacher[0][picked],
            has_teacher=None if self.teacher is None else self.teacher[1][picked],
        )
