"""`mmctr serve` under load: many clients at once on the loopback, each with a connection that stays open.

    python benchmarks/serve.py INDEX [--ranker RUN] [--clients 64] [--requests 4000]

Starts the server in a process of its own. Prints a line of JSON for each kind of request: requests a second, latency in
milliseconds (median, 99th percentile, slowest), and answers that were no 200.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("index")
    parser.add_argument("--ranker")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=4000)
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
    finally:
        server.terminate()
        server.wait(30)


if __name__ == "__main__":
    main()
