"""Splits of a click log into training, validation and test impressions: temporal, cold items, staged."""

from __future__ import annotations

import string
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from mmctr.config import Config
from mmctr.data.interactions import Impressions, Interactions


class TemporalSplit(Config):
    """Train on the past, test on the last part of the log by global time. Cold items are those unseen before it."""

    name: Literal["temporal"] = "temporal"
    test: float = Field(default=0.1, gt=0, lt=1)
    """fraction of all interactions, the latest"""
    validation: float = Field(default=0.1, gt=0, lt=1)
    """fraction of what is left, the latest"""


class ColdItemsSplit(Config):
    """A seeded fraction of items is kept out of training and of all histories; each user's last part is tested.

    A cold item has never been clicked, so none stands in a history, not even a test history: a click on one there
    would give away that its user likes items like it, and a ranker that knows no cold item apart from another would
    see the labels of the user's earlier cold rows through it.

    Validation is cut the same way from what is left: further items are held out, and each user's last part of the
    remaining rows is taken. Test rows of items held out for validation alone are set aside (and counted): they are
    neither warm nor part of the cold set asked for.
    """

    name: Literal["cold_items"] = "cold_items"
    cold: float = Field(default=0.15, gt=0, lt=1)
    """fraction of the items in the log that no training row and no training history holds"""
    test: float = Field(default=0.2, gt=0, lt=1)
    """fraction of each user's interactions, the latest"""
    validation_cold: float = Field(default=0.05, ge=0, lt=1)
    """fraction of the remaining items held out for validation"""
    validation: float = Field(default=0.1, gt=0, lt=1)
    """fraction of each user's remaining interactions, the latest"""
    seed: int = 0
    """which items are held out; separate from the training seed so that seeds can be compared on the same rows"""


class StagedSplit(Config):
    """New items are warmed up in stages: old items train, the first rows of each new item come `rows` at a time, and
    its later rows are tested before the first stage ("cold") and after each ("warm_a", "warm_b", ...).

    The protocol of Meta-Embedding (Pan et al. 2019, arXiv 1904.12214), MWUF (Zhu et al. 2021, arXiv 2105.04790) and
    CVAR (Zhao et al. 2022, arXiv 2205.13795). What keeps the later rows of a new item out of the earlier stages:

    - New items stand in no history: of training, of stages or of the test. A click on one is the label of a row of
      some stage or of the test, and a history that held it would tell that label to whatever is scored or trained
      before its turn. (Also `cold_items`: until they have rows of their own all new items look alike, so a click on
      one would say "likes the cold ones".) So a test row reads the same at all stages, but for its item's vector.
    - Stages go by the time of the item's own rows, so a stage trains an item on what came before its test rows. Other
      items' stages may be later in time: they cannot tell, as long as a stage trains the vectors of new items alone.
    - Old items train on rows of any time, as in the papers: what a user did to old items after a test row is known,
      to all methods alike. `temporal` is the split that hides it.

    Validation is each user's last part of the rows of old items.
    """

    name: Literal["staged"] = "staged"
    new: float | None = Field(default=None, gt=0, lt=1)
    """new are this seeded fraction of the items with rows for all stages and the test; all others are old"""
    old_from: int | None = Field(default=None, ge=1)
    """instead: old are the items with at least so many rows, as in the papers; of the others those with rows for all
    stages and the test are new, and the rest are set aside"""
    rows: int = Field(default=20, ge=1)
    """rows of each new item in a stage"""
    stages: int = Field(default=3, ge=1, le=26)
    """number of stages"""
    test_rows: int = Field(default=20, ge=1)
    """rows a new item has at least for the test; all that follow its stages are tested"""
    validation: float = Field(default=0.1, gt=0, lt=1)
    """fraction of each user's rows of old items, the latest"""
    seed: int = 0
    """which items are new; separate from the training seed so that seeds can be compared on the same rows"""

    @property
    def needed(self) -> int:
        """Rows without which an item cannot be new."""
        return self.stages * self.rows + self.test_rows

    @model_validator(mode="after")
    def _one_way_to_be_new(self) -> Self:
        if (self.new is None) == (self.old_from is None):
            raise ValueError(
                "give either `new`, a fraction of the items, or `old_from`, the rows that make an item old"
            )
        if self.old_from is not None and self.old_from <= self.needed:
            raise ValueError(
                f"old_from: {self.old_from} leaves no new item, as one needs stages * rows + test_rows = {self.needed} "
                f"rows; raise it, or lower the others"
            )
        return self


SplitConfig = Annotated[TemporalSplit | ColdItemsSplit | StagedSplit, Field(discriminator="name")]


@dataclass(frozen=True)
class Splits:
    train: Impressions
    validation: Impressions
    test: Impressions
    seen: np.ndarray
    """(N,) int64: training impressions of each catalog item; 0 means cold"""
    clicks: np.ndarray
    """(N,) int64: training clicks of each catalog item"""
    report: dict[str, Any]
    """row counts, with everything set aside and why"""
    stages: dict[str, Impressions] = field(default_factory=dict)
    """impressions of the test's items that each stage trains on, by stage in order; of `StagedSplit` alone"""

    def is_cold(self, part: Impressions) -> np.ndarray:
        """(n,) bool: the target of an impression is in no training impression."""
        return self.seen[part.item] == 0


def require_both_labels(train: Impressions, source: str) -> None:
    """Raises ValueError where all training impressions have one label: nothing can then be learned."""
    if len(np.unique(train.label)) < 2:
        raise ValueError(
            f"{source}: all training labels are {train.label[0]}; a ranker needs clicks and impressions without a click"
        )


def split_interactions(
    log: Interactions, num_items: int, config: TemporalSplit | ColdItemsSplit | StagedSplit
) -> Splits:
    """Cut a log into training, validation and test impressions without leaking the future or the cold items.

    Raises ValueError when a part comes out empty.
    """
    stages: dict[str, np.ndarray] = {}
    everything = np.ones(len(log), bool)
    if isinstance(config, TemporalSplit):
        # rows at the very moment of the cut go to the later part together
        test = log.time >= _cut_time(log.time, config.test)
        rest = np.sort(log.time[~test])
        validation = ~test & (log.time >= _cut_time(rest, config.validation)) if len(rest) else ~everything
        train = ~test & ~validation
        aside: dict[str, int] = {}
        keep_train, keep_validation, keep_test = train, ~test, everything
    elif isinstance(config, StagedSplit):
        old, stages, test = _staged_rows(log, num_items, config)
        validation = _latest_of_users(log, old, config.validation)
        train = old & ~validation
        keep_train, keep_validation, keep_test = train, old, old
        used = sum(int(rows.sum()) for rows in (old, test, *stages.values()))  # of each row one at most
        aside = {"rows of items too rare to be new": len(log) - used}
    else:
        cold, validation_cold = _cold_items(log, num_items, config)
        place, size = log.user_position()
        late = place >= np.ceil(size * (1 - config.test) - 1e-9)
        test = late & ~validation_cold[log.item]
        left = ~late & ~cold[log.item]
        validation = _latest_of_users(log, left, config.validation)
        train = left & ~validation & ~validation_cold[log.item]
        keep_test = ~(cold | validation_cold)[log.item]
        keep_train, keep_validation = train, left & keep_test
        aside = {
            "early rows of items held out for test": int((~late & cold[log.item]).sum()),
            "early rows of items held out for validation": int((left & ~validation & validation_cold[log.item]).sum()),
            "test rows of items held out for validation": int((late & validation_cold[log.item]).sum()),
        }
    parts = {
        "train": _impressions(log, train, keep_train),
        "validation": _impressions(log, validation, keep_validation),
        "test": _impressions(log, test, keep_test),
    }
    staged = {name: _impressions(log, rows, keep_test) for name, rows in stages.items()}
    for name, part in parts.items():
        if not len(part):
            raise ValueError(
                f"split {config.name!r}: no {name} rows among {len(log)} interactions; change its fractions"
            )
    seen = np.bincount(parts["train"].item, minlength=num_items)
    clicks = np.bincount(parts["train"].item, weights=parts["train"].label, minlength=num_items).astype(np.int64)
    report: dict[str, Any] = {
        name: {"rows": len(part), "positives": int(part.label.sum()), "cold rows": int((seen[part.item] == 0).sum())}
        for name, part in parts.items()
    }
    report |= {"items seen in training": int((seen > 0).sum()), "set aside": aside}
    if staged:
        report["stages"] = {n: {"rows": len(part), "positives": int(part.label.sum())} for n, part in staged.items()}
        report["new items"] = len(np.unique(parts["test"].item))
    return Splits(**parts, seen=seen, clicks=clicks, report=report, stages=staged)


def _impressions(log: Interactions, rows: np.ndarray, keep: np.ndarray) -> Impressions:
    values, start, end = log.histories(keep)
    picked = np.flatnonzero(rows)
    return Impressions(
        user=log.user[picked],
        item=log.item[picked],
        label=log.label[picked],
        source=picked,
        history=values,
        history_start=start[picked],
        history_end=end[picked],
    )


def _cut_time(times: np.ndarray, fraction: float) -> int:
    """The time from which the latest `fraction` of the rows begins."""
    ordered = np.sort(times)
    return int(ordered[min(len(ordered) - 1, int(len(ordered) * (1 - fraction) + 1e-9))])


def _cold_items(log: Interactions, num_items: int, config: ColdItemsSplit) -> tuple[np.ndarray, np.ndarray]:
    """Two (N,) bool masks: items held out for test, and further ones held out for validation."""
    active = np.unique(log.item)
    shuffled = np.random.default_rng([config.seed, len(active)]).permutation(active)
    num_cold = round(len(active) * config.cold)
    num_validation = round((len(active) - num_cold) * config.validation_cold)
    masks = np.zeros((2, num_items), bool)
    masks[0, shuffled[:num_cold]] = True
    masks[1, shuffled[num_cold : num_cold + num_validation]] = True
    return masks[0], masks[1]


def _latest_of_users(log: Interactions, rows: np.ndarray, fraction: float) -> np.ndarray:
    """(n,) mask of the latest `fraction` of each user's rows among the masked ones."""
    left = np.flatnonzero(rows)
    place, size = Interactions(*(getattr(log, name)[left] for name in Interactions.NAMES)).user_position()
    latest = np.zeros(len(log), bool)
    latest[left[place >= np.ceil(size * (1 - fraction) - 1e-9)]] = True
    return latest


def _staged_rows(
    log: Interactions, num_items: int, config: StagedSplit
) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """(n,) masks: rows of old items, the rows of each stage, and test rows. Raises ValueError without new items."""
    count = np.bincount(log.item, minlength=num_items)
    is_new = count >= config.needed
    is_old = np.ones(num_items, bool)
    if config.old_from is not None:
        is_old = count >= config.old_from
        is_new &= ~is_old
    elif config.new is not None:
        able = np.flatnonzero(is_new)
        shuffled = np.random.default_rng([config.seed, len(able)]).permutation(able)
        is_new[shuffled[round(len(able) * config.new) :]] = False
        is_old = ~is_new
    if not is_new.any():
        raise ValueError(
            f"split 'staged': no item is new; one needs stages * rows + test_rows = {config.needed} rows, and the "
            f"longest has {count.max(initial=0)}: lower rows or test_rows"
            + (", or raise old_from" if config.old_from is not None else ", or raise new")
        )
    # the place of a row among those of its item, by time; rows of one moment are of different users, in their order
    order = np.lexsort((log.time, log.item))
    place = np.empty(len(log), np.int64)
    place[order] = np.arange(len(log)) - np.repeat(np.cumsum(count) - count, count)
    own = is_new[log.item]
    stages = {f"warm_{string.ascii_lowercase[i]}": own & (place // config.rows == i) for i in range(config.stages)}
    return is_old[log.item], stages, own & (place >= config.stages * config.rows)
