"""The HTTP service: answers equal those of the library, and whatever is sent to it, it says why and goes on."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from accelerate import Accelerator
from fastapi.testclient import TestClient

from mmctr.cli.main import main
from mmctr.evaluation.predict import predict
from mmctr.retrieval.index import ItemIndex
from mmctr.runs.finished import all_impressions
from mmctr.serving.schemas import MAX_BODY, MAX_PICTURE
from mmctr.serving.scoring import Scorer
from mmctr.serving.search import Searcher
from mmctr.serving.server import create_app
from mmctr.serving.service import Service
from tests.helpers.tiny import CLONE
from tests.helpers.worlds import picture

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def service(runs, tmp_path_factory) -> Service:
    folder = tmp_path_factory.mktemp("served")
    main(["index", str(runs / "embeddings"), "--out", str(folder / "index"), "--columns"])
    rankers = {"ranker": Scorer(runs / "table"), "baseline": Scorer(runs / "id")}
    return Service(Searcher(ItemIndex.load(folder / "index")), rankers)


@pytest.fixture(scope="module")
def client(service) -> TestClient:
    return TestClient(create_app(service), raise_server_exceptions=False)


def ask(client, path, body, status=200):
    response = client.post(f"/api/{path}", json=body)
    assert response.status_code == status, response.text
    return response.json()


@pytest.mark.lowest
def test_search_equals_the_library(client, service):
    index, searcher = service.index, service.searcher
    item = index.ids[5].as_py()
    expected = [vars(n) for n in index.search_item(item, 7)]
    assert ask(client, "search", {"parts": [{"item_id": item}], "k": 7})["items"] == expected
    assert ask(client, "search", {"parts": [{"item_id": str(item)}], "k": 7})["items"] == expected
    vector = searcher.encoder.embed(texts=["red circle"])[0]
    found = ask(client, "search", {"parts": [{"text": "red circle"}], "where": ["factor_colour=red"]})["items"]
    assert found == [vars(n) for n in index.search(vector, 10, where=["factor_colour=red"])]
    sent = {"parts": [{"image": base64.b64encode(picture()).decode()}], "k": 5}
    expected = [vars(n) for n in index.search(searcher.encoder.embed(images=[picture()])[0], 5)]
    assert ask(client, "search", sent)["items"] == expected
    upload = client.post("/api/search/picture", files={"picture": ("p.png", picture())}, data={"k": 5})
    assert upload.json()["items"] == expected
    filtered = client.post(
        "/api/search/picture", files={"picture": picture()}, data={"where": ["factor_colour=red", "factor_size=small"]}
    )
    where = ["factor_colour=red", "factor_size=small"]
    vector = searcher.encoder.embed(images=[picture()])[0]
    assert filtered.json()["items"] == [vars(n) for n in index.search(vector, where=where)]
    vectors = ask(client, "embed", {"texts": ["a", "b c"]})["vectors"]
    np.testing.assert_allclose(vectors, searcher.encoder.embed(texts=["a", "b c"]), rtol=1e-6)


@pytest.mark.parametrize("name", ["id", "table", "joint", "trees"])
def test_served_scores_are_those_of_evaluate(runs, toy_folder, name):
    scorer = Scorer(runs / name)
    part = all_impressions(scorer.dataset.interactions)
    expected = predict(scorer.task, scorer.ranking.collator(part), Accelerator())
    times = scorer.dataset.interactions.time
    for row in range(3, len(part), 97):
        user, at = int(part.user[row]), int(times[row])
        history = scorer.history(user, at)
        same = np.flatnonzero((part.user == user) & (times == at))
        served = scorer.score(user, part.item[same], history, at=at)
        np.testing.assert_allclose(served, expected[same], rtol=1e-5)
    client = TestClient(create_app(Service(Searcher(ItemIndex.load(runs / "index")), {"ranker": scorer})))
    user_id = scorer.dataset.users["user_id"][user].as_py()
    item_id = scorer.dataset.catalog.item_ids[int(part.item[row])].as_py()
    body = {"user_id": user_id, "items": [item_id], "at": at}
    found = ask(client, "score", body)["items"][0]
    assert found["score"] == pytest.approx(expected[row], rel=1e-5)
    assert found["cold"] == bool(scorer.ranking.id_rows[part.item[row]] == 0)
    # the same with the history spelled out, for a user with a name
    history = [scorer.dataset.catalog.item_ids[int(i)].as_py() for i in scorer.history(user, at)]
    spelled = ask(client, "score", body | {"history": history, "at": None})["items"][0]
    assert spelled["score"] == pytest.approx(expected[row], rel=1e-5)
    stranger = ask(client, "score", {"items": [item_id], "history": history})["items"][0]["score"]
    assert 0 < stranger < 1


def test_a_ranking_is_the_scores_sorted_and_marks_cold_items(client, service):
    scorer = service.rankers["ranker"]
    user = scorer.dataset.users["user_id"][3].as_py()
    everything = ask(client, "rank", {"user_id": user, "candidates": 5000, "k": 500})
    ids = [item["item_id"] for item in everything["items"]]
    scores = [item["score"] for item in everything["items"]]
    assert scores == sorted(scores, reverse=True) and len(set(ids)) == len(ids)
    clicked = scorer.dataset.catalog.item_ids.take(pa.array(scorer.history(3))).to_pylist()
    assert everything["history_length"] == len(clicked) > 0
    assert set(ids) == set(service.index.ids.to_pylist()) - set(clicked)
    again = ask(client, "score", {"user_id": user, "items": ids})["items"]
    np.testing.assert_allclose([item["score"] for item in again], scores, rtol=1e-5)
    cold = {item["item_id"] for item in everything["items"] if item["cold"]}
    assert cold == {ids[n] for n, row in enumerate(scorer.dataset.catalog.rows(ids)) if scorer.cold[row]} and cold
    for among, wanted in (("cold", cold), ("warm", set(ids) - cold)):
        part = ask(client, "rank", {"user_id": user, "candidates": 5000, "k": 500, "among": among})
        assert [item["item_id"] for item in part["items"]] == [item for item in ids if item in wanted]
    baseline = ask(client, "rank", {"user_id": user, "candidates": 5000, "k": 500, "ranker": "baseline"})
    assert {item["item_id"] for item in baseline["items"]} == set(ids) and baseline["items"] != everything["items"]
    few = ask(client, "rank", {"user_id": user, "candidates": 20, "k": 500})["items"]
    assert len(few) == 20 and {item["item_id"] for item in few} < set(ids)
    assert len(ask(client, "rank", {"candidates": 30, "k": 30})["items"]) == 30  # nobody in particular


@pytest.mark.parametrize("ranker", ["ranker", "baseline"])
def test_reasons_are_differences_of_scores(client, service, ranker):
    scorer = service.rankers[ranker]
    user = scorer.dataset.users["user_id"][3].as_py()
    item = service.index.ids[0].as_py()
    explained = ask(client, "explain", {"user_id": user, "item_id": item, "ranker": ranker})
    history = [reason["item_id"] for reason in explained["history"]]
    assert 2 <= len(history) <= scorer.task.config.max_history

    def odds(clicked):
        body = {"user_id": user, "items": [item], "history": clicked, "ranker": ranker}
        score = ask(client, "score", body)["items"][0]["score"]
        return np.log(score / (1 - score))

    whole = odds(history)
    assert explained["score"] == pytest.approx(1 / (1 + np.exp(-whole)), rel=1e-5)
    for place, reason in enumerate(explained["history"]):
        assert reason["effect"] == pytest.approx(whole - odds(history[:place] + history[place + 1 :]), abs=1e-4)
    # DIN's weights: those its forward pass pools with
    assert all(isinstance(reason["weight"], float) for reason in explained["history"])
    nothing = ask(client, "explain", {"item_id": item, "history": [], "ranker": ranker})
    assert nothing["history"] == [] and 0 < nothing["score"] < 1


def bomb() -> bytes:
    """A PNG that says it is 60,000 pixels wide and high."""
    header = bytearray(picture())
    header[16:24] = (60_000).to_bytes(4, "big") * 2
    return bytes(header)


PART = {"item_id": 5}
WRONG = [
    ("search", {}),
    ("search", []),
    ("search", None),
    ("search", "text"),
    ("search", {"parts": []}),
    ("search", {"parts": {}}),
    ("search", {"parts": [{}]}),
    ("search", {"parts": [{"item_id": None}]}),
    ("search", {"parts": [{"item_id": 1.5}]}),
    ("search", {"parts": [{"item_id": True}]}),
    ("search", {"parts": [{"item_id": [1]}]}),
    ("search", {"parts": [{"item_id": 10**40}]}),
    ("search", {"parts": [{"item_id": "x" * 5000}]}),
    ("search", {"parts": [{"item_id": "../../etc/passwd"}]}),
    ("search", {"parts": [{"item_id": -1}]}),
    ("search", {"parts": [{"text": ""}]}),
    ("search", {"parts": [{"text": "   "}]}),
    ("search", {"parts": [{"text": 5}]}),
    ("search", {"parts": [{"text": "a" * 3000}]}),
    ("search", {"parts": [{"text": "a", "item_id": 5}]}),
    ("search", {"parts": [{"text": "a", "weight": "heavy"}]}),
    ("search", {"parts": [{"text": "a", "weight": 1e300}]}),
    ("search", {"parts": [{"text": "a", "weight": 0}, {"text": "b", "weight": 0}]}),
    ("search", {"parts": [{"text": "a"}] * 17}),
    ("search", {"parts": [{"image": "!!"}]}),
    ("search", {"parts": [{"image": base64.b64encode(b"no picture").decode()}]}),
    ("search", {"parts": [{"image": base64.b64encode(bomb()).decode()}]}),
    ("search", {"parts": [{"user_id": "nobody"}]}),
    ("search", {"parts": [{"user_id": 10**30}]}),
    ("search", {"parts": [{"text": "a"}], "k": 0}),
    ("search", {"parts": [{"text": "a"}], "k": 10**9}),
    ("search", {"parts": [{"text": "a"}], "k": "many"}),
    ("search", {"parts": [{"text": "a"}], "where": ["price<3"]}),
    ("search", {"parts": [{"text": "a"}], "where": "factor_colour=red"}),
    ("search", {"parts": [{"text": "a"}], "unknown": 1}),
    ("embed", {"texts": []}),
    ("embed", {"texts": ["a"] * 300}),
    ("embed", {"texts": [None]}),
    ("score", {"items": []}),
    ("score", {"items": [5]}),
    ("score", {"items": ["../.."], "user_id": 1}),
    ("score", {"items": [10**40], "user_id": 1}),
    ("score", {"items": [1] * 6000, "user_id": 1}),
    ("score", {"items": [5], "user_id": -5}),
    ("score", {"items": [5], "user_id": {"a": 1}}),
    ("score", {"items": [5], "history": [10**40]}),
    ("score", {"items": [5], "at": "yesterday"}),
    ("score", {"items": [5], "ranker": "../../id"}),
    ("rank", {"user_id": 1, "candidates": 0}),
    ("rank", {"user_id": 1, "candidates": 10**9}),
    ("rank", {"user_id": 1, "among": "old"}),
    ("explain", {"user_id": 1}),
    ("explain", {"item_id": [], "user_id": 1}),
]


@pytest.mark.parametrize(("path", "body"), WRONG)
def test_wrong_requests_get_a_reason(client, path, body):
    response = client.post(f"/api/{path}", json=body)
    assert 400 <= response.status_code < 500, response.text
    assert response.json()["detail"]
    assert "Traceback" not in response.text


def test_wrong_bodies_uploads_and_paths(client, service):
    item = service.index.ids[5].as_py()
    json_type = {"content-type": "application/json"}
    for content in (b"{", b"\xff\xfe", b"", b"[" * 100_000, b'{"parts": [{"text": "\\ud800"}]}', b"NaN"):
        response = client.post("/api/search", content=content, headers=json_type)
        assert 400 <= response.status_code < 500 and response.json()["detail"], content[:20]
    large = json.dumps({"parts": [{"text": "a" * 10_000_000}]}).encode()
    response = client.post("/api/search", content=large, headers=json_type)
    assert response.status_code == 413 and f"larger than {MAX_BODY:,} bytes" in response.json()["detail"]

    def trickle():
        for _ in range(30):
            yield b" " * 100_000

    assert client.post("/api/search", content=trickle(), headers=json_type).status_code == 413
    assert client.post("/api/search", content=b"{}", headers=json_type | {"content-length": "much"}).status_code == 413
    for upload in (b"", b"no picture", bomb(), picture()[:60]):
        response = client.post("/api/search/picture", files={"picture": ("../../p.png", upload)})
        assert response.status_code == 400 and response.json()["detail"].startswith("picture"), upload[:10]
    response = client.post("/api/search/picture", files={"picture": bytes(MAX_PICTURE + 1)})
    assert response.status_code == 413
    assert client.post("/api/search/picture", data={"picture": "text"}).status_code == 422
    for name in ("../../../etc/passwd", "..%2f..%2fetc%2fpasswd", "", "9" * 400, "x" * 600, "\0"):
        response = client.get("/api/picture", params={"item_id": name})
        assert 400 <= response.status_code < 500 and response.json()["detail"]
    for path in ("/../pyproject.toml", "/static/../server.py", "/%2e%2e/%2e%2e/etc/passwd", "/api/nothing"):
        assert client.get(path).status_code == 404
    assert client.get("/api/search").status_code == 405
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    for query in ({"count": 0}, {"count": 1000}, {"starts": "x" * 200}):
        assert client.get("/api/users", params=query).status_code == 422
    # it still serves
    assert len(ask(client, "search", {"parts": [{"item_id": item}], "k": 3})["items"]) == 3


def test_pictures_users_and_pages(client, service, toy_folder):
    items = pq.read_table(toy_folder / "items.parquet")
    item = items["item_id"][4].as_py()
    response = client.get("/api/picture", params={"item_id": item})
    assert response.content == (toy_folder / items["image"][4].as_py()).read_bytes()
    assert response.headers["content-type"] in ("image/png", "image/jpeg")
    assert response.headers["x-content-type-options"] == "nosniff"
    users = service.rankers["ranker"].dataset.users["user_id"].to_pylist()
    first = str(users[0])
    assert client.get("/api/users", params={"count": 3}).json() == users[:3]
    assert (
        client.get("/api/users", params={"starts": first}).json() == [u for u in users if str(u).startswith(first)][:20]
    )
    for path in ("/", "/docs", "/page.js", "/docs.js", "/style.css"):
        response = client.get(path)
        assert response.status_code == 200 and "default-src 'none'" in response.headers["content-security-policy"]
        assert "http://" not in response.text and "https://" not in response.text  # nothing from elsewhere
    described = client.get("/openapi.json").json()
    searching, ranking = ["search", "search/picture", "embed"], ["score", "rank", "explain", "users"]
    assert set(described["paths"]) == {f"/api/{name}" for name in (*searching, *ranking, "facts", "picture")}
    assert all(call["summary"] for calls in described["paths"].values() for call in calls.values())
    facts = client.get("/api/facts").json()
    assert facts["items"] == len(service.index) and facts["rankers"] == {"ranker": "table", "baseline": "id"}
    assert "red" in facts["columns"]["factor_colour"]["values"]


def test_an_index_without_a_run_or_a_dataset_is_searched_by_item(runs, tmp_path):
    loaded = ItemIndex.load(runs / "index")
    bare = ItemIndex(loaded.index, loaded.items)
    client = TestClient(create_app(Service(Searcher(bare), {})), raise_server_exceptions=False)
    item = bare.ids[0].as_py()
    assert len(ask(client, "search", {"parts": [{"item_id": item}]})["items"]) == 10
    assert "the run that made" in ask(client, "search", {"parts": [{"text": "red"}]}, 400)["detail"]
    assert "--ranker" in ask(client, "score", {"items": [item]}, 400)["detail"]
    assert client.get("/api/picture", params={"item_id": item}).status_code == 404
    assert client.get("/api/facts").json()["encoder"] is False and client.get("/api/users").json() == []


class Server:
    """`mmctr serve` in a process of its own."""

    def __init__(self, *arguments):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            self.port = taken.getsockname()[1]
        command = [sys.executable, "-m", "mmctr", "serve", *map(str, arguments), "--port", str(self.port)]
        self.process = subprocess.Popen(command, cwd=CLONE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def wait(self):
        for _ in range(600):
            try:
                return self.ask("facts")
            except OSError:
                assert self.process.poll() is None, self.process.stdout.read()
                time.sleep(0.1)
        raise AssertionError("the server did not start")

    def ask(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/api/{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)


@pytest.fixture(scope="module")
def server(runs):
    server = Server(runs / "index", "--ranker", runs / "table", "--baseline", runs / "id")
    server.wait()
    yield server
    server.process.terminate()
    server.process.wait(30)


def test_many_clients_at_once(server, service):
    ids = service.index.ids.to_pylist()
    user = service.rankers["ranker"].dataset.users["user_id"][0].as_py()

    def one(number):
        item = ids[number % len(ids)]
        if number % 3 == 0:
            return number, server.ask("search", {"parts": [{"item_id": item}], "k": 5})["items"]
        if number % 3 == 1:
            return number, server.ask("search", {"parts": [{"text": f"red {number % 7}"}], "k": 5})["items"]
        return number, server.ask("score", {"user_id": user, "items": ids[:20]})["items"]

    with ThreadPoolExecutor(64) as pool:
        answers = dict(pool.map(one, range(384)))
    assert len(answers) == 384
    for number in (0, 3, 6):
        expected = [vars(n) for n in service.index.search_item(ids[number % len(ids)], 5)]
        assert [item["item_id"] for item in answers[number]] == [n["item_id"] for n in expected]
    assert all(answers[n] == answers[2] for n in range(2, 384, 3))


def test_the_page_in_a_browser(server, service, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    user = service.rankers["ranker"].dataset.users["user_id"][3].as_py()

    def dom(query):
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        command += ["--virtual-time-budget=20000", "--dump-dom", f"http://127.0.0.1:{server.port}/{query}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout

    page = dom(f"?q=red%20circle&user={user}&why=1")
    titles = [n.title for n in service.index.search(service.searcher.encoder.embed(texts=["red circle"])[0], 24)]
    assert all(title in page for title in titles) and "“red circle”" in page
    best = server.ask("rank", {"user_id": user, "k": 12})["items"]
    assert all(f"{item['item_id']} · {item['score']:.3f}" in page for item in best)
    assert 'class="cold"' in page and "Why " in page and "attention" in page
    words = "<b>bold</b><img src=x onerror=alert(1)>"
    page = dom("?q=" + urllib.request.quote(words))
    assert "<b>bold" not in page and "&lt;b&gt;bold" in page  # words are never markup
    page = dom("docs")
    assert "/api/explain" in page and "candidates" in page


def test_what_cannot_be_served(runs, tmp_path, capsys):
    shutil.copytree(runs / "index", tmp_path / "cut")
    file = tmp_path / "cut" / "index.faiss"
    file.write_bytes(file.read_bytes()[:-10])
    for arguments, message in (
        ((tmp_path / "cut",), "index.faiss: damaged"),
        ((tmp_path / "none",), "no such embedding folder"),
        ((runs / "index", "--ranker", tmp_path / "none"), "none"),
        ((runs / "index", "--ranker", runs / "pretrain"), "pretrain"),
        ((runs / "index", "--ranker", runs / "id", "--embeddings", runs / "embeddings"), "reads no content"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["serve", *map(str, arguments), "--port", "0"])
        assert stopped.value.code == 1 and message in capsys.readouterr().err
