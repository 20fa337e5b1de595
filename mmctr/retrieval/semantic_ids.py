"""Semantic IDs: a few codes an item, from coarse to fine, by residual k-means over its vectors.

The first code is the nearest of K centres; the second the nearest of K centres of what the first leaves over, and so
on. Items alike share the first codes, so a ranker that reads prefixes of these IDs as categorical features knows
something of an item nobody has clicked (Singh et al., 2023, arXiv 2306.08121, where such codes do more for a ranker
than the dense vector does). Learned codebooks (RQ-VAE, as in TIGER, arXiv 2305.05065) need training and care against
codes that die; k-means has neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mmctr.data.arrow import pc
from mmctr.data.embeddings import EmbeddingTable
from mmctr.data.tables import rows_of
from mmctr.files import replace_file, write_json

FORMAT = 1
CHUNK = 16_384
SAMPLE_PER_CODE = 256
"""more points a centre do not move it, which is also what FAISS takes at most"""
NOTHING_LEFT = 1e-10
"""a mean square below this, of data with variance 1, is rounding"""


@dataclass(frozen=True)
class ItemVectors:
    """Tables side by side: the items of any of them, and where each has its vector."""

    ids: pa.Array
    """(N,) in the order of the tables"""
    tables: list[np.ndarray]
    """(n_t, D_t) float32 each"""
    rows: list[np.ndarray]
    """(N,) rows in each table, -1 where an item is not in it"""

    @classmethod
    def read(cls, paths: list[str]) -> ItemVectors:
        """Raises ValueError when a table cannot be read or ids are of two kinds."""
        tables = [EmbeddingTable.read(path) for path in paths]
        for path, table in zip(paths, tables, strict=True):
            if not len(table):
                raise ValueError(f"{path}: holds no vectors")
            rows_of(table.ids, tables[0].ids, f"{paths[0]} and {path}")  # speaks up about ids of two kinds
        ids = pa.concat_arrays([table.ids for table in tables]).unique()
        rows = [rows_of(ids, table.ids, path) for path, table in zip(paths, tables, strict=True)]
        return cls(ids, [table.vectors for table in tables], rows)

    @property
    def dims(self) -> list[int]:
        return [table.shape[1] for table in self.tables]

    def spread(self, paths: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The mean (D,) and for each table the root of its total variance (T,), float32.

        Raises ValueError for a table whose vectors are all alike.
        """
        means, scales = [], []
        for path, table in zip(paths, self.tables, strict=True):
            parts = [table[start : start + CHUNK].astype(np.float64) for start in range(0, len(table), CHUNK)]
            mean = sum(part.sum(0) for part in parts) / len(table)
            variance = sum(np.square(part - mean).sum() for part in parts) / len(table)
            if variance <= NOTHING_LEFT * np.square(mean).sum():
                raise ValueError(f"{path}: all vectors are alike; there is nothing to tell items apart by")
            means.append(mean)
            scales.append(np.sqrt(variance))
        return np.concatenate(means).astype(np.float32), np.array(scales, np.float32)

    def take(self, rows: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """(n, D) vectors of the given items, each table centred and brought to a total variance of 1, so that no table
        outweighs another; zeros, which is the mean, where an item is not in one."""
        result = np.zeros((len(rows), len(mean)), np.float32)
        begin = 0
        for table, at, size in zip(self.tables, self.rows, scale, strict=True):
            there = np.flatnonzero(at[rows] >= 0)
            block = slice(begin, begin + table.shape[1])
            result[there, block] = (table[at[rows[there]]] - mean[block]) / size
            begin += table.shape[1]
        return result


@dataclass(frozen=True)
class Codebooks:
    """What turns vectors into codes; kept, it gives items to come the codes they would have had.

    `mean` (D,), `scale` (T,) one a table, `dims` the D of each table, `levels` (K_l, D) centres each.
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
        """Residual k-means over the items, or over `sample` of them drawn with the seed.

        A level has fewer than `codes` centres where fewer different residuals are left.
        Raises ValueError when there are fewer items than codes.
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
        """(n, D) vectors as `ItemVectors.take` gives them -> (n, L) int32 codes, and the (L,) sums of squares that the
        codes up to each level leave unexplained. The codes of an item do not depend on the others of the batch."""
        codes, left = np.empty((len(x), len(self.levels)), np.int32), np.empty(len(self.levels))
        for level, centres in enumerate(self.levels):
            directed, length = _directed(x, self.normalize_residuals)
            codes[:, level] = nearest(directed, centres)
            x = (directed - centres[codes[:, level]]) * length
            left[level] = np.square(x, dtype=np.float64).sum()
        return codes, left

    def save(self, path: Path) -> None:
        arrays = {"mean": self.mean, "scale": self.scale, "dims": np.array(self.dims, np.int64)}
        arrays |= {f"level_{n}": np.ascontiguousarray(centres) for n, centres in enumerate(self.levels)}
        arrays["normalize_residuals"] = np.array([self.normalize_residuals])
        # one entry alone: several are written in any order, and the same seed is to give the same bytes
        replace_file(path, lambda temporary: save_file(arrays, temporary, {"format": f"mmctr codebooks {FORMAT}"}))

    @classmethod
    def load(cls, path: str | Path) -> Codebooks:
        """Raises ValueError naming the file when it is missing or something else."""
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such codebooks file; `mmctr semantic-ids` writes one beside its table")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a file of codebooks ({error})") from None
        if metadata.get("format") != f"mmctr codebooks {FORMAT}":
            raise ValueError(f"{path}: not a file of codebooks that `mmctr semantic-ids` writes")
        levels = [arrays[f"level_{n}"] for n in range(sum(name.startswith("level_") for name in arrays))]
        normalize = bool(arrays["normalize_residuals"][0])
        return cls(arrays["mean"], arrays["scale"], arrays["dims"].tolist(), levels, normalize)


def _directed(residual: np.ndarray, normalize: bool) -> tuple[np.ndarray, np.ndarray]:
    """Residuals as a level sees them, (n, D), and the (n, 1) length to multiply by afterwards.

    Normalised, what is left is coded by its direction alone, and the lengths are not part of the code. Else k-means of
    the later levels gives most centres to the few longest residuals and one to all others, where vectors have many
    dimensions.
    """
    if not normalize:
        return residual, np.ones((1, 1), np.float32)
    length = np.sqrt(np.square(residual, dtype=np.float64).sum(1, keepdims=True)).astype(np.float32)
    length[length**2 < NOTHING_LEFT] = np.inf  # the direction of nothing is nothing
    directed = residual / length
    return directed, np.where(np.isinf(length), np.float32(0), length)


def _kmeans(x: np.ndarray, codes: int, seed: int) -> np.ndarray:
    """(K, D) centres of (n, D) points, K = codes or the number of different points if that is less."""
    x = np.ascontiguousarray(x)
    start = _first_centres(x, codes, seed)
    kmeans = faiss.Kmeans(
        x.shape[1], len(start), niter=25, seed=seed, min_points_per_centroid=1, max_points_per_centroid=len(x)
    )
    kmeans.train(x, init_centroids=start)
    assert kmeans.centroids is not None
    return kmeans.centroids


def _first_centres(x: np.ndarray, codes: int, seed: int) -> np.ndarray:
    """Points drawn by k-means++ (Arthur and Vassilvitskii, 2007), each that equals an earlier one left out.

    `faiss.Kmeans` can draw these itself, but always as many as there are codes: where there are fewer different
    points, it moves the superfluous centres a little away from the points, and codes differ by nothing.
    """
    init = faiss.ClusteringInitialization(x.shape[1], codes)  # type: ignore[attr-defined]  # not in the stubs of faiss
    init.method, init.seed = faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS, seed
    start = np.empty((codes, x.shape[1]), np.float32)
    init.init_centroids(len(x), faiss.swig_ptr(x), faiss.swig_ptr(start))
    wide = start.astype(np.float64)
    lengths = np.square(wide).sum(1)
    same = max(1e-6 * np.square(x, dtype=np.float64).sum(1).mean(), NOTHING_LEFT)  # points that rounding alone parts
    equals_earlier = np.triu(lengths[:, None] - 2 * wide @ wide.T + lengths < same, 1).any(0)
    return start[~equals_earlier]


def nearest(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """(n,) the nearest of (K, D) centres to each of (n, D) points, the first of equally near ones.

    FAISS multiplies matrices, which rounds by what else is in the batch. Where the two nearest are close, the distances
    are taken again as plain sums, so that an item gets the same code alone and in a catalog.
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


def id_columns(codes: np.ndarray, name: str) -> dict[str, pa.Array]:
    """Columns of (N, L) codes: `NAME_0` ...; prefixes `NAME_prefix_1` ... as text such as "12-7"; and all prefixes of
    an item as one list, `NAME_prefixes`, a multi-valued feature whose values share one table."""
    num_items, num_levels = codes.shape
    columns: dict[str, pa.Array] = {f"{name}_{level}": pa.array(codes[:, level]) for level in range(num_levels)}
    texts = [pa.array(codes[:, level]).cast(pa.string()) for level in range(num_levels)]
    prefixes = [texts[0]]
    for text in texts[1:]:
        prefixes.append(pc.binary_join_element_wise(prefixes[-1], text, "-"))
    columns |= {f"{name}_prefix_{level}": prefix for level, prefix in enumerate(prefixes, 1)}
    by_item = np.arange(num_items * num_levels).reshape(num_levels, num_items).T.ravel()
    values = pa.concat_arrays(prefixes).take(pa.array(by_item))
    offsets = pa.array(np.arange(num_items + 1, dtype=np.int32) * num_levels)
    columns[f"{name}_prefixes"] = pa.ListArray.from_arrays(offsets, values)
    return columns


def usage(codes: np.ndarray, sizes: list[int]) -> list[dict[str, Any]]:
    """For each level how many codes are used and the perplexity, exp(entropy): K when all are used alike."""
    result = []
    for level, size in enumerate(sizes):
        share = np.bincount(codes[:, level], minlength=size) / len(codes)
        share = share[share > 0]
        result.append({"codes": size, "used": len(share), "perplexity": float(np.exp(-(share * np.log(share)).sum()))})
    return result


def collisions(codes: np.ndarray) -> dict[str, Any]:
    """How many items share all codes with another one."""
    group = np.zeros(len(codes), np.int64)
    for level in range(codes.shape[1]):  # numbered anew at each level: the product of all levels may not fit an integer
        _, group = np.unique(group * (int(codes.max()) + 1) + codes[:, level], return_inverse=True)
    sizes = np.bincount(group)
    alone = int((sizes == 1).sum())
    return {
        "distinct ids": len(sizes),
        "items with an id of their own": alone,
        "share with an id of their own": alone / len(codes),
        "items that share an id": len(codes) - alone,
        "largest number of items with one id": int(sizes.max()),
    }


def semantic_ids(
    paths: list[str],
    out: str | Path,
    *,
    levels: int | None = None,
    codes: int | None = None,
    seed: int | None = None,
    sample: int | None = None,
    normalize_residuals: bool = True,
    codebooks: str | None = None,
    name: str = "sid",
) -> dict[str, Any]:
    """Write `out` (Parquet: `item_id` and the columns of `id_columns`), a report beside it with the ending .json, and
    the codebooks with the ending .codebooks.safetensors; returns the report.

    Args:
        paths: embedding folders or files; several stand side by side, each with the same say.
        codebooks: file of codebooks to use instead of learning some.

    Raises ValueError for tables that cannot be read, too few items, and codebooks of other vectors.
    """
    out = Path(out)
    if out.suffix != ".parquet":
        raise ValueError(f"--out {out}: semantic IDs are written as Parquet; give a name that ends in .parquet")
    if not name.isidentifier():
        raise ValueError(f"--name {name!r}: columns are called after it; use letters, digits and underscores")
    items = ItemVectors.read(paths)
    if codebooks is not None:
        given = {"--levels": levels, "--codes": codes, "--seed": seed, "--sample": sample}
        extra = [flag for flag, value in given.items() if value is not None]
        if extra or not normalize_residuals:
            flag = (extra or ["--keep-lengths"])[0]
            raise ValueError(
                f"{flag} is of learning codebooks, --codebooks uses those of {codebooks}: give one of both"
            )
        books = Codebooks.load(codebooks)
        if books.dims != items.dims:
            raise ValueError(
                f"{codebooks}: made for vectors of {books.dims} dimensions, those of {', '.join(paths)} have "
                f"{items.dims}; give the same embeddings in the same order"
            )
    else:
        settings = (3 if levels is None else levels, 256 if codes is None else codes, 0 if seed is None else seed)
        books = Codebooks.fit(items, paths, *settings, normalize_residuals=normalize_residuals, sample=sample)

    parts, total, left = [], 0.0, np.zeros(len(books.levels))
    for start in range(0, len(items.ids), CHUNK):
        x = items.take(np.arange(start, min(start + CHUNK, len(items.ids))), books.mean, books.scale)
        assigned, unexplained = books.assign(x)
        parts.append(assigned)
        total, left = total + np.square(x, dtype=np.float64).sum(), left + unexplained
    all_codes = np.concatenate(parts)

    per_level = usage(all_codes, [len(centres) for centres in books.levels])
    for level, unexplained in zip(per_level, left, strict=True):
        level["unexplained"] = float(unexplained / total) if total else 0.0
    report = {
        "embeddings": paths,
        "items": len(items.ids),
        "codebooks": codebooks or _codebooks_path(out).name,
        "normalize_residuals": books.normalize_residuals,
        "codebook_shapes": [list(centres.shape) for centres in books.levels],
        "levels": per_level,
        "collisions": collisions(all_codes),
    }
    if codebooks is None:
        report["learned"] = {"levels": settings[0], "codes": settings[1], "seed": settings[2], "sample": sample}
        books.save(_codebooks_path(out))
    write_json(out.with_suffix(".json"), report)
    table = pa.table({"item_id": items.ids, **id_columns(all_codes, name)})
    replace_file(out, lambda path: pyarrow.parquet.write_table(table, path))
    return report


def _codebooks_path(out: Path) -> Path:
    return out.with_suffix(".codebooks.safetensors")


def summary(report: dict[str, Any]) -> str:
    """The report as lines to print."""
    lines = [f"{report['items']} items, codebooks {report['codebooks']}"]
    for number, level in enumerate(report["levels"]):
        lines.append(
            f"level {number}: {level['used']} of {level['codes']} codes used, perplexity {level['perplexity']:.1f}, "
            f"{level['unexplained']:.3f} of the variance left"
        )
    found = report["collisions"]
    lines.append(
        f"{found['distinct ids']} distinct ids; {found['items that share an id']} items share theirs, at most "
        f"{found['largest number of items with one id']} one id"
    )
    return "\n".join(lines)
