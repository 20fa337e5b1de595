"""Names of latent dimensions: chosen on the naming half of the items, verified on the verification half.

A dimension has two ends, so a name has two parts: "dark ↔ bright". Candidates are values of a catalog column, words of
the item texts, and prompts that the encoder compares with pictures. The candidate that explains most of a dimension's
variance becomes the name, and the name is verified where it separates items of the verification half.
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
"""a value or a word takes part in names when at least so many items have it"""
MAX_WORDS = 2000
"""most frequent words of the texts that take part in names"""
MAX_NAMES_PER_END = 3
"""values or words of one end of a name"""
VERIFIED_AUC = 0.6
"""a name is verified when the lower end of the AUC's interval is above this value"""

Source = Literal["column", "word", "prompt"]


@dataclass(frozen=True)
class Attribute:
    """A catalog column with few values, which may name dimensions and which scores are computed against."""

    name: str
    codes: np.ndarray
    """(n,) position of each item's value in `values`, -1 for an item without a value"""
    values: list[str]


@dataclass(frozen=True)
class Name:
    """The meaning of the two ends of a latent dimension, with the score on the verification items."""

    low: list[str]
    """values, words or prompt of the low end"""
    high: list[str]
    """values, words or prompt of the high end"""
    source: Source
    column: str | None
    """catalog column that the values are of, None for words and prompts"""
    auc: float
    """probability that a verification item of the high end has a greater latent than one of the low end"""
    interval: tuple[float, float]
    """95 % interval of the AUC"""
    num_items: tuple[int, int]
    """numbers of verification items of the low end and of the high end"""

    @property
    def verified(self) -> bool:
        """Whether the AUC is above `VERIFIED_AUC` beyond doubt."""
        return self.interval[0] > VERIFIED_AUC

    @property
    def text(self) -> str:
        """The name for the reader: "column: low, lower ↔ high, higher"."""
        ends = " ↔ ".join(", ".join(end) for end in (self.low, self.high))
        return f"{self.column}: {ends}" if self.column else ends

    def to_json(self) -> dict[str, Any]:
        """All fields with "text" and "verified"."""
        return {**vars(self), "text": self.text, "verified": self.verified}


def read_attributes(table: pa.Table, columns: Sequence[str] | None = None) -> tuple[list[Attribute], dict[str, str]]:
    """(attributes of an items table, {column that cannot be an attribute: reason}).

    Columns of numbers with many values are cut into fifths. Values of fewer than `MIN_ITEMS` items count as missing.

    Args:
        columns: names of columns; None for all but identifier and picture.

    Raises:
        ValueError: a name in `columns` is no column of the table, or a column that cannot be an attribute.
    """
    attributes, refused = [], {}
    for name in columns if columns is not None else [c for c in table.column_names if c not in ("item_id", "image")]:
        if name not in table.column_names:
            raise ValueError(f"items table: column {name!r} is missing; it has {', '.join(table.column_names)}")
        column = table.column(name)
        is_numeric = pt.is_integer(column.type) or pt.is_floating(column.type)
        codes, values = _quintiles(column) if is_numeric else (None, [])
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
            position_of = np.full(len(values) + 1, -1)
            position_of[common] = np.arange(len(common))
            attributes.append(Attribute(name, position_of[codes], [values[c] for c in common]))
    if columns is not None and refused:
        name, reason = next(iter(refused.items()))
        raise ValueError(f"items table: column {name!r} cannot name anything: {reason}; leave it out of --columns")
    return attributes, refused


def _quintiles(column: pa.ChunkedArray) -> tuple[np.ndarray | None, list[str]]:
    """(codes, values) of the fifths of a column of numbers; codes are None for a column of 20 values or fewer."""
    values = one_array(column).to_numpy(zero_copy_only=False).astype(np.float64)
    finite = np.isfinite(values)
    if len(np.unique(values[finite])) <= 20:
        return None, []
    cuts = np.unique(np.quantile(values[finite], [0.2, 0.4, 0.6, 0.8]))
    codes = np.where(finite, np.searchsorted(cuts, np.where(finite, values, 0.0), side="right"), -1)
    edges = [f"{cut:g}" for cut in cuts]
    middle = [f"{a} to {b}" for a, b in itertools.pairwise(edges)]
    return codes.astype(np.int64), [f"below {edges[0]}", *middle, f"{edges[-1]} and more"]


def frequent_words(texts: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """(which of n texts has which word, (n, W) bool; the W words): frequent words that are not in nearly all texts."""
    words_of_texts = [set(re.findall(r"[^\W\d_][\w-]+", text.lower())) for text in texts]
    counts = Counter(word for words in words_of_texts for word in words)
    usable = [(word, n) for word, n in counts.items() if MIN_ITEMS <= n <= 0.9 * len(texts)]
    words = [word for word, _ in sorted(usable, key=lambda pair: (-pair[1], pair[0]))[:MAX_WORDS]]
    position_of = {word: position for position, word in enumerate(words)}
    has_word = np.zeros((len(texts), len(words)), bool)
    for row, text_words in enumerate(words_of_texts):
        has_word[row, [position_of[word] for word in text_words if word in position_of]] = True
    return has_word, words


@dataclass(frozen=True)
class _Candidate:
    """A possible name of a dimension: the n items of both ends, and the explained variance on the naming items."""

    low: list[str]
    high: list[str]
    source: Source
    column: str | None
    is_low: np.ndarray
    """(n,) bool"""
    is_high: np.ndarray
    """(n,) bool"""
    explained: float
    """fraction of the variance of the dimension that the candidate explains"""


def name_dimensions(
    mu: np.ndarray,
    attributes: Sequence[Attribute] = (),
    texts: Sequence[str] | None = None,
    prompts: tuple[np.ndarray, list[str]] | None = None,
    seed: int = 0,
) -> list[Name | None]:
    """The best name of each of Z dimensions, verified or not; None for one that does not vary or has no candidate.

    Args:
        mu: (n, Z) latents.
        attributes: columns of the n items.
        texts: texts of the n items, whose words may be names.
        prompts: similarities (n, P) of each picture to each of P prompts, and the prompts.
        seed: chooses the naming half of the items.
    """
    naming = np.zeros(len(mu), bool)
    naming[np.random.default_rng(seed).permutation(len(mu))[: len(mu) // 2]] = True
    words = frequent_words(texts) if texts is not None else None
    names: list[Name | None] = []
    for latent, active in zip(mu.T, active_dimensions(mu), strict=True):
        candidates = []
        if active:
            candidates += [_attribute_candidate(latent, attribute, naming) for attribute in attributes]
            if words is not None:
                candidates.append(_word_candidate(latent, *words, naming))
            if prompts is not None:
                candidates.append(_prompt_candidate(latent, *prompts, naming))
        usable = [c for c in candidates if c is not None]
        best = max(usable, key=lambda c: c.explained, default=None)
        names.append(None if best is None else _verify(latent, best, ~naming))
    return names


def _attribute_candidate(latent: np.ndarray, attribute: Attribute, naming: np.ndarray) -> _Candidate | None:
    """The candidate of a column: values whose items have a mean above the mean of all items are the high end.

    The explained variance is that between values, adjusted for the number of values (adjusted R squared).
    """
    rows = naming & (attribute.codes >= 0)
    codes, z = attribute.codes[rows], latent[rows]
    counts = np.bincount(codes, minlength=len(attribute.values))
    usable = np.flatnonzero(counts >= MIN_ITEMS // 4)
    if len(usable) < 2 or not z.var():
        return None
    means = np.bincount(codes, z, len(attribute.values)) / np.maximum(counts, 1)
    centre = float((means[usable] * counts[usable]).sum() / counts[usable].sum())
    between = float((counts[usable] * (means[usable] - centre) ** 2).sum() / counts[usable].sum() / z.var())
    num_rows, num_values = int(counts[usable].sum()), len(usable)
    explained = 1 - (1 - between) * (num_rows - 1) / max(num_rows - num_values, 1)
    # first the values that explain most: far from the mean, and of many items
    ordered = usable[np.argsort(-counts[usable] * (means[usable] - centre) ** 2)]
    low = [v for v in ordered if means[v] < centre]
    high = [v for v in ordered if means[v] >= centre]
    if not low or not high:
        return None
    names = [[attribute.values[v] for v in end[:MAX_NAMES_PER_END]] for end in (low, high)]
    ends = (np.isin(attribute.codes, low), np.isin(attribute.codes, high))
    return _Candidate(names[0], names[1], "column", attribute.name, *ends, explained)


def _word_candidate(
    latent: np.ndarray, has_word: np.ndarray, words: list[str], naming: np.ndarray
) -> _Candidate | None:
    """The candidate of words: those most correlated with either end, as many as explain more together."""
    z = latent[naming] - latent[naming].mean()
    indicators = has_word[naming].astype(np.float64)
    counts = indicators.sum(0)
    usable = (counts >= MIN_ITEMS // 4) & (counts <= len(z) - MIN_ITEMS // 4)
    if not usable.any() or not z.var():
        return None
    centred = indicators - indicators.mean(0)
    r = (z @ centred) / np.sqrt((centred**2).sum(0).clip(min=1e-12) * (z**2).sum())
    r[~usable] = 0
    low, high = (_select_words(z * sign, has_word[naming], sign * r) for sign in (-1, 1))
    if not low or not high:
        return None
    some_low, some_high = np.any(has_word[:, low], axis=1), np.any(has_word[:, high], axis=1)
    is_low, is_high = np.asarray(some_low & ~some_high), np.asarray(some_high & ~some_low)
    explained = _explained(z, is_high[naming].astype(float) - is_low[naming])
    return _Candidate(
        [words[w] for w in low[:MAX_NAMES_PER_END]],
        [words[w] for w in high[:MAX_NAMES_PER_END]],
        "word",
        None,
        is_low,
        is_high,
        explained,
    )


def _select_words(z: np.ndarray, has_word: np.ndarray, r: np.ndarray) -> list[int]:
    """Words of one end, by correlation r: a word is added where items with any chosen word then explain more."""
    best, chosen, items = 0.0, [], np.zeros(len(z), bool)
    for word in np.argsort(-r)[:12]:
        if r[word] <= 0:
            break
        more = items | has_word[:, word]
        explained = _explained(z, more.astype(float))
        if explained > best:
            best, items = explained, more
            chosen.append(int(word))
    return chosen


def _prompt_candidate(
    latent: np.ndarray, similarity: np.ndarray, prompts: list[str], naming: np.ndarray
) -> _Candidate | None:
    """The candidate of prompts: the two whose similarities to pictures correlate most, negatively and positively."""
    z = latent[naming]
    if not z.var() or len(prompts) < 2:
        return None
    scaled = (similarity - similarity[naming].mean(0)) / similarity[naming].std(0).clip(min=1e-12)
    r = (z - z.mean()) @ scaled[naming] / len(z) / z.std()
    low, high = int(np.argmin(r)), int(np.argmax(r))
    difference = scaled[:, high] - scaled[:, low]
    cuts = np.quantile(difference[naming], [0.25, 0.75])
    explained = _explained(z - z.mean(), difference[naming])
    ends = difference <= cuts[0], difference >= cuts[1]
    return _Candidate([prompts[low]], [prompts[high]], "prompt", None, *ends, explained)


def _explained(z: np.ndarray, x: np.ndarray) -> float:
    """The fraction of the variance of a centred z (n,) that x (n,) explains linearly."""
    x = x - x.mean()
    return float((z @ x) ** 2 / max((z @ z) * (x @ x), 1e-12))


def _verify(latent: np.ndarray, candidate: _Candidate, verification: np.ndarray) -> Name:
    """The name of a candidate with its AUC on the verification items, (n,) bool."""
    low, high = candidate.is_low & verification, candidate.is_high & verification
    value, interval = auc_with_interval(latent[low], latent[high])
    counts = int(low.sum()), int(high.sum())
    return Name(candidate.low, candidate.high, candidate.source, candidate.column, value, interval, counts)


def auc_with_interval(low: np.ndarray, high: np.ndarray) -> tuple[float, tuple[float, float]]:
    """The probability that a value of `high` is above one of `low`, with a 95 % interval (Hanley & McNeil 1982)."""
    if len(low) < 2 or len(high) < 2:
        return 0.5, (0.0, 1.0)
    labels = np.concatenate([np.zeros(len(low)), np.ones(len(high))])
    a = float(auc(labels, np.concatenate([low, high])))
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    variance = (a * (1 - a) + (len(high) - 1) * (q1 - a * a) + (len(low) - 1) * (q2 - a * a)) / len(low) / len(high)
    width = 1.96 * float(np.sqrt(max(variance, 0.0)))
    return a, (max(a - width, 0.0), min(a + width, 1.0))
