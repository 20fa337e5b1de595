"""Searcher: an index with what makes queries of items, words, pictures and users, alone or mixed, one or many."""

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
from mmctr.retrieval.index import ItemIndex, Neighbour
from mmctr.run_folder import RunFolder
from mmctr.runs.item_encoder import ItemEncoder

Kind = Literal["item_id", "text", "image", "user_id"]
KINDS: tuple[Kind, ...] = ("item_id", "text", "image", "user_id")


@dataclass(frozen=True)
class Part:
    """A part of a query: an item, words, a picture (see `mmctr.runs.item_encoder.Picture`), or what a user clicked."""

    kind: Kind
    value: Any
    weight: float = 1.0


class Searcher:
    """Answers queries over an index.

    Args:
        run: pretraining run that encodes words and pictures; the one the vectors were made by when None.
        data: dataset whose log says what users clicked; the one the vectors were made of when None.
        last: clicks of a user that are read, the latest.
    """

    def __init__(self, index: ItemIndex, run: str | None = None, data: str | None = None, last: int = 50):
        self.index, self.last = index, last
        self._run, self._data = run or index.identity.run, data or index.identity.data

    @property
    def has_encoder(self) -> bool:
        """Whether words and pictures can be queries: the run that made the vectors is known and there."""
        return self._run is not None and RunFolder(Path(self._run)).is_begun

    @cached_property
    def encoder(self) -> ItemEncoder:
        if self._run is None:
            raise ValueError(
                "the index does not say which run made it; name it with --run to search by text or picture"
            )
        return ItemEncoder(self._run)

    @cached_property
    def dataset(self) -> Dataset:
        if self._data is None:
            raise ValueError("the index does not say which dataset it is of; name it with --data")
        return open_dataset(self._data)

    @cached_property
    def _index_rows(self) -> np.ndarray:
        """(N,) row in the index of each catalog row, -1 for none."""
        live = np.flatnonzero(~self.index.removed)
        rows = rows_of(self.dataset.catalog.item_ids, self.index.ids.take(pa.array(live)), "the catalog and the index")
        return np.where(rows >= 0, live[rows], -1)

    def history(self, user_id: Any) -> np.ndarray:
        """(h,) rows in the index of what a user clicked, oldest first. Raises ValueError for an unknown user."""
        rows = self._index_rows[self.dataset.interactions.clicked_before(self.dataset.user_row(user_id))]
        return rows[rows >= 0][-self.last :]

    def vectors(self, queries: Sequence[Sequence[Part]]) -> tuple[np.ndarray, list[set[Any]]]:
        """What queries look for: (Q, D), and for each the ids of the items it is made of, which its answer leaves out.

        A query of one part has that part's vector as it came; one of several the weighted sum of unit vectors. A user's
        vector is the mean of those of the items clicked.

        Raises ValueError naming the part that cannot be had.
        """
        total = np.zeros((len(queries), self.index.dim), np.float32)
        made_of: list[set[Any]] = [set() for _ in queries]
        by_kind: dict[str, list[tuple[int, Part]]] = {kind: [] for kind in KINDS}
        for number, parts in enumerate(queries):
            if not parts:
                raise ValueError(f"query {number}: nothing to search by; give an item, a text, a picture or a user")
            for part in parts:
                by_kind[part.kind].append((number, part))
        for kind, found in by_kind.items():
            if not found:
                continue
            numbers = np.array([number for number, _ in found])
            values = [part.value for _, part in found]
            if kind == "item_id":
                ids = [self.index.typed(value) for value in values]
                vectors = self.index.vectors(np.array([self.index.row(item) for item in ids]), unit=False)
                for number, item in zip(numbers, ids, strict=True):
                    made_of[number].add(item)
            elif kind == "user_id":
                vectors = self._users(values, numbers, made_of)
            else:
                vectors = self.encoder.embed(**{f"{kind}s": values})
                if vectors.shape[1] != self.index.dim:
                    raise ValueError(
                        f"run {self.encoder.run} makes vectors of {vectors.shape[1]} dimensions, the index has "
                        f"{self.index.dim}: it was made by another run"
                    )
            weights = np.array([part.weight for _, part in found], np.float32)
            mixed = np.array([len(queries[number]) > 1 for number in numbers])
            weights[mixed] /= np.maximum(np.linalg.norm(vectors[mixed], axis=1), 1e-12)
            np.add.at(total, numbers, vectors * weights[:, None])
        nothing = np.flatnonzero(~total.any(1))
        if len(nothing):
            raise ValueError(f"query {nothing[0]}: its parts cancel out; change their weights")
        return total, made_of

    def _users(self, users: list[Any], numbers: np.ndarray, made_of: list[set[Any]]) -> np.ndarray:
        vectors = np.zeros((len(users), self.index.dim), np.float32)
        for place, (user, number) in enumerate(zip(users, numbers, strict=True)):
            rows = self.history(user)
            if not len(rows):
                raise ValueError(f"user {user!r} has clicked no item of the index: there is nothing to go by")
            vectors[place] = self.index.vectors(rows).mean(0)
            made_of[number].update(self.index.ids.take(pa.array(rows)).to_pylist())
        return vectors

    def answer(
        self, parts: Sequence[Part], k: int = 10, where: Sequence[str] = (), shift: np.ndarray | None = None
    ) -> list[Neighbour]:
        """The k items nearest to a query of one or more parts, its own items left out.

        Args:
            where: conditions on catalog columns; see `mmctr.retrieval.filters`.
            shift: (D,) added to the query.
        """
        vectors, made_of = self.vectors([parts])
        vector = vectors[0] if shift is None else vectors[0] + shift
        return self.index.search(vector, k, exclude=made_of[0], where=where)

    def answer_file(self, path: str | Path, k: int = 10, where: Sequence[str] = ()) -> pa.Table:
        """Answers to all queries of a table: one row a neighbour, best first.

        The table (Parquet, CSV, JSON lines) has any of the columns `item_id`, `text`, `image` (file), `user_id`, one of
        them given in each row; `query`, where rows with the same value are parts of one; and `weight`.

        Returns:
            `query`, `rank` (from 1), `item_id`, `score` and, where there are any, `title`.
        """
        table = read_table(Path(path))
        names, queries = _read_queries(table, path)
        vectors, made_of = self.vectors(queries)
        allowed = self.index.rows_where(where)
        most = max((len(ids) for ids in made_of), default=0)
        scores, rows = self.index.nearest(vectors, min(k, len(self.index.items)) + most, allowed)
        keep = rows >= 0
        for number, ids in enumerate(made_of):
            if ids:
                own = [self.index.row(item) for item in ids]
                keep[number] &= ~np.isin(rows[number], own)
        rank = np.where(keep, keep.cumsum(1), k + 1)
        number, place = np.nonzero(rank <= k)
        found = self.index.items.take(pa.array(rows[number, place]))
        answer = {
            "query": names.take(pa.array(number)),
            "rank": pa.array(rank[number, place]),
            "item_id": found.column("item_id"),
            "score": pa.array(scores[number, place]),
        }
        return pa.table(answer | ({"title": found.column("title")} if "title" in found.column_names else {}))


def _read_queries(table: pa.Table, path: str | Path) -> tuple[pa.Array, list[list[Part]]]:
    """Names of queries and their parts, in the order they first stand in the table."""
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
                f"{path}: row {row}: give one of {', '.join(given)}, and `query` where that column is there"
            )
        weight = weights[row]
        if not isinstance(weight, int | float) or not np.isfinite(weight):
            raise ValueError(f"{path}: row {row}: weight {weight!r} is not a number")
        queries[number].append(Part(values[0][0], values[0][1], float(weight)))
    return encoded.dictionary, queries
