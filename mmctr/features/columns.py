"""Side features: declared in the config, with vocabularies learned on training rows only, and encoded once as columns.

Row 0 of every vocabulary means "unknown or missing". A value that occurs only on cold items, test users or test rows is
unknown too, since an embedding of that value would never have been trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor

from mmctr.config import Config
from mmctr.data.arrow import pc
from mmctr.data.batches import Features, Jagged, jagged_rows
from mmctr.data.tables import as_text, one_array, require_columns, rows_of


class CategoricalFeature(Config):
    """One value per row, such as a brand, a gender or a shop."""

    name: Literal["categorical"] = "categorical"
    dim: int = Field(default=8, ge=1)
    """embedding size"""
    min_count: int = Field(default=1, ge=1)
    """values on fewer training rows are unknown"""


class MultiValuedFeature(Config):
    """Several values per row, such as genres, tags, the words of a text or the prefixes of a semantic ID."""

    name: Literal["multi_valued"] = "multi_valued"
    separator: str = Field(default="|", min_length=1)
    """the string between two values of a text column, unused for list columns; " " splits a text into words"""
    dim: int = Field(default=8, ge=1)
    """embedding size"""
    min_count: int = Field(default=1, ge=1)
    """values on fewer training rows are unknown"""
    pooling: Literal["mean", "sum"] = "mean"
    """how the vectors of the known values of a row are combined; a row without known values gets zeros"""


class NumericFeature(Config):
    """A number, standardised on training rows, with a flag for a missing value; or cut into quantile buckets."""

    name: Literal["numeric"] = "numeric"
    log: bool = False
    """replace x by log(1 + x) first, for prices and counts"""
    buckets: int | None = Field(default=None, ge=2)
    """number of quantile buckets to embed instead of the number itself; null: the number itself"""
    dim: int = Field(default=8, ge=1)
    """embedding size of the buckets"""


FeatureConfig = Annotated[CategoricalFeature | MultiValuedFeature | NumericFeature, Field(discriminator="name")]


@dataclass(frozen=True)
class Vocabulary:
    """The statistics of one column over training rows: known values, or the mean and deviation of numbers."""

    values: list[Any]
    """categorical values, of which `values[i]` has row i + 1; for buckets, the edges between two buckets"""
    mean: float = 0.0
    """mean of a number"""
    std: float = 1.0
    """standard deviation of a number"""

    @property
    def num_rows(self) -> int:
        """Number of vocabulary rows, row 0 for unknown values included."""
        return len(self.values) + 1

    def to_json(self) -> dict[str, Any]:
        """The fields by name; `Vocabulary(**values)` restores the vocabulary."""
        return {"values": self.values, "mean": self.mean, "std": self.std}


@dataclass(frozen=True)
class FeatureColumns:
    """The encoded features of one table with n rows: items, users or interactions."""

    columns: dict[str, Any]
    """feature name -> Tensor (n, ...) or Jagged over n rows"""

    def take(self, rows: Tensor) -> Features:
        """The features of the (m,) rows `rows`, by name."""
        return {name: _take(column, rows) for name, column in self.columns.items()}


def _take(column: Tensor | Jagged, rows: Tensor) -> Tensor | Jagged:
    if isinstance(column, Jagged):
        index, offsets = jagged_rows(column.offsets[rows], column.offsets[rows + 1])
        return Jagged(values=column.values[index].long(), offsets=offsets)
    taken = column[rows]
    return taken if taken.is_floating_point() else taken.long()


@dataclass(frozen=True)
class BehaviorView:
    """B impressions with the side features of targets, behaviours and impressions, from which derived features
    (crosses, leaves of trees) are computed. Item features are looked up on demand."""

    items: FeatureColumns
    """item features over the catalog"""
    target_rows: Tensor
    """(B,) catalog rows of the targets"""
    history_rows: Tensor
    """(H,) catalog rows of the behaviours"""
    target_ids: Tensor
    """(B,) rows of the ID vocabulary after ID dropout"""
    history_ids: Tensor
    """(H,) rows of the ID vocabulary after ID dropout"""
    offsets: Tensor
    """(B + 1,) offsets of the impressions in the behaviours"""
    impression: Features
    """`user_id`, user and context features, (B, ...) each"""

    def target(self, name: str) -> Tensor | Jagged:
        """An item feature of the B targets.

        Args:
            name: name of the feature, or `item_id`.
        """
        return self.target_ids if name == "item_id" else _take(self.items.columns[name], self.target_rows)

    def history(self, name: str) -> Tensor | Jagged:
        """An item feature of the H behaviours.

        Args:
            name: name of the feature, or `item_id`.
        """
        return self.history_ids if name == "item_id" else _take(self.items.columns[name], self.history_rows)


def known_values(feature: Tensor | Jagged) -> Jagged:
    """The known values of n rows.

    Args:
        feature: (n,) vocabulary rows or a `Jagged` of several vocabulary rows per row, 0 for unknown.

    Returns:
        The vocabulary rows other than 0.
    """
    if isinstance(feature, Jagged):
        values, offsets = feature.values, feature.offsets
    else:
        values, offsets = feature, torch.arange(len(feature) + 1)
    known = values > 0
    before = torch.cat([known.new_zeros(1, dtype=torch.int64), known.cumsum(0)])
    return Jagged(values=values[known], offsets=before[offsets])


def pooled_by(feature: Jagged, offsets: Tensor) -> Jagged:
    """The values of all behaviours of an impression as one list.

    Args:
        feature: lists of values over H behaviours.
        offsets: (B + 1,) offsets of the impressions in the behaviours.

    Returns:
        Lists of values over B impressions.
    """
    return Jagged(values=feature.values, offsets=feature.offsets[offsets])


def learn_vocabulary(config: FeatureConfig, column: pa.ChunkedArray, rows: np.ndarray) -> Vocabulary:
    """Learn the vocabulary of one column.

    Args:
        config: the declared feature.
        column: the whole column.
        rows: (n,) training rows; a row that repeats counts several times.

    Raises:
        ValueError: the type of the column does not fit the declared feature.
    """
    if isinstance(config, NumericFeature):
        numbers = _numbers(config, column)[rows]
        numbers = numbers[np.isfinite(numbers)]
        if not len(numbers):
            return Vocabulary([])
        if config.buckets:
            edges, repeats = np.unique(
                np.quantile(numbers, np.linspace(0, 1, config.buckets + 1)[1:-1]), return_counts=True
            )
            # a value that fills whole buckets (the zeros of a count) is separated from the larger values too
            heavy = edges[((repeats > 1) | (edges == numbers.min())) & (edges < numbers.max())]
            above = [numbers[numbers > value].min() for value in heavy]
            edges = np.unique([*edges[edges > numbers.min()], *above])
            return Vocabulary([float(edge) for edge in edges])
        mean, std = float(numbers.mean()), float(numbers.std())
        # equal numbers have a deviation of rounding errors; dividing by it would blow up any other number
        return Vocabulary([], mean, std if std > 1e-13 * abs(mean) else 1.0)
    taken = (
        as_text(column).take(pa.array(rows)) if isinstance(config, CategoricalFeature) else column.take(pa.array(rows))
    )
    flat = taken if isinstance(config, CategoricalFeature) else _lists(config, taken)[0]
    counts = pc.value_counts(flat.drop_null() if isinstance(flat, pa.Array) else pa.chunked_array(flat).drop_null())
    pairs = [(pair["values"], pair["counts"]) for pair in counts.to_pylist()]
    return Vocabulary(sorted(value for value, count in pairs if count >= config.min_count))


def encode_column(config: FeatureConfig, vocabulary: Vocabulary, column: pa.ChunkedArray) -> Tensor | Jagged:
    """Encode a whole column of n rows as batches hold the feature.

    Args:
        config: the declared feature.
        vocabulary: the vocabulary learned for the feature.
        column: the whole column.

    Returns:
        (n,) int32 vocabulary rows, a `Jagged` of int32 vocabulary rows, or (n, 2) float32 [standardised value, is
        missing].

    Raises:
        ValueError: the type of the column does not fit the declared feature.
    """
    if isinstance(config, NumericFeature):
        numbers = _numbers(config, column)
        missing = ~np.isfinite(numbers)
        if config.buckets:
            bucket = np.searchsorted(np.asarray(vocabulary.values), numbers, side="right") + 1
            return torch.from_numpy(np.where(missing, 0, bucket).astype(np.int32))
        scaled = np.where(missing, 0, (np.where(missing, 0, numbers) - vocabulary.mean) / vocabulary.std)
        # a million deviations away says no more than a billion; without a bound it may be infinite as float32
        return torch.from_numpy(np.stack([scaled.clip(-1e6, 1e6), missing], 1).astype(np.float32))
    known = pa.array(vocabulary.values, type=pa.string())
    if isinstance(config, CategoricalFeature):
        text = as_text(column)
        return torch.from_numpy((rows_of(one_array(text), known, "feature") + 1).astype(np.int32))
    flat, offsets = _lists(config, column)
    rows = rows_of(flat, known, "feature") + 1
    # unknown values are left out of the pool rather than averaged in
    is_known = rows > 0
    known_before = np.concatenate([[0], np.cumsum(is_known)])
    return Jagged(torch.from_numpy(rows[is_known].astype(np.int32)), torch.from_numpy(known_before[offsets]))


def table_rows(config: FeatureConfig, vocabulary: Vocabulary) -> int | None:
    """Number of rows of the embedding table of a feature.

    Args:
        config: the declared feature.
        vocabulary: the vocabulary learned for the feature.

    Returns:
        None for a number without buckets, which has no embedding table.
    """
    if isinstance(config, NumericFeature) and not config.buckets:
        return None
    return vocabulary.num_rows + (1 if isinstance(config, NumericFeature) else 0)


def learn_vocabularies(
    configs: dict[str, FeatureConfig], table: pa.Table, rows: np.ndarray, where: str
) -> dict[str, Vocabulary]:
    """Learn the vocabularies of all declared columns of a table.

    Args:
        configs: column name -> declared feature.
        table: the whole table.
        rows: (n,) training rows of the table.
        where: name of the table, for error messages.

    Raises:
        ValueError: the table lacks a column, or the type of a column does not fit the declared feature.
    """
    require_columns(table, list(configs), where)
    return {n: _named(where, n, learn_vocabulary, c, table.column(n), rows) for n, c in configs.items()}


def encode_table(
    configs: dict[str, FeatureConfig], vocabularies: dict[str, Vocabulary], table: pa.Table, where: str
) -> FeatureColumns:
    """Encode all declared columns of a table.

    Args:
        configs: column name -> declared feature.
        vocabularies: column name -> vocabulary learned for the feature.
        table: the whole table.
        where: name of the table, for error messages.

    Raises:
        ValueError: the table lacks a column, or the type of a column does not fit the declared feature.
    """
    require_columns(table, list(configs), where)
    return FeatureColumns(
        {n: _named(where, n, encode_column, c, vocabularies[n], table.column(n)) for n, c in configs.items()}
    )


def _named(where: str, name: str, function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except ValueError as error:
        raise ValueError(f"{where}: column {name!r}: {error}") from None


def _numbers(config: NumericFeature, column: pa.ChunkedArray) -> np.ndarray:
    try:
        numbers = column.cast(pa.float64()).to_numpy()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise ValueError(
            f"a numeric feature is declared on a column of type {column.type}; declare it categorical"
        ) from None
    numbers = np.where(np.abs(numbers) < 1e150, numbers, np.nan)  # largest floats mark gaps; their squares overflow
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.log1p(numbers) if config.log else numbers


def _lists(config: MultiValuedFeature, column: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
    """Flat string values and (n + 1,) offsets of a list column, or of a text column cut at the separator."""
    array = one_array(column)
    if pa.types.is_fixed_size_list(array.type):
        array = array.cast(pa.list_(array.type.value_type))
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        lists = array
        if pa.types.is_nested(array.type.value_type):
            raise ValueError(f"a multi-valued feature is declared on a column of type {array.type}; flatten its lists")
    else:
        text = one_array(as_text(pa.chunked_array([array])))
        if config.separator == " ":
            # words: letters with combining marks (Hindi, Thai) and digits, lower case, so that "Love," equals "love"
            text = pc.replace_substring_regex(pc.utf8_lower(text), r"[^\pL\pM\pN]+", " ")
        lists = pc.split_pattern(text, config.separator)
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    flat = pc.utf8_trim_whitespace(pc.list_flatten(lists).cast(pa.string()))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return pc.if_else(pc.equal(pc.utf8_length(flat), 0), None, flat), offsets
