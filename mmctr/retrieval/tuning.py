"""Choice of a FAISS index for a catalog, and measurement of the recall against exact search.

Sizes and rules are chosen for CPUs; a FAISS factory string replaces the choice.
"""
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false
# the type stubs of FAISS describe the C++ layer, not the Python layer

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

logger = logging.getLogger(__name__)

HNSW_LINKS = 32
MOST_HNSW = 200_000
"""largest number of vectors for which an HNSW graph is chosen: a graph takes several times as long to build as inverted
lists"""
SCAN_RATE = 8e9
"""bytes per second that one thread compares exactly, from which the latency of exact search is estimated"""
POINTS_PER_CENTROID = 64
"""number of training vectors per centroid; FAISS requires at least 39"""
TUNED_ON = 1000
RANKED_AGAIN = 4
"""multiple of k of the candidates that an index with re-ranking (RFlat) compares exactly"""
MOST_EF = 2048


@dataclass(frozen=True)
class Wanted:
    """Requirements on an index.

    Raises:
        ValueError: a requirement is out of range.
    """

    recall: float = 0.99
    """least share of the ten nearest items among the results"""
    latency_ms: float = 2.0
    """largest latency of one query in milliseconds; exact search is chosen where exact search is fast enough"""
    memory: int | None = None
    """largest size of the index in bytes; None: no limit"""
    factory: str | None = None
    """FAISS factory string; None: chosen from the other requirements"""

    def __post_init__(self) -> None:
        if not 0 < self.recall <= 1:
            raise ValueError(f"recall {self.recall}: a share above 0 and at most 1")
        if self.latency_ms <= 0:
            raise ValueError(f"latency of {self.latency_ms} ms: must be above 0")
        if self.memory is not None and self.memory <= 0:
            raise ValueError(f"memory of {self.memory} bytes: must be above 0")


def num_lists(count: int) -> int:
    """Number of inverted lists for `count` vectors: the power of two nearest to 4 sqrt(count), as in autofaiss, but at
    most the number that FAISS can train."""
    wanted = 2 ** round(math.log2(4 * math.sqrt(count)))
    return max(1, min(wanted, 2 ** int(math.log2(max(count / 39, 1)))))


def most_equal(vectors: np.ndarray) -> int:
    """The largest number of (n, D) unit vectors that are equal to four digits, as of one picture in two batches."""
    if not len(vectors):
        return 0
    factors = np.random.default_rng(0).integers(0, 2**62, vectors.shape[1]) * 2 + 1
    keys = [  # products and sums are taken modulo 2^64
        (np.rint(part * 1e4).astype(np.int64) * factors).sum(1)
        for part in np.array_split(vectors, len(vectors) // 8192 + 1)
    ]
    return int(np.unique(np.concatenate(keys), return_counts=True)[1].max())


def choose_factory(count: int, dim: int, wanted: Wanted, num_equal: int = 1) -> str:
    """The factory string of the index that is fastest to build within the required latency and memory.

    Args:
        count: number of vectors.
        dim: D, number of dimensions.
        wanted: the requirements.
        num_equal: the result of `most_equal`. Equal vectors fill the links of a graph with each other, so that a search
            ends among them: with 2,000 of 4,000 vectors equal, HNSW finds half of the nearest vectors, IVF all.

    Raises:
        ValueError: not even codes of `dim / 8` bytes fit into the memory.
    """
    if wanted.factory is not None:
        if num_equal > HNSW_LINKS and wanted.factory.startswith("HNSW"):
            logger.warning(
                "%d items have one and the same vector, where searches in %s end; leave --factory out or take IVF",
                num_equal,
                wanted.factory,
            )
        return wanted.factory
    room = math.inf if wanted.memory is None else wanted.memory / max(count, 1)  # bytes a vector
    flat, links = 4 * dim, 8 * HNSW_LINKS + 16
    if flat <= room and flat * count / SCAN_RATE * 1000 <= wanted.latency_ms:
        return "Flat"
    lists = num_lists(count)
    if count <= MOST_HNSW and flat + links <= room and num_equal <= HNSW_LINKS:
        return f"HNSW{HNSW_LINKS},Flat"
    centroids = 4 * dim * lists / max(count, 1)
    for name, size in (("Flat", flat), ("SQ8", dim), *((f"PQ{m}x8", m) for m in _code_sizes(dim))):
        if size + 8 + centroids <= room:
            return f"IVF{lists},{name}"
    raise ValueError(
        f"memory {wanted.memory}: {count} vectors of {dim} dimensions need at least "
        f"{int(count * (_code_sizes(dim)[-1] + 8 + centroids))} bytes; allow more or make shorter vectors"
    )


def _code_sizes(dim: int) -> list[int]:
    """Bytes per vector that product quantisation may take, largest first: divisors of the number of dimensions."""
    return [m for m in range(dim // 2, 0, -1) if dim % m == 0 and m >= dim / 8] or [1]


@dataclass
class SearchSetting:
    """The search parameter of an index that trades recall for time."""

    name: str
    """`nprobe`, `efSearch`, or `none` for exact search"""
    value: int
    """current value"""
    most: int
    """largest useful value"""


def setting_of(index: Any) -> SearchSetting:
    """The search parameter of a FAISS index."""
    inner = inner_index(index)
    if isinstance(inner, faiss.IndexIVF):
        return SearchSetting("nprobe", inner.nprobe, inner.nlist)
    if isinstance(inner, faiss.IndexHNSW):
        return SearchSetting("efSearch", inner.hnsw.efSearch, MOST_EF)
    return SearchSetting("none", 0, 0)


def inner_index(index: Any) -> Any:
    """The index that is searched, below transformations of vectors and re-ranking."""
    index = faiss.downcast_index(index)
    while isinstance(index, faiss.IndexPreTransform | faiss.IndexRefine):
        index = faiss.downcast_index(index.index if isinstance(index, faiss.IndexPreTransform) else index.base_index)
    return index


def is_wrapped(index: Any) -> bool:
    """Whether an index transforms vectors before, or ranks results again after, the search of `inner_index`."""
    return isinstance(faiss.downcast_index(index), faiss.IndexPreTransform | faiss.IndexRefine)


def parameters(index: Any, value: int, selector: Any = None) -> Any:
    """Search parameters of FAISS for one call, which change no state shared with other threads.

    Args:
        index: a FAISS index.
        value: value of the search setting, `nprobe` or `efSearch`.
        selector: a FAISS selector of rows; None: all rows.
    """
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return faiss.SearchParametersPreTransform(index_params=parameters(index.index, value, selector))
    if isinstance(index, faiss.IndexRefine):
        base = parameters(index.base_index, value, selector)
        return faiss.IndexRefineSearchParameters(k_factor=index.k_factor, base_index_params=base)
    chosen = {} if selector is None else {"sel": selector}
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(nprobe=value, **chosen)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=value, **chosen)
    return faiss.SearchParameters(**chosen) if chosen else None


def _made(dim: int, factory: str) -> Any:
    try:
        return faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(f"factory {factory!r}: not an index FAISS can make of {dim} dimensions ({error})") from None


def build(vectors: np.ndarray, factory: str, seed: int = 0, rows: np.ndarray | None = None) -> Any:
    """A trained and filled FAISS index by inner product.

    Args:
        vectors: (n, D) float32 unit vectors.
        factory: FAISS factory string.
        seed: seed of the sample of training vectors.
        rows: (m,) rows of the vectors to train on and add; None: all rows.

    Raises:
        ValueError: FAISS does not understand the factory string, or cannot train the index on so few vectors.
    """
    dim = vectors.shape[1]
    rows = np.arange(len(vectors)) if rows is None else rows
    count = len(rows)
    index = _made(dim, factory)
    if isinstance(index, faiss.IndexRefine):
        index.k_factor = RANKED_AGAIN
    if not index.is_trained:
        inner = inner_index(index)
        lists = inner.nlist if isinstance(inner, faiss.IndexIVF) else 0
        if lists > count:
            raise ValueError(f"factory {factory!r}: {lists} lists for {count} vectors; use fewer, or Flat")
        wanted = max(POINTS_PER_CENTROID * lists, 256 * POINTS_PER_CENTROID)
        sample = rows
        if wanted < count:
            sample = np.sort(np.random.default_rng(seed).choice(rows, wanted, replace=False))
        try:
            index.train(np.ascontiguousarray(vectors[sample]))
        except RuntimeError as error:
            raise ValueError(
                f"factory {factory!r}: FAISS cannot train it on {len(sample)} vectors ({error}); use fewer lists"
            ) from None
    for start in range(0, count, 65536):
        index.add(np.ascontiguousarray(vectors[rows[start : start + 65536]]))
    return index


def nearest_exactly(queries: np.ndarray, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact search.

    Args:
        queries: (Q, D) float32 queries.
        vectors: (n, D) float32 vectors.
        k: number of neighbours.

    Returns:
        (Q, k) inner products and (Q, k) rows, nearest first.
    """
    return faiss.knn(queries, vectors, min(k, len(vectors)), metric=faiss.METRIC_INNER_PRODUCT)


def build_and_tune(vectors: np.ndarray, factory: str, recall: float, seed: int = 0) -> tuple[Any, np.ndarray, dict]:
    """Build an index, and choose the search setting by queries that are not in the index; the queries are added last.

    Most queries in use (texts, users, new items) are not vectors of the index. Queries from the index overestimate the
    recall of a graph: 0.99 instead of 0.98 for 100 thousand clustered vectors of 512 dimensions.

    Args:
        vectors: (n, D) float32 unit vectors.
        factory: FAISS factory string.
        recall: wanted share of the ten nearest vectors among the results.
        seed: seed of the samples.

    Returns:
        The index, the (n,) row in `vectors` of each row of the index, and the result of `tune`.

    Raises:
        ValueError: FAISS cannot build the index.
    """
    count = len(vectors)
    approximate = count >= 100 and bool(setting_of(_made(vectors.shape[1], factory)).most)
    query_rows = np.sort(np.random.default_rng(seed).permutation(count)[: min(TUNED_ON, count // 10) * approximate])
    if not len(query_rows):
        index = build(vectors, factory, seed)
        return index, np.arange(count), tune(index, vectors, recall, seed=seed)
    rest = np.setdiff1d(np.arange(count), query_rows)
    index = build(vectors, factory, seed, rest)
    measured = tune(index, vectors[rest], recall, seed=seed, queries=vectors[query_rows])
    index.add(np.ascontiguousarray(vectors[query_rows]))
    return index, np.concatenate([rest, query_rows]), measured | {"count": count}


def tune(
    index: Any,
    vectors: np.ndarray,
    recall: float,
    k: int = 10,
    seed: int = 0,
    queries: np.ndarray | None = None,
) -> dict[str, Any]:
    """Measure recall@k against exact search and the latency of single queries, and choose the smallest search setting
    that reaches the recall.

    The setting is doubled until the recall, less two standard errors, is reached, and a binary search then finds the
    smallest such setting. The setting is stored in the index, so every program that reads the index uses the setting.

    Args:
        index: a FAISS index of the vectors.
        vectors: (n, D) unit vectors in the order of the index.
        recall: wanted recall@k.
        k: number of neighbours.
        seed: seed of the sample of queries.
        queries: (Q, D) unit vectors that are not in the index. None: a sample of the vectors, where the query is left
            out of the results; the measured recall is then slightly too high for other queries.

    Returns:
        `{"k", "queries", "queries_outside", "asked", "reached", "recall", "setting", "curve": [...],
        "exact_latency_ms", "count"}`.
    """
    count = len(vectors)
    k = min(k, count - 1)
    setting = setting_of(index)
    if k < 1:
        return {"k": 0, "queries": 0, "asked": recall, "reached": True, "recall": 1.0, "curve": [], "count": count}
    outside = queries is not None
    rows = np.random.default_rng(seed).permutation(count)[:TUNED_ON]
    queries = np.ascontiguousarray(vectors[rows]) if queries is None else np.ascontiguousarray(queries)
    query_rows = np.full(len(queries), -1) if outside else rows
    truth = _others(nearest_exactly(queries, vectors, k + 1)[1], query_rows, k)
    # of equally near vectors any will do: what counts is how near the last of the k nearest is
    needed = np.einsum("qd,qd->q", vectors[truth[:, -1]], queries) - 1e-6
    exact_latency = _latency(lambda q: nearest_exactly(q, vectors, k), queries[:20])[0]
    curve: list[dict[str, Any]] = []

    def measure(value: int) -> float:
        chosen = parameters(index, value)
        start = time.perf_counter()
        result = _others(index.search(queries, k + 1, params=chosen)[1], query_rows, k)
        seconds = time.perf_counter() - start
        near = np.einsum("qkd,qd->qk", vectors[result], queries) >= needed[:, None]
        shares = (near & (result >= 0)).sum(1) / k
        share = float(shares.mean())
        middle, slow = _latency(lambda q: index.search(q, k, params=chosen), queries[:100])
        point = {"recall": share, "latency_ms": middle, "latency_ms_p99": slow, "queries_per_s": len(queries) / seconds}
        curve.append({setting.name: value, **point} if setting.most else point)
        return share - 2 * float(shares.std()) / len(shares) ** 0.5

    best, reached = 0, False
    if not setting.most:
        reached = measure(0) >= recall
    else:
        low, value = 0, min(16 if setting.name == "efSearch" else 1, setting.most)
        while not (reached := measure(value) >= recall) and value < setting.most:
            low, value = value, min(2 * value, setting.most)
        best = value
        while reached and best - low > max(1, best // 8):
            middle = (low + best) // 2
            low, best = (low, middle) if measure(middle) >= recall else (middle, best)
        if not reached:
            # the same recall for less
            shares = {p[setting.name]: p["recall"] for p in curve}
            best = min(v for v, share in shares.items() if share >= max(shares.values()) - 1e-3)
        _set(index, best)
    curve.sort(key=lambda p: p.get(setting.name, 0))
    now = next(p for p in curve if p.get(setting.name, 0) == best)
    return {
        "k": k,
        "queries": len(queries),
        "queries_outside": outside,
        "asked": recall,
        "reached": reached,
        "recall": now["recall"],
        "setting": {setting.name: best} if setting.most else {},
        "latency_ms": now["latency_ms"],
        "exact_latency_ms": exact_latency,
        "count": count,
        "curve": curve,
    }


def _set(index: Any, value: int) -> None:
    inner = inner_index(index)
    if isinstance(inner, faiss.IndexIVF):
        inner.nprobe = value
    else:
        inner.hnsw.efSearch = value


def _others(rows: np.ndarray, query_rows: np.ndarray, k: int) -> np.ndarray:
    """(Q, k) of (Q, k + 1) rows: without the row of the query, or without the last row where the query is missing."""
    is_query = rows == query_rows[:, None]
    is_query[~is_query.any(1), -1] = True
    return rows[~is_query].reshape(len(rows), k)


def _latency(search: Any, queries: np.ndarray) -> tuple[float, float]:
    """Milliseconds of single queries: median and 99th percentile."""
    times = []
    for number in range(len(queries)):
        start = time.perf_counter()
        search(queries[number : number + 1])
        times.append((time.perf_counter() - start) * 1000)
    return float(np.median(times)), float(np.percentile(times, 99))


def emptied(index: Any) -> Any:
    """A copy of a trained index without vectors."""
    copy = faiss.clone_index(index)
    copy.reset()
    return copy
