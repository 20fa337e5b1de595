"""The descriptions of `examples/datasets`, each read from tiny files in the published layout of the set."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable

import numpy as np
import pytest

from mmctr.data.prepare import Dataset, prepare
from mmctr.data.splits import GivenSplit
from tests.helpers.tiny import CLONE
from tests.helpers.worlds import write_table

EXAMPLES = CLONE / "examples" / "datasets"
Files = dict[str, str | bytes | dict]
BEHAVIORS = (
    "1\tU1\t11/11/2019 9:05:58 AM\tN1 N2\tN3-0 N1-1\n"
    "2\tU2\t11/12/2019 2:14:46 PM\t\tN2-1 N3-0 N9-0\n"
    "3\tU1\t11/13/2019 11:11:30 PM\tN1 N2 N1\tN2-0 N3-1\n"
)
DEV = "1\tU1\t11/15/2019 7:11:01 AM\tN1 N2 N1 N3\tN4-0 N2-1\n2\tU3\t11/15/2019 12:01:00 AM\t\tN4-1 N1-0\n"
NEWS = 'N{0}\tsports\tsoccer\tA "quoted title {0}\tAbout {0}\thttps://x/{0}\t[]\t[]\n'
CRITEO = "\t".join(["{label}", *["{n}"] * 13, *["{c}"] * 26]) + "\n"


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


LAYOUTS: dict[str, Files] = {
    "movielens_1m": {
        "ratings.dat": "1::1193::5::978300760\n1::661::3::978302109\n2::1193::4::978298413\n",
        "movies.dat": "661::James (1996)::Animation\n1193::Amélie::Drama\n".encode("latin-1"),
        "users.dat": "1::F::1::10::48067\n2::M::56::16::70072\n",
    },
    "movielens_latest": {
        "ratings.csv": "userId,movieId,rating,timestamp\n1,1,4.0,964982703\n1,3,3.5,964981247\n",
        "movies.csv": 'movieId,title,genres\n1,Toy Story (1995),Adventure\n3,"American President, The (1995)",Comedy\n',
    },
    "mind": {
        "train/behaviors.tsv": BEHAVIORS,
        "train/news.tsv": "".join(NEWS.format(i) for i in (1, 2, 3)),
        "dev/behaviors.tsv": DEV,
        "dev/news.tsv": "".join(NEWS.format(i) for i in (2, 4)),
    },
    "hm": {
        "transactions_train.csv": "t_dat,customer_id,article_id,price,sales_channel_id\n"
        "2018-09-20,000058a1,0663713001,0.0508,2\n2018-09-21,000058a1,0541518023,0.0304,1\n",
        "articles.csv": "article_id,product_code,prod_name,detail_desc\n0663713001,0663713,Atlanta,Push-up bra\n"
        "0541518023,0541518,Rae,\n",
        "customers.csv": "customer_id,FN,Active,club_member_status,fashion_news_frequency,age,postal_code\n"
        "000058a1,,,ACTIVE,NONE,24.0,64f1\n",
    },
    "amazon_reviews_2023": {
        "reviews.jsonl.gz": gzip.compress(
            lines(
                {"rating": 5.0, "title": "Good", "text": "Very", "images": [], "asin": "B1", "parent_asin": "B0",
                 "user_id": "AE", "timestamp": 1588687728923, "helpful_vote": 0, "verified_purchase": True},
                {"rating": 2.0, "title": "Bad", "text": "", "images": [], "asin": "B2", "parent_asin": "B2",
                 "user_id": "AE", "timestamp": 1588687728924, "helpful_vote": 1, "verified_purchase": False},
            ).encode()
        ),
        "meta.jsonl.gz": gzip.compress(
            lines(
                {"main_category": "All", "title": "Comb", "average_rating": 4.8, "features": ["a", "b"], "price": 9.5,
                 "images": [{"thumb": "t", "large": "l", "variant": "MAIN", "hi_res": None}], "parent_asin": "B0"},
                {"main_category": "All", "title": "Brush", "average_rating": 4.0, "features": [], "price": None,
                 "images": [], "parent_asin": "B2"},
            ).encode()
        ),
    },
    "microlens": {
        "MicroLens-100k_pairs.csv": "user,item,timestamp\n1,2,1583378629552\n1,1,1583378629553\n",
        "MicroLens-100k_title_en.csv": "1,What is this?\n2,1984\n",
    },
    "kuairand": {
        f"data/log_standard_{days}_pure.csv": "user_id,video_id,date,hourmin,time_ms,is_click,is_like,long_view,tab\n"
        f"0,{video},20220408,0,{time},1,0,1,1\n0,8,20220408,0,{time + 1},0,0,0,1\n"
        for days, video, time in (("4_08_to_4_21", 7, 1649349000000), ("4_22_to_5_08", 9, 1650560000000))
    }
    | {
        "data/video_features_basic_pure.csv": 'video_id,author_id,tag\n7,1,"3,5"\n8,2,\n9,1,6\n',
        "data/user_features_pure.csv": "user_id,user_active_degree\n0,high_active\n",
    },
    "retailrocket": {
        "events.csv": "timestamp,visitorid,event,itemid,transactionid\n1433221332117,257597,view,355908,\n"
        "1433221332118,257597,transaction,355908,4000\n1433221332119,9,addtocart,1,\n"
    },
    "taobao_display_ads": {
        "raw_sample.csv": "user,time_stamp,adgroup_id,pid,nonclk,clk\n581738,1494137644,1,430548_1007,1,0\n"
        "449818,1494638778,3,430548_1007,0,1\n",
        "ad_feature.csv": "adgroup_id,cate_id,campaign_id,customer,brand,price\n1,6406,83237,1,95471,170.0\n"
        "3,6406,83237,1,NULL,199.0\n",
        "user_profile.csv": "userid,cms_segid,cms_group_id,final_gender_code,new_user_class_level \n581738,0,5,2,\n",
    },
    "criteo": {
        "train.txt": CRITEO.format(label=0, n=1, c="68fd1e64") + CRITEO.format(label=1, n="", c="05db9164"),
    },
    "mmctr_challenge": {
        "train.parquet": {"user_id": [1, 1], "item_id": [5, 6], "item_seq": [[0, 6], [0, 5]], "likes_level": [1, 2],
                          "views_level": [3, 4], "label": [1, 0]},
        "valid.parquet": {"user_id": [1], "item_id": [6], "item_seq": [[5, 5]], "likes_level": [1], "views_level": [3],
                          "label": [1]},
        "item_info.parquet": {"item_id": [5, 6], "item_tags": [[1, 2], [3, 4]]},
    },
}  # fmt: skip
"""name of the description -> file -> content, or columns of a Parquet file"""


@pytest.fixture
def read(tmp_path) -> Callable[[str], Dataset]:
    def read(name: str) -> Dataset:
        folder = tmp_path / name
        for file, content in LAYOUTS[name].items():
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, dict):
                write_table(path, content)
            else:
                path.write_bytes(content if isinstance(content, bytes) else content.encode())
        shutil.copy(EXAMPLES / f"{name}.yaml", folder / "dataset.yaml")
        return prepare(folder, tmp_path / "prepared")

    return read


def log_of(data: Dataset) -> list[tuple]:
    """(user id, item id, time, label) of each row of the log, in the order of the prepared folder."""
    log, users, items = data.interactions, data.users["user_id"].to_pylist(), data.catalog.item_ids.to_pylist()
    columns = (log.user.tolist(), log.item.tolist(), log.time.tolist(), log.label.tolist())
    return [(users[u], items[i], t, y) for u, i, t, y in zip(*columns, strict=True)]


def microseconds(text: str) -> int:
    return int(np.datetime64(text, "us").astype(np.int64))


EXPECTED: dict[str, list[tuple]] = {
    "movielens_1m": [(1, 1193, 978300760, 1), (1, 661, 978302109, 0), (2, 1193, 978298413, 1)],
    "movielens_latest": [(1, 3, 964981247, 0), (1, 1, 964982703, 1)],
    "hm": [
        ("000058a1", "0663713001", microseconds("2018-09-20"), 1),
        ("000058a1", "0541518023", microseconds("2018-09-21"), 1),
    ],
    "amazon_reviews_2023": [("AE", "B0", 1588687728923, 1), ("AE", "B2", 1588687728924, 0)],
    "microlens": [(1, 2, 1583378629552, 1), (1, 1, 1583378629553, 1)],
    "kuairand": [
        (0, 7, 1649349000000, 1),
        (0, 8, 1649349000001, 0),
        (0, 9, 1650560000000, 1),
        (0, 8, 1650560000001, 0),
    ],
    "retailrocket": [(9, 1, 1433221332119, 1), (257597, 355908, 1433221332117, 0), (257597, 355908, 1433221332118, 1)],
    "taobao_display_ads": [(449818, 3, 1494638778, 1), (581738, 1, 1494137644, 0)],
    "criteo": [("all", "68fd1e64", 0, 0), ("all", "05db9164", 1, 1)],
    "mmctr_challenge": [(1, 5, 0, 1), (1, 6, 1, 0), (1, 6, 2, 1)],
}


def test_every_description_has_a_layout():
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == LAYOUTS.keys() == EXPECTED.keys() | {"mind"}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_rows_of_a_public_set(read, name):
    data = read(name)
    assert log_of(data) == EXPECTED[name]
    assert not sum(entry["count"] for entry in data.report["interactions"]["set aside"].values())


def test_columns_of_public_sets(read):
    """Titles that look like numbers stay text, renamed columns and pictures are where the recipes look for them."""
    items = read("microlens").catalog.table
    assert items["title"].to_pylist() == ["What is this?", "1984"]
    assert items["image"].to_pylist() == ["MicroLens-100k_covers/1.jpg", "MicroLens-100k_covers/2.jpg"]


def test_columns_of_orders(read):
    data = read("hm")
    assert data.catalog.table["image"].to_pylist()[0] == "images/066/0663713001.jpg"
    assert data.catalog.table["description"].to_pylist() == ["Push-up bra", None]
    assert data.users["age"].to_pylist() == [24.0]


def test_labels_of_kuairand(read):
    data = read("kuairand")
    assert data.context["like"].to_pylist() == [0] * 4 and data.context["long"].to_pylist() == [1, 0, 1, 0]


def test_mind_gives_the_rows_and_parts_of_a_plain_script(read):
    data = read("mind")
    rows = []
    for part, text in (("train", BEHAVIORS), ("test", DEV)):
        for line in text.splitlines():
            impression, user, time, _, shown = line.split("\t")
            day, clock, half = time.split(" ")
            month, date, year = day.split("/")
            hour, minute, second = clock.split(":")
            hour = int(hour) % 12 + 12 * (half == "PM")
            at = microseconds(f"{year}-{month:0>2}-{date:0>2}T{hour:02}:{minute:0>2}:{second:0>2}")
            for pair in shown.split(" "):
                item, label = pair.split("-")
                rows.append((user, item, at, int(label), int(impression), part))
    known = [row for row in rows if row[1] != "N9"]  # which is in no news.tsv
    context = zip(data.context["impression_id"].to_pylist(), data.context["split"].to_pylist(), strict=True)
    found = [(*row, *further) for row, further in zip(log_of(data), context, strict=True)]
    assert sorted(found) == sorted(known) and len(found) == 10
    assert data.report["interactions"]["set aside"]["item_id not in the catalog"] == {"count": 1, "examples": ["N9"]}
    assert data.catalog.table["title"].to_pylist() == [f'A "quoted title {i}' for i in (1, 2, 3, 4)]
    splits = data.split(GivenSplit(validation_fraction=0.5))
    assert len(splits.test) == 4 and len(splits.train) + len(splits.validation) == 6
    assert splits.is_cold(splits.test).any() and not splits.report["training rows not before the first test row"]


@pytest.mark.parametrize(
    ("shown", "message"),
    [("N1-1 N2", "holds 'N2', which is not an item, '-' and a label"), ("N1-x", "a label is no number")],
)
def test_impressions_that_are_not_pairs(read, monkeypatch, shown, message):
    monkeypatch.setitem(LAYOUTS["mind"], "dev/behaviors.tsv", f"1\tU1\t11/15/2019 7:11:01 AM\tN1\t{shown}\n")
    with pytest.raises(ValueError, match=f"impressions: column 'impressions'.*{message}"):
        read("mind")
