from __future__ import annotations

import logging

import numpy as np
import pyarrow as pa
import pytest

from mmctr.config import Config
from mmctr.data.hashing import tie_hashes
from mmctr.data.interactions import Impressions, Interactions
from mmctr.data.split_checks import check_labels
from mmctr.data.splits import (
    ColdItemsSplit,
    GivenSplit,
    SplitConfig,
    Splits,
    StagedSplit,
    TemporalSplit,
    split_interactions,
)
from tests.helpers.worlds import clicks_before, log_of, random_log

NUM_ITEMS = 30
SPLITS = [
    TemporalSplit(),
    TemporalSplit(test=0.37, validation=0.5),
    ColdItemsSplit(),
    ColdItemsSplit(cold=0.3, test=0.5, validation_cold=0.2, validation=0.3, seed=3),
    ColdItemsSplit(validation_cold=0),
]


def history(part: Impressions, i: int) -> list[int]:
    return part.history[part.history_start[i] : part.history_end[i]].tolist()


def parts_of(splits: Splits) -> dict[str, Impressions]:
    return {"train": splits.train, "validation": splits.validation, "test": splits.test}


@pytest.mark.parametrize("config", SPLITS, ids=str)
def test_no_split_looks_into_the_future_or_at_cold_items(config):
    log = random_log()
    splits = split_interactions(log, NUM_ITEMS, config)
    sources = {name: part.source for name, part in parts_of(splits).items()}
    everything = np.concatenate(list(sources.values()))
    assert len(np.unique(everything)) == len(everything)
    assert len(everything) + sum(splits.report["set aside"].values()) == len(log)

    train = np.isin(np.arange(len(log)), sources["train"])
    # what each part may have in its histories, at the most
    allowed = {
        "train": train,
        "validation": ~np.isin(np.arange(len(log)), sources["test"]),
        "test": np.ones(len(log), bool),
    }
    seen = set(log.item[train].tolist())
    if isinstance(config, ColdItemsSplit):
        # in this log every item that is not held out has training rows
        num_cold = round(NUM_ITEMS * config.cold)
        assert NUM_ITEMS - len(seen) == num_cold + round((NUM_ITEMS - num_cold) * config.validation_cold)
        cold = cold_items(log, config)
    for name, part in parts_of(splits).items():
        assert splits.report[name]["rows"] == len(part) > 0
        for i, row in enumerate(part.source):
            assert (part.user[i], part.item[i], part.label[i]) == (log.user[row], log.item[row], log.label[row])
            found = history(part, i)
            if isinstance(config, ColdItemsSplit):
                # a cold item has never been clicked: it stands in no history
                expected = [item for item in clicks_before(log, row, allowed[name]) if item in seen]
                assert found == expected
                assert name == "test" or not cold[part.item[i]]
            else:
                assert found == clicks_before(log, row, allowed[name])
            if name == "train":
                assert set(found) <= seen
    assert splits.seen.tolist() == [sum(log.item[train] == item) for item in range(NUM_ITEMS)]
    assert splits.clicks.tolist() == [
        sum((log.item[train] == item) & (log.label[train] == 1)) for item in range(NUM_ITEMS)
    ]
    assert splits.report["items seen in training"] == len(seen)
    for name, part in parts_of(splits).items():
        assert splits.report[name]["cold rows"] == sum(int(item) not in seen for item in part.item)
        assert splits.report[name]["positives"] == part.label.sum()
    assert splits.report["train"]["cold rows"] == 0


def cold_items(log: Interactions, config: ColdItemsSplit) -> np.ndarray:
    """The items held out for the test: those with late rows in the test part that no earlier part may show."""
    splits = split_interactions(log, NUM_ITEMS, config)
    early = np.isin(np.arange(len(log)), np.concatenate([splits.train.source, splits.validation.source]))
    cold = np.zeros(NUM_ITEMS, bool)
    for item in np.unique(splits.test.item):
        # every user's early rows of it are set aside
        cold[item] = not (log.item[early] == item).any()
    return cold


@pytest.mark.parametrize("config", [c for c in SPLITS if isinstance(c, ColdItemsSplit)], ids=str)
def test_the_cold_split_tests_each_users_last_part(config):
    log = random_log()
    splits = split_interactions(log, NUM_ITEMS, config)
    late = []
    for user in np.unique(log.user):
        rows = np.flatnonzero(log.user == user)
        late += rows[len(rows) - int(len(rows) * config.test + 1e-9) :].tolist()
    aside = splits.report["set aside"]
    assert set(splits.test.source.tolist()) <= set(late)
    left_out = set(late) - set(splits.test.source.tolist())
    assert len(left_out) == aside["test rows of items held out for validation"]

    train, test = set(splits.train.item.tolist()), set(splits.test.item.tolist())
    validation_only = {int(log.item[row]) for row in left_out}
    assert not validation_only & (train | test)  # neither warm nor cold
    assert bool(left_out) == (config.validation_cold > 0)
    cold = cold_items(log, config)
    assert cold.sum() == round(NUM_ITEMS * config.cold)
    early = np.setdiff1d(np.arange(len(log)), late)
    assert cold[log.item[early]].sum() == aside["early rows of items held out for test"]
    # the same cut once more for validation, from what is left
    left = early[~cold[log.item[early]]]
    expected = []
    for user in np.unique(log.user[left]):
        rows = left[log.user[left] == user]
        expected += rows[len(rows) - int(len(rows) * config.validation + 1e-9) :].tolist()
    assert splits.validation.source.tolist() == expected


def test_users_with_one_row_stay_in_training():
    rows = [(user, 0, 1, 1) for user in range(20)] + [(20, item, item, 1) for item in range(1, 20)]
    splits = split_interactions(log_of(rows), 20, ColdItemsSplit(cold=0.1, test=0.5, validation=0.5, validation_cold=0))
    late = set(range(20))
    assert not late & set(splits.test.source.tolist()) and not late & set(splits.validation.source.tolist())


def test_held_out_items_depend_on_their_own_seed_alone():
    log = random_log()
    held = [cold_items(log, ColdItemsSplit(seed=seed, cold=0.3)) for seed in (0, 0, 1)]
    assert (held[0] == held[1]).all() and (held[0] != held[2]).any()


def test_the_temporal_split_cuts_by_time():
    log = random_log(num_times=10_000)
    splits = split_interactions(log, NUM_ITEMS, TemporalSplit(test=0.2, validation=0.25))
    last = {name: log.time[part.source].max() for name, part in parts_of(splits).items()}
    first = {name: log.time[part.source].min() for name, part in parts_of(splits).items()}
    assert last["train"] < first["validation"] <= last["validation"] < first["test"]
    rows = {name: len(part) for name, part in parts_of(splits).items()}
    assert abs(rows["test"] - 180) <= 3 and abs(rows["validation"] - 180) <= 3 and sum(rows.values()) == 900


def test_rows_at_the_very_moment_of_the_cut_go_to_the_later_part():
    times = [1, 2, 3, 4, 5, 6, 6, 6, 6, 6]  # a tenth is one row, but it has the time of four others
    log = log_of([(i % 3, i % 4, time, 1) for i, time in enumerate(times)])
    splits = split_interactions(log, 4, TemporalSplit(test=0.1, validation=0.2))
    assert sorted(log.time[splits.test.source]) == [6] * 5
    assert sorted(log.time[splits.validation.source]) == [5] and sorted(log.time[splits.train.source]) == [1, 2, 3, 4]


def test_a_fraction_is_not_lost_to_rounding():
    log = log_of([(0, 0, time, 1) for time in range(10)])
    splits = split_interactions(log, 1, TemporalSplit(test=0.7, validation=0.34))
    assert [len(part) for part in parts_of(splits).values()] == [1, 2, 7]
    splits = split_interactions(
        log_of([(0, 0, time, 1) for time in range(100)]), 1, TemporalSplit(test=0.9, validation=0.1)
    )
    assert [len(part) for part in parts_of(splits).values()] == [9, 1, 90]


@pytest.mark.parametrize(
    ("rows", "config", "part"),
    [
        ([(0, i, 7, 1) for i in range(9)], TemporalSplit(), "train"),  # one moment: all of it is the end
        ([(0, i, i, 1) for i in range(2)], TemporalSplit(), "train"),
        ([(user, user % 5, 1, 1) for user in range(9)], ColdItemsSplit(), "validation"),  # no user has a last part
    ],
)
def test_an_empty_part_is_an_error(rows, config, part):
    with pytest.raises(
        ValueError, match=f"split '{config.name}': no {part} rows among {len(rows)} interactions; change"
    ):
        split_interactions(log_of(rows), 10, config)


def test_impressions_are_small_whatever_the_histories():
    rng = np.random.default_rng(0)
    rows = 20_000  # 100 a user, all clicked: histories of 50 on average
    user = np.repeat(np.arange(rows // 100), 100)
    log, _ = Interactions.from_columns(user, rng.integers(0, 500, rows), np.arange(rows), np.ones(rows))
    train = split_interactions(log, 500, ColdItemsSplit(cold=0.01, test=0.05, validation=0.05, validation_cold=0)).train
    assert (train.history_end - train.history_start).mean() > 40
    size = sum(array.nbytes for array in vars(train).values())
    assert size / len(train) < 64


def test_the_config_of_a_split():
    class Holder(Config):
        split: SplitConfig = TemporalSplit()

    assert Holder.parse({"split": {"name": "cold_items", "cold": 0.3}}).split == ColdItemsSplit(cold=0.3)
    for wrong in (
        {"name": "temporal", "test": 1.0},
        {"name": "temporal", "test": 0},
        {"name": "cold_items", "cold": -1},
    ):
        with pytest.raises(ValueError, match=r"split\.(test|cold): Input should be"):
            Holder.parse({"split": wrong})
    with pytest.raises(ValueError, match=r"unknown key 'split\.validation_cld'; did you mean 'validation_cold'"):
        Holder.parse({"split": {"name": "cold_items", "validation_cld": 0.3}})


@pytest.mark.parametrize(
    "config",
    [
        StagedSplit(new=0.3, rows=4, test_rows=3),
        StagedSplit(old_from=33, rows=8, stages=2, test_rows=10, validation=0.4),
    ],
)
def test_stages_take_the_first_rows_of_new_items(config):
    log = random_log(seed=4)
    splits = split_interactions(log, NUM_ITEMS, config)
    count = np.bincount(log.item, minlength=NUM_ITEMS)
    new = np.unique(splits.test.item)
    needed = config.stages * config.rows + config.test_rows
    if config.old_from is None:
        assert len(new) == round((count >= needed).sum() * config.new)
        assert splits.report["set aside"] == {"rows of items too rare to be new": 0}
        assert len(splits.train) + len(splits.validation) == len(log) - count[new].sum()
    else:
        assert new.tolist() == [i for i in range(NUM_ITEMS) if needed <= count[i] < config.old_from]
        rest = [i for i in range(NUM_ITEMS) if count[i] < needed]
        assert list(splits.report["set aside"].values()) == [count[rest].sum()] and len(rest) > 0
    assert list(splits.stages) == ["warm_a", "warm_b", "warm_c"][: config.stages]
    for item in new:
        rows = np.flatnonzero(log.item == item)
        hashes = tie_hashes(log.user[rows], log.item[rows], log.time[rows])
        rows = [rows[i] for i in sorted(range(len(rows)), key=lambda i: (log.time[rows[i]], hashes[i]))]
        cut = [rows[i * config.rows : (i + 1) * config.rows] for i in range(config.stages)]
        for part, expected in zip(splits.stages.values(), cut, strict=True):
            assert sorted(part.source[part.item == item]) == sorted(expected)
        later = rows[config.stages * config.rows :]
        assert sorted(splits.test.source[splits.test.item == item]) == sorted(later)
        assert len(later) >= config.test_rows


def test_no_history_of_a_staged_split_tells_a_click_on_a_new_item():
    """What a test row reads is the same at each stage, and before the first: clicks on old items, strictly earlier."""
    log = random_log(seed=5)
    splits = split_interactions(log, NUM_ITEMS, StagedSplit(new=0.3, rows=4, test_rows=3))
    new = np.isin(np.arange(NUM_ITEMS), splits.test.item)
    assert not splits.seen[new].any() and not new[splits.train.item].any() and not new[splits.validation.item].any()
    of_training = np.isin(np.arange(len(log)), splits.train.source)
    for part in (splits.train, splits.validation, splits.test, *splits.stages.values()):
        keep = of_training if part is splits.train else ~new[log.item]
        assert [history(part, i) for i in range(len(part))] == [clicks_before(log, i, keep) for i in part.source]
    old = np.flatnonzero(~new[log.item])
    last = {log.user[i]: i for i in old if (log.user[old] == log.user[i]).sum() >= 10}
    assert set(last.values()) <= set(splits.validation.source) and last


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "give either `new`"),
        ({"new": 0.2, "old_from": 90}, "give either `new`"),
        ({"old_from": 80}, r"old_from: 80 leaves no new item, as one needs stages \* rows \+ test_rows = 80"),
    ],
)
def test_a_staged_split_that_cannot_be_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        StagedSplit.parse(values)


def test_a_staged_split_without_new_items_says_what_to_change():
    with pytest.raises(
        ValueError, match=r"no item is new; one needs .* = 303 rows, and the longest has .*: lower rows"
    ):
        split_interactions(random_log(), NUM_ITEMS, StagedSplit(new=0.3, rows=100, test_rows=3))


DAYS = [ColdItemsSplit(), TemporalSplit(test=0.2), StagedSplit(new=0.3, rows=20, test_rows=40)]


def log_of_days(clicks_first: bool = True, num_days: int = 6) -> tuple[np.ndarray, ...]:
    """User, item, day and label of 20,000 rows, each day of the file with the clicks first or last; 30 % are clicks,
    and users with higher numbers click more often."""
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, 400, 20_000), rng.integers(0, NUM_ITEMS * 4, 20_000)
    day, label = rng.integers(0, num_days, 20_000), rng.random(20_000) < 0.1 + user / 1000
    _, once = np.unique((user * 1000 + item) * 10 + day, return_index=True)
    order = once[np.lexsort((label[once] ^ clicks_first, day[once]))]
    return user[order], item[order], day[order], label[order]


def shares(splits: Splits) -> dict[str, float]:
    parts = parts_of(splits) | splits.stages
    return {name: float(part.label.mean()) for name, part in parts.items()}


@pytest.mark.parametrize("num_days", [1, 6])
@pytest.mark.parametrize("config", DAYS, ids=lambda config: config.name)
def test_days_with_clicks_first_in_the_file_give_even_shares_of_positives(config, num_days):
    if config.name == "temporal" and num_days == 1:
        pytest.skip("one moment cannot be cut by time")
    split = [
        split_interactions(Interactions.from_columns(*log_of_days(first, num_days))[0], NUM_ITEMS * 4, config)
        for first in (True, False)
    ]
    assert max(shares(split[0]).values()) - min(shares(split[0]).values()) < 0.06, shares(split[0])
    for part, other in zip(*((parts_of(s) | s.stages).values() for s in split), strict=True):
        for name in ("user", "item", "label", "source", "history", "history_start", "history_end"):
            assert np.array_equal(getattr(part, name), getattr(other, name)), name


def test_shares_of_positives_that_differ_are_said(caplog):
    user, item, _, label = log_of_days()
    even, _ = Interactions.from_columns(user, item, np.arange(len(user)) // 10 * 7919 % 10_007, label)
    # clicks have the time of the order, and other impressions the time of the export
    late, _ = Interactions.from_columns(user, item, np.arange(len(user)) + 50_000 * ~label, label)
    with caplog.at_level(logging.WARNING):
        check_labels(split_interactions(even, NUM_ITEMS * 4, ColdItemsSplit()), "shop")
        assert not caplog.records
        check_labels(split_interactions(late, NUM_ITEMS * 4, ColdItemsSplit()), "shop")
    (message,) = caplog.messages
    assert message.startswith("shop: the share of positives differs: 4") and "0.0% of test rows" in message


def given_parts(num_rows: int, seed: int = 0) -> np.ndarray:
    """The part of each row of a log, drawn at random: what a published split may look like."""
    names = ["train", "valid", "test", "history", "aside", None]
    return np.random.default_rng(seed).choice(np.array(names, object), num_rows, p=[0.5, 0.1, 0.2, 0.1, 0.05, 0.05])


@pytest.mark.parametrize("hide_cold", [False, True])
def test_a_given_split_is_that_of_the_column(hide_cold):
    log = random_log(seed=7)
    part = given_parts(len(log))
    part[(log.item < 5) & (part == "train")] = "aside"  # five cold items
    splits = split_interactions(log, NUM_ITEMS, GivenSplit(hide_cold=hide_cold), pa.table({"split": part}))
    seen = np.isin(np.arange(NUM_ITEMS), log.item[part == "train"])
    assert not seen[:5].any() and seen[5:].all() and ((splits.seen > 0) == seen).all()
    visible = seen[log.item] | (not hide_cold)
    histories = {
        "train": np.isin(part, ["train", "history"]),
        "validation": np.isin(part, ["train", "valid", "history"]),
        "test": np.isin(part, ["train", "valid", "test", "history"]),
    }
    for name, column in (("train", "train"), ("validation", "valid"), ("test", "test")):
        found = parts_of(splits)[name]
        assert found.source.tolist() == np.flatnonzero(part == column).tolist()
        keep = histories[name] & visible
        assert [history(found, i) for i in range(len(found))] == [clicks_before(log, i, keep) for i in found.source]
    late = (part == "train") & (log.time >= log.time[part == "test"].min())
    assert splits.report["training rows not before the first test row"] == late.sum() > 0
    assert splits.report["set aside"] == {
        "rows that are history alone": (part == "history").sum(),
        "rows that the column sets aside": (part == "aside").sum(),
        "rows without a value in 'split'": sum(value is None for value in part),
    }


def test_a_given_split_by_numbers_and_without_validation_rows():
    log = random_log(seed=8)
    fold = np.random.default_rng(1).integers(0, 3, len(log))
    config = GivenSplit(column="fold", train=["0", "2"], test=["1"], validation_fraction=0.25)
    splits = split_interactions(log, NUM_ITEMS, config, pa.table({"fold": fold}))
    assert splits.test.source.tolist() == np.flatnonzero(fold == 1).tolist()
    rest = np.flatnonzero(fold != 1)
    assert sorted([*splits.train.source, *splits.validation.source]) == rest.tolist()
    for user in np.unique(log.user[rest]):
        rows = rest[log.user[rest] == user]  # in the order of time
        taken = len(rows) - int(np.ceil(len(rows) * 0.75 - 1e-9))
        assert np.isin(rows, splits.validation.source).tolist() == [i >= len(rows) - taken for i in range(len(rows))]


@pytest.mark.parametrize(
    ("values", "config", "message"),
    [
        ({"part": "train"}, GivenSplit(), "interactions table: column 'split' is missing"),
        (
            {"split": "training"},
            GivenSplit(),
            r"column 'split' holds 'training' \(\d+ rows\), which is the value of no",
        ),
        ({"split": "train"}, GivenSplit(), r"no validation rows among \d+ interactions; column 'split' has no row for"),
        ({"split": "valid"}, GivenSplit(), "no train rows among"),
        (
            {"split": "valid"},
            GivenSplit(validation_fraction=0.1),
            r"validation_fraction: .* validation rows of its own",
        ),
        (None, GivenSplit(), "column 'split' is needed; give `context`"),
    ],
)
def test_what_is_wrong_with_a_given_split_is_said(values, config, message):
    log = random_log()
    context = None if values is None else pa.table({name: [value] * len(log) for name, value in values.items()})
    with pytest.raises(ValueError, match=message):
        split_interactions(log, NUM_ITEMS, config, context)
    with pytest.raises(ValueError, match="'test' is listed for two parts"):
        GivenSplit(validation=["test"])
