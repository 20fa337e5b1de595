"""An ItemIndex beside plain FAISS: build time, memory, recall@10 and queries a second, one by one and in batches.

    python benchmarks/search.py [--counts 100000 1000000] [--dim 512] [--kinds chosen exact autofaiss]

Vectors are unit vectors around centres; queries are drawn from the same centres and are not in the index. `plain` is a
bare `faiss.IndexFlatIP`, the exact answer and the rate others are compared with; `exact` an ItemIndex of the same kind;
`chosen` what `mmctr index` takes for the default recall and latency; `autofaiss` the index and search setting that
autofaiss 2.18 (`external/optimize.py`) would take, built here by its rule: HNSW of at most 32 links below 10 thousand
vectors or where memory allows, else IVF of 4 sqrt(n) lists. A line of JSON for each.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from mmctr.data.embeddings import EmbeddingTable
from mmctr.retrieval.index import ItemIndex
from mmctr.retrieval.tuning import Wanted, num_lists

K = 10


def vectors(count: int, dim: int, seed: int, spread: float) -> np.ndarray:
    """(count, dim) unit vectors around 2,000 centres, made in blocks."""
    centres = np.random.default_rng(0).normal(size=(2000, dim)).astype(np.float32)
    rng, out = np.random.default_rng(seed), np.empty((count, dim), np.float32)
    for start in range(0, count, 65536):
        part = out[start : start + 65536]
        part[:] = centres[rng.integers(len(centres), size=len(part))]
        part += spread * rng.standard_normal(part.shape, np.float32)
    faiss.normalize_L2(out)
    return out


def resident_mb() -> float:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def rates(search: Callable[[np.ndarray], Any], queries: np.ndarray) -> dict[str, float]:
    """Queries a second one by one (median), their slowest hundredth, and in batches of 1000."""
    search(queries[:10])
    times = []
    for number in range(200):
        start = time.perf_counter()
        search(queries[number : number + 1])
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    search(queries)
    batch = len(queries) / (time.perf_counter() - start)
    return {
        "single_per_s": round(1 / float(np.median(times)), 1),
        "single_p99_ms": round(1000 * float(np.percentile(times, 99)), 2),
        "batched_per_s": round(batch, 1),
    }


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(found, truth, strict=True)]))


def autofaiss_factory(count: int, dim: int) -> str:
    if count < 1000:
        return "Flat"
    if count < 10_000:
        return "HNSW15"
    return "HNSW32" if count * (4 * dim + 8 * 32) < 5 * 2**30 else f"IVF{num_lists(count)},Flat"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--spread", type=float, default=0.6, help="noise around a centre of unit variance")
    parser.add_argument("--kinds", nargs="+", default=["exact", "chosen", "autofaiss"])
    parser.add_argument("--ef", type=int, default=64, help="efSearch of autofaiss' index")
    arguments = parser.parse_args()
    for count in arguments.counts:
        data = vectors(count, arguments.dim, 1, arguments.spread)
        queries = vectors(1000, arguments.dim, 2, arguments.spread)
        table = EmbeddingTable(pa.array(np.arange(count)), data)
        common = {"count": count, "dim": arguments.dim, "threads": faiss.omp_get_max_threads()}
        start = time.perf_counter()
        plain = faiss.IndexFlatIP(arguments.dim)
        plain.add(data)
        built = time.perf_counter() - start
        truth = plain.search(queries, K)[1]
        scan = partial(plain.search, k=K)
        base = rates(scan, queries)
        print(json.dumps({"kind": "plain", **common, "build_s": round(built, 1), "recall": 1.0, **base}), flush=True)
        for kind in arguments.kinds:
            before, start = resident_mb(), time.perf_counter()
            facts: dict[str, Any] = {}
            if kind == "autofaiss":
                factory = autofaiss_factory(count, arguments.dim)
                index = faiss.index_factory(arguments.dim, factory, faiss.METRIC_INNER_PRODUCT)
                if not index.is_trained:
                    index.train(data[:: max(1, count // 300_000)])
                index.add(data)
                if factory.startswith("HNSW"):
                    faiss.ParameterSpace().set_index_parameter(index, "efSearch", arguments.ef)
                facts["factory"] = factory
                search = partial(index.search, k=K)
            else:
                index = ItemIndex.build(table, None if kind == "exact" else Wanted())
                facts |= {"factory": index.factory, "measured": index.measured and index.measured["recall"]}
                facts |= {"setting": index.measured and index.measured["setting"]}
                search = partial(index.nearest, k=K)
            built, memory = time.perf_counter() - start, resident_mb() - before
            # plain FAISS once more beside it: the machine is shared
            beside, own = rates(scan, queries), rates(search, queries)
            ratios = {
                f"{name}_to_plain": round(own[name] / beside[name], 2) for name in ("single_per_s", "batched_per_s")
            }
            found = search(queries)[1]
            if kind != "autofaiss":
                found = np.asarray(index.ids)[found]  # rows of an index are in its own order
            numbers = {"build_s": round(built, 1), "memory_mb": round(memory), "recall": round(recall(found, truth), 4)}
            print(json.dumps({"kind": kind, **common, **facts, **numbers, **own, **ratios}), flush=True)
            del index, search


if __name__ == "__main__":
    main()
