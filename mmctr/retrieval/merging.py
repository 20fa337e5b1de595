"""Merging of several indexes into one index."""
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false
# the type stubs of FAISS describe the C++ layer, not the Python layer

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from mmctr.data.tables import examples
from mmctr.retrieval.index import ItemIndex
from mmctr.retrieval.tuning import emptied, inner_index, is_wrapped


def merge(parts: Sequence[ItemIndex]) -> ItemIndex:
    """Merge indexes over vectors of one run into an index with the structure of the first index, without removed items.

    Args:
        parts: the indexes.

    Raises:
        ValueError: the indexes differ in dimensions, columns or run, or an item is in two indexes.
    """
    first, *others = (part.compact() if part.removed.any() else part for part in parts)
    for number, part in enumerate(others, 1):
        if part.dim != first.dim:
            raise ValueError(f"part {number} has {part.dim} dimensions, the first {first.dim}")
        if part.identity.weights != first.identity.weights:
            raise ValueError(f"part {number} is of another run's vectors than the first: they cannot be compared")
        if part.items.schema != first.items.schema:
            raise ValueError(
                f"part {number} has columns {part.items.column_names}, the first {first.items.column_names}, or "
                f"they differ in type"
            )
    ids = pa.concat_arrays([part.ids for part in (first, *others)])
    if len(ids.unique()) != len(ids):
        counted = ids.value_counts()
        twice = counted.field("values").filter(pa.array(np.asarray(counted.field("counts")) > 1))
        raise ValueError(f"items are in several parts, like {examples(twice)}; remove them from all but one")
    index = faiss.clone_index(first.index)
    for part in others:
        _append(index, part)
    norms = None
    if any(part.norms is not None for part in (first, *others)):
        parts_norms = [np.ones(len(p.items), np.float32) if p.norms is None else p.norms for p in (first, *others)]
        norms = np.concatenate(parts_norms)
    items = pa.concat_tables([part.items for part in (first, *others)])
    return ItemIndex(index, items, first.manifest, norms, None, first.measured, first.factory)


def _append(index: Any, part: ItemIndex) -> None:
    """Add all vectors of a part: codes where both indexes have the same training, else decoded vectors."""
    other = part.index
    inner = inner_index(index)
    if isinstance(inner, faiss.IndexIVF) and not is_wrapped(index):
        same = faiss.serialize_index(emptied(index)), faiss.serialize_index(emptied(other))
        if np.array_equal(*same):
            copy = faiss.clone_index(other)
            inner.set_direct_map_type(faiss.DirectMap.NoMap)
            faiss.downcast_index(copy).set_direct_map_type(faiss.DirectMap.NoMap)
            inner.merge_from(copy, inner.ntotal)
            return
    for start in range(0, other.ntotal, 65536):
        index.add(part.vectors(np.arange(start, min(start + 65536, other.ntotal))))
