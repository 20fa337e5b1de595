"""Which FAISS index fits a catalog, and how well it finds what exact search finds: measured, then set as wanted.

Sizes and rules are those of a CPU; everything can be overruled by a FAISS factory string.
"""
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false
# FAISS's stubs know nothing of its Python layer.

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

HNSW_LINKS = 32
MOST_HNSW = 200_000
"""vectors up to which a graph is built by choice: building one takes several times as long as inverted lists"""
SCAN_RATE = 8e9
"""bytes a second that one thread compares exactly; what exact search would take is reckoned from it"""
POINTS_PER_CENTROID = 64
"""trained on; FAISS asks for 39 at least"""
TUNED_ON = 1000
RANKED_AGAIN = 4
"""times k that are compared exactly where an index ranks again (RFlat)"""
MOST_EF = 2048


@dataclass(frozen=True)
class Wanted:
    """What an index should do.

    Raises ValueError for values that cannot be had.
    """

    recall: float = 0.99
    """share of the ten nearest that must be among those found"""
    latency_ms: float = 2.0
    """of one query: exact search is kept while it takes no longer"""
    memory: int | None = None
    """bytes of the index"""
    factory: str | None = None
    """FAISS factory string, chosen when None"""

    def __post_init__(self) -> None:
        if not 0 < self.recall <= 1:
            raise ValueError(f"recall {self.recall}: a share above 0 and at most 1")
        if self.latency_ms <= 0:
            raise ValueError(f"latency of {self.latency_ms} ms: must be above 0")
        if self.memory is not None and self.memory <= 0:
            raise ValueError(f"memory of {self.memory} bytes: must be above 0")


def num_lists(count: int) -> int:
    """Inverted lists for `count` vectors: the power of two nearest 4 sqrt(n), as in autofaiss, that FAISS can train."""
    wanted = 2 ** round(math.log2(4 * math.sqrt(count)))
    return max(1, min(wanted, 2 ** int(math.log2(max(count / 39, 1)))))


def choose_factory(count: int, dim: int, wanted: Wanted) -> str:
    """The factory string of the quickest index to build that keeps the latency and the memory.

    Raises ValueError when not even codes of `dim / 8` bytes fit into the memory.
    """
    if wanted.factory is not None:
        return wanted.factory
    room = math.inf if wanted.memory is None else wanted.memory / max(count, 1)  # bytes a vector
    flat, links = 4 * dim, 8 * HNSW_LINKS + 16
    if flat <= room and flat * count / SCAN_RATE * 1000 <= wanted.latency_ms:
        return "Flat"
    lists = num_lists(count)
    if count <= MOST_HNSW and flat + links <= room:
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
    """Bytes a vector that product quantisation may take, most first: divisors of the dimensions."""
    return [m for m in range(dim // 2, 0, -1) if dim % m == 0 and m >= dim / 8] or [1]


@dataclass
class SearchSetting:
    """The one number that trades recall for time."""

    name: str
    """`nprobe`, `efSearch`, or `none` for exact search"""
    value: int
    most: int


def setting_of(index: Any) -> SearchSetting:
    inner = inner_index(index)
    if isinstance(inner, faiss.IndexIVF):
        return SearchSetting("nprobe", inner.nprobe, inner.nlist)
    if isinstance(inner, faiss.IndexHNSW):
        return SearchSetting("efSearch", inner.hnsw.efSearch, MOST_EF)
    return SearchSetting("none", 0, 0)


def inner_index(index: Any) -> Any:
    """What is searched, below transformations of vectors and re-ranking."""
    index = faiss.downcast_index(index)
    while isinstance(index, faiss.IndexPreTransform | faiss.IndexRefine):
        index = faiss.downcast_index(index.index if isinstance(index, faiss.IndexPreTransform) else index.base_index)
    return index


def is_wrapped(index: Any) -> bool:
    """Whether vectors are transformed before, or ranked again after, the search of `inner_index`."""
    return isinstance(faiss.downcast_index(index), faiss.IndexPreTransform | faiss.IndexRefine)


def parameters(index: Any, value: int, selector: Any = None) -> Any:
    """Search parameters of FAISS for one call: nothing that other threads see is set."""
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
    """A trained and filled inner-product index over (n, D) float32 unit vectors.

    Args:
        rows: (m,) of the vectors to train on and hold, all when None.

    Raises ValueError for a factory string that FAISS does not understand or cannot train on so few vectors.
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
    """(Q, k) inner products and rows, best first, by comparing with all of (n, D)."""
    return faiss.knn(queries, vectors, min(k, len(vectors)), metric=faiss.METRIC_INNER_PRODUCT)


def build_and_tune(vectors: np.ndarray, factory: str, recall: float, seed: int = 0) -> tuple[Any, np.ndarray, dict]:
    """Build an index and set it, measured with vectors that it had never seen, which are added last.

    What is searched for is seldom in the index: queries of words, of users, of new items. Searching for its own vectors
    flatters a graph (0.99 instead of 0.98 in 100 thousand clustered vectors of 512 dimensions).

    Returns:
        The index, the (n,) row of `vectors` that each of its rows is, and what `tune` found.
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
    """Measure recall@k against exact search and the latency of single queries, and set what reaches the recall.

    Settings are doubled until the recall, less two standard errors, is reached, and the smallest that does is then
    sought by halves, so the curve is of few points. The setting is left in the index, and so in the file, for anyone's
    FAISS.

    Args:
        vectors: (n, D) unit vectors, row by row those in the index.
        queries: (Q, D) unit vectors that are not in it. When None some of its own are, each left out of its answer,
            which finds a little more than other queries will.

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
    own = np.full(len(queries), -1) if outside else rows
    truth = _others(nearest_exactly(queries, vectors, k + 1)[1], own, k)
    exact_latency = _latency(lambda q: nearest_exactly(q, vectors, k), queries[:20])[0]
    curve: list[dict[str, Any]] = []

    def measure(value: int) -> float:
        chosen = parameters(index, value)
        start = time.perf_counter()
        found = _others(index.search(queries, k + 1, params=chosen)[1], own, k)
        seconds = time.perf_counter() - start
        shares = np.array([len(np.intersect1d(a, b)) / k for a, b in zip(found, truth, strict=True)])
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


def _others(found: np.ndarray, own: np.ndarray, k: int) -> np.ndarray:
    """(Q, k) of (Q, k + 1) rows: without the query itself, or without the last where it is not among them."""
    is_own = found == own[:, None]
    is_own[~is_own.any(1), -1] = True
    return found[~is_own].reshape(len(found), k)


def _latency(search: Any, queries: np.ndarray) -> tuple[float, float]:
    """Milliseconds of single queries: median and 99th percentile."""
    times = []
    for number in range(len(queries)):
        start = time.perf_counter()
        search(queries[number : number + 1])
        times.append((time.perf_counter() - start) * 1000)
    return float(np.median(times)), float(np.percentile(times, 99))


def emptied(index: Any) -> Any:
    """A copy without vectors, with all that was trained."""
    copy = faiss.clone_index(index)
    copy.reset()
    return copy
