"""A server under hostile requests: it says why, goes on, and ends when it is told to."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from mmctr.serving.guards import BodyLimit, SameOrigin, TimeBudget, most_connections, quiet_loop
from mmctr.serving.schemas import MAX_BODY
from tests.helpers.tiny import CLONE

pytestmark = pytest.mark.slow


def app_with(*middleware: Any) -> TestClient:
    app = FastAPI()

    @app.post("/echo")
    async def echo(request: Request) -> int:
        return len(await request.body())

    @app.get("/slow")
    def slow(seconds: float) -> str:
        time.sleep(seconds)
        return "done"

    for kind, options in middleware:
        app.add_middleware(kind, **options)
    return TestClient(app)


def test_pages_of_other_sites_are_refused():
    client = app_with((SameOrigin, {}))
    for headers, status in (
        ({}, 200),
        ({"origin": "http://testserver"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://testserver:81"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-origin", "origin": "http://testserver"}, 200),
    ):
        assert client.post("/echo", content=b"x", headers=headers).status_code == status, headers


def test_a_request_that_takes_too_long_gets_503():
    client = app_with((TimeBudget, {"seconds": 0.2}))
    begun = time.monotonic()
    answer = client.get("/slow", params={"seconds": 1.5})
    assert answer.status_code == 503 and "longer than 0.2 seconds" in answer.json()["detail"]
    assert time.monotonic() - begun < 1.4 and answer.headers["retry-after"] == "5"
    assert client.get("/slow", params={"seconds": 0}).json() == "done"


def test_a_body_of_unknown_length_is_refused():
    client = app_with((BodyLimit, {}))
    chunks = (b"x" * 100_000 for _ in range(MAX_BODY // 100_000 + 2))
    answer = client.post("/echo", content=chunks)
    assert answer.status_code == 413 and "larger than 1,000,000 bytes" in answer.json()["detail"]
    assert client.post("/echo", content=(b"x" for _ in range(10))).json() == 10


def test_a_loop_without_descriptors_logs_once(caplog):
    loop = asyncio.new_event_loop()
    quiet_loop(loop)
    for _ in range(1000):
        loop.call_exception_handler(
            {"message": "socket.accept() out of system resource", "exception": OSError(24, "x")}
        )
    assert len(caplog.records) == 1 and "ulimit -n" in caplog.text
    loop.call_exception_handler({"message": "something else"})
    assert "something else" in caplog.text
    loop.close()


def test_connections_leave_descriptors_for_files(monkeypatch):
    limits = {"soft": 64, "hard": 64}
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limits["soft"], limits["hard"]))
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.update(soft=pair[0]))
    assert most_connections() == 16
    limits.update(soft=64, hard=4096)
    assert most_connections() == 1000 and limits["soft"] == 1048


class Served:
    """`mmctr serve` on some vectors, in a process with few file descriptors."""

    def __init__(self, folder: Path):
        np.savez(folder / "v.npz", item_id=np.arange(50), vectors=np.random.default_rng(0).normal(size=(50, 8)))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = open(folder / "log.txt", "w")  # noqa: SIM115
        self.path = folder / "log.txt"
        code = (
            "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
            "import mmctr.serving.guards as guards; guards.HEADERS_WITHIN = 1.0\n"
            "from mmctr.cli.main import main; import sys; main(sys.argv[1:])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "serve", str(folder / "v.npz"), "--port", str(self.port)],
            stdout=self.log,
            stderr=self.log,
            cwd=CLONE,
            env=os.environ | {"PYTHONPATH": str(CLONE), "OMP_NUM_THREADS": "1"},
        )
        for _ in range(600):
            try:
                self.search()
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError(self.path.read_text())

    def search(self) -> Any:
        body = json.dumps({"parts": [{"item_id": 3}], "k": 2}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/api/search", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)

    def send(self, data: bytes) -> socket.socket:
        """An open connection on which some bytes were sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        connection.sendall(data)
        return connection


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    served = Served(tmp_path_factory.mktemp("served"))
    yield served
    served.process.kill()
    served.process.wait()
    served.log.close()


def head_of(length: int) -> bytes:
    """The headers of a search with a body of a length."""
    lines = ("POST /api/search HTTP/1.1", "Host: localhost", "Content-Type: application/json")
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


def test_half_requests_are_closed(served):
    for data in (b"", b"POST /api/search HTTP/1.1\r\nHost: loc", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\nGET /"):
        connection = served.send(data)
        received = b""
        while part := connection.recv(65536):  # ends when the server closes
            received += part
        connection.close()
    assert served.search()["items"]


def test_a_body_that_is_too_large_is_answered(served):
    """The answer arrives though the sender sends all of the body first."""
    size = 20_000_000
    connection = served.send(head_of(size) + b"x" * size)
    assert connection.recv(1000).startswith(b"HTTP/1.1 413")
    connection.close()


def test_a_flood_of_connections_is_survived_in_silence(served):
    before = len(served.path.read_text().splitlines())
    crowd = []
    for _ in range(300):
        try:
            crowd.append(served.send(b""))
        except OSError:
            break
    time.sleep(1.0)
    for connection in crowd:
        connection.close()
    for attempt in range(50):
        try:
            assert served.search()["items"]
            break
        except OSError:
            assert attempt < 49
            time.sleep(0.2)
    assert len(served.path.read_text().splitlines()) - before < 20


def test_a_stalled_body_does_not_keep_the_server_from_ending(served):
    head = (
        "POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    )
    connection = served.send(head.encode() + b"{")
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(timeout=20) is not None
    connection.close()
    assert "Traceback" not in served.path.read_text()
