"""Item tables that bound a comparison: the true factors of a ToyWorld (upper bound), vectors of other items (control).

A ranker on `factor_table` reads what a perfect encoder could tell of a ToyWorld item. A ranker on `shuffled_table`
reads vectors with the same distribution that tell nothing of their items: any gain on cold items over IDs alone is a
leak.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from mmctr.data.embeddings import EmbeddingTable, read_tables
from mmctr.data.prepare import open_dataset
from mmctr.data.tables import as_text

PREFIX = "factor_"


def factor_table(dataset: str | Path) -> EmbeddingTable:
    """The columns `factor_*` of all N items of a dataset, one-hot and concatenated: vectors (N, sum of values).

    A missing factor is a block of zeros. The clicks of a ToyWorld are drawn from these columns, so a ranker on the
    table is an oracle, not a result. Raises ValueError for a dataset without such columns.
    """
    catalog = open_dataset(dataset).catalog
    names = [name for name in catalog.table.column_names if name.startswith(PREFIX)]
    if not names:
        raise ValueError(
            f"{dataset}: its items have no column {PREFIX}*, so there are no true factors to make a table of; "
            f"only a ToyWorld has them"
        )
    blocks = []
    for name in names:
        column = as_text(catalog.table.column(name))
        values = sorted(value for value in column.unique().to_pylist() if value is not None)
        position = {value: number for number, value in enumerate(values)}
        codes = [position.get(value, len(values)) for value in column.to_pylist()]
        blocks.append(np.eye(len(values) + 1, dtype=np.float32)[codes, :-1])
    return EmbeddingTable(catalog.item_ids, np.concatenate(blocks, axis=1))


def shuffled_table(dataset: str | Path, paths: str | list[str], seed: int = 0) -> EmbeddingTable:
    """The vectors (n, D) of n items of a dataset, permuted at random so that no item keeps its vector.

    `paths` names one table, or several tables whose vectors are concatenated, as `content.path` does. Raises ValueError
    as `EmbeddingTable.read` does, and where fewer than two items have a vector, as nothing can be exchanged then.
    """
    item_ids = open_dataset(dataset).catalog.item_ids
    vectors, has_vector = (part.numpy() for part in read_tables(paths, item_ids))
    rows = np.flatnonzero(has_vector)
    if len(rows) < 2:
        raise ValueError(f"{paths}: vectors of {len(rows)} items of {dataset}; shuffling takes two or more")
    # along a cycle through all items: no item keeps its vector
    order = np.random.default_rng(seed).permutation(len(rows))
    source = np.empty_like(rows)
    source[order] = rows[np.roll(order, 1)]
    return EmbeddingTable(item_ids.take(pa.array(rows)), vectors[source])
