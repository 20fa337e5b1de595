"""The items behind the rows of an index: raw ids, columns for conditions, and which rows are removed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from mmctr.data.tables import as_text, one_array, rows_of, typed_id
from mmctr.errors import UnknownId
from mmctr.retrieval.filters import matching


@dataclass(frozen=True)
class Neighbour:
    """One item of a search result."""

    item_id: Any
    """raw id"""
    score: float
    """cosine of the query and the vector of the item"""
    title: str | None = None
    """title of the item, None where the index has no titles"""


class IndexedItems:
    """Items by row. A removed item keeps a row, marked in `removed`.

    Args:
        items: table of n rows with `item_id`, and optionally `title` and catalog columns for conditions.
        removed: (n,) bool mask of the removed items; None: no item was removed.
    """

    def __init__(self, items: pa.Table, removed: np.ndarray | None = None):
        self.items = items.combine_chunks()
        self.removed = np.zeros(len(items), bool) if removed is None else removed

    def __len__(self) -> int:
        return len(self.items) - int(self.removed.sum())

    @property
    def ids(self) -> pa.Array:
        """(n,) raw ids by row, the ids of removed items included."""
        return one_array(self.items.column("item_id"))

    def typed(self, item_id: Any) -> Any:
        """An id with the type of the ids of the index: text is converted where the ids are integers.

        Raises:
            UnknownId: the ids are integers, and the text is not an integer.
        """
        return typed_id(item_id, self.ids)

    @cached_property
    def _row_by_id(self) -> dict[Any, int]:
        rows = np.flatnonzero(~self.removed)
        return dict(zip(self.ids.take(pa.array(rows)).to_pylist(), rows.tolist(), strict=True))

    def row(self, item_id: Any) -> int:
        """The row of an item.

        Raises:
            UnknownId: the index has no such item.
        """
        row = self._row_by_id.get(item_id) if isinstance(item_id, int | str) else None
        if row is None or isinstance(item_id, bool):
            if not len(self):
                raise UnknownId(f"item {item_id!r}: the index holds no items; add some with `mmctr index --append`")
            raise UnknownId(f"item {item_id!r} has no vector here; ids look like {self.ids[0].as_py()!r}")
        return row

    def sample(self, count: int) -> list[Any]:
        """The ids of at most `count` items, at equal distances in the order of the rows."""
        rows = np.flatnonzero(~self.removed)
        positions = np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)
        return self.ids.take(pa.array(rows[positions])).to_pylist()

    def __contains__(self, item_id: Any) -> bool:
        return isinstance(item_id, int | str) and item_id in self._row_by_id

    def rows_where(self, where: Sequence[str]) -> np.ndarray | None:
        """The (n,) bool mask of the rows that fulfil all conditions; None without conditions.

        Args:
            where: conditions on columns of `items`, in the syntax of `mmctr.retrieval.filters`.

        Raises:
            ValueError: a condition is malformed or names an unknown column.
        """
        return matching(self.items, where) if where else None

    def take_titles(self, catalog: pa.Table) -> None:
        """Take the titles of a catalog where the vectors came without titles, as from an .npz file.

        Args:
            catalog: an items table; without a column `title` nothing is done.

        Raises:
            ValueError: one side has integer ids and the other side strings.
        """
        if "title" in self.items.column_names or "title" not in catalog.column_names:
            return
        rows = rows_of(self.ids, one_array(catalog.column("item_id")), "the vectors and the catalog")
        titles = one_array(as_text(catalog.column("title"))).take(pa.array(rows, mask=rows < 0))
        self.items = self.items.append_column("title", titles)

    def neighbours(self, scores: np.ndarray, rows: np.ndarray, k: int, exclude: Iterable[Any] = ()) -> list[Neighbour]:
        """The result of `nearest` for one query, as items.

        Args:
            scores: (m,) cosines.
            rows: (m,) rows, -1 for none.
            k: largest number of items.
            exclude: item ids that the result does not contain.
        """
        is_row = rows >= 0
        part = self.items.take(pa.array(rows[is_row]))
        titles = part.column("title").to_pylist() if "title" in part.column_names else [None] * len(part)
        nearest = zip(part.column("item_id").to_pylist(), scores[is_row].tolist(), titles, strict=True)
        excluded = set(exclude)
        return [Neighbour(*one) for one in nearest if one[0] not in excluded][:k]

    def _forget_ids(self) -> None:
        """Look the ids up anew, after items were added or removed."""
        self.__dict__.pop("_row_by_id", None)
