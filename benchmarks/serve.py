"""`mmctr serve` under load: many clients at once on the loopback, each with a connection that stays open.

    python benchmarks/serve.py INDEX [--ranker RUN] [--clients 64] [--requests 4000] [--hostile]

Starts the server in a process of its own. Prints a line of JSON for each kind of request: requests a second, latency in
milliseconds (median, 99th percentile, slowest), and answers that were no 200. With `--hostile` searches by item are
measured again while two other clients send what a server should not get: conditions of thousands of spaces, bodies too
large and stalled, half requests, forms of another site, broken JSON; the line has the answers to these by status.
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from typing import Any

import numpy as np


def call(connection: http.client.HTTPConnection, path: str, body: Any = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body)
    headers = {"Content-Type": "application/json"}
    connection.request("GET" if body is None else "POST", f"/api/{path}", data, headers)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def load(port: int, bodies: list[tuple[str, Any]], clients: int) -> dict[str, Any]:
    """Send all bodies from `clients` threads, in turn."""
    times, wrong, lock, numbers = [], [0], threading.Lock(), iter(range(len(bodies)))

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            start = time.perf_counter()
            status, _ = call(connection, *bodies[number])
            seconds = time.perf_counter() - start
            with lock:
                times.append(seconds * 1000)
                wrong[0] += status != 200

    threads = [threading.Thread(target=client) for _ in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    return {
        "requests": len(bodies),
        "clients": clients,
        "per_s": round(len(bodies) / seconds, 1),
        "p50_ms": round(float(np.median(times)), 1),
        "p99_ms": round(float(np.percentile(times, 99)), 1),
        "max_ms": round(max(times), 1),
        "not_200": wrong[0],
    }


SPACES = "a" + " " * 1900 + "b"
JUNK: list[tuple[str, dict[str, str], bytes]] = [
    ("/api/search", {}, json.dumps({"parts": [{"item_id": 1}], "where": [SPACES] * 16}).encode()),
    ("/api/search", {"Origin": "http://elsewhere.example"}, b'{"parts": [{"item_id": 1}]}'),
    ("/api/search", {}, b"[" * 100_000),
    ("/api/search", {}, b"x" * 3_000_000),
    ("/api/search/picture", {"Content-Type": "multipart/form-data; boundary=x"}, b"--x\r\n" + b"y" * 500_000),
    ("/api/score", {}, json.dumps({"user_id": "x", "items": ["y"] * 5000}).encode()),
]
"""path, headers and body of hostile requests"""


class Hostile:
    """Clients that send junk until they are told to stop, and count the answers by status."""

    def __init__(self, port: int, clients: int = 2):
        self.port, self.stopped, self.statuses = port, threading.Event(), Counter[str]()
        self.threads = [threading.Thread(target=self._send, args=(number,)) for number in range(clients)]

    def __enter__(self) -> Counter[str]:
        for thread in self.threads:
            thread.start()
        return self.statuses

    def __exit__(self, *_: Any) -> None:
        self.stopped.set()
        for thread in self.threads:
            thread.join()

    def _send(self, number: int) -> None:
        half = []
        while not self.stopped.wait(0.02):
            path, headers, body = JUNK[number % len(JUNK)]
            number += 1
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
                connection.request("POST", path, body, {"Content-Type": "application/json"} | headers)
                self.statuses[str(connection.getresponse().status)] += 1
                connection.close()
                opened = socket.create_connection(("127.0.0.1", self.port), timeout=60)
                opened.sendall(
                    b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"[: 40 + number % 40]
                )
                half.append(opened)  # half a request, or a body that stalls
            except OSError as error:
                self.statuses[type(error).__name__] += 1
            if len(half) > 50:
                half.pop(0).close()
        for opened in half:
            opened.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("index")
    parser.add_argument("--ranker")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--hostile", action="store_true")
    arguments = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mmctr", "serve", arguments.index, "--port", str(port)]
    server = subprocess.Popen(command + (["--ranker", arguments.ranker] if arguments.ranker else []))
    try:
        facts = None
        while facts is None:
            try:
                facts = call(http.client.HTTPConnection("127.0.0.1", port, timeout=60), "facts")[1]
            except OSError:
                if server.poll() is not None:
                    raise SystemExit("the server did not start") from None
                time.sleep(0.2)
        ids = [item["item_id"] for item in facts["sample"]]
        users = call(http.client.HTTPConnection("127.0.0.1", port), "users?count=100")[1]
        kinds: dict[str, Any] = {"item": lambda n: ("search", {"parts": [{"item_id": ids[n % len(ids)]}]})}
        if facts["encoder"]:
            kinds["text"] = lambda n: ("search", {"parts": [{"text": f"red {n}"}]})
        if users:
            kinds["score"] = lambda n: ("score", {"user_id": users[n % len(users)], "items": ids})
            kinds["rank"] = lambda n: ("rank", {"user_id": users[n % len(users)]})
        for name, body in kinds.items():
            bodies = [body(number) for number in range(arguments.requests)]
            print(json.dumps({"kind": name, **load(port, bodies, arguments.clients)}), flush=True)
        if arguments.hostile:
            bodies = [kinds["item"](number) for number in range(arguments.requests)]
            for _ in range(2):
                alone = load(port, bodies, 4)
                with Hostile(port) as statuses:
                    beside = load(port, bodies, 4)
                line = {"kind": "item, 4 clients", "alone": alone, "beside hostile requests": beside}
                ratio = round(beside["p99_ms"] / alone["p99_ms"], 2)
                print(json.dumps({**line, "ratio of p99": ratio, "hostile answers": dict(statuses)}), flush=True)
    finally:
        server.terminate()
        server.wait(30)


if __name__ == "__main__":
    main()
