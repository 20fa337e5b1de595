"""Files as public datasets and shops have them, read by a `dataset.yaml` alone."""

from __future__ import annotations

import datetime
import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml

from mmctr.data.prepare import Dataset, open_dataset, prepare
from tests.helpers.worlds import write_table


def dataset(folder: Path, files: dict[str, str | bytes], description: str) -> Path:
    """A folder with files and a `dataset.yaml`."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "dataset.yaml").write_text(description)
    return folder


def rows_of(data: Dataset) -> list[tuple]:
    """(user id, item id, time, label) of each row of the log, in the order of the prepared folder."""
    log, users, items = data.interactions, data.users["user_id"].to_pylist(), data.catalog.item_ids.to_pylist()
    columns = (log.user.tolist(), log.item.tolist(), log.time.tolist(), log.label.tolist())
    return [(users[u], items[i], t, y) for u, i, t, y in zip(*columns, strict=True)]


def test_movielens_1m(tmp_path):
    folder = dataset(
        tmp_path,
        {
            "ratings.dat": "1::1193::5::978300760\n1::661::3::978302109\n2::1193::4::978298413\n",
            "movies.dat": '661::James (1996)::Animation|Children\'s\n1193::Amélie, "x"::Drama\n'.encode("latin-1"),
            "users.dat": "1::F::1::10::48067\n2::M::56::16::70072\n",
        },
        """
items:
  files: movies.dat
  format: csv
  separator: "::"
  encoding: latin-1
  quotes: false
  columns: [item_id, title, genres]
interactions:
  files: ratings.dat
  format: csv
  separator: "::"
  columns: [user_id, item_id, rating, timestamp]
  timestamp: {column: timestamp, unit: s}
  label: rating >= 4
users:
  files: users.dat
  format: csv
  separator: "::"
  columns: [user_id, gender, age, occupation, zip]
""",
    )
    data = prepare(folder, tmp_path / "out")
    assert rows_of(data) == [(1, 1193, 978300760, 1), (1, 661, 978302109, 0), (2, 1193, 978298413, 1)]
    assert data.catalog.table["title"].to_pylist() == ["James (1996)", 'Amélie, "x"']
    assert data.users["gender"].to_pylist() == ["F", "M"] and data.context["rating"].to_pylist() == [5, 3, 4]


def test_a_shop_whose_ids_have_lost_zeros_in_parts_by_day(tmp_path):
    """Transactions without zeros, a catalog with zeros, pictures in folders named by the first three characters."""
    sales = "t_dat,customer_id,article_id,price\n{day},AB,{one},0.5\n{day},cd,{two},1.5\n"
    folder = dataset(
        tmp_path,
        {
            "articles.csv": "article_id,prod_name,detail_desc\n0108775015,Top,Soft\n0208775044,Vest,\n",
            "sales/dt=2020-09-01/part-0.csv": sales.format(day="2020-09-01", one=108775015, two=208775044),
            "sales/dt=2020-09-02/part-0.csv": sales.format(day="2020-09-02", one=208775044, two=208775044),
            "sales/dt=2020-09-02/_SUCCESS": "",
            "customers.csv": "customer_id,age\nab,30\nCD,\n",
        },
        """
items:
  files: articles.csv
  item_id: {column: article_id, zero_pad: 10}
  rename: {title: prod_name, description: detail_desc}
  image: {pattern: "images/{article_id:.3}/{article_id}.jpg"}
interactions:
  files: sales/dt=*/part-*.csv
  user_id: {column: customer_id, lower: true}
  item_id: {column: article_id, zero_pad: 10}
  timestamp: {column: t_dat, format: "%Y-%m-%d", time_zone: Europe/Stockholm}
  label: 1
  constants: {source: shop}
users:
  files: customers.csv
  user_id: {column: customer_id, lower: true}
""",
    )
    data = prepare(folder, tmp_path / "out")
    evenings = (datetime.datetime(2020, month, day, 22, tzinfo=datetime.UTC) for month, day in ((8, 31), (9, 1)))
    first, second = (int(evening.timestamp()) * 10**6 for evening in evenings)  # midnight in Stockholm
    assert rows_of(data) == [
        ("ab", "0108775015", first, 1),
        ("ab", "0208775044", second, 1),
        ("cd", "0208775044", first, 1),
        ("cd", "0208775044", second, 1),
    ]
    assert data.catalog.table["image"].to_pylist() == ["images/010/0108775015.jpg", "images/020/0208775044.jpg"]
    assert data.catalog.table["description"].to_pylist() == ["Soft", None]
    assert data.context["dt"].to_pylist() == ["2020-09-01", "2020-09-02"] * 2
    assert set(data.context["source"].to_pylist()) == {"shop"} and data.users["age"].to_pylist() == [30, None]


def test_events_with_several_labels_and_weights(tmp_path):
    """The layout of RetailRocket: events in milliseconds, and no catalog: items have nothing but ids."""
    folder = dataset(
        tmp_path,
        {
            "events.csv.gz": gzip.compress(
                b"timestamp,visitorid,event,itemid\n1433221332117,7,view,5\n1433221332118,7,addtocart,5\n"
                b"1433221332119,8,transaction,6\n1433221332119,8,,6\n"
            )
        },
        """
interactions:
  files: events.csv.gz
  user_id: visitorid
  item_id: itemid
  timestamp: {column: timestamp, unit: ms}
  label: event != view
  labels: {purchase: event == transaction}
  weight: {column: event, values: {transaction: 3, view: 0.5}}
""",
    )
    data = prepare(folder, tmp_path / "out")
    assert rows_of(data) == [
        (7, 5, 1433221332117, 0),
        (7, 5, 1433221332118, 1),
        (8, 6, 1433221332119, 1),
    ]
    assert data.report["interactions"]["set aside"]["no label"] == {"count": 1}
    assert data.context["purchase"].to_pylist() == [0, 0, 1] and data.context["weight"].to_pylist() == [0.5, 1, 3]
    assert data.catalog.item_ids.to_pylist() == [5, 6] and data.catalog.table.column_names[0] == "item_id"


@pytest.mark.parametrize(
    ("values", "time", "expected"),
    [
        (["11/12/2019 2:14:46 PM"], {"format": "%m/%d/%Y %I:%M:%S %p"}, ["2019-11-12T14:14:46"]),
        (["2020-07-01 12:00"], {"time_zone": "America/New_York"}, ["2020-07-01T16:00:00"]),
        (
            ["2020-07-01T12:00:00.25Z", "2020-07-01T12:00:00+02:00"],
            {},
            ["2020-07-01T12:00:00.25", "2020-07-01T10:00:00"],
        ),
        (
            ["2020-07-01T12:00:00Z", "2020-07-01"],
            {"time_zone": "Asia/Tokyo"},
            ["2020-07-01T12:00:00", "2020-06-30T15:00"],
        ),
        ([20191112, 20191113], {"format": "%Y%m%d"}, ["2019-11-12", "2019-11-13"]),
        (
            [1_500_000_000_000_000_001, 1_500_000_000_000_000_002],
            {"unit": "ns"},
            [1_500_000_000_000_000_001, 1_500_000_000_000_000_002],
        ),
        ([1.5e9, 1.5e9 + 1], {"unit": "s"}, ["2017-07-14T02:40:00", "2017-07-14T02:40:01"]),
        (["2020-07-01", "soon", None], {}, ["2020-07-01"]),
    ],
)
@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_times(tmp_path, values, time, expected, form):
    columns = {"user_id": ["u"] * len(values), "item_id": list(range(len(values))), "at": values}
    write_table(tmp_path / f"log.{form}", columns | {"label": [1] * len(values)})
    about = {"files": f"log.{form}", "timestamp": {"column": "at"} | time}
    data = prepare(dataset(tmp_path, {}, yaml.safe_dump({"interactions": about})), tmp_path / "out")
    unit = time.get("unit", "us")
    wanted = sorted(np.array(expected, f"datetime64[{unit}]").astype(np.int64).tolist())
    assert data.interactions.time.tolist() == wanted
    assert data.report["interactions"]["set aside"]["no timestamp"]["count"] == len(values) - len(expected)


LOG = {"user_id": ["a", "b"], "item_id": ["x", "y"], "timestamp": [1600000000, 1600000001], "label": [0, 1]}


@pytest.mark.parametrize(
    ("changes", "about", "message"),
    [
        ({}, {"files": "logs/*.parquet"}, r"interactions\.files: no file fits 'logs/\*\.parquet' in"),
        ({}, {"files": "../log.parquet"}, r"interactions\.files: '\.\./log\.parquet': files are named relative"),
        ({}, {"files": "/etc/passwd"}, "files are named relative to the folder"),
        ({}, {"files": "log.parquet", "format": "csv", "separator": ";;"}, "cannot be read as csv|missing|not UTF-8"),
        ({}, {"files": "log.parquet", "user_id": "usr_id"}, r"column 'usr_id' is missing; did you mean 'user_id'"),
        ({}, {"files": "log.parquet", "label": "labl > 1", "item_id": "itm"}, r"columns 'itm', 'labl' are missing"),
        ({}, {"files": "log.parquet", "rename": {"label": "timestamp"}}, "a column 'label' is there already"),
        ({}, {"files": "log.parquet", "label": "rating >="}, r"interactions\.label: 'rating >=': no expression"),
        ({}, {"files": "log.parquet", "labl": "x"}, r"unknown key 'interactions\.labl'; did you mean 'label"),
        ({}, {"files": "log.parquet", "label": "timestamp"}, "column 'label' holds 1.6e"),
        (
            {},
            {"files": "log.parquet", "timestamp": {"column": "timestamp", "unit": "ms"}},
            "said to be ms, .*seconds",
        ),
        (
            {"timestamp": [1600000000, 1600000001000]},
            {"files": "log.parquet"},
            "times of several units since 1970: 1 like seconds, 1 like milliseconds",
        ),
        ({"timestamp": ["soon", "late"]}, {"files": "log.parquet"}, "no text is written in ISO 8601.*'soon'"),
        (
            {"timestamp": ["2020-01-01", "late"]},
            {"files": "log.parquet", "timestamp": {"column": "timestamp", "time_zone": "Mars"}},
            "time zone 'Mars'",
        ),
        (
            {},
            {"files": "log.parquet", "timestamp": {"column": "timestamp", "unit": "s", "format": "%Y"}},
            "either `unit`",
        ),
    ],
)
def test_what_is_wrong_with_a_description_is_said(tmp_path, changes, about, message):
    write_table(tmp_path / "log.parquet", LOG | changes)
    folder = dataset(tmp_path, {}, yaml.safe_dump({"interactions": about}))
    with pytest.raises(ValueError, match=message):
        prepare(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_columns_of_all_files_are_one_error(tmp_path):
    write_table(tmp_path / "log.parquet", {"user_id": [1], "timestamp": [1]})
    write_table(tmp_path / "items.csv", {"id": [1]})
    folder = dataset(tmp_path, {}, "items: {files: items.csv}\ninteractions: {files: log.parquet}\n")
    with pytest.raises(ValueError) as caught:
        prepare(folder, tmp_path / "out")
    items, log = str(caught.value).splitlines()
    assert "dataset.yaml: items (items.csv): column 'item_id' is missing" in items
    assert "dataset.yaml: interactions (log.parquet): columns 'item_id', 'label' are missing" in log


def test_a_dataset_is_opened_by_a_description_and_prepared_again_when_a_file_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("MMCTR_CACHE", str(tmp_path / "cache"))
    (tmp_path / "shop").mkdir()
    write_table(tmp_path / "shop" / "log.parquet", LOG)
    (tmp_path / "shop" / "one.yaml").write_text("interactions: {files: log.parquet}")
    (tmp_path / "shop" / "two.yaml").write_text("interactions: {files: log.parquet, label: timestamp > 1600000000}")
    one, two = (open_dataset(tmp_path / "shop" / name) for name in ("one.yaml", "two.yaml"))
    assert one.folder != two.folder and one.catalog.item_ids.to_pylist() == ["x", "y"]
    assert open_dataset(tmp_path / "shop" / "one.yaml").folder == one.folder
    write_table(tmp_path / "shop" / "log.parquet", LOG | {"label": [1, 1]})
    changed = open_dataset(tmp_path / "shop" / "one.yaml")
    assert changed.folder != one.folder and changed.interactions.label.tolist() == [1, 1]
    other = prepare(tmp_path / "shop", tmp_path / "out", schema=tmp_path / "shop" / "two.yaml")
    assert other.interactions.label.tolist() == [0, 1]


def test_integers_of_parquet_are_padded_like_text(tmp_path):
    write_table(tmp_path / "log.parquet", LOG | {"item_id": pa.array([7, None], pa.int32())})
    about = {"files": "log.parquet", "item_id": {"column": "item_id", "zero_pad": 3}}
    data = prepare(dataset(tmp_path, {}, yaml.safe_dump({"interactions": about})), tmp_path / "out")
    assert data.catalog.item_ids.to_pylist() == ["007"]
