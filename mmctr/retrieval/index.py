"""ItemIndex: nearest items by FAISS. Answers speak raw item ids, never rows."""
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false
# FAISS's stubs know nothing of its Python layer.

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from mmctr.data.embedding_identity import EmbeddingIdentity
from mmctr.data.embeddings import EmbeddingTable, identity_of
from mmctr.data.tables import examples, one_array
from mmctr.errors import UnknownId
from mmctr.retrieval import storage as index_files
from mmctr.retrieval import tuning as index_tuning
from mmctr.retrieval.filters import matching
from mmctr.retrieval.tuning import Wanted

FEW = 5_000
"""vectors a filter may leave that are compared one by one, whatever the index"""


@dataclass(frozen=True)
class Neighbour:
    item_id: Any
    score: float
    title: str | None = None


class ItemIndex:
    """Search by cosine: vectors are scaled to unit norm, those of an embedding table and queries alike.

    `index` is a plain FAISS index whose ids are rows of `items`; anyone's FAISS can read the file. Removed items keep
    their row, marked in `removed`, until `compact`. Searching is safe in many threads; adding and removing is not.

    Args:
        items: (n rows) `item_id`, and any of `title` and catalog columns to filter by.
        manifest: of the embeddings, which says what run made them.
        norms: (n,) lengths of the vectors as they came, None where all had unit norm.
        removed: (n,) mask.
        measured: what `tune` found, None when it was not called.
    """

    def __init__(
        self,
        index: Any,
        items: pa.Table,
        manifest: dict[str, Any] | None = None,
        norms: np.ndarray | None = None,
        removed: np.ndarray | None = None,
        measured: dict[str, Any] | None = None,
        factory: str = "Flat",
        mapped: bool = False,
    ):
        if index.ntotal != len(items):
            raise ValueError(f"the index holds {index.ntotal} vectors but there are {len(items)} ids; build it again")
        self.index, self.items = index, items.combine_chunks()
        self.manifest, self.norms, self.measured, self.factory = manifest or {}, norms, measured, factory
        self.removed = np.zeros(len(items), bool) if removed is None else removed
        self.mapped = mapped
        self._lock = threading.Lock()

    @property
    def identity(self) -> EmbeddingIdentity:
        """What made the vectors; nothing is known of vectors of another program."""
        return identity_of(self.manifest)

    def __len__(self) -> int:
        return len(self.items) - int(self.removed.sum())

    @property
    def dim(self) -> int:
        return self.index.d

    @property
    def ids(self) -> pa.Array:
        """(n,) raw ids by row, those of removed items included."""
        return one_array(self.items.column("item_id"))

    @classmethod
    def build(
        cls, table: EmbeddingTable, wanted: Wanted | None = None, columns: pa.Table | None = None, seed: int = 0
    ) -> ItemIndex:
        """Choose, train, fill and measure an index.

        Args:
            wanted: exact search when None.
            columns: (n rows) catalog columns to filter by, in the order of the table.

        Raises ValueError when nothing that was wanted can be had, or for vectors of no length.
        """
        vectors, norms = _unit(table)
        if wanted is None:
            index = index_tuning.build(vectors, "Flat")
            return cls(index, index_files.items_of(table, columns), table.manifest, norms)
        factory = index_tuning.choose_factory(len(vectors), table.dim, wanted)
        index, order, measured = index_tuning.build_and_tune(vectors, factory, wanted.recall, seed)
        items = index_files.items_of(table, columns).take(pa.array(order))
        norms = None if norms is None else norms[order]
        return cls(index, items, table.manifest, norms, None, measured, factory)

    # --- search

    def nearest(
        self, queries: np.ndarray, k: int = 10, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The rows of the k nearest items to each query, best first.

        Args:
            queries: (Q, D), of any length but 0.
            allowed: (n,) mask of rows that may be found; `rows_where` makes one.

        Returns:
            (Q, k) float32 cosines and (Q, k) int64 rows, -1 where fewer items than k may be found.

        Raises ValueError for k < 1, another dimension, or values that are not finite.
        """
        if k < 1:
            raise ValueError(f"k={k}: ask for at least one neighbour")
        queries = np.array(queries, np.float32, ndmin=2)
        if queries.shape[1] != self.dim:
            raise ValueError(
                f"the query has {queries.shape[1]} dimensions, the index {self.dim}: it was made by another run"
            )
        if not np.isfinite(queries).all():
            raise ValueError("the query holds values that are not finite")
        faiss.normalize_L2(queries)
        if self.removed.any():
            allowed = ~self.removed if allowed is None else allowed & ~self.removed
        there = len(self.items) if allowed is None else int(allowed.sum())
        k = min(k, there)
        if not k:
            return np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
        selector = None
        if allowed is not None:
            selector = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
            if there <= max(FEW, len(self.items) // 20):
                return self._exactly(queries, k, selector)
        setting = index_tuning.setting_of(self.index)
        # what a filter hides must be made up for by looking further
        value = max(setting.value, k) if setting.name == "efSearch" else setting.value
        value = min(setting.most, int(np.ceil(value * len(self.items) / there)))
        scores, rows = self.index.search(queries, k, params=index_tuning.parameters(self.index, value, selector))
        short = (rows < 0).any(1)  # never of exact search
        if short.any():
            scores[short], rows[short] = self._exactly(queries[short], k, selector)
        return scores, rows

    def _exactly(self, queries: np.ndarray, k: int, selector: Any) -> tuple[np.ndarray, np.ndarray]:
        """Compare with all vectors, or codes, that are selected."""
        inner = index_tuning.inner_index(self.index)
        if isinstance(inner, faiss.IndexHNSW) and not index_tuning.is_wrapped(self.index):
            storage = faiss.downcast_index(inner.storage)
            params = None if selector is None else faiss.SearchParameters(sel=selector)
            return storage.search(queries, k, params=params)
        most = index_tuning.setting_of(self.index).most
        return self.index.search(queries, k, params=index_tuning.parameters(self.index, max(most, k), selector))

    def search(
        self, vector: np.ndarray, k: int = 10, exclude: Any = None, where: Sequence[str] = ()
    ) -> list[Neighbour]:
        """The k items nearest to a (D,) query, best first.

        Args:
            exclude: an item id, or a list of them, left out of the answer.
            where: conditions on columns of `items`, see `mmctr.retrieval.filters`.
        """
        left_out = set(exclude) if isinstance(exclude, list | tuple | set) else set() if exclude is None else {exclude}
        if k < 1:
            raise ValueError(f"k={k}: ask for at least one neighbour")
        k = min(k, len(self.items))
        scores, rows = self.nearest(np.asarray(vector).reshape(1, -1), k + len(left_out), self.rows_where(where))
        return self.neighbours(scores[0], rows[0], k, left_out)

    def neighbours(self, scores: np.ndarray, rows: np.ndarray, k: int, left_out: Iterable[Any] = ()) -> list[Neighbour]:
        """The first k of an answer of `nearest`, by id and title, without those left out."""
        kept = rows >= 0
        part = self.items.take(pa.array(rows[kept]))
        titles = part.column("title").to_pylist() if "title" in part.column_names else [None] * len(part)
        found = zip(part.column("item_id").to_pylist(), scores[kept].tolist(), titles, strict=True)
        left_out = set(left_out)
        return [Neighbour(*one) for one in found if one[0] not in left_out][:k]

    def search_item(
        self, item_id: Any, k: int = 10, shift: np.ndarray | None = None, where: Sequence[str] = ()
    ) -> list[Neighbour]:
        """The k items nearest to an item, itself excluded; `shift` (D,) is added to its vector. See `typed`."""
        item_id = self.typed(item_id)
        vector = self.vector(item_id)
        return self.search(vector if shift is None else vector + shift, k, exclude=item_id, where=where)

    def rows_where(self, where: Sequence[str]) -> np.ndarray | None:
        """(n,) mask of the rows that fulfil all conditions, None without any."""
        return matching(self.items, where) if where else None

    # --- items

    def typed(self, item_id: Any) -> Any:
        """An id as the index has it: one typed as text is understood as an integer one."""
        if pa.types.is_integer(self.ids.type) and isinstance(item_id, str):
            try:
                return int(item_id)
            except ValueError:
                raise UnknownId(f"item {item_id!r}: ids here are integers, like {self.ids[0].as_py()}") from None
        return item_id

    @cached_property
    def _row_by_id(self) -> dict[Any, int]:
        rows = np.flatnonzero(~self.removed)
        return dict(zip(self.ids.take(pa.array(rows)).to_pylist(), rows.tolist(), strict=True))

    def row(self, item_id: Any) -> int:
        """Raises ValueError when the item is not here."""
        row = self._row_by_id.get(item_id) if isinstance(item_id, int | str) else None
        if row is None or isinstance(item_id, bool):
            raise UnknownId(f"item {item_id!r} has no vector here; ids look like {self.ids[0].as_py()!r}")
        return row

    def sample(self, count: int) -> list[Any]:
        """Ids of some items, spread evenly."""
        rows = np.flatnonzero(~self.removed)
        places = np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)
        return self.ids.take(pa.array(rows[places])).to_pylist()

    def __contains__(self, item_id: Any) -> bool:
        return isinstance(item_id, int | str) and item_id in self._row_by_id

    def vector(self, item_id: Any) -> np.ndarray:
        """The (D,) vector of an item, as it came, or what its code stands for. Raises ValueError when it has none."""
        return self.vectors(np.array([self.row(item_id)]), unit=False)[0]

    def vectors(self, rows: np.ndarray, unit: bool = True) -> np.ndarray:
        """(m, D) vectors of rows, of unit norm or as they came."""
        self._prepare_lookup()
        vectors = self.index.reconstruct_batch(np.ascontiguousarray(rows, np.int64))
        return vectors if unit or self.norms is None else vectors * self.norms[rows, None]

    def _prepare_lookup(self) -> None:
        inner = index_tuning.inner_index(self.index)
        if isinstance(inner, faiss.IndexIVF):
            with self._lock:
                if inner.direct_map.no():
                    inner.make_direct_map()

    # --- changes

    def add(self, table: EmbeddingTable, columns: pa.Table | None = None, replace: bool = False) -> int:
        """Add items; returns how many. The index keeps what it was trained on: many new items of another kind ask for
        building it anew, and `tune` tells.

        Args:
            replace: give items that are here already their new vectors.

        Raises ValueError for another dimension, columns that are lacking, or items that are here already.
        """
        self._check_writable()
        if table.dim != self.dim:
            raise ValueError(f"vectors of {table.dim} dimensions cannot be added to an index of {self.dim}")
        here = np.array([item in self for item in table.ids.to_pylist()], bool)
        if here.any() and not replace:
            some = examples(table.ids.filter(pa.array(here)))
            raise ValueError(
                f"{int(here.sum())} items are in the index already, like {some}; replace them, or leave out"
            )
        vectors, norms = _unit(table)
        new = index_files.items_of(table, columns)
        lacking = [name for name in self.items.column_names if name not in new.column_names]
        if lacking and lacking != ["title"]:
            raise ValueError(f"the index filters by {lacking}; give these columns of the new items too")
        if here.any():
            self.removed[[self.row(item) for item in table.ids.filter(pa.array(here)).to_pylist()]] = True
        for name in lacking:
            new = new.append_column(name, pa.nulls(len(new), self.items.schema.field(name).type))
        try:
            new = new.select(self.items.column_names).cast(self.items.schema)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise ValueError(f"the new items' columns are of other types than the index's: {error}") from None
        if norms is not None or self.norms is not None:
            ones = np.ones(len(self.items), np.float32) if self.norms is None else self.norms
            self.norms = np.concatenate([ones, np.ones(len(new), np.float32) if norms is None else norms])
        self._forget_lookup()
        self.index.add(vectors)
        self.items = pa.concat_tables([self.items, new]).combine_chunks()
        self.removed = np.concatenate([self.removed, np.zeros(len(new), bool)])
        return len(new)

    def remove(self, item_ids: Iterable[Any]) -> int:
        """Take items out of all answers; returns how many. Raises ValueError when one is not here; then none is."""
        rows = [self.row(self.typed(item)) for item in item_ids]
        self.removed[rows] = True
        self.__dict__.pop("_row_by_id", None)
        return len(set(rows))

    def compact(self) -> ItemIndex:
        """The same without the rows of removed items, filled anew on what was trained."""
        self._check_writable()
        rows = np.flatnonzero(~self.removed)
        index = index_tuning.emptied(self.index)
        for start in range(0, len(rows), 65536):
            index.add(self.vectors(rows[start : start + 65536]))
        kept = self.items.take(pa.array(rows))
        norms = None if self.norms is None else self.norms[rows]
        return ItemIndex(index, kept, self.manifest, norms, None, self.measured, self.factory)

    def tune(self, recall: float = 0.99) -> dict[str, Any]:
        """Measure against exact search over the vectors held here and set what reaches the recall; see
        `index_tuning.tune`. An index of codes is measured against what its codes stand for: build it anew for more."""
        self._check_writable()
        if self.removed.any():
            raise ValueError("the index has removed items; compact it first")
        vectors = self.vectors(np.arange(len(self.items)))
        self.measured = index_tuning.tune(self.index, vectors, recall)
        return self.measured

    def _check_writable(self) -> None:
        if self.mapped:
            raise ValueError("this index was opened memory-mapped; load it into memory to change it")

    def _forget_lookup(self) -> None:
        self.__dict__.pop("_row_by_id", None)
        inner = index_tuning.inner_index(self.index)
        if isinstance(inner, faiss.IndexIVF) and not inner.direct_map.no():
            inner.set_direct_map_type(faiss.DirectMap.NoMap)

    # --- files

    def save(self, folder: str | Path) -> None:
        """Write an index folder. Raises ValueError for a folder that holds something else."""
        rows = {"removed": self.removed} | ({} if self.norms is None else {"norms": self.norms})
        facts = {
            "factory": self.factory,
            "dim": self.dim,
            "count": len(self.items),
            "removed": int(self.removed.sum()),
            "measured": self.measured,
            "embeddings": self.manifest,
        }
        index_files.save(Path(folder), self.index, self.items, rows, facts)

    @classmethod
    def load(cls, folder: str | Path, mmap: bool = False) -> ItemIndex:
        """An index folder, or an embedding folder or file (indexed on the fly, exactly).

        Args:
            mmap: leave vectors on disk and read what a search needs; such an index cannot be changed.

        Raises ValueError for anything else: a file cut short, of another dimension, of another program.
        """
        folder = Path(folder)
        if not index_files.is_index(folder):
            return cls.build(EmbeddingTable.read(folder))
        index, items, rows, facts = index_files.load(folder, mmap)
        manifest, measured, factory = facts["embeddings"], facts["measured"], facts["factory"]
        return cls(index, items, manifest, rows.get("norms"), rows["removed"], measured, factory, mmap)


def _unit(table: EmbeddingTable) -> tuple[np.ndarray, np.ndarray | None]:
    """(n, D) unit vectors and their (n,) lengths before, None where all were 1."""
    norms = np.linalg.norm(table.vectors, axis=1)
    if len(norms) and not norms.min():
        raise ValueError(f"the vector of item {table.ids[int(norms.argmin())].as_py()!r} is zero: it has no direction")
    vectors = table.vectors.copy()
    faiss.normalize_L2(vectors)
    return vectors, None if np.abs(norms - 1).max(initial=0.0) < 1e-3 else norms.astype(np.float32)
