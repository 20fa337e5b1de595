from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmctr.data.embeddings import EmbeddingTable, write_npz
from mmctr.datasets.toy_world import FACTOR_VALUES
from mmctr.studies.controls import factor_table, shuffled_table
from tests.helpers.worlds import write_dataset


def test_factor_table_is_the_truth_one_hot(toy_folder):
    table = factor_table(toy_folder)
    items = pq.read_table(toy_folder / "items.parquet")
    assert table.ids.to_pylist() == items["item_id"].to_pylist()
    assert table.vectors.shape == (len(items), sum(map(len, FACTOR_VALUES.values())))
    assert (table.vectors.sum(1) == len(FACTOR_VALUES)).all() and set(np.unique(table.vectors)) == {0, 1}
    names = [f"factor_{name}" for name in FACTOR_VALUES]
    rows = [tuple(row[name] for name in names) for row in items.select(names).to_pylist()]
    vectors = [tuple(vector) for vector in table.vectors]
    assert len(set(rows)) == len(set(vectors)) == len(set(zip(rows, vectors, strict=True)))  # one vector a combination


def test_factors_need_a_toy_world(tmp_path):
    items = {"item_id": [1, 2, 3], "title": ["a", "b", "c"]}
    with pytest.raises(ValueError, match="no column factor_"):
        factor_table(write_dataset(tmp_path / "data", items))


def test_shuffled_table_gives_every_item_the_vector_of_another(toy_folder, tmp_path):
    ids = factor_table(toy_folder).ids
    table = EmbeddingTable(ids[:100], np.random.default_rng(0).random((100, 4), np.float32))
    write_npz(table, tmp_path / "a.npz")
    found = shuffled_table(toy_folder, str(tmp_path / "a.npz"), seed=1)
    assert found.ids.equals(table.ids)
    assert sorted(map(tuple, found.vectors)) == sorted(map(tuple, table.vectors))
    assert (found.vectors != table.vectors).any(axis=1).all()
    again = shuffled_table(toy_folder, [str(tmp_path / "a.npz")], seed=1)
    assert np.array_equal(again.vectors, found.vectors)
    assert not np.array_equal(shuffled_table(toy_folder, str(tmp_path / "a.npz")).vectors, found.vectors)
    assert shuffled_table(toy_folder, [str(tmp_path / "a.npz")] * 2).dim == 8
    write_npz(EmbeddingTable(ids[:1], table.vectors[:1]), tmp_path / "one.npz")
    with pytest.raises(ValueError, match="vectors of 1 items"):
        shuffled_table(toy_folder, str(tmp_path / "one.npz"))
