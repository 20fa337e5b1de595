"""Partners of items for pretraining: co-clicked items, queries, shown but not clicked items, items of the same group.

Every draw is a pure function of (seed, step, item): equal in every process, loader worker and resumed run.
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
    """Draws one partner item for every given item."""

    @property
    def log_q(self) -> np.ndarray | None:
        """(N,) log of the probability of drawing a catalog row, relative to uniform draws; None: no correction."""
        ...

    def __call__(self, rows: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw a partner for each of the (n,) catalog rows.

        Returns:
            (n,) catalog rows of the partners, and the (n,) bool mask of the items that have a partner.
        """
        ...


@dataclass(frozen=True)
class _Clicks:
    """The C clicks of the training rows in the order of the log, and an index of the clicks by item."""

    user: np.ndarray
    """(C,) user rows"""
    item: np.ndarray
    """(C,) catalog rows"""
    source: np.ndarray
    """(C,) rows of the interactions"""
    by_item: np.ndarray
    """(C,) positions of the clicks sorted by item"""
    start: np.ndarray
    """(N + 1,) offsets of the items in `by_item`"""

    @classmethod
    def of(cls, train: Impressions, num_items: int) -> _Clicks:
        """The clicks of a split, whose rows are in the order (user, time) of the log."""
        clicked = np.flatnonzero(train.label == 1)
        item = train.item[clicked].astype(np.int64)
        start = np.concatenate([[0], np.cumsum(np.bincount(item, minlength=num_items))])
        by_item = np.argsort(item, kind="stable")
        return cls(train.user[clicked].astype(np.int64), item, train.source[clicked], by_item, start)

    def draw(self, rows: np.ndarray, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """One click of each item, drawn uniformly: (n,) positions of clicks, and the (n,) mask of clicked items."""
        count = self.start[rows + 1] - self.start[rows]
        position = self.start[rows] + (hashed_uniform(seed, step, rows) * count).astype(np.int64)
        if not len(self.item):
            return position, count > 0
        return self.by_item[np.minimum(position, max(len(self.item) - 1, 0))], count > 0


class CoClicks:
    """Draws an item that a user clicked near a click on the given item.

    A click on the item is drawn uniformly, then uniformly one of the clicks of the same user that are at most `window`
    clicks earlier or later. P(j | i) is therefore proportional to the number of clicks on j near clicks on i, and items
    with few clicks are anchors as often as popular items.

    Args:
        train: training impressions alone, so that no pair comes from the test period or holds a cold item.
        log: the interactions that `train` was cut from, for the times of the clicks.
        num_items: N, number of catalog items.
        window: largest distance of two clicks, in clicks of the user.
        max_gap: longest time between two clicks, in the unit of the log; None: any time.
        seed: seed of the run.
        allowed: (N,) bool: whether an item may be drawn.
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
        """Draw a co-clicked item for each of the (n,) catalog rows.

        Returns:
            (n,) catalog rows of the partners, and the (n,) bool mask of the items that have a partner.
        """
        click, has = self.clicks.draw(rows, stream_seed(self.seed, "click of an item"), step)
        if not len(self.clicks.item):
            return rows, has
        before, after = self.before[click], self.after[click]
        # 0 .. before - 1 are the earlier clicks, the others the later clicks
        offset = (hashed_uniform(stream_seed(self.seed, "co-click"), step, rows) * (before + after)).astype(np.int64)
        partner = self.clicks.item[np.minimum(click - before + offset + (offset >= before), len(self.clicks.item) - 1)]
        has = has & (before + after > 0) & (partner != rows)  # an item is no partner of itself
        return np.where(has, partner, rows), has

    def _log_q(self, num_items: int) -> np.ndarray:
        """(N,) log of the mean of P(j | i) over the items i times the number of items that can be drawn; items that are
        never drawn get the smallest value."""
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
    """Draws a hard negative: an item that was shown near a click on the given item, to the same user, and not clicked.

    Args:
        train: training impressions.
        num_items: N, number of catalog items.
        window: largest distance from the click, in impressions. One of these impressions is drawn uniformly; where the
            drawn impression was clicked, the item has no hard negative in this step.
        seed: seed of the run.
        allowed: (N,) bool: whether an item may be drawn.
    """

    log_q = None

    def __init__(self, train: Impressions, num_items: int, window: int, seed: int, allowed: np.ndarray):
        train = train.take(np.flatnonzero(allowed[train.item]))
        self.train, self.window, self.seed = train, window, seed
        self.clicks = _Clicks.of(train, num_items)
        self.click_rows = np.flatnonzero(train.label == 1)

    def __call__(self, rows: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw a hard negative for each of the (n,) catalog rows.

        Returns:
            (n,) catalog rows of the negatives, and the (n,) bool mask of the items that have a negative.
        """
        # the same draw as in CoClicks: the negative belongs to the same click as the positive
        click, has = self.clicks.draw(rows, stream_seed(self.seed, "click of an item"), step)
        if not len(self.clicks.item):
            return rows, has
        row = self.click_rows[click]
        shift = (hashed_uniform(stream_seed(self.seed, "hard negative"), step, rows) * 2 * self.window).astype(
            np.int64
        ) - self.window
        other = row + shift + (shift >= 0)
        inside = (other >= 0) & (other < len(self.train))
        other = np.where(inside, other, row)
        negative = self.train.item[other].astype(np.int64)
        same_user = self.train.user[other] == self.train.user[row]
        has = has & inside & same_user & (self.train.label[other] == 0) & (negative != rows)
        return np.where(has, negative, rows), has


class GroupMates:
    """Draws another item with the same value in a column of the catalog, uniformly.

    Args:
        codes: (N,) int group of each catalog row, negative for an item without a group.
        allowed: (N,) bool: whether an item may be drawn, True for training items.
        seed: seed of the run.
    """

    log_q = None

    def __init__(self, codes: np.ndarray, allowed: np.ndarray, seed: int):
        self.codes, self.seed = codes, seed
        members = np.flatnonzero(allowed & (codes >= 0))
        self.members = members[np.argsort(codes[members], kind="stable")]
        self.start = np.searchsorted(codes[self.members], np.arange(codes.max(initial=-1) + 2))

    def __call__(self, rows: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw a group mate for each of the (n,) catalog rows.

        Returns:
            (n,) catalog rows of the partners, and the (n,) bool mask of the items that have a partner.
        """
        code = self.codes[rows]
        group = np.maximum(code, 0)
        if not len(self.members):
            return rows, np.zeros(len(rows), bool)
        first, last = self.start[group], self.start[group + 1]
        uniform = hashed_uniform(stream_seed(self.seed, "group mate"), step, rows)
        position = first + (uniform * (last - first)).astype(np.int64)
        mate = self.members[np.minimum(position, len(self.members) - 1)]
        has = (code >= 0) & (last > first) & (mate != rows)
        return np.where(has, mate, rows), has


class ClickedQueries:
    """Draws the search query of one click on the given item, uniformly over the clicks with a query.

    Args:
        train: training impressions.
        num_items: N, number of catalog items.
        query: (n,) row in `input_ids` of the query of each interaction, negative for an interaction without a query.
        input_ids: (Q, T) tokens of the distinct queries.
        seed: seed of the run.
    """

    def __init__(self, train: Impressions, num_items: int, query: np.ndarray, input_ids: Tensor, seed: int):
        asked = train.take(np.flatnonzero((train.label == 1) & (query[train.source] >= 0)))
        self.clicks, self.query, self.input_ids, self.seed = _Clicks.of(asked, num_items), query, input_ids, seed

    def __call__(self, rows: np.ndarray, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draw a query for each of the (n,) catalog rows.

        Returns:
            (n, T) tokens, the (n,) bool mask of items that have a query, and the (n,) rows of the queries.
        """
        click, has = self.clicks.draw(rows, stream_seed(self.seed, "query"), step)
        number = np.zeros(len(rows), np.int64)
        if len(self.clicks.item):
            number = np.where(has, self.query[self.clicks.source[click]], 0)
        return self.input_ids[torch.from_numpy(number)].long(), torch.from_numpy(has), torch.from_numpy(number)


@dataclass(frozen=True)
class PairCollator:
    """Makes a `PairBatch` from training rows: the items of the rows, and the partners that the objectives need."""

    content: ItemContent
    """pictures and texts of the catalog"""
    catalog_rows: np.ndarray
    """(number of training rows,) catalog row of each training row"""
    keys: Tensor
    """(N, K) int keys: two items that agree in any column are not negatives of each other; the first column is the
    catalog row"""
    samplers: Mapping[str, PartnerSampler]
    """samplers by the name under which an objective reads the partners"""
    queries: ClickedQueries | None = None
    """sampler of queries, for the objective `query`"""
    groups: Mapping[str, Tensor] | None = None
    """column name -> (N,) int group of each item, negative for an item without a group"""
    teacher: tuple[Tensor, Tensor] | None = None
    """(N, D') unit-norm vectors of a teacher and the (N,) bool mask of items with a teacher vector"""
    seed: int = 0
    """seed of the run"""

    def __call__(self, rows: np.ndarray, step: int = 0) -> PairBatch:
        """The batch of (B,) training rows.

        Args:
            rows: (B,) training rows, all distinct.
            step: training step, which determines all draws.
        """
        anchors = self.catalog_rows[rows]
        drawn = {name: sampler(anchors, step) for name, sampler in self.samplers.items()}
        every = np.concatenate([anchors, *(partner for partner, _ in drawn.values())])
        distinct, position = np.unique(every, return_inverse=True)
        at = torch.from_numpy(position).split(len(anchors))
        partners = {
            name: PartnerBatch(
                item=at[number],
                has_partner=torch.from_numpy(has),
                log_q=None if sampler.log_q is None else torch.from_numpy(sampler.log_q[partner]),
            )
            for number, ((name, (partner, has)), sampler) in enumerate(
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
