"""Item tables that bound a comparison: the true factors of a ToyWorld (a ceiling), vectors of other items (a floor).

A ranker that reads `factor_table` knows what a perfect encoder could say of a drawn item. One that reads
`shuffled_table` sees vectors with the same distribution that say nothing of the item they stand beside: whatever it
gains on cold items over IDs alone has leaked from somewhere.
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
    """The columns `factor_*` of a dataset's items, one-hot side by side: vectors (N, sum of values), all items.

    A missing factor is a block of zeros. These columns are the truth behind the clicks of a ToyWorld: a ranker on them
    is an oracle, not a result. Raises ValueError for a dataset without such columns.
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
    """Vectors (n, D) of the items of a dataset, each given to an item drawn at random; same ids, same vectors.

    `paths` are one or several tables side by side, as `content.path` takes them. Raises ValueError as
    `EmbeddingTable.read` does, and where fewer than two items have a vector: nothing can be exchanged then.
    """
    item_ids = open_dataset(dataset).catalog.item_ids
    vectors, has = (part.numpy() for part in read_tables(paths, item_ids))
    rows = np.flatnonzero(has)
    if len(rows) < 2:
        raise ValueError(f"{paths}: vectors of {len(rows)} items of {dataset}; shuffling takes two or more")
    # along a cycle through all items, so that no item keeps its own vector
    order = np.random.default_rng(seed).permutation(len(rows))
    taken = np.empty_like(rows)
    taken[order] = rows[np.roll(order, 1)]
    return EmbeddingTable(item_ids.take(pa.array(rows)), vectors[taken])
