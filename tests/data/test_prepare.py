from __future__ import annotations

import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from mmctr.data.catalog import clean_items
from mmctr.data.prepare import Dataset, open_dataset, prepare
from mmctr.files import read_json
from tests.helpers.worlds import log_columns, picture, write_dataset, write_table

FORMATS = ["parquet", "csv", "jsonl"]
ITEMS = {"item_id": [10, 20, 30], "title": ["ten", "twenty", "thirty"]}
LOG = log_columns([(1, 10, 5, 1), (2, 20, 6, 0), (1, 30, 4, 0), (2, 10, 3, 1)])


def rows(dataset: Dataset) -> list[tuple]:
    """(user id, item id, time, label) of the prepared log, in its order."""
    log = dataset.interactions
    users, items = dataset.users.column("user_id").to_pylist(), dataset.catalog.item_ids.to_pylist()
    columns = (log.user, log.item, log.time, log.label)
    return [(users[u], items[i], t, y) for u, i, t, y in zip(*(c.tolist() for c in columns), strict=True)]


def aside(dataset: Dataset) -> dict[str, int]:
    """What was set aside of the log, without the zeros."""
    entries = dataset.report["interactions"]["set aside"].items()
    return {reason: entry["count"] for reason, entry in entries if entry["count"]}


def test_the_log_is_sorted_by_user_and_time(tmp_path):
    dataset = prepare(write_dataset(tmp_path / "d", ITEMS, LOG), tmp_path / "out")
    assert rows(dataset) == [(1, 30, 4, 0), (1, 10, 5, 1), (2, 10, 3, 1), (2, 20, 6, 0)]
    report = dataset.report["interactions"]
    assert (report["rows"], report["kept"], report["positives"], report["users"]) == (4, 4, 2, 2)
    assert report["items with interactions"] == 3 and report["notes"] == [] and aside(dataset) == {}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "ids",
    [[7, 2**24 + 1, 2**31 + 1, 2**53 + 1], ["007", "7", "ünï 猫", "x" * 200], ["1", "2", "3", "04"]],
    ids=["integers", "strings", "numbers as text"],
)
def test_ids_go_in_and_come_out_as_they_are(tmp_path, format, ids):
    items = {"item_id": ids, "title": ["a", "b", "c", "d"]}
    # the users of the log are written like integers, one in the users table is not
    users = {"user_id": ids[::-1], "age": [1, 2, 3, 4]}
    log = log_columns([(ids[0], ids[1], 1, 1), (ids[0], ids[2], 2, 0), (ids[1], ids[1], 3, 1)])
    dataset = prepare(write_dataset(tmp_path / "d", items, log, users, format), tmp_path / "out")
    assert dataset.catalog.item_ids.to_pylist() == ids
    found = sorted(zip(dataset.users["user_id"].to_pylist(), dataset.users["age"].to_pylist(), strict=True))
    assert found == sorted([(ids[0], 4), (ids[1], 3)])
    assert sorted(rows(dataset)) == sorted(zip(*log.values(), strict=True))
    assert dataset.catalog.rows([ids[3], ids[0]]).tolist() == [3, 0]


def test_ids_with_gaps_as_pandas_writes_them(tmp_path):
    items = {"item_id": pa.array([2.0**31 + 1, np.nan, 2.0**52 + 1, None]), "title": ["a", "b", "c", "d"]}
    log = log_columns(
        [(1.0, 2.0**31 + 1, 1, 1), (np.nan, 2.0**31 + 1, 2, 0), (2.0, 2.0**52 + 1, 3, 0), (2.0, None, 4, 1)]
    )
    dataset = prepare(write_dataset(tmp_path / "d", items, log), tmp_path / "out")
    assert dataset.catalog.item_ids.to_pylist() == [2**31 + 1, 2**52 + 1]
    assert dataset.report["items"]["set aside"]["no item_id"] == 2
    assert rows(dataset) == [(1, 2**31 + 1, 1, 1), (2, 2**52 + 1, 3, 0)]
    assert aside(dataset) == {"no user_id": 1, "no item_id": 1}


@pytest.mark.parametrize("table", ["items", "interactions", "users"])
def test_integers_here_and_strings_there_is_an_error(tmp_path, table):
    tables = {"items": ITEMS, "interactions": LOG, "users": {"user_id": [1, 2]}}
    name = "user_id" if table == "users" else "item_id"
    tables[table] = tables[table] | {name: [str(value) for value in tables[table][name]]}
    write_dataset(tmp_path / "d", **tables)
    with pytest.raises(
        ValueError, match=r"ids are (int64|string) on one side .*; store both as integers or both as strings"
    ):
        prepare(tmp_path / "d", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_csv_has_no_types(tmp_path):
    """Ids that look like integers in one file are text where another file says so."""
    log, users = log_columns([("1", "8", 1, 1), ("1", "9", 2, 1)]), {"user_id": ["1", "01"], "age": [5, 6]}
    write_dataset(tmp_path / "d1", {"item_id": ["8", "007"]}, log, users, format="csv")
    dataset = prepare(tmp_path / "d1", tmp_path / "out1")
    assert rows(dataset) == [("1", "8", 1, 1)] and dataset.users["age"].to_pylist() == [5]
    write_dataset(tmp_path / "d2", {"item_id": ["8", "9"]}, format="csv")
    write_table(tmp_path / "d2" / "interactions.parquet", log_columns([("1", "8", 1, 1)]))
    dataset = prepare(tmp_path / "d2", tmp_path / "out2")
    assert rows(dataset) == [("1", "8", 1, 1)] and dataset.catalog.item_ids.to_pylist() == ["8", "9"]


@pytest.mark.parametrize(("table", "column"), [("items", "item_id"), *(("interactions", name) for name in LOG)])
def test_a_missing_column_is_named_with_the_nearest(tmp_path, table, column):
    tables = {"items": ITEMS, "interactions": LOG}
    tables[table] = {("my_" + name if name == column else name): values for name, values in tables[table].items()}
    write_dataset(tmp_path / "d", **tables)
    with pytest.raises(
        ValueError, match=rf"{table}\.parquet: column '{column}' is missing; did you mean 'my_{column}'"
    ):
        prepare(tmp_path / "d", tmp_path / "out")


def test_users_table_without_user_id(tmp_path):
    write_dataset(tmp_path / "d", ITEMS, LOG, {"userid": [1]})
    with pytest.raises(ValueError, match=r"users\.parquet: column 'user_id' is missing; did you mean 'userid'"):
        prepare(tmp_path / "d", tmp_path / "out")


def test_repeated_items_keep_the_first(tmp_path):
    items = {"item_id": ["b", "a", "b", None, "a", "c"], "title": ["1", "2", "3", "4", "5", "6"]}
    dataset = prepare(write_dataset(tmp_path / "d", items), tmp_path / "out")
    assert dataset.catalog.table.select(["item_id", "title"]).to_pydict() == {
        "item_id": ["b", "a", "c"],
        "title": ["1", "2", "6"],
    }
    repeated = dataset.report["items"]["set aside"]["repeated item_id (the first one is kept)"]
    assert repeated == {"count": 2, "examples": ["b", "a"]}
    assert dataset.report["items"]["set aside"]["no item_id"] == 1
    assert (dataset.report["items"]["rows"], dataset.report["items"]["kept"]) == (6, 3)


def test_odd_titles_are_kept_or_counted(tmp_path):
    titles = ["", None, "  ", "猫 и собака", "x" * 3_000_000, "plain"]
    items = {"item_id": [1, 2, 3, 4, 5, 6], "title": titles}
    dataset = prepare(write_dataset(tmp_path / "d", items), tmp_path / "out")
    assert dataset.catalog.table["title"].to_pylist() == [None, None, None, *titles[3:]]
    assert dataset.report["items"]["without title"] == 3
    for titles, expected in (
        ([1984, None], ["1984", None]),
        ([1.5, np.nan], ["1.5", None]),
        ([["a", None]] * 2, ["a"] * 2),
    ):
        table, _ = clean_items(pa.table({"item_id": [1, 2], "title": titles}), "x")
        assert table["title"].to_pylist() == expected


@pytest.mark.parametrize("format", FORMATS)
def test_bad_interactions_are_set_aside_and_counted_by_reason(tmp_path, format):
    good = [(1, 10, 5, 1), (1, 20, 6, 0)]
    bad = [
        (None, 10, 1, 1),
        (1, None, 1, 1),
        (1, 99, 1, 1),
        (1, 98, 1, 0),
        (1, 10, 1, None),
        (1, 10, None, 1),
        (1, 10, -1, 1),
        (1, 10, 5, 0),  # again, not clicked: the click stays
        (1, 20, 6, 0),
        (None, 99, None, None),  # counted once, for its first fault
    ]
    write_dataset(tmp_path / "d", ITEMS, log_columns(bad + good), format=format)
    dataset = prepare(tmp_path / "d", tmp_path / "out")
    assert rows(dataset) == good
    assert aside(dataset) == {
        "no user_id": 2,
        "no item_id": 1,
        "item_id not in the catalog": 2,
        "no label": 1,
        "no timestamp": 1,
        "negative timestamp": 1,
        "repeated (same user, item and time)": 2,
    }
    report = dataset.report["interactions"]
    assert report["set aside"]["item_id not in the catalog"]["examples"] == [99, 98]
    assert report["rows"] == report["kept"] + sum(aside(dataset).values()) == len(good + bad)


@pytest.mark.parametrize(
    ("labels", "found"),
    [([0, 1, 4, 5], "4"), ([0.5, 1, 0, np.nan], "0.5"), ([-1, 1, 1, -1], "-1"), ([1, 2, 1, 2], "2")],
)
def test_labels_other_than_0_and_1_are_an_error(tmp_path, labels, found):
    write_dataset(tmp_path / "d", ITEMS, LOG | {"label": labels})
    with pytest.raises(ValueError, match=rf"interactions\.parquet: column 'label' holds {found} .*labels are 0 or 1"):
        prepare(tmp_path / "d", tmp_path / "out")


@pytest.mark.parametrize("labels", [["yes", "no", "no", "yes"], [[1], [0], [0], [1]]])
def test_labels_of_another_type_are_an_error(tmp_path, labels):
    write_dataset(tmp_path / "d", ITEMS, LOG | {"label": labels})
    with pytest.raises(ValueError, match=r"column 'label' has type .*; labels are 0 or 1"):
        prepare(tmp_path / "d", tmp_path / "out")


@pytest.mark.parametrize("labels", [[True, False, False, True], [1.0, 0.0, 0.0, 1.0], ["1", "0", "0", "1"]])
def test_labels_written_another_way(tmp_path, labels):
    dataset = prepare(write_dataset(tmp_path / "d", ITEMS, LOG | {"label": labels}), tmp_path / "out")
    assert rows(dataset) == [(1, 30, 4, 0), (1, 10, 5, 1), (2, 10, 3, 1), (2, 20, 6, 0)]


def test_labels_that_are_all_the_same_are_reported(tmp_path):
    for label in (0, 1):
        write_dataset(tmp_path / f"d{label}", ITEMS, LOG | {"label": [label] * 4})
        dataset = prepare(tmp_path / f"d{label}", tmp_path / f"out{label}")
        assert dataset.report["interactions"]["notes"] == [
            f"all labels are {label}: a ranker needs both clicks and impressions without a click"
        ]
        assert dataset.report["interactions"]["positives"] == 4 * label


def times(tmp_path, values: pa.Array) -> list[int]:
    """Prepared times of one user's rows, given those of the log."""
    count = len(values)
    log = {"user_id": [1] * count, "item_id": [10] * count, "timestamp": values, "label": [1] * count}
    out = tmp_path / str(len(os.listdir(tmp_path)))
    return prepare(write_dataset(tmp_path / f"{out.name}-d", ITEMS, log), out).interactions.time.tolist()


def test_times_keep_their_order_and_unit(tmp_path):
    nano = 1_700_000_000_000_000_001  # beyond 2^53; a gap must not turn the column into floats
    assert times(tmp_path, pa.array([nano + 1, None, nano])) == [nano, nano + 1]
    assert times(tmp_path, pa.array([nano + 1, None, nano], pa.timestamp("ns"))) == [nano, nano + 1]
    micro = pa.array([1_000_001, 1_000_000], pa.timestamp("us", "Europe/Berlin"))
    assert times(tmp_path, micro) == [1_000_000, 1_000_001]
    assert times(tmp_path, pa.array([2, 1], pa.date32())) == [86_400_000, 2 * 86_400_000]
    assert times(tmp_path, pa.array([3.0, np.nan, 2.0, np.inf, 1e300, -1.0])) == [2, 3]
    # fractions of a second say what came first
    assert times(tmp_path, pa.array([1.7e9 + 0.75, 1.7e9 + 0.25])) == [1_700_000_000_250_000, 1_700_000_000_750_000]


@pytest.mark.parametrize("values", [["2024-01-01"] * 4, [[1]] * 4, pa.array([2**63] * 4, pa.uint64())])
def test_times_that_cannot_be_read(tmp_path, values):
    write_dataset(tmp_path / "d", ITEMS, LOG | {"timestamp": values})
    with pytest.raises(ValueError, match=r"interactions\.parquet: column 'timestamp' .*store seconds as integers"):
        prepare(tmp_path / "d", tmp_path / "out")


def test_csv_times_as_dates(tmp_path):
    log = LOG | {"timestamp": [f"2024-01-01 00:00:0{second}" for second in (5, 6, 4, 3)]}
    dataset = prepare(write_dataset(tmp_path / "d", ITEMS, log, format="csv"), tmp_path / "out")
    begin = 1_704_067_200
    assert (dataset.interactions.time - begin).tolist() == [4, 5, 3, 6]


@pytest.mark.parametrize("format", FORMATS)
def test_empty_datasets(tmp_path, format):
    empty = {"item_id": pa.array([], pa.int64()), "title": pa.array([], pa.string())}
    write_dataset(tmp_path / "d", empty, format=format)
    with pytest.raises(ValueError, match=r"items\..*: "):
        prepare(tmp_path / "d", tmp_path / "out")
    no_log = {name: pa.array([], pa.int64()) for name in LOG}
    write_dataset(tmp_path / "e", ITEMS, no_log, format=format)
    with pytest.raises(ValueError, match=r"interactions\..*: "):
        prepare(tmp_path / "e", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_all_ids_missing_or_all_rows_set_aside(tmp_path):
    write_dataset(tmp_path / "d", {"item_id": [None, None], "title": ["a", "b"]})
    with pytest.raises(ValueError, match=r"items\.parquet: no items \(of 2 rows, 2 have no item_id\)"):
        prepare(tmp_path / "d", tmp_path / "out")
    write_dataset(tmp_path / "e", ITEMS, LOG | {"item_id": [97, 98, 99, None]})
    with pytest.raises(
        ValueError, match=r"no interaction is left of 4; set aside: no item_id: 1, item_id not in the cat.*: 3"
    ):
        prepare(tmp_path / "e", tmp_path / "out")
    write_dataset(tmp_path / "f", {"item_id": ["a"]}, LOG | {"item_id": [None] * 4})
    with pytest.raises(ValueError, match="no interaction is left of 4; set aside: no item_id: 4"):
        prepare(tmp_path / "f", tmp_path / "out")


def test_a_folder_that_is_no_dataset(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such dataset folder"):
        open_dataset(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no items\.parquet, items\.csv, items\.tsv or items\.jsonl"):
        open_dataset(tmp_path / "empty")


def test_without_a_log_there_is_a_catalog_but_nothing_to_rank(tmp_path):
    dataset = prepare(write_dataset(tmp_path / "d", ITEMS, users={"user_id": [1]}), tmp_path / "out")
    assert len(dataset.catalog) == 3
    for name in ("interactions", "users", "context"):
        with pytest.raises(ValueError, match="there is no interactions table; a ranker needs a click log"):
            getattr(dataset, name)


def test_further_columns_of_the_log_stay_with_their_rows(tmp_path):
    rng = np.random.default_rng(0)
    n = 500
    log = {
        "row": np.arange(n),
        "user_id": rng.integers(0, 20, n),
        "item_id": rng.choice([10, 20, 30, 99], n),
        "shop": [f"shop {i}" if i % 7 else None for i in range(n)],
        "timestamp": rng.integers(0, 40, n),
        "label": rng.integers(0, 2, n),
        "tags": [["a"] * (i % 3) for i in range(n)],
    }
    dataset = prepare(write_dataset(tmp_path / "d", ITEMS, log), tmp_path / "out")
    context = dataset.context
    assert context.column_names == ["row", "shop", "tags"] and len(context) == len(dataset.interactions) < n
    source = context["row"].to_numpy()
    expected = [tuple(int(log[name][i]) for name in ("user_id", "item_id", "timestamp", "label")) for i in source]
    assert rows(dataset) == expected
    assert context["shop"].to_pylist() == [log["shop"][i] for i in source]
    assert context["tags"].to_pylist() == [log["tags"][i] for i in source]


def test_the_order_of_rows_with_equal_times_does_not_depend_on_the_file(tmp_path):
    """Whether a file lists the clicks of a day first or last says nothing of what was earlier on that day."""
    rng = np.random.default_rng(0)
    shown = [(user, item, day) for user in range(9) for item in (10, 20, 30) for day in (5, 7)]
    log = [(*row, int(label)) for row, label in zip(shown, rng.integers(0, 2, len(shown)), strict=True)]
    orders = {"clicks first": sorted(log, key=lambda row: -row[3]), "clicks last": sorted(log, key=lambda row: row[3])}
    found = {
        name: rows(prepare(write_dataset(tmp_path / name, ITEMS, log_columns(order)), tmp_path / f"{name} prepared"))
        for name, order in orders.items()
    }
    assert found["clicks first"] == found["clicks last"]
    # no item goes first in all moments
    first = [found["clicks last"][at][1] for at in range(0, len(log), 3)]
    assert set(first) == {10, 20, 30}


def test_times_that_tell_no_order_are_reported(tmp_path):
    day = [(user, item, 5, user % 2) for user in range(4) for item in (10, 20)]
    more = [(user, 10, time, user % 2) for user in range(10, 20) for time in (1, 2)]
    cases = [(day, "all 8 times are 5"), (day + more, "one time for 4 of the 14 users"), (day[:2] + more, None)]
    for number, (log, note) in enumerate(cases):
        dataset = prepare(write_dataset(tmp_path / f"d{number}", ITEMS, log_columns(log)), tmp_path / f"out{number}")
        notes = dataset.report["interactions"]["notes"]
        if note is None:
            assert notes == []  # 1 of 11 users
        else:
            assert len(notes) == 1 and note in notes[0]


def test_clicks_that_come_earlier_than_other_impressions_are_reported(tmp_path):
    for name, last in (("even", 1), ("uneven", 0)):
        log = [
            (user, 10 + 10 * (time % 3), time, last if time == 4 else user % 2)
            for user in range(100)
            for time in range(5)
        ]
        if name == "even":
            log = [(user, item, time, (user + time) % 2) for user, item, time, _ in log]
        dataset = prepare(write_dataset(tmp_path / name, ITEMS, log_columns(log)), tmp_path / f"{name} prepared")
        notes = dataset.report["interactions"]["notes"]
        assert bool(notes) == (name == "uneven")
        assert not notes or ("the share of positives differs" in notes[0] and "latest 20% of the rows" in notes[0])


def test_users_have_one_row_each(tmp_path):
    users = {"user_id": [2, None, 2, 7], "age": [20, 0, 21, 70], "town": ["a", "b", "c", "d"]}
    dataset = prepare(write_dataset(tmp_path / "d", ITEMS, LOG, users), tmp_path / "out")
    assert dataset.users.to_pydict() == {"user_id": [1, 2], "age": [None, 20], "town": [None, "a"]}
    write_dataset(tmp_path / "e", ITEMS, LOG, {name: pa.array([], pa.int64()) for name in users})
    assert prepare(tmp_path / "e", tmp_path / "out2").users["age"].to_pylist() == [None, None]
    write_dataset(tmp_path / "f", ITEMS, LOG)
    assert prepare(tmp_path / "f", tmp_path / "out3").users.to_pydict() == {"user_id": [1, 2]}


def test_users_of_the_log_without_a_row_are_counted(tmp_path):
    """Ids written another way make every user column empty: the report says so."""
    users = {"user_id": ["1.5", "2.5"], "age": [1, 2]}
    report = prepare(write_dataset(tmp_path / "d", ITEMS, LOG, users, "csv"), tmp_path / "out").report["interactions"]
    assert report["users without a row in the users table"] == {"count": 2, "examples": ["1", "2"]}
    assert any("no user of the log is in" in note for note in report["notes"])
    users = {"user_id": [1], "age": [1]}
    report = prepare(write_dataset(tmp_path / "e", ITEMS, LOG, users), tmp_path / "out2").report["interactions"]
    assert report["users without a row in the users table"] == {"count": 1, "examples": [2]} and not report["notes"]


def test_users_written_as_floats_because_of_gaps(tmp_path):
    users = {"user_id": ["1.0", None, "2.0"], "age": [10, 20, 30]}
    dataset = prepare(write_dataset(tmp_path / "d", ITEMS, LOG, users, "csv"), tmp_path / "out")
    assert dataset.users.to_pydict() == {"user_id": [1, 2], "age": [10, 30]}


# Items from `datasets` ----------------------------------------------------------------------------


def test_items_from_a_saved_dataset(tmp_path):
    folder = write_dataset(tmp_path / "d", None, LOG)
    source = datasets.Dataset.from_dict(ITEMS | {"image": [{"bytes": picture(), "path": None}, None, None]})
    source = source.cast_column("image", datasets.Image()).select([2, 1, 0])
    source.save_to_disk(tmp_path / "items: v2")
    dataset = prepare(folder, tmp_path / "out", items=str(tmp_path / "items: v2"))
    assert dataset.catalog.item_ids.to_pylist() == [30, 20, 10]
    assert dataset.catalog.table["image"].to_pylist() == [None, None, picture()]
    assert rows(dataset) == [(1, 30, 4, 0), (1, 10, 5, 1), (2, 10, 3, 1), (2, 20, 6, 0)]
    assert open_dataset(folder, items=str(tmp_path / "items: v2")).catalog.table.equals(dataset.catalog.table)
    # another content under the same name is another dataset
    datasets.Dataset.from_dict({"item_id": [10]}).save_to_disk(tmp_path / "items: v2")
    assert len(prepare(folder, tmp_path / "out", items=str(tmp_path / "items: v2")).catalog) == 1


def test_the_toy_world(toy_folder):
    dataset = open_dataset(toy_folder)
    log = pyarrow.parquet.read_table(toy_folder / "interactions.parquet")
    assert len(dataset.catalog) == 120 and len(dataset.interactions) == len(log) and aside(dataset) == {}
    assert dataset.interactions.label.sum() == sum(log["label"].to_pylist())
    assert read_json(dataset.folder / "report.json") == dataset.report
