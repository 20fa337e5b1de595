"""Searcher: search in an index by items, texts, pictures and users, alone or mixed, one query or many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from mmctr.data.prepare import Dataset, open_dataset
from mmctr.data.tables import as_text, one_array, read_table, rows_of
from mmctr.retrieval.index import ItemIndex
from mmctr.retrieval.indexed_items import Neighbour
from mmctr.run_folder import RunFolder
from mmctr.runs.item_encoder import ItemEncoder

Kind = Literal["item_id", "text", "image", "user_id"]
KINDS: tuple[Kind, ...] = ("item_id", "text", "image", "user_id")


@dataclass(frozen=True)
class Part:
    """A part of a query: an item, a text, a picture (`mmctr.runs.item_encoder.Picture`), or the clicks of a user."""

    kind: Kind
    value: Any
    """raw item id, text, picture, or raw user id"""
    weight: float = 1.0
    """factor on the unit vector of the part"""


class Searcher:
    """Search in an index.

    Args:
        index: the index.
        run: pretraining run that encodes texts and pictures; None: the run that made the vectors.
        data: dataset folder whose log has the clicks of users; None: the dataset of the vectors.
        last: number of latest clicks of a user that are read.
    """

    def __init__(self, index: ItemIndex, run: str | None = None, data: str | None = None, last: int = 50):
        self.index, self.last = index, last
        self._run, self._data = run or index.identity.run, data or index.identity.data

    @property
    def has_encoder(self) -> bool:
        """Whether texts and pictures can be queries: the pretraining run is known and the folder exists."""
        return self._run is not None and RunFolder(Path(self._run)).is_begun

    @cached_property
    def encoder(self) -> ItemEncoder:
        """The encoder of texts and pictures.

        Raises:
            ValueError: the pretraining run is unknown or cannot be read.
        """
        if self._run is None:
            raise ValueError(
                "the index does not name the run that made the vectors; give --run to search by text or picture"
            )
        return ItemEncoder(self._run)

    @cached_property
    def dataset(self) -> Dataset:
        """The dataset with the log.

        Raises:
            ValueError: the dataset is unknown or cannot be read.
        """
        if self._data is None:
            raise ValueError("the index does not name the dataset of the vectors; give --data")
        return open_dataset(self._data)

    @cached_property
    def _index_rows(self) -> np.ndarray:
        """The row in the index of each item of the catalog, (N,), -1 for an item that the index lacks."""
        live = np.flatnonzero(~self.index.removed)
        rows = rows_of(self.dataset.catalog.item_ids, self.index.ids.take(pa.array(live)), "the catalog and the index")
        return np.where(rows >= 0, live[rows], -1)

    def history(self, user_id: Any) -> np.ndarray:
        """The rows in the index (h,) of the latest items that a user has clicked, oldest first.

        Raises:
            ValueError: the user is not in the dataset.
        """
        rows = self._index_rows[self.dataset.interactions.clicked_before(self.dataset.user_row(user_id))]
        return rows[rows >= 0][-self.last :]

    def vectors(self, queries: Sequence[Sequence[Part]]) -> tuple[np.ndarray, list[set[Any]]]:
        """The vectors of queries.

        The vector of a query of one part is the vector of the part; that of a query of several parts is the weighted
        sum of the unit vectors of the parts. The vector of a user is the mean over the clicked items.

        Args:
            queries: Q queries of one or more parts each.

        Returns:
            (Q, D), and for each query the ids of the items that are parts of the query, which answers leave out.

        Raises:
            ValueError: a part cannot be turned into a vector, or a query has no parts.
        """
        total = np.zeros((len(queries), self.index.dim), np.float32)
        part_ids: list[set[Any]] = [set() for _ in queries]
        by_kind: dict[str, list[tuple[int, Part]]] = {kind: [] for kind in KINDS}
        for number, parts in enumerate(queries):
            if not parts:
                raise ValueError(f"query {number}: nothing to search by; give an item, a text, a picture or a user")
            for part in parts:
                by_kind[part.kind].append((number, part))
        for kind, numbered_parts in by_kind.items():
            if not numbered_parts:
                continue
            numbers = np.array([number for number, _ in numbered_parts])
            values = [part.value for _, part in numbered_parts]
            if kind == "item_id":
                ids = [self.index.typed(value) for value in values]
                vectors = self.index.vectors(np.array([self.index.row(item) for item in ids]), unit=False)
                for number, item in zip(numbers, ids, strict=True):
                    part_ids[number].add(item)
            elif kind == "user_id":
                vectors = self._users(values, numbers, part_ids)
            else:
                vectors = self.encoder.embed(**{f"{kind}s": values})
                if vectors.shape[1] != self.index.dim:
                    raise ValueError(
                        f"run {self.encoder.run} makes vectors of {vectors.shape[1]} dimensions, the index has "
                        f"{self.index.dim}: it was made by another run"
                    )
            weights = np.array([part.weight for _, part in numbered_parts], np.float32)
            mixed = np.array([len(queries[number]) > 1 for number in numbers])
            weights[mixed] /= np.maximum(np.linalg.norm(vectors[mixed], axis=1), 1e-12)
            np.add.at(total, numbers, vectors * weights[:, None])
        zeros = np.flatnonzero(~total.any(1))
        if len(zeros):
            raise ValueError(f"query {zeros[0]}: the parts cancel out; change the weights")
        return total, part_ids

    def _users(self, users: list[Any], numbers: np.ndarray, part_ids: list[set[Any]]) -> np.ndarray:
        """The vectors (n, D) of users; the clicked items are added to `part_ids` of the queries `numbers` (n,)."""
        vectors = np.zeros((len(users), self.index.dim), np.float32)
        for position, (user, number) in enumerate(zip(users, numbers, strict=True)):
            rows = self.history(user)
            if not len(rows):
                raise ValueError(f"user {user!r} has clicked no item of the index and so has no vector")
            vectors[position] = self.index.vectors(rows).mean(0)
            part_ids[number].update(self.index.ids.take(pa.array(rows)).to_pylist())
        return vectors

    def answer(
        self, parts: Sequence[Part], k: int = 10, where: Sequence[str] = (), shift: np.ndarray | None = None
    ) -> list[Neighbour]:
        """The k items nearest to a query; items that are parts of the query are left out.

        Args:
            parts: the parts of the query.
            k: number of neighbours.
            where: conditions on catalog columns (`mmctr.retrieval.filters`).
            shift: (D,) vector that is added to the vector of the query.

        Raises:
            ValueError: as `vectors`, and for a malformed condition.
        """
        vectors, part_ids = self.vectors([parts])
        vector = vectors[0] if shift is None else vectors[0] + shift
        return self.index.search(vector, k, exclude=part_ids[0], where=where)

    def answer_file(self, path: str | Path, k: int = 10, where: Sequence[str] = ()) -> pa.Table:
        """The answers to all queries of a table.

        Args:
            path: a Parquet, CSV or JSON lines file with one part of a query per row: one of `item_id`, `text`, `image`
                (a file) and `user_id`; optionally `query`, equal for the parts of one query, and `weight`.
            k: number of neighbours.
            where: conditions on catalog columns (`mmctr.retrieval.filters`).

        Returns:
            One row for each neighbour, nearest first, with `query`, `rank` (from 1), `item_id`, `score` and, where the
            index has titles, `title`.

        Raises:
            ValueError: as `vectors`, and for a table with missing columns or wrong values.
        """
        table = read_table(Path(path))
        names, queries = _read_queries(table, path)
        vectors, part_ids = self.vectors(queries)
        allowed = self.index.rows_where(where)
        most = max((len(ids) for ids in part_ids), default=0)
        scores, rows = self.index.nearest(vectors, min(k, max(len(self.index.items), 1)) + most, allowed)
        keep = rows >= 0
        for number, ids in enumerate(part_ids):
            if ids:
                keep[number] &= ~np.isin(rows[number], [self.index.row(item) for item in ids])
        rank = np.where(keep, keep.cumsum(1), k + 1)
        number, column = np.nonzero(rank <= k)
        items = self.index.items.take(pa.array(rows[number, column]))
        answer = {
            "query": names.take(pa.array(number)),
            "rank": pa.array(rank[number, column]),
            "item_id": items.column("item_id"),
            "score": pa.array(scores[number, column]),
        }
        return pa.table(answer | ({"title": items.column("title")} if "title" in items.column_names else {}))


def _read_queries(table: pa.Table, path: str | Path) -> tuple[pa.Array, list[list[Part]]]:
    """The names and the parts of queries, in the order of the table."""
    given: list[Kind] = [kind for kind in KINDS if kind in table.column_names]
    if not given:
        raise ValueError(f"{path}: needs a column item_id, text, image or user_id; it has {table.column_names}")
    if not len(table):
        raise ValueError(f"{path}: holds no query")
    columns = {
        kind: (table.column(kind) if kind.endswith("_id") else as_text(table.column(kind))).to_pylist()
        for kind in given
    }
    weights = table.column("weight").to_pylist() if "weight" in table.column_names else [1.0] * len(table)
    name = one_array(table.column("query")) if "query" in table.column_names else pa.array(range(len(table)))
    encoded = name.dictionary_encode()
    queries: list[list[Part]] = [[] for _ in encoded.dictionary]
    for row, number in enumerate(encoded.indices.to_pylist()):
        values: list[tuple[Kind, Any]] = [
            (kind, columns[kind][row]) for kind in given if columns[kind][row] is not None
        ]
        if len(values) != 1 or number is None:
            raise ValueError(
                f"{path}: row {row}: give one of {', '.join(given)}, and `query` where the table has that column"
            )
        weight = weights[row]
        if not isinstance(weight, int | float) or not np.isfinite(weight):
            raise ValueError(f"{path}: row {row}: weight {weight!r} is not a number")
        queries[number].append(Part(values[0][0], values[0][1], float(weight)))
    return encoded.dictionary, queries
