"""Types of other programs as plain types."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet
import pytest

from mmctr.data.plain_tables import plain_table
from mmctr.data.prepare import prepare
from tests.helpers.worlds import write_table

WORDS, BYTES, LISTS = ["a", None, "ü"], [b"a", None, b"b"], [["a", "b"], None, []]
COLUMNS = {
    "string view": (pa.array(WORDS, pa.string_view()), pa.string()),
    "large string": (pa.array(WORDS, pa.large_string()), pa.string()),
    "binary view": (pa.array(BYTES, pa.binary_view()), pa.large_binary()),
    "category": (pa.array(WORDS).dictionary_encode(), pa.string()),
    "category of polars": (
        pa.DictionaryArray.from_arrays(pa.array([0, None, 1], pa.uint32()), pa.array(["a", "ü"], pa.large_string())),
        pa.string(),
    ),
    "category of views": (
        pa.DictionaryArray.from_arrays(pa.array([0, None, 1], pa.int8()), pa.array(["a", "ü"], pa.string_view())),
        pa.string(),
    ),
    "large list": (pa.array(LISTS, pa.large_list(pa.large_string())), pa.list_(pa.string())),
    "list view": (pa.array(LISTS, pa.list_view(pa.string())), pa.list_(pa.string())),
    "list of views": (pa.array(LISTS, pa.list_(pa.string_view())), pa.list_(pa.string())),
    "integers": (pa.array([1, None, 3], pa.uint8()), pa.uint8()),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_values_stay_and_types_become_plain(name):
    column, kind = COLUMNS[name]
    table = plain_table(pa.table({"first": [1, 2, 3], "x": pa.chunked_array([column, column[:1]])[:3]}))
    assert table.schema.field("x").type == kind and table["x"].to_pylist() == column.to_pylist()
    assert table.column_names == ["first", "x"] and len(plain_table(table[:0])) == 0


def test_a_list_of_categories():
    kind = pa.list_(pa.dictionary(pa.int32(), pa.string()))
    column = pa.ListArray.from_arrays([0, 2, 2], pa.array(["a", "b"]).dictionary_encode()).cast(kind)
    assert plain_table(pa.table({"x": column}))["x"].to_pylist() == [["a", "b"], []]


@pytest.mark.lowest
def test_a_dataset_of_views_and_categories(tmp_path):
    """A repeated item is set aside, for which pyarrow has no function on views."""
    columns = {
        "item_id": pa.array(["x", "y", "y"], pa.string_view()),
        "title": pa.array(["a", "b", "c"], pa.string_view()),
        "brand": pa.array(["a", "b", "b"]).dictionary_encode(),
        "image": pa.array([b"1", None, b"2"], pa.binary_view()),
        "tags": pa.array([["a"], [], None], pa.large_list(pa.string_view())),
    }
    (tmp_path / "d").mkdir()
    write_table(tmp_path / "d" / "items.parquet", columns)
    table = prepare(tmp_path / "d", tmp_path / "out").catalog.table
    assert table.select(["item_id", "title", "brand", "tags"]).to_pydict() == {
        "item_id": ["x", "y"],
        "title": ["a", "b"],
        "brand": ["a", "b"],
        "tags": [["a"], []],
    }
