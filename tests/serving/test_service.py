"""Ids and times of requests and answers, without a trained run."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient

from mmctr.data.embeddings import EmbeddingTable
from mmctr.data.prepare import open_dataset
from mmctr.errors import UnknownId
from mmctr.retrieval.index import ItemIndex
from mmctr.serving.schemas import EXACT, Answer, Explanation, Found, Moment, Ranking, Reason, Scored, written_id
from mmctr.serving.search import Searcher
from mmctr.serving.server import create_app
from mmctr.serving.service import Service, rows_of_items
from tests.helpers.worlds import log_columns, write_dataset

LARGE = [2**60 + 1 + 3 * k for k in range(8)]


def service(rankers: dict[str, Any] | None = None) -> Service:
    table = EmbeddingTable(pa.array(LARGE), np.eye(8, dtype=np.float32) + 0.1)
    made = Service(Searcher(ItemIndex.build(table)), {})
    made.rankers = rankers or {}
    return made


def as_javascript(body: str) -> Any:
    """JSON as a reader sees it that knows floats alone."""
    return json.loads(body, parse_int=float)


def test_ids_that_floats_cannot_hold_leave_as_text_and_are_understood() -> None:
    dataset = SimpleNamespace(users=pa.table({"user_id": [5, EXACT, EXACT + 1]}))
    users = SimpleNamespace(dataset=dataset, run=SimpleNamespace(name="run"))
    client = TestClient(create_app(service({"ranker": users})))
    item = client.get("/api/facts").json()["sample"][0]["item_id"]
    assert item == str(LARGE[0])
    for _ in range(3):  # from neighbour to neighbour, as clicks in the page
        answer = client.post("/api/search", json={"parts": [{"item_id": item}], "k": 1})
        item = as_javascript(answer.text)["items"][0]["item_id"]
        assert int(item) in LARGE
    assert client.get("/api/users").json() == [5, EXACT, str(EXACT + 1)]


@pytest.mark.parametrize("raw", [0, EXACT, -EXACT, "7", "x"])
def test_other_ids_stay_as_they_are(raw) -> None:
    assert written_id(raw) == raw and type(written_id(raw)) is type(raw)


def test_every_answer_writes_ids_in_the_same_way() -> None:
    large, text = LARGE[0], str(LARGE[0])
    for answer in (
        Answer(items=[Found(item_id=large, score=1)]),
        Ranking(items=[Scored(item_id=large, score=1, cold=True)], history_length=0),
        Explanation(score=1, history=[Reason(item_id=large, title=None, effect=0, weight=None)]),
    ):
        values = json.loads(answer.model_dump_json())
        assert next(iter(values.get("items") or values["history"]))["item_id"] == text


def test_items_of_a_request_may_be_written_as_text(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MMCTR_CACHE", str(tmp_path / "cache"))
    integers = open_dataset(write_dataset(tmp_path / "i", {"item_id": [3, 5, 2**60 + 1]})).catalog
    assert rows_of_items(integers, ["5", 3, str(2**60 + 1)]).tolist() == [1, 0, 2]
    assert rows_of_items(integers, []).tolist() == []
    for unknown, message in (("x", "ids here are integers, like 3"), ("7", "item id 7 is not in the catalog")):
        with pytest.raises(UnknownId, match=message):
            rows_of_items(integers, ["5", unknown])
    texts = open_dataset(write_dataset(tmp_path / "t", {"item_id": ["3", "a"]})).catalog
    assert rows_of_items(texts, ["a", "3"]).tolist() == [1, 0]


def test_a_moment_is_asked_for_in_the_unit_of_the_log(tmp_path) -> None:
    """The column has halves of seconds; requests for half a second see what happened before."""
    from mmctr.serving.scoring import Scorer

    log = log_columns([(1, 10, 100.25, 1), (1, 20, 100.75, 1), (1, 30, 102.5, 0)])
    dataset = open_dataset(write_dataset(tmp_path / "d", {"item_id": [10, 20, 30]}, log))
    scorer = cast(Scorer, SimpleNamespace(dataset=dataset, stranger=1))
    sizes = [len(Scorer.history(scorer, 0, Moment(at=at).at)) for at in (100, 100.5, 101, None)]
    assert sizes == [0, 1, 2, 2]


@pytest.mark.parametrize("path", ["/", "/docs", "/style.css", "/api/facts", "/api/users"])
def test_head_is_answered_as_get(path) -> None:
    client = TestClient(create_app(service()))
    head, get = client.head(path), client.get(path)
    assert head.status_code == get.status_code == 200
    assert head.headers["content-type"] == get.headers["content-type"]
