from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from mmctr.data.batches import Jagged
from mmctr.features.columns import (
    CategoricalFeature,
    FeatureColumns,
    FeatureConfig,
    MultiValuedFeature,
    NumericFeature,
    Vocabulary,
    encode_column,
    encode_table,
    learn_vocabularies,
    learn_vocabulary,
    table_rows,
)


def column(values, type=None) -> pa.ChunkedArray:
    """As a table read from a file has it, in chunks."""
    array = pa.array(values, type)
    return pa.chunked_array([array[:2], array[2:]], type=array.type)


def learned(config: FeatureConfig, values, rows) -> tuple[Vocabulary, Tensor | Jagged]:
    vocabulary = learn_vocabulary(config, column(values), np.array(rows))
    return vocabulary, encode_column(config, vocabulary, column(values))


def lists(jagged: Tensor | Jagged) -> list[list[int]]:
    assert isinstance(jagged, Jagged)
    bounds = jagged.offsets.tolist()
    return [jagged.values[a:b].tolist() for a, b in pairwise(bounds)]


# Categorical --------------------------------------------------------------------------------------


def test_categorical_values_come_from_training_rows_only():
    values = ["red", "blue", None, "red", "only in test", "", "猫 "]
    vocabulary, encoded = learned(CategoricalFeature(), values, [0, 1, 2, 3, 5, 6])
    assert vocabulary.values == ["blue", "red", "猫"] and table_rows(CategoricalFeature(), vocabulary) == 4
    assert isinstance(encoded, Tensor) and encoded.tolist() == [2, 1, 0, 2, 0, 0, 3]


def test_categorical_min_count_counts_repeated_rows():
    values = ["a", "b", "b", "c"]
    config = CategoricalFeature(min_count=2)
    assert learned(config, values, [0, 1, 2, 3])[0].values == ["b"]
    vocabulary, encoded = learned(config, values, [0, 0, 1, 3])
    assert vocabulary.values == ["a"] and encoded.tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("values", "known", "rows"),
    [
        ([3, 1, None, 3], ["1", "3"], [2, 1, 0, 2]),
        ([3.0, 1.5, np.nan, 3.0], ["1.5", "3"], [2, 1, 0, 2]),
        ([True, False, None, True], ["false", "true"], [2, 1, 0, 2]),
        (pa.array(["b", "a", None, "b"]).dictionary_encode(), ["a", "b"], [2, 1, 0, 2]),
        ([None, None, None, None], [], [0, 0, 0, 0]),
    ],
)
def test_categorical_of_other_types(values, known, rows):
    vocabulary, encoded = learned(CategoricalFeature(), values, [0, 1, 2, 3])
    assert vocabulary.values == known and encoded.tolist() == rows


def test_a_vocabulary_meets_another_type_of_column():
    """Integers in the training data, the same written as text in another dataset."""
    vocabulary, _ = learned(CategoricalFeature(), [3, 1, 2**40], [0, 1, 2])
    assert encode_column(CategoricalFeature(), vocabulary, column(["1", str(2**40), "x"])).tolist() == [1, 2, 0]


# Multi-valued -------------------------------------------------------------------------------------


def test_multi_valued_text():
    values = ["Drama|Comedy", None, "Comedy| War ||", "", "Drama|Only in test", "Only in test"]
    vocabulary, encoded = learned(MultiValuedFeature(), values, [0, 1, 2, 3])
    assert vocabulary.values == ["Comedy", "Drama", "War"]
    assert lists(encoded) == [[2, 1], [], [1, 3], [], [2], []]  # unknown values leave the pool


@pytest.mark.parametrize("type", [pa.list_(pa.string()), pa.large_list(pa.string())])
def test_multi_valued_lists(type):
    values = pa.array([["b", "a"], None, ["a", None, "zz"], [], ["b|a"]], type)
    vocabulary, encoded = learned(MultiValuedFeature(), values, [0, 1, 3])
    assert vocabulary.values == ["a", "b"] and lists(encoded) == [[2, 1], [], [1], [], []]


def test_multi_valued_lists_of_numbers_and_of_fixed_size():
    vocabulary, encoded = learned(MultiValuedFeature(), [[10, 9], [9], None], [0, 1, 2])
    assert vocabulary.values == ["10", "9"] and lists(encoded) == [[1, 2], [2], []]
    fixed = pa.array([["a", "b"], None, ["b", "c"]], pa.list_(pa.string(), 2))
    vocabulary, encoded = learned(MultiValuedFeature(), fixed, [0, 1, 2])
    assert vocabulary.values == ["a", "b", "c"] and lists(encoded) == [[1, 2], [], [2, 3]]


def test_words():
    values = ["Love, love & War!", "WAR", None, "हिन्दी भाषा 猫", "Größe"]
    vocabulary, encoded = learned(MultiValuedFeature(separator=" "), values, [0, 1, 2, 3])
    assert vocabulary.values == sorted(["love", "war", "हिन्दी", "भाषा", "猫"])
    row = {word: i + 1 for i, word in enumerate(vocabulary.values)}
    words = [["love", "love", "war"], ["war"], [], ["हिन्दी", "भाषा", "猫"], []]
    assert lists(encoded) == [[row[word] for word in text] for text in words]


def test_multi_valued_min_count():
    assert learned(MultiValuedFeature(min_count=2), ["a|b", "b|c", "b"], [0, 1])[0].values == ["b"]


def test_nested_lists_are_an_error():
    with pytest.raises(ValueError, match=r"column 'x': a multi-valued feature is declared on .*; flatten its lists"):
        learn_vocabularies({"x": MultiValuedFeature()}, pa.table({"x": [[["a"]]]}), np.array([0]), "items table")


# Numeric ------------------------------------------------------------------------------------------


def test_numbers_are_standardised_on_training_rows_with_a_flag_for_gaps():
    values = [1.0, 3.0, None, 100.0, np.nan, np.inf, 5.0]
    config = NumericFeature()
    vocabulary, encoded = learned(config, values, [0, 1, 2, 4, 5, 6])
    assert vocabulary.mean == 3.0 and vocabulary.std == pytest.approx((8 / 3) ** 0.5)
    assert table_rows(config, vocabulary) is None
    expected = [[(v - 3) / (8 / 3) ** 0.5, 0] if v is not None and np.isfinite(v) else [0, 1] for v in values]
    assert isinstance(encoded, Tensor) and encoded.dtype == torch.float32
    torch.testing.assert_close(encoded, torch.tensor(expected, dtype=torch.float32))


def test_logarithms():
    values = [0, 9, 99, -1, -5, None]
    vocabulary, encoded = learned(NumericFeature(log=True), values, [0, 1, 2, 3, 4, 5])
    logs = np.log([1, 10, 100])
    assert vocabulary.mean == pytest.approx(logs.mean()) and vocabulary.std == pytest.approx(logs.std())
    assert isinstance(encoded, Tensor) and encoded[:, 1].tolist() == [0, 0, 0, 1, 1, 1]
    np.testing.assert_allclose(encoded[:3, 0], (logs - logs.mean()) / logs.std(), rtol=1e-6)


@pytest.mark.parametrize("value", [0.1, 1e9 + 0.3, 0.0])
def test_equal_numbers_do_not_blow_up_others(value):
    values = [value] * 77 + [value + 1]
    _, encoded = learned(NumericFeature(), values, range(77))
    assert isinstance(encoded, Tensor)
    np.testing.assert_allclose(encoded[:, 0], [0] * 77 + [1], atol=1e-6)


def test_numbers_too_large_to_reckon_with():
    _, encoded = learned(NumericFeature(), [1.0, 3.0, 1.7976931348623157e308, -1.7e308, 1e40, -1e100], [0, 1, 2, 3])
    assert encoded.tolist() == [[-1, 0], [1, 0], [0, 1], [0, 1], [1e6, 0], [-1e6, 0]]


def test_no_numbers_in_training():
    for config in (NumericFeature(), NumericFeature(buckets=4)):
        _, encoded = learned(config, [None, np.nan, 7.0], [0, 1])
        assert encoded.tolist() == ([[0, 1], [0, 1], [7, 0]] if config.buckets is None else [0, 0, 1])


def test_buckets_hold_equal_shares_of_training_rows():
    rng = np.random.default_rng(0)
    values = [*np.exp(rng.normal(size=1000)).tolist(), None, -1e9, 1e9]
    config = NumericFeature(buckets=5)
    vocabulary, encoded = learned(config, values, range(1000))
    assert isinstance(encoded, Tensor) and len(vocabulary.values) == 4 and table_rows(config, vocabulary) == 6
    assert np.bincount(encoded[:1000]).tolist() == [0] + [200] * 5
    assert encoded[1000:].tolist() == [0, 1, 5]
    by_hand = [0 if v is None else 1 + sum(v >= edge for edge in vocabulary.values) for v in values]
    assert encoded.tolist() == by_hand


@pytest.mark.parametrize(
    ("values", "buckets", "expected"),
    [
        ([0] * 80 + list(range(1, 21)), 4, [1] * 80 + [2] * 20),  # most are zero: the others are no zeros
        ([9] * 80 + list(range(8)), 4, [2] * 80 + [1] * 8),
        ([5] * 80 + [1] * 10 + [7] * 10, 4, [2] * 80 + [1] * 10 + [3] * 10),
        ([0] * 60 + [1] * 40, 2, [1] * 60 + [2] * 40),
        ([1, 2, 3, 4], 2, [1, 1, 2, 2]),
        ([3, 3, 3], 4, [1, 1, 1]),
        ([1, 1, 1, 2, 2, 2, 3, 3, 3], 3, [1, 1, 1, 2, 2, 2, 3, 3, 3]),
    ],
)
def test_buckets_of_values_that_repeat(values, buckets, expected):
    config = NumericFeature(buckets=buckets)
    vocabulary, encoded = learned(config, values, range(len(values)))
    assert isinstance(encoded, Tensor) and encoded.tolist() == expected
    assert max(expected) < (table_rows(config, vocabulary) or 0) <= buckets + 1


def test_numbers_written_as_text_and_words():
    _, encoded = learned(NumericFeature(), ["1", "3", None], [0, 1])
    assert encoded.tolist() == [[-1, 0], [1, 0], [0, 1]]
    with pytest.raises(ValueError, match=r"items table: column 'size': .*type string; declare it categorical"):
        learn_vocabularies({"size": NumericFeature()}, pa.table({"size": ["1", "XL"]}), np.array([0]), "items table")


# Tables -------------------------------------------------------------------------------------------


def test_take_equals_taking_one_by_one():
    rng = np.random.default_rng(0)
    table = pa.table(
        {
            "brand": [None if i % 11 == 0 else f"b{i % 7}" for i in range(100)],
            "tags": [[f"t{t}" for t in rng.integers(0, 9, i % 4)] for i in range(100)],
            "price": rng.random(100),
            "year": rng.integers(1990, 2000, 100),
        }
    )
    configs: dict[str, FeatureConfig] = {
        "brand": CategoricalFeature(),
        "tags": MultiValuedFeature(),
        "price": NumericFeature(),
        "year": NumericFeature(buckets=3),
    }
    train = np.arange(0, 100, 2)
    vocabularies = learn_vocabularies(configs, table, train, "items table")
    columns = encode_table(configs, vocabularies, table, "items table")
    rows = torch.tensor([5, 99, 0, 5, 42])
    taken = columns.take(rows)
    # by the definition, in plain Python
    data = table.to_pydict()
    brands = sorted({data["brand"][i] for i in train} - {None})
    tags = sorted({tag for i in train for tag in data["tags"][i]})
    assert taken["brand"].tolist() == [
        brands.index(data["brand"][i]) + 1 if data["brand"][i] in brands else 0 for i in rows.tolist()
    ]
    assert lists(taken["tags"]) == [[tags.index(t) + 1 for t in data["tags"][i] if t in tags] for i in rows.tolist()]
    prices = np.array([data["price"][i] for i in train])
    expected = [(data["price"][i] - prices.mean()) / prices.std() for i in rows.tolist()]
    np.testing.assert_allclose(taken["price"][:, 0], expected, rtol=1e-5)
    edges = vocabularies["year"].values
    assert taken["year"].tolist() == [1 + sum(data["year"][i] >= e for e in edges) for i in rows.tolist()]
    assert taken["brand"].dtype == taken["tags"].values.dtype == torch.int64
    nothing = columns.take(torch.zeros(0, dtype=torch.int64))
    assert lists(nothing["tags"]) == [] and nothing["price"].shape == (0, 2)


def test_take_of_a_jagged_column_without_values():
    columns = FeatureColumns({"x": encode_column(MultiValuedFeature(), Vocabulary([]), column(["a", None, "b"]))})
    assert lists(columns.take(torch.tensor([2, 2, 0]))["x"]) == [[], [], []]


def test_a_declared_column_that_is_not_there():
    table = pa.table({"brand": ["a"]})
    with pytest.raises(ValueError, match="items table: column 'brnd' is missing; did you mean 'brand'"):
        learn_vocabularies({"brnd": CategoricalFeature()}, table, np.array([0]), "items table")
    with pytest.raises(ValueError, match="users table: column 'age' is missing; columns there: brand"):
        encode_table({"age": CategoricalFeature()}, {"age": Vocabulary([])}, table, "users table")


def test_wrong_configs():
    for config, values in (
        (MultiValuedFeature, {"separator": ""}),
        (NumericFeature, {"buckets": 1}),
        (CategoricalFeature, {"dim": 0}),
    ):
        with pytest.raises(ValueError, match=next(iter(values))):
            config.parse(values)
