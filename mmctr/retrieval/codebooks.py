"""Codebooks of semantic IDs: residual k-means over item vectors, and the codes of items."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mmctr.data.embeddings import EmbeddingTable
from mmctr.data.tables import rows_of
from mmctr.files import replace_file

FORMAT = 1
"""version of the files of codebooks"""
CHUNK = 16_384
"""items that are encoded at once"""
SAMPLE_PER_CODE = 256
"""default number of sampled items per code; more items hardly move a centre, and FAISS by default uses no more"""
ROUNDING = 1e-10
"""a mean square below this value, of data with variance 1, is rounding error"""


@dataclass(frozen=True)
class ItemVectors:
    """The items of several tables of vectors, whose concatenation is the vector of an item."""

    ids: pa.Array
    """(N,) item ids of all tables, without repetition"""
    tables: list[np.ndarray]
    """the vectors of each table, (n_t, D_t) float32"""
    rows: list[np.ndarray]
    """for each table the (N,) row of each item, -1 for an item that the table lacks"""

    @classmethod
    def read(cls, paths: list[str]) -> ItemVectors:
        """Read tables of vectors.

        Args:
            paths: embedding folders or files.

        Raises:
            ValueError: a table cannot be read or is empty, or the ids of the tables have different types.
        """
        tables = [EmbeddingTable.read(path) for path in paths]
        for path, table in zip(paths, tables, strict=True):
            if not len(table):
                raise ValueError(f"{path}: holds no vectors")
            rows_of(table.ids, tables[0].ids, f"{paths[0]} and {path}")  # raises for ids of different types
        ids = pa.concat_arrays([table.ids for table in tables]).unique()
        rows = [rows_of(ids, table.ids, path) for path, table in zip(paths, tables, strict=True)]
        return cls(ids, [table.vectors for table in tables], rows)

    @property
    def dims(self) -> list[int]:
        """The size of the vectors of each table."""
        return [table.shape[1] for table in self.tables]

    def spread(self, paths: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The mean of the vectors, and the root of the total variance of each table.

        Args:
            paths: names of the T tables for errors.

        Returns:
            (D,) and (T,) float32.

        Raises:
            ValueError: all vectors of a table are equal.
        """
        means, scales = [], []
        for path, table in zip(paths, self.tables, strict=True):
            parts = [table[start : start + CHUNK].astype(np.float64) for start in range(0, len(table), CHUNK)]
            mean = sum(part.sum(0) for part in parts) / len(table)
            variance = sum(np.square(part - mean).sum() for part in parts) / len(table)
            if variance <= ROUNDING * np.square(mean).sum():
                raise ValueError(f"{path}: all vectors are alike, so no code can tell items apart")
            means.append(mean)
            scales.append(np.sqrt(variance))
        return np.concatenate(means).astype(np.float32), np.array(scales, np.float32)

    def take(self, rows: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """The vectors of items, with each table centred and scaled to a total variance of 1.

        Args:
            rows: (n,) positions in `ids`.
            mean: (D,) of `spread`.
            scale: (T,) of `spread`.

        Returns:
            (n, D) float32; zeros, the mean, in the columns of a table that lacks an item.
        """
        result = np.zeros((len(rows), len(mean)), np.float32)
        begin = 0
        for table, table_rows, size in zip(self.tables, self.rows, scale, strict=True):
            present = np.flatnonzero(table_rows[rows] >= 0)
            block = slice(begin, begin + table.shape[1])
            result[present, block] = (table[table_rows[rows[present]]] - mean[block]) / size
            begin += table.shape[1]
        return result


@dataclass(frozen=True)
class Codebooks:
    """The centres of all levels, which turn vectors into codes; saved codebooks give codes to later items.

    Args:
        mean: (D,) mean of the vectors.
        scale: (T,) root of the total variance of each table.
        dims: size of the vectors of each table.
        levels: centres (K_l, D) of each level.
        normalize_residuals: whether the residuals of each level are scaled to unit length.
    """

    mean: np.ndarray
    scale: np.ndarray
    dims: list[int]
    levels: list[np.ndarray]
    normalize_residuals: bool = True

    @classmethod
    def fit(
        cls,
        items: ItemVectors,
        paths: list[str],
        levels: int,
        codes: int,
        seed: int,
        *,
        normalize_residuals: bool = True,
        sample: int | None = None,
    ) -> Codebooks:
        """Learn codebooks by residual k-means.

        A level has fewer than `codes` centres where there are fewer different residuals.

        Args:
            items: vectors of items.
            paths: names of the tables for errors.
            levels: number of levels.
            codes: number of codes of a level.
            seed: seed of the sample and of k-means.
            normalize_residuals: whether the residuals of each level are scaled to unit length.
            sample: largest number of items to learn from; None: 256 per code.

        Raises:
            ValueError: fewer items than codes, or a number that is too small.
        """
        limit = SAMPLE_PER_CODE * codes if sample is None else sample
        for name, value, least in (("levels", levels, 1), ("codes", codes, 2), ("sample", limit, codes)):
            if value < least:
                raise ValueError(f"--{name} {value}: at least {least} is needed")
        if len(items.ids) < codes:
            raise ValueError(
                f"{', '.join(paths)}: {len(items.ids)} items are too few for {codes} codes a level; lower --codes"
            )
        rng = np.random.default_rng(seed)
        rows = np.arange(len(items.ids))
        if len(rows) > limit:
            rows = np.sort(rng.choice(len(rows), limit, replace=False))
        mean, scale = items.spread(paths)
        residual, centres = items.take(rows, mean, scale), []
        for level in range(levels):
            directed, length = _directed(residual, normalize_residuals)
            centres.append(_kmeans(directed, codes, seed + level))
            residual = (directed - centres[-1][nearest(directed, centres[-1])]) * length
        return cls(mean, scale, items.dims, centres, normalize_residuals)

    def assign(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The codes of vectors; the codes of an item do not depend on the other items.

        Args:
            x: (n, D) vectors of `ItemVectors.take`.

        Returns:
            (n, L) int32 codes, and the (L,) sums of squares of the residuals after each level.
        """
        codes, unexplained = np.empty((len(x), len(self.levels)), np.int32), np.empty(len(self.levels))
        for level, centres in enumerate(self.levels):
            directed, length = _directed(x, self.normalize_residuals)
            codes[:, level] = nearest(directed, centres)
            x = (directed - centres[codes[:, level]]) * length
            unexplained[level] = np.square(x, dtype=np.float64).sum()
        return codes, unexplained

    def save(self, path: Path) -> None:
        """Write the codebooks as a safetensors file."""
        arrays = {"mean": self.mean, "scale": self.scale, "dims": np.array(self.dims, np.int64)}
        arrays |= {f"level_{n}": np.ascontiguousarray(centres) for n, centres in enumerate(self.levels)}
        arrays["normalize_residuals"] = np.array([self.normalize_residuals])
        # one metadata entry only: several are written in random order, and equal codebooks should give equal bytes
        replace_file(path, lambda temporary: save_file(arrays, temporary, {"format": f"mmctr codebooks {FORMAT}"}))

    @classmethod
    def load(cls, path: str | Path) -> Codebooks:
        """Read codebooks from a file written by `save`.

        Raises:
            ValueError: the file is missing or holds no codebooks.
        """
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such codebooks file; `mmctr semantic-ids` writes one with each table")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a file of codebooks ({error})") from None
        if metadata.get("format") != f"mmctr codebooks {FORMAT}":
            raise ValueError(f"{path}: not a file of codebooks that `mmctr semantic-ids` writes")
        try:
            levels = [arrays[f"level_{n}"] for n in range(sum(name.startswith("level_") for name in arrays))]
            normalize = bool(arrays["normalize_residuals"][0])
            mean, scale, dims = arrays["mean"], arrays["scale"], arrays["dims"].tolist()
        except (KeyError, IndexError) as error:
            raise ValueError(f"{path}: a file of codebooks without {error}; run `mmctr semantic-ids` again") from None
        width = len(mean) if mean.ndim == 1 else -1
        shapes = [centres.shape[1:] for centres in levels]
        if not levels or scale.shape != (len(dims),) or sum(dims) != width or shapes != [(width,)] * len(levels):
            raise ValueError(f"{path}: the codebooks do not fit each other; run `mmctr semantic-ids` again")
        return cls(mean, scale, dims, levels, normalize)


def _directed(residual: np.ndarray, normalize: bool) -> tuple[np.ndarray, np.ndarray]:
    """Residuals (n, D) for the k-means of a level, and the (n, 1) lengths to multiply the results by.

    With normalisation a level encodes the direction of the residual, and the codes do not contain the length. Without
    normalisation, in many dimensions, k-means of the later levels gives most centres to the few longest residuals and
    one centre to all others.
    """
    if not normalize:
        return residual, np.ones((1, 1), np.float32)
    length = np.sqrt(np.square(residual, dtype=np.float64).sum(1, keepdims=True)).astype(np.float32)
    length[length**2 < ROUNDING] = np.inf  # the direction of a zero residual is zero
    directed = residual / length
    return directed, np.where(np.isinf(length), np.float32(0), length)


def _kmeans(x: np.ndarray, codes: int, seed: int) -> np.ndarray:
    """Centres (K, D) of points x (n, D), where K is `codes`, or the number of different points if that is smaller."""
    x = np.ascontiguousarray(x)
    start = _first_centres(x, codes, seed)
    kmeans = faiss.Kmeans(
        x.shape[1], len(start), niter=25, seed=seed, min_points_per_centroid=1, max_points_per_centroid=len(x)
    )
    kmeans.train(x, init_centroids=start)
    assert kmeans.centroids is not None
    return kmeans.centroids


def _first_centres(x: np.ndarray, codes: int, seed: int) -> np.ndarray:
    """Initial centres (K, D) by k-means++ (Arthur and Vassilvitskii 2007), without duplicates.

    `faiss.Kmeans` draws exactly as many initial centres as there are codes: with fewer different points, FAISS moves
    the superfluous centres slightly, and different codes would mean nothing.
    """
    library: Any = faiss  # the stubs of faiss lack the initialisation of centres
    init = library.ClusteringInitialization(x.shape[1], codes)
    init.method, init.seed = library.ClusteringInitMethod_KMEANS_PLUS_PLUS, seed
    start = np.empty((codes, x.shape[1]), np.float32)
    init.init_centroids(len(x), faiss.swig_ptr(x), faiss.swig_ptr(start))
    wide = start.astype(np.float64)
    lengths = np.square(wide).sum(1)
    same = max(1e-6 * np.square(x, dtype=np.float64).sum(1).mean(), ROUNDING)  # below: equal points up to rounding
    equals_earlier = np.triu(lengths[:, None] - 2 * wide @ wide.T + lengths < same, 1).any(0)
    return start[~equals_earlier]


def nearest(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The nearest centre of each point.

    The matrix products of FAISS round differently for different batches. Where the two nearest centres are almost
    equally near, the distances are computed again as plain sums, so that the code of an item does not depend on the
    batch.

    Args:
        x: (n, D) points.
        centres: (K, D).

    Returns:
        (n,) numbers of centres; of equally near centres the first.
    """
    count = min(4, len(centres))
    distance, index = faiss.knn(np.ascontiguousarray(x), np.ascontiguousarray(centres), count)
    result = index[:, 0].copy()
    if count > 1:
        scale = np.square(x, dtype=np.float64).sum(1) + np.square(centres, dtype=np.float64).sum(1).max()
        close = np.flatnonzero(distance[:, 1] - distance[:, 0] <= 1e-4 * scale)
        for start in range(0, len(close), 1024):
            rows = close[start : start + 1024]
            candidates = np.sort(index[rows], axis=1)
            exact = np.square(x[rows, None].astype(np.float64) - centres[candidates]).sum(2)
            result[rows] = candidates[np.arange(len(rows)), exact.argmin(1)]
    return result
