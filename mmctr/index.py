"""ItemIndex: nearest items by FAISS. Answers speak raw item ids, never rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet

from mmctr.data.tables import as_ids, read_table, rows_of
from mmctr.embeddings import EmbeddingTable
from mmctr.files import read_json, replace_folder, write_json


@dataclass(frozen=True)
class Neighbour:
    item_id: Any
    score: float
    title: str | None = None


class ItemIndex:
    """Exact search by cosine: vectors are scaled to unit norm, those of an embedding table and queries alike.

    `index` is a plain FAISS index whose ids are positions in `ids`; anyone's FAISS can read the file.
    """

    def __init__(
        self,
        index: faiss.Index,
        ids: pa.Array,
        titles: list[str | None] | None,
        manifest: dict[str, Any],
        norms: np.ndarray | None = None,
    ):
        if index.ntotal != len(ids):
            raise ValueError(f"the index holds {index.ntotal} vectors but there are {len(ids)} ids; build it again")
        self.index, self.ids, self.titles, self.manifest = index, ids, titles, manifest
        self.norms = norms
        """(n,) lengths of the vectors as they came, None where all had unit norm"""

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def build(cls, table: EmbeddingTable) -> ItemIndex:
        vectors, norms = table.vectors.copy(), np.linalg.norm(table.vectors, axis=1)
        faiss.normalize_L2(vectors)
        index = faiss.IndexFlatIP(table.dim)
        index.add(vectors)  # type: ignore[call-arg]
        unit = np.abs(norms - 1).max(initial=0.0) < 1e-3
        return cls(index, table.ids, table.titles, table.manifest, None if unit else norms)  # type: ignore[arg-type]

    def vector(self, item_id: Any) -> np.ndarray:
        """The (D,) vector of an item, as it came. Raises ValueError when it has none."""
        row = self._row(item_id)
        vector: np.ndarray = self.index.reconstruct(row)  # type: ignore[call-arg, assignment]
        return vector if self.norms is None else vector * self.norms[row]

    def _row(self, item_id: Any) -> int:
        try:
            wanted = pa.array([item_id], type=self.ids.type)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            wanted = None
        row = -1 if wanted is None else int(rows_of(wanted, self.ids, "index")[0])
        if row < 0:
            raise ValueError(f"item {item_id!r} has no vector here; ids look like {self.ids[0].as_py()!r}")
        return row

    def search(self, vector: np.ndarray, k: int = 10, exclude: Any = None) -> list[Neighbour]:
        """The k items nearest to a (D,) query, best first; `exclude` is left out of the answer."""
        if k < 1:
            raise ValueError(f"k={k}: ask for at least one neighbour")
        query = np.array(vector, np.float32).reshape(1, -1)
        faiss.normalize_L2(query)
        if query.shape[1] != self.index.d:
            raise ValueError(
                f"the query has {query.shape[1]} dimensions, the index {self.index.d}: it was made by another run"
            )
        scores, rows = self.index.search(query, min(k + (exclude is not None), len(self)))  # type: ignore[call-arg]
        found = [
            Neighbour(self.ids[int(row)].as_py(), float(score), self.titles[row] if self.titles else None)
            for score, row in zip(scores[0], rows[0], strict=True)
            if row >= 0
        ]
        return [n for n in found if exclude is None or n.item_id != exclude][:k]

    def search_item(self, item_id: Any, k: int = 10, shift: np.ndarray | None = None) -> list[Neighbour]:
        """The k items nearest to an item, itself excluded. An id typed as text is understood as an integer one.

        Args:
            shift: (D,) added to the item's vector.
        """
        if pa.types.is_integer(self.ids.type) and isinstance(item_id, str):
            try:
                item_id = int(item_id)
            except ValueError:
                raise ValueError(f"item {item_id!r}: ids here are integers, like {self.ids[0].as_py()}") from None
        vector = self.vector(item_id)
        return self.search(vector if shift is None else vector + shift, k, exclude=item_id)

    def save(self, folder: str | Path) -> None:
        def write(temporary: Path) -> None:
            faiss.write_index(self.index, str(temporary / "index.faiss"))
            columns: dict[str, Any] = {"item_id": self.ids}
            if self.titles is not None:
                columns["title"] = pa.array(self.titles, type=pa.string())
            if self.norms is not None:
                columns["norm"] = pa.array(self.norms, type=pa.float32())
            pyarrow.parquet.write_table(pa.table(columns), temporary / "items.parquet")
            write_json(temporary / "index.json", {"format": 1, "embeddings": self.manifest})

        folder = Path(folder)
        if folder.exists() and any(folder.iterdir()) and not (folder / "index.json").is_file():
            raise ValueError(f"{folder}: the folder is not empty and holds no index; choose another --out")
        replace_folder(folder, write)

    @classmethod
    def load(cls, folder: str | Path) -> ItemIndex:
        """An index folder, or an embedding folder (indexed on the fly). Raises ValueError for anything else."""
        folder = Path(folder)
        if not (folder / "index.json").is_file():
            return cls.build(EmbeddingTable.read(folder))
        manifest = read_json(folder / "index.json")
        try:
            index = faiss.read_index(str(folder / "index.faiss"))
        except RuntimeError as error:
            raise ValueError(
                f"{folder / 'index.faiss'}: not a readable FAISS index ({error}); run `mmctr index` again"
            ) from None
        items = read_table(folder / "items.parquet", ("item_id",))
        titles = items.column("title").to_pylist() if "title" in items.column_names else None
        norms = np.asarray(items.column("norm")) if "norm" in items.column_names else None
        return cls(index, as_ids(items.column("item_id"), "item_id", folder), titles, manifest["embeddings"], norms)
