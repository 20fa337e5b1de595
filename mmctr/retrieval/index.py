"""ItemIndex: nearest-neighbour search over item vectors by FAISS; results hold raw item ids, not rows."""
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false
# the type stubs of FAISS describe the C++ layer, not the Python layer

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from mmctr.data.embedding_identity import EmbeddingIdentity
from mmctr.data.embeddings import EmbeddingTable, identity_of
from mmctr.data.tables import examples
from mmctr.files import user_path
from mmctr.retrieval import storage as index_files
from mmctr.retrieval import tuning as index_tuning
from mmctr.retrieval.indexed_items import IndexedItems, Neighbour
from mmctr.retrieval.tuning import Wanted

logger = logging.getLogger(__name__)

FEW = 5_000
"""largest number of vectors that pass a filter for which the search is exact, whatever the index"""


class ItemIndex(IndexedItems):
    """Search for the nearest items by cosine. Item vectors and queries are scaled to unit norm.

    `index` is a plain FAISS index whose ids are rows of `items`, and the file of the index can be read by FAISS without
    mmctr. A removed item keeps a row, marked in `removed`, until `compact`. Concurrent searches in several threads are
    safe; adding and removing items during a search is not.

    Args:
        index: a FAISS index of n unit vectors by inner product.
        items: table of n rows with `item_id`, and optionally `title` and catalog columns for conditions.
        manifest: manifest of the embeddings, which names the run that produced the vectors.
        norms: (n,) norms of the vectors before scaling; None where all vectors had unit norm.
        removed: (n,) bool mask of the removed items; None: no item was removed.
        measured: result of `tune`; None where `tune` was not called.
        factory: the FAISS factory string of the index.
        mapped: whether the index is memory-mapped and cannot be changed.

    Raises:
        ValueError: the index and the table of items have different sizes.

    Example:
        ```python
        import numpy as np
        import pyarrow as pa

        vectors = np.array([[1, 0], [0.8, 0.6], [0, 1]], np.float32)
        table = mmctr.EmbeddingTable(pa.array(["shoe", "boot", "hat"]), vectors)
        index = mmctr.ItemIndex.build(table)
        assert [neighbour.item_id for neighbour in index.search_item("shoe", k=2)] == ["boot", "hat"]
        ```
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
        super().__init__(items, removed)
        self.index = index
        self.manifest, self.norms, self.measured, self.factory = manifest or {}, norms, measured, factory
        self.mapped = mapped
        self._lock = threading.Lock()

    @property
    def identity(self) -> EmbeddingIdentity:
        """The run, data and options that produced the vectors; all unknown for vectors of another program."""
        return identity_of(self.manifest)

    @property
    def dim(self) -> int:
        """D, the number of dimensions of a vector."""
        return self.index.d

    @classmethod
    def build(
        cls, table: EmbeddingTable, wanted: Wanted | None = None, columns: pa.Table | None = None, seed: int = 0
    ) -> ItemIndex:
        """Choose, train and fill an index, and measure the recall. Items with a vector of zeros are left out.

        Args:
            table: n item vectors.
            wanted: required recall, latency and memory; None: exact search.
            columns: n rows of catalog columns for conditions, in the order of the table.
            seed: seed of the sample on which the index is trained and measured.

        Raises:
            ValueError: no index satisfies the requirements.

        Example:
            ```python
            dataset, table = mmctr.open_dataset("demo/data"), mmctr.EmbeddingTable.read("demo/embeddings")
            rows = dataset.catalog.rows(table.ids)
            index = mmctr.ItemIndex.build(table, columns=dataset.catalog.table.take(rows).select(["category", "brand"]))
            for neighbour in index.search_item(table.ids[0].as_py(), k=5, where=["category=round"]):
                print(neighbour.score, neighbour.item_id, neighbour.title)
            ```
        """
        table, columns = _with_direction(table, columns)
        vectors, norms = _unit(table)
        if wanted is None:
            index = index_tuning.build(vectors, "Flat")
            return cls(index, index_files.items_of(table, columns), table.manifest, norms)
        factory = index_tuning.choose_factory(len(vectors), table.dim, wanted, index_tuning.most_equal(vectors))
        index, order, measured = index_tuning.build_and_tune(vectors, factory, wanted.recall, seed)
        items = index_files.items_of(table, columns).take(pa.array(order))
        norms = None if norms is None else norms[order]
        return cls(index, items, table.manifest, norms, None, measured, factory)

    # search ----------------------------------------------------------------------------------------------------------

    def nearest(
        self, queries: np.ndarray, k: int = 10, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The rows of the k nearest items to each query, nearest first.

        Args:
            queries: (Q, D) vectors of any norm but 0.
            k: number of neighbours.
            allowed: (n,) bool mask of rows that may be returned, such as the result of `rows_where`; None: all rows.

        Returns:
            (Q, k) float32 cosines and (Q, k) int64 rows, -1 where fewer than k rows may be returned; k is at most the
            number of these rows.

        Raises:
            ValueError: k is less than 1, the queries have another number of dimensions, or a value is not finite.

        Example:
            ```python
            index = mmctr.ItemIndex.load("demo/index")
            scores, rows = index.nearest(index.vectors([0, 1]), k=3)  # (2, 3) cosines and rows
            print(index.ids.take(rows[0]).to_pylist(), scores[0])
            ```
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
        num_allowed = len(self.items) if allowed is None else int(allowed.sum())
        k = min(k, num_allowed)
        if not k:
            return np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
        selector = None
        if allowed is not None:
            selector = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
            if num_allowed <= max(FEW, len(self.items) // 20):
                return self._exactly(queries, k, selector)
        setting = index_tuning.setting_of(self.index)
        # the search visits more candidates in proportion to the rows that the filter excludes
        value = max(setting.value, k) if setting.name == "efSearch" else setting.value
        value = min(setting.most, int(np.ceil(value * len(self.items) / num_allowed)))
        scores, rows = self.index.search(queries, k, params=index_tuning.parameters(self.index, value, selector))
        short = (rows < 0).any(1)  # never of exact search
        if short.any():
            scores[short], rows[short] = self._exactly(queries[short], k, selector)
        return scores, rows

    def _exactly(self, queries: np.ndarray, k: int, selector: Any) -> tuple[np.ndarray, np.ndarray]:
        """Compare the queries with all selected vectors or codes."""
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
        """The k items nearest to a query, nearest first.

        Args:
            vector: (D,) query.
            k: number of neighbours.
            exclude: an item id, or a list of item ids, that the result does not contain.
            where: conditions on columns of `items`, in the syntax of `mmctr.retrieval.filters`.

        Raises:
            ValueError: k is less than 1, the query does not fit the index, or a condition is malformed.

        Example:
            ```python
            index = mmctr.ItemIndex.load("demo/index")
            mean = index.vectors([0, 1, 2]).mean(axis=0)
            print(index.search(mean, k=3, exclude=index.ids[0].as_py()))
            ```
        """
        excluded = set(exclude) if isinstance(exclude, list | tuple | set) else set() if exclude is None else {exclude}
        if k < 1:
            raise ValueError(f"k={k}: ask for at least one neighbour")
        k = min(k, max(len(self.items), 1))
        scores, rows = self.nearest(np.asarray(vector).reshape(1, -1), k + len(excluded), self.rows_where(where))
        return self.neighbours(scores[0], rows[0], k, excluded)

    def search_item(
        self, item_id: Any, k: int = 10, shift: np.ndarray | None = None, where: Sequence[str] = ()
    ) -> list[Neighbour]:
        """The k items nearest to an item, nearest first, without the item itself.

        Args:
            item_id: raw id; text is converted where the ids are integers.
            k: number of neighbours.
            shift: (D,) vector to add to the vector of the item; None: zero.
            where: conditions on columns of `items`, in the syntax of `mmctr.retrieval.filters`.

        Raises:
            UnknownId: the index has no such item.
            ValueError: k is less than 1, or a condition is malformed.

        Example:
            ```python
            index = mmctr.ItemIndex.load("demo/index")
            for neighbour in index.search_item(index.ids[0].as_py(), k=3):
                print(neighbour.score, neighbour.item_id, neighbour.title)
            ```
        """
        item_id = self.typed(item_id)
        vector = self.vector(item_id)
        return self.search(vector if shift is None else vector + shift, k, exclude=item_id, where=where)

    # vectors ---------------------------------------------------------------------------------------------------------

    def vector(self, item_id: Any) -> np.ndarray:
        """The (D,) vector of an item with the norm before scaling; an index of codes decodes an approximate vector.

        Raises:
            UnknownId: the index has no such item.
        """
        return self.vectors(np.array([self.row(item_id)]), unit=False)[0]

    def vectors(self, rows: np.ndarray | Sequence[int], unit: bool = True) -> np.ndarray:
        """The vectors of some rows.

        Args:
            rows: (m,) rows.
            unit: whether to return unit vectors instead of vectors with the norm before scaling.

        Returns:
            (m, D) float32.
        """
        rows = np.ascontiguousarray(rows, np.int64)
        self._prepare_lookup()
        vectors = self.index.reconstruct_batch(rows)
        return vectors if unit or self.norms is None else vectors * self.norms[rows, None]

    def _prepare_lookup(self) -> None:
        inner = index_tuning.inner_index(self.index)
        if isinstance(inner, faiss.IndexIVF):
            with self._lock:
                if inner.direct_map.no():
                    inner.make_direct_map()

    # changes ---------------------------------------------------------------------------------------------------------

    def add(self, table: EmbeddingTable, columns: pa.Table | None = None, replace: bool = False) -> int:
        """Add items. The index is not trained again; after adding many items of another kind, `tune` shows whether the
        index should be built anew.

        Args:
            table: vectors of the new items.
            columns: catalog columns of the new items, in the order of the table.
            replace: whether items of the index get new vectors; otherwise such items are an error.

        Returns:
            Number of added items.

        Raises:
            ValueError: the vectors have another number of dimensions, a column is missing or has another type, an item
                is in the index already, or the index is memory-mapped.
        """
        self._check_writable()
        table, columns = _with_direction(table, columns)
        if table.dim != self.dim:
            raise ValueError(f"vectors of {table.dim} dimensions cannot be added to an index of {self.dim}")
        is_known = np.array([item in self for item in table.ids.to_pylist()], bool)
        if is_known.any() and not replace:
            some = examples(table.ids.filter(pa.array(is_known)))
            raise ValueError(
                f"{int(is_known.sum())} items are in the index already, like {some}; replace them, or leave out"
            )
        vectors, norms = _unit(table)
        new = index_files.items_of(table, columns)
        lacking = [name for name in self.items.column_names if name not in new.column_names]
        if lacking and lacking != ["title"]:
            raise ValueError(f"the index filters by {lacking}; give these columns of the new items too")
        if is_known.any():
            self.removed[[self.row(item) for item in table.ids.filter(pa.array(is_known)).to_pylist()]] = True
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
        """Exclude items from all results.

        Args:
            item_ids: raw ids.

        Returns:
            Number of removed items.

        Raises:
            UnknownId: the index lacks one of the items; then no item is removed.
        """
        rows = [self.row(self.typed(item)) for item in item_ids]
        self.removed[rows] = True
        self._forget_ids()
        return len(set(rows))

    def compact(self) -> ItemIndex:
        """A copy of the index without the rows of removed items. The copy is not trained again.

        Raises:
            ValueError: the index is memory-mapped.
        """
        self._check_writable()
        rows = np.flatnonzero(~self.removed)
        index = index_tuning.emptied(self.index)
        for start in range(0, len(rows), 65536):
            index.add(self.vectors(rows[start : start + 65536]))
        items = self.items.take(pa.array(rows))
        norms = None if self.norms is None else self.norms[rows]
        return ItemIndex(index, items, self.manifest, norms, None, self.measured, self.factory)

    def tune(self, recall: float = 0.99) -> dict[str, Any]:
        """Measure the recall against exact search over the vectors of the index, and choose the search setting.

        An index of codes is measured against the vectors that the codes decode to.

        Args:
            recall: wanted share of the ten nearest items among the results.

        Returns:
            The result of `mmctr.retrieval.tuning.tune`.

        Raises:
            ValueError: the index has removed items, or is memory-mapped.
        """
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
        self._forget_ids()
        inner = index_tuning.inner_index(self.index)
        if isinstance(inner, faiss.IndexIVF) and not inner.direct_map.no():
            inner.set_direct_map_type(faiss.DirectMap.NoMap)

    # files -----------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write an index folder.

        Raises:
            ValueError: the folder holds other files.

        Example:
            ```python
            index = mmctr.ItemIndex.build(mmctr.EmbeddingTable.read("demo/embeddings"))
            index.save("my_index")
            assert len(mmctr.ItemIndex.load("my_index")) == len(index)
            ```
        """
        rows = {"removed": self.removed} | ({} if self.norms is None else {"norms": self.norms})
        facts = {
            "factory": self.factory,
            "dim": self.dim,
            "count": len(self.items),
            "removed": int(self.removed.sum()),
            "measured": self.measured,
            "embeddings": self.manifest,
        }
        index_files.save(user_path(folder), self.index, self.items, rows, facts)

    @classmethod
    def load(cls, folder: str | Path, mmap: bool = False) -> ItemIndex:
        """Open an index folder, or build an exact index of an embedding folder or file in memory.

        Args:
            folder: an index folder, or vectors as `EmbeddingTable.read` takes.
            mmap: whether to leave the vectors on disk; a memory-mapped index cannot be changed.

        Raises:
            ValueError: the files are missing, damaged, or of another version.

        Example:
            ```python
            index = mmctr.ItemIndex.load("demo/index")
            print(len(index), "items of", index.dim, "dimensions, of the run", index.identity.run)
            ```
        """
        folder = user_path(folder)
        if not index_files.is_index(folder):
            return cls.build(EmbeddingTable.read(folder))
        index, items, rows, facts = index_files.load(folder, mmap)
        manifest, measured, factory = facts["embeddings"], facts["measured"], facts["factory"]
        return cls(index, items, manifest, rows.get("norms"), rows["removed"], measured, factory, mmap)


def _with_direction(table: EmbeddingTable, columns: pa.Table | None) -> tuple[EmbeddingTable, pa.Table | None]:
    """The rows of a table and of the columns whose vector is not zero; the others are set aside with a warning."""
    zero = ~table.vectors.any(1)
    if not zero.any():
        return table, columns
    without = table.ids.filter(pa.array(zero))
    logger.warning(
        "%d of %d items have a vector of zeros, which is near to nothing, and are left out of the index, like %s",
        len(without),
        len(table),
        examples(without),
    )
    return table.without(without), None if columns is None else columns.filter(pa.array(~zero))


def _unit(table: EmbeddingTable) -> tuple[np.ndarray, np.ndarray | None]:
    """(n, D) unit vectors, and the (n,) norms before scaling, None where all norms were 1."""
    norms = np.linalg.norm(table.vectors, axis=1)
    vectors = table.vectors.copy()
    faiss.normalize_L2(vectors)
    return vectors, None if np.abs(norms - 1).max(initial=0.0) < 1e-3 else norms.astype(np.float32)
