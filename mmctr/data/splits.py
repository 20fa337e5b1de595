"""Splits of a click log into training, validation and test impressions: by time, by cold items, in stages, or as a
column of the log says.

Rows with equal times: `temporal` keeps a moment together. The cuts by user and by item fall between rows of one moment
where the fractions say so, in the order of a hash of (user, item, time): no result depends on the order in which a file
lists rows with equal times, and both sides of a cut have the same share of positives. Histories hold earlier moments
alone.
"""

from __future__ import annotations

import string
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from mmctr.config import Config
from mmctr.data.hashing import tie_hashes
from mmctr.data.interactions import Impressions, Interactions
from mmctr.data.tables import value_codes


class TemporalSplit(Config):
    """Train on the past and test on the last part of the log by global time. Cold items are items without a training
    row. Rows with equal times are in the same part: the moment of a cut belongs to the later part."""

    name: Literal["temporal"] = "temporal"
    test: float = Field(default=0.1, gt=0, lt=1)
    """fraction of all interactions that is tested, the latest ones"""
    validation: float = Field(default=0.1, gt=0, lt=1)
    """fraction of the remaining interactions that is used for validation, the latest ones"""


class ColdItemsSplit(Config):
    """A seeded fraction of the items, the cold items, is excluded from training and from all histories; the last rows
    of each user are tested.

    A cold item has never been clicked, so no history holds a cold item, not even a test history. A click on a cold item
    in a history would reveal labels: a ranker that cannot distinguish cold items would read from such a history whether
    the user clicked on earlier cold rows.

    The validation rows are cut in the same way from the remaining rows: further items are excluded from training, and
    the last remaining rows of each user are taken. Test rows of the items that were excluded for validation alone are
    set aside and counted, because these items are neither warm nor among the cold items of the test.
    """

    name: Literal["cold_items"] = "cold_items"
    cold: float = Field(default=0.15, gt=0, lt=1)
    """fraction of the items in the log that are cold: in no training row and in no history"""
    test: float = Field(default=0.2, gt=0, lt=1)
    """fraction of the interactions of each user that is tested, the latest ones"""
    validation_cold: float = Field(default=0.05, ge=0, lt=1)
    """fraction of the remaining items that are excluded from training for validation"""
    validation: float = Field(default=0.1, gt=0, lt=1)
    """fraction of the remaining interactions of each user that is used for validation, the latest ones"""
    seed: int = 0
    """seed of the choice of cold items; separate from the training seed, so that training seeds can be compared on the
    same rows"""


class StagedSplit(Config):
    """New items are trained in stages: the ranker trains on old items, then on the first rows of each new item in
    stages of `rows` rows. The later rows of the new items are tested before the first stage ("cold") and after every
    stage ("warm_a", "warm_b", ...).

    The protocol of Meta-Embedding (Pan et al. 2019, arXiv 1904.12214), MWUF (Zhu et al. 2021, arXiv 2105.04790) and
    CVAR (Zhao et al. 2022, arXiv 2205.13795). Three rules keep labels of later rows out of earlier stages:

    - No history of training, stages or test holds a new item. A click on a new item is the label of a row of some stage
      or of the test, and a history with that click would reveal the label to stages that come earlier. The inputs of a
      test row are therefore equal in all stages, except for the vector of the target item.
    - The rows of each new item are divided into stages by time, so a stage trains an item on rows before the test rows
      of the same item. Stages of other items may be later in time, which reveals nothing as long as a stage trains the
      vectors of new items alone.
    - Old items are trained on rows of any time, as in the papers: interactions with old items after a test row are
      known to all methods. The split `temporal` excludes such rows.

    The validation rows are the last rows of old items of each user.
    """

    name: Literal["staged"] = "staged"
    new: float | None = Field(default=None, gt=0, lt=1)
    """fraction of the items with enough rows for all stages and the test that are new, chosen by `seed`; all other
    items are old"""
    old_from: int | None = Field(default=None, ge=1)
    """alternative to `new`: items with at least this many rows are old, as in the papers; other items are new where the
    rows suffice for all stages and the test, and are set aside otherwise"""
    rows: int = Field(default=20, ge=1)
    """number of rows of each new item in a stage"""
    stages: int = Field(default=3, ge=1, le=26)
    """number of stages"""
    test_rows: int = Field(default=20, ge=1)
    """least number of test rows of a new item; all rows after the rows of the stages are tested"""
    validation: float = Field(default=0.1, gt=0, lt=1)
    """fraction of the rows of old items of each user that is used for validation, the latest ones"""
    seed: int = 0
    """seed of the choice of new items; separate from the training seed, so that training seeds can be compared on the
    same rows"""

    @property
    def needed(self) -> int:
        """Least number of rows of a new item: the rows of all stages and `test_rows`."""
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


class GivenSplit(Config):
    """The parts that a column of the click log names, such as the published split of a public dataset. Cold items are
    items without a training row.

    A history holds clicks of the same user at a strictly earlier time. Training histories hold training rows and
    history rows alone; validation histories no test row. Rows that are set aside are in no part and in no history.
    Whether the training rows are earlier than the test rows is up to the column: `metrics.json` counts, under `split`,
    the training rows that are not.
    """

    name: Literal["given"] = "given"
    column: str = "split"
    """column of the interactions table that names the part of each row"""
    train: list[str] = ["train"]
    """values of the training rows"""
    validation: list[str] = ["validation", "valid", "val", "dev"]
    """values of the validation rows"""
    test: list[str] = ["test"]
    """values of the test rows"""
    history: list[str] = ["history"]
    """values of rows that are read in histories, and neither trained nor tested"""
    aside: list[str] = ["aside"]
    """values of rows that are set aside; rows without a value are set aside as well"""
    validation_fraction: float | None = Field(default=None, gt=0, lt=1)
    """for a column without validation rows: fraction of the training rows of each user that is used for validation
    instead, the latest ones"""
    hide_cold: bool = False
    """no history holds a cold item, as in the split `cold_items`; for a column that holds items out of training"""

    @property
    def parts(self) -> dict[str, list[str]]:
        """The values of the column for each part."""
        return {name: getattr(self, name) for name in ("train", "validation", "test", "history", "aside")}

    @model_validator(mode="after")
    def _one_part_a_value(self) -> Self:
        values = [value for listed in self.parts.values() for value in listed]
        repeated = sorted({value for value in values if values.count(value) > 1})
        if repeated:
            raise ValueError(f"{repeated[0]!r} is listed for two parts; a value of the column names one part")
        return self


SplitConfig = Annotated[TemporalSplit | ColdItemsSplit | StagedSplit | GivenSplit, Field(discriminator="name")]


@dataclass(frozen=True)
class Splits:
    """Training, validation and test impressions, and the number of training rows of every item."""

    train: Impressions
    """impressions to train on"""
    validation: Impressions
    """impressions for early stopping and the choice of hyperparameters"""
    test: Impressions
    """impressions of the reported metrics"""
    seen: np.ndarray
    """(N,) int64: number of training impressions of each catalog item; 0 for a cold item"""
    clicks: np.ndarray
    """(N,) int64: number of training clicks on each catalog item"""
    report: dict[str, Any]
    """row counts of the parts, and of the rows set aside by reason"""
    stages: dict[str, Impressions] = field(default_factory=dict)
    """for `StagedSplit`: stage name -> training impressions of new items, in the order of the stages"""

    def is_cold(self, part: Impressions) -> np.ndarray:
        """Whether the target of an impression is a cold item, an item without training impressions.

        Args:
            part: n impressions of any part.

        Returns:
            (n,) bool.
        """
        return self.seen[part.item] == 0


def split_interactions(
    log: Interactions,
    num_items: int,
    config: TemporalSplit | ColdItemsSplit | StagedSplit | GivenSplit,
    context: pa.Table | None = None,
) -> Splits:
    """Cut a click log into training, validation and test impressions without leaking the future or the cold items.

    `Dataset.split` does the same for a dataset, with the columns that the split needs.

    Args:
        log: the interactions of a dataset.
        num_items: N, number of items of the catalog.
        config: the way to split, and the fractions of the parts.
        context: the further columns of the log, in the order of `log`; needed by the split `given` alone.

    Returns:
        The three parts, with the history of every impression, and the number of training rows of every item.

    Raises:
        ValueError: a part is empty; for the split `given`, the column is missing or holds a value of no part.

    Example:
        ```python
        from mmctr.data.splits import ColdItemsSplit

        dataset = mmctr.open_dataset("demo/data")
        splits = mmctr.split_interactions(dataset.interactions, len(dataset.catalog), ColdItemsSplit(cold=0.2))
        print(len(splits.train), "training rows;", splits.is_cold(splits.test).sum(), "test rows of cold items")
        ```
    """
    stages: dict[str, np.ndarray] = {}
    everything = np.ones(len(log), bool)
    if isinstance(config, TemporalSplit):
        # rows at the very moment of the cut go to the later part together
        test = log.time >= _cut_time(log.time, config.test)
        earlier = np.sort(log.time[~test])
        validation = ~test & (log.time >= _cut_time(earlier, config.validation)) if len(earlier) else ~everything
        train = ~test & ~validation
        aside: dict[str, int] = {}
        keep_train, keep_validation, keep_test = train, ~test, everything
    elif isinstance(config, StagedSplit):
        old, stages, test = _staged_rows(log, num_items, config)
        validation = _latest_of_users(log, old, config.validation)
        train = old & ~validation
        keep_train, keep_validation, keep_test = train, old, old
        used = sum(int(rows.sum()) for rows in (old, test, *stages.values()))  # the masks are disjoint
        aside = {"rows of items too rare to be new": len(log) - used}
    elif isinstance(config, GivenSplit):
        train, validation, test, history, aside = _given_rows(log, context, config)
        keep_train, keep_validation = train | history, train | history | validation
        keep_test = keep_validation | test
        if config.hide_cold:
            is_warm = np.bincount(log.item[train], minlength=num_items) > 0
            keep_train, keep_validation, keep_test = (
                keep & is_warm[log.item] for keep in (keep_train, keep_validation, keep_test)
            )
    else:
        cold, validation_cold = _cold_items(log, num_items, config)
        position, size = log.user_position()
        late = position >= np.ceil(size * (1 - config.test) - 1e-9)
        test = late & ~validation_cold[log.item]
        rest = ~late & ~cold[log.item]
        validation = _latest_of_users(log, rest, config.validation)
        train = rest & ~validation & ~validation_cold[log.item]
        keep_test = ~(cold | validation_cold)[log.item]
        keep_train, keep_validation = train, rest & keep_test
        aside = {
            "early rows of items held out for test": int((~late & cold[log.item]).sum()),
            "early rows of items held out for validation": int((rest & ~validation & validation_cold[log.item]).sum()),
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
            remedy = "change its fractions"
            if isinstance(config, GivenSplit):
                remedy = f"column {config.column!r} has no row for it"
                if name == "validation":
                    remedy += ": set split.validation_fraction=0.1 to take the latest training rows of each user"
            raise ValueError(f"split {config.name!r}: no {name} rows among {len(log)} interactions; {remedy}")
    seen = np.bincount(parts["train"].item, minlength=num_items)
    clicks = np.bincount(parts["train"].item, weights=parts["train"].label, minlength=num_items).astype(np.int64)
    report: dict[str, Any] = {
        name: {"rows": len(part), "positives": int(part.label.sum()), "cold rows": int((seen[part.item] == 0).sum())}
        for name, part in parts.items()
    }
    report |= {"items seen in training": int((seen > 0).sum()), "set aside": aside}
    if isinstance(config, GivenSplit):
        first_test = log.time[parts["test"].source].min()
        not_before = int((log.time[parts["train"].source] >= first_test).sum())
        report["training rows not before the first test row"] = not_before
    if staged:
        report["stages"] = {n: {"rows": len(part), "positives": int(part.label.sum())} for n, part in staged.items()}
        report["new items"] = len(np.unique(parts["test"].item))
    return Splits(**parts, seen=seen, clicks=clicks, report=report, stages=staged)


def _given_rows(
    log: Interactions, context: pa.Table | None, config: GivenSplit
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, int]]:
    """(n,) masks of training, validation, test and history rows by a column of the log, and counts of the other rows.

    Raises:
        ValueError: the column is missing, or holds a value of no part.
    """
    source = "split 'given': the interactions table"
    if context is None:
        raise ValueError(f"{source}: the column {config.column!r} is needed; give `context`, or use `Dataset.split`")
    codes, values = value_codes(context, config.column, source)
    part_of = {value: part for part, listed in config.parts.items() for value in listed}
    for code, value in enumerate(values):
        if value not in part_of:
            raise ValueError(
                f"{source}: column {config.column!r} holds {value!r} ({int((codes == code).sum())} rows), which is "
                f"the value of no part; list it under split.train, validation, test, history or aside"
            )
    names = list(config.parts)
    # the code -1 of a row without a value picks the last entry
    part = np.array([names.index(part_of[value]) for value in values] + [-1], np.int8)[codes]
    train, validation, test, history, set_aside = (part == number for number in range(len(names)))
    if config.validation_fraction is not None:
        if validation.any():
            raise ValueError(
                f"split.validation_fraction: column {config.column!r} has {int(validation.sum())} validation rows of "
                f"its own; leave the fraction out, or list their values under split.train"
            )
        validation = _latest_of_users(log, train, config.validation_fraction)
        train = train & ~validation
    aside = {
        "rows that are history alone": int(history.sum()),
        "rows that the column sets aside": int(set_aside.sum()),
        f"rows without a value in {config.column!r}": int((part < 0).sum()),
    }
    return train, validation, test, history, aside


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
    """Two (N,) bool masks: the cold items of the test, and the further items that are cold in validation."""
    active = np.unique(log.item)
    shuffled = np.random.default_rng([config.seed, len(active)]).permutation(active)
    num_cold = round(len(active) * config.cold)
    num_validation = round((len(active) - num_cold) * config.validation_cold)
    masks = np.zeros((2, num_items), bool)
    masks[0, shuffled[:num_cold]] = True
    masks[1, shuffled[num_cold : num_cold + num_validation]] = True
    return masks[0], masks[1]


def _latest_of_users(log: Interactions, rows: np.ndarray, fraction: float) -> np.ndarray:
    """(n,) mask of the latest `fraction` of the rows of each user among the rows of the mask `rows`."""
    selected = np.flatnonzero(rows)
    position, size = Interactions(*(getattr(log, name)[selected] for name in Interactions.NAMES)).user_position()
    latest = np.zeros(len(log), bool)
    latest[selected[position >= np.ceil(size * (1 - fraction) - 1e-9)]] = True
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
    # position of a row among the rows of the same item by time
    order = np.lexsort((tie_hashes(log.user, log.item, log.time), log.time, log.item))
    position = np.empty(len(log), np.int64)
    position[order] = np.arange(len(log)) - np.repeat(np.cumsum(count) - count, count)
    new = is_new[log.item]
    stages = {f"warm_{string.ascii_lowercase[i]}": new & (position // config.rows == i) for i in range(config.stages)}
    return is_old[log.item], stages, new & (position >= config.stages * config.rows)
