"""Names of latent dimensions: found on half of the items, verified on the other half, and shown with their score.

A dimension has two ends, so a name has two: "dark ↔ bright". Candidates are values of the catalog's columns, words of
its texts, and prompts that the encoder compares with pictures; the one that tells most of a dimension is its name, if
held-out items agree.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from mmctr.concepts.disentanglement import active_dimensions
from mmctr.data.tables import one_array, value_codes
from mmctr.evaluation.metrics import auc

MIN_ITEMS = 20
"""items that must have a value, or a word, for it to be part of a name"""
MAX_WORDS = 2000
"""commonest words of the texts that are looked at"""
SHOWN = 3
"""values or words named at each end, at most"""
VERIFIED = 0.6
"""a name holds when the lower end of its interval is above this AUC"""

Source = Literal["column", "word", "prompt"]


@dataclass(frozen=True)
class Attribute:
    """A column whose values may name a dimension, or be what scores are measured by."""

    name: str
    codes: np.ndarray
    """(n,) number of each item's value, -1 for none"""
    values: list[str]


@dataclass(frozen=True)
class Name:
    """What an end of a dimension means, and how sure that is."""

    low: list[str]
    high: list[str]
    source: Source
    column: str | None
    """of the catalog, where the name is of its values"""
    auc: float
    """the chance, on held-out items, that an item of the high end has a greater latent than one of the low end"""
    interval: tuple[float, float]
    """95 % of it"""
    num_items: tuple[int, int]
    """held-out items of the low end and of the high one"""

    @property
    def verified(self) -> bool:
        return self.interval[0] > VERIFIED

    @property
    def text(self) -> str:
        ends = " ↔ ".join(", ".join(end) for end in (self.low, self.high))
        return f"{self.column}: {ends}" if self.column else ends

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "text": self.text, "verified": self.verified}


def attributes_of(table: pa.Table, columns: Sequence[str] | None = None) -> tuple[list[Attribute], dict[str, str]]:
    """Columns as attributes, and of those that cannot be the reason.

    Numbers of many values are cut into fifths. Values of fewer than 20 items count as none.

    Args:
        columns: which; None: all but ids, pictures and texts.

    Raises:
        ValueError: a column that is not there, or that was asked for and cannot be used.
    """
    found, refused = [], {}
    for name in columns if columns is not None else [c for c in table.column_names if c not in ("item_id", "image")]:
        if name not in table.column_names:
            raise ValueError(f"items table: column {name!r} is missing; it has {', '.join(table.column_names)}")
        column = table.column(name)
        numbers = pt.is_integer(column.type) or pt.is_floating(column.type)
        codes, values = _numbers(column) if numbers else (None, [])
        if codes is None:
            codes, values = value_codes(table, name, "items table")
        counts = np.bincount(codes[codes >= 0], minlength=len(values))
        common = np.flatnonzero(counts >= MIN_ITEMS)
        kept = counts[common].sum()
        if len(common) < 2:
            refused[name] = "the same for all items" if len(common) else f"no value has {MIN_ITEMS} items"
        elif columns is None and kept < 0.5 * (codes >= 0).sum():
            refused[name] = f"{len(values)} values, half of the items with ones of fewer than {MIN_ITEMS} items"
        else:
            place = np.full(len(values) + 1, -1)
            place[common] = np.arange(len(common))
            found.append(Attribute(name, place[codes], [values[c] for c in common]))
    if columns is not None and refused:
        name, reason = next(iter(refused.items()))
        raise ValueError(f"items table: column {name!r} cannot name anything: {reason}; leave it out of --columns")
    return found, refused


def _numbers(column: pa.ChunkedArray) -> tuple[np.ndarray | None, list[str]]:
    """Fifths of a column of numbers, None when it has few values, which are then taken as they are."""
    values = one_array(column).to_numpy(zero_copy_only=False).astype(np.float64)
    there = np.isfinite(values)
    if len(np.unique(values[there])) <= 20:
        return None, []
    cuts = np.unique(np.quantile(values[there], [0.2, 0.4, 0.6, 0.8]))
    codes = np.where(there, np.searchsorted(cuts, np.where(there, values, 0.0), side="right"), -1)
    edges = [f"{cut:g}" for cut in cuts]
    middle = [f"{a} to {b}" for a, b in itertools.pairwise(edges)]
    return codes.astype(np.int64), [f"below {edges[0]}", *middle, f"{edges[-1]} and more"]


def words_of(texts: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """The commonest words of texts that are in neither too few nor nearly all of them: (n, W) bool and the words."""
    split = [set(re.findall(r"[^\W\d_][\w-]+", text.lower())) for text in texts]
    counts = Counter(word for words in split for word in words)
    usable = [(word, n) for word, n in counts.items() if MIN_ITEMS <= n <= 0.9 * len(texts)]
    words = [word for word, _ in sorted(usable, key=lambda pair: (-pair[1], pair[0]))[:MAX_WORDS]]
    place = {word: number for number, word in enumerate(words)}
    has = np.zeros((len(texts), len(words)), bool)
    for row, found in enumerate(split):
        has[row, [place[word] for word in found if word in place]] = True
    return has, words


@dataclass(frozen=True)
class _Candidate:
    """Items of the low and of the high end of a dimension, (n,) bool each, and what it tells of it on naming items."""

    low: list[str]
    high: list[str]
    source: Source
    column: str | None
    is_low: np.ndarray
    is_high: np.ndarray
    explained: float


def name_dimensions(
    mu: np.ndarray,
    attributes: Sequence[Attribute] = (),
    texts: Sequence[str] | None = None,
    prompts: tuple[np.ndarray, list[str]] | None = None,
    seed: int = 0,
) -> list[Name | None]:
    """The best name of each of Z dimensions, verified or not; None for one that does not vary or has no candidate.

    Args:
        mu: (n, Z).
        texts: of the n items, for words.
        prompts: (n, P) how much each picture looks like each of P prompts, and the prompts.
        seed: which half of the items names are found on.
    """
    naming = np.zeros(len(mu), bool)
    naming[np.random.default_rng(seed).permutation(len(mu))[: len(mu) // 2]] = True
    words = words_of(texts) if texts is not None else None
    names: list[Name | None] = []
    for latent, active in zip(mu.T, active_dimensions(mu), strict=True):
        candidates = []
        if active:
            candidates += [_of_attribute(latent, attribute, naming) for attribute in attributes]
            if words is not None:
                candidates.append(_of_words(latent, *words, naming))
            if prompts is not None:
                candidates.append(_of_prompts(latent, *prompts, naming))
        usable = [c for c in candidates if c is not None]
        best = max(usable, key=lambda c: c.explained, default=None)
        names.append(None if best is None else _verified(latent, best, ~naming))
    return names


def _of_attribute(latent: np.ndarray, attribute: Attribute, naming: np.ndarray) -> _Candidate | None:
    """Values whose items lie above the mean of all are the high end. What they explain is the variance between values,
    less what as many random groups would."""
    rows = naming & (attribute.codes >= 0)
    codes, z = attribute.codes[rows], latent[rows]
    counts = np.bincount(codes, minlength=len(attribute.values))
    there = np.flatnonzero(counts >= MIN_ITEMS // 4)
    if len(there) < 2 or not z.var():
        return None
    means = np.bincount(codes, z, len(attribute.values)) / np.maximum(counts, 1)
    centre = float((means[there] * counts[there]).sum() / counts[there].sum())
    between = float((counts[there] * (means[there] - centre) ** 2).sum() / counts[there].sum() / z.var())
    num_rows, num_values = int(counts[there].sum()), len(there)
    explained = 1 - (1 - between) * (num_rows - 1) / max(num_rows - num_values, 1)
    # those that say most of the dimension first: far out, and of many items
    ordered = there[np.argsort(-counts[there] * (means[there] - centre) ** 2)]
    low = [v for v in ordered if means[v] < centre]
    high = [v for v in ordered if means[v] >= centre]
    if not low or not high:
        return None
    names = [[attribute.values[v] for v in end[:SHOWN]] for end in (low, high)]
    ends = (np.isin(attribute.codes, low), np.isin(attribute.codes, high))
    return _Candidate(names[0], names[1], "column", attribute.name, *ends, explained)


def _of_words(latent: np.ndarray, has: np.ndarray, words: list[str], naming: np.ndarray) -> _Candidate | None:
    """The words that go with either end: each end's are added while they tell more together than without."""
    z = latent[naming] - latent[naming].mean()
    shown = has[naming].astype(np.float64)
    counts = shown.sum(0)
    usable = (counts >= MIN_ITEMS // 4) & (counts <= len(z) - MIN_ITEMS // 4)
    if not usable.any() or not z.var():
        return None
    centred = shown - shown.mean(0)
    r = (z @ centred) / np.sqrt((centred**2).sum(0).clip(min=1e-12) * (z**2).sum())
    r[~usable] = 0
    low, high = (_grown(z * sign, has[naming], sign * r) for sign in (-1, 1))
    if not low or not high:
        return None
    some_low, some_high = np.any(has[:, low], axis=1), np.any(has[:, high], axis=1)
    is_low, is_high = np.asarray(some_low & ~some_high), np.asarray(some_high & ~some_low)
    explained = _explained(z, is_high[naming].astype(float) - is_low[naming])
    return _Candidate(
        [words[w] for w in low[:SHOWN]], [words[w] for w in high[:SHOWN]], "word", None, is_low, is_high, explained
    )


def _grown(z: np.ndarray, has: np.ndarray, r: np.ndarray) -> list[int]:
    """Words of one end, the best first: the next best is added while items with any of them explain more."""
    best, chosen, items = 0.0, [], np.zeros(len(z), bool)
    for word in np.argsort(-r)[:12]:
        if r[word] <= 0:
            break
        more = items | has[:, word]
        explained = _explained(z, more.astype(float))
        if explained > best:
            best, items = explained, more
            chosen.append(int(word))
    return chosen


def _of_prompts(latent: np.ndarray, alike: np.ndarray, prompts: list[str], naming: np.ndarray) -> _Candidate | None:
    """The two prompts whose difference, as the encoder sees pictures, goes most with the latent."""
    z = latent[naming]
    if not z.var() or len(prompts) < 2:
        return None
    scaled = (alike - alike[naming].mean(0)) / alike[naming].std(0).clip(min=1e-12)
    r = (z - z.mean()) @ scaled[naming] / len(z) / z.std()
    low, high = int(np.argmin(r)), int(np.argmax(r))
    difference = scaled[:, high] - scaled[:, low]
    cuts = np.quantile(difference[naming], [0.25, 0.75])
    explained = _explained(z - z.mean(), difference[naming])
    ends = difference <= cuts[0], difference >= cuts[1]
    return _Candidate([prompts[low]], [prompts[high]], "prompt", None, *ends, explained)


def _explained(z: np.ndarray, x: np.ndarray) -> float:
    """The fraction of the variance of a centred z that x explains linearly."""
    x = x - x.mean()
    return float((z @ x) ** 2 / max((z @ z) * (x @ x), 1e-12))


def _verified(latent: np.ndarray, candidate: _Candidate, held_out: np.ndarray) -> Name:
    low, high = candidate.is_low & held_out, candidate.is_high & held_out
    value, interval = auc_of(latent[low], latent[high])
    counts = int(low.sum()), int(high.sum())
    return Name(candidate.low, candidate.high, candidate.source, candidate.column, value, interval, counts)


def auc_of(low: np.ndarray, high: np.ndarray) -> tuple[float, tuple[float, float]]:
    """The chance that one of `high` is greater than one of `low`, and a 95 % interval (Hanley & McNeil 1982)."""
    if len(low) < 2 or len(high) < 2:
        return 0.5, (0.0, 1.0)
    labels = np.concatenate([np.zeros(len(low)), np.ones(len(high))])
    a = float(auc(labels, np.concatenate([low, high])))
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    variance = (a * (1 - a) + (len(high) - 1) * (q1 - a * a) + (len(low) - 1) * (q2 - a * a)) / len(low) / len(high)
    width = 1.96 * float(np.sqrt(max(variance, 0.0)))
    return a, (max(a - width, 0.0), min(a + width, 1.0))
