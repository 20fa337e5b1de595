"""Semantic IDs: a few codes for each item, from coarse to fine, by residual k-means over item vectors.

The first code is the number of the nearest of K centres; the second code that of the nearest of K centres of the
residuals of the first level, and so on. Similar items share the first codes, so a ranker that reads prefixes of the IDs
as categorical features can generalise to cold items (Singh et al. 2023, arXiv 2306.08121, where such codes are better
ranking features than the dense vectors). Learned codebooks (RQ-VAE, as in TIGER, arXiv 2305.05065) need training and
measures against unused codes; k-means needs neither.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from mmctr.data.arrow import pc
from mmctr.files import replace_file, write_json
from mmctr.retrieval.codebooks import CHUNK, Codebooks, ItemVectors


def id_columns(codes: np.ndarray, name: str) -> dict[str, pa.Array]:
    """The columns of a table of semantic IDs.

    Args:
        codes: (N, L).
        name: prefix of the names of the columns.

    Returns:
        `NAME_0` ... with the codes of each level; `NAME_prefix_1` ... with prefixes as text such as "12-7"; and
        `NAME_prefixes` with the list of all prefixes of an item, a multi-valued feature with one embedding table.
    """
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
    """The number of used codes and the perplexity of each level.

    Args:
        codes: (N, L).
        sizes: number of codes of each level.

    Returns:
        For each level {"codes", "used", "perplexity"}; the perplexity, exp(entropy), is the number of codes when all
        codes are used equally often.
    """
    result = []
    for level, size in enumerate(sizes):
        share = np.bincount(codes[:, level], minlength=size) / len(codes)
        share = share[share > 0]
        result.append({"codes": size, "used": len(share), "perplexity": float(np.exp(-(share * np.log(share)).sum()))})
    return result


def collisions(codes: np.ndarray) -> dict[str, Any]:
    """The numbers of items with unique and with shared semantic IDs, for codes (N, L)."""
    group = np.zeros(len(codes), np.int64)
    for level in range(codes.shape[1]):  # renumbered at each level, because the product over all levels can overflow
        _, group = np.unique(group * (int(codes.max()) + 1) + codes[:, level], return_inverse=True)
    sizes = np.bincount(group)
    unique = int((sizes == 1).sum())
    return {
        "distinct ids": len(sizes),
        "items with an id of their own": unique,
        "share with an id of their own": unique / len(codes),
        "items that share an id": len(codes) - unique,
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
    """Write semantic IDs as a Parquet table, a report (.json) and the codebooks (.codebooks.safetensors).

    Args:
        paths: embedding folders or files; vectors of several are concatenated, with equal weight.
        out: the Parquet file, with `item_id` and the columns of `id_columns`; the other two files have the same stem.
        levels: number of codes of an item; None: 3.
        codes: number of different codes of a level; None: 256.
        seed: seed of the sample and of k-means; None: 0.
        sample: largest number of items to learn codebooks from; None: 256 per code.
        normalize_residuals: whether the residuals of each level are scaled to unit length.
        codebooks: file of codebooks to use; None: learn codebooks.
        name: prefix of the names of the columns.

    Returns:
        The report.

    Raises:
        ValueError: a table cannot be read, there are too few items, or the codebooks are for other vectors.
    """
    out = Path(out)
    if out.suffix != ".parquet":
        raise ValueError(f"--out {out}: semantic IDs are written as Parquet; give a name that ends in .parquet")
    if not name.isidentifier():
        raise ValueError(f"--name {name!r}: the prefix of column names; use letters, digits and underscores")
    items = ItemVectors.read(paths)
    if codebooks is not None:
        given = {"--levels": levels, "--codes": codes, "--seed": seed, "--sample": sample}
        extra = [flag for flag, value in given.items() if value is not None]
        if extra or not normalize_residuals:
            flag = (extra or ["--keep-lengths"])[0]
            raise ValueError(
                f"{flag} is for learning codebooks, but --codebooks {codebooks} is given: give one of the two"
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

    parts, total, residuals = [], 0.0, np.zeros(len(books.levels))
    for start in range(0, len(items.ids), CHUNK):
        x = items.take(np.arange(start, min(start + CHUNK, len(items.ids))), books.mean, books.scale)
        assigned, unexplained = books.assign(x)
        parts.append(assigned)
        total, residuals = total + np.square(x, dtype=np.float64).sum(), residuals + unexplained
    all_codes = np.concatenate(parts)

    per_level = usage(all_codes, [len(centres) for centres in books.levels])
    for level, unexplained in zip(per_level, residuals, strict=True):
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
    """The file of codebooks of a table of semantic IDs."""
    return out.with_suffix(".codebooks.safetensors")


def summary(report: dict[str, Any]) -> str:
    """The report of `semantic_ids` as lines to print."""
    lines = [f"{report['items']} items, codebooks {report['codebooks']}"]
    for number, level in enumerate(report["levels"]):
        lines.append(
            f"level {number}: {level['used']} of {level['codes']} codes used, perplexity {level['perplexity']:.1f}, "
            f"{level['unexplained']:.3f} of the variance left"
        )
    counts = report["collisions"]
    lines.append(
        f"{counts['distinct ids']} distinct ids; {counts['items that share an id']} items share an id, at most "
        f"{counts['largest number of items with one id']} items one id"
    )
    return "\n".join(lines)
