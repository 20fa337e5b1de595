"""The public Python API: open a run, an embedding folder or an index; train a run; compare runs."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmctr.data.embeddings import EmbeddingTable
from mmctr.data.tables import rows_of
from mmctr.errors import UnknownId
from mmctr.files import user_path
from mmctr.reports.compare import comparison_json, comparison_table, write_report
from mmctr.reports.run import Run, load_runs
from mmctr.retrieval.index import ItemIndex
from mmctr.retrieval.indexed_items import Neighbour
from mmctr.retrieval.storage import is_index
from mmctr.run_folder import RunFolder
from mmctr.runs.config import FinetuneConfig, PretrainConfig
from mmctr.runs.item_encoder import ItemEncoder, Picture
from mmctr.serving.scoring import Scorer
from mmctr.serving.search import Kind, Part, Searcher
from mmctr.shipped import recipe_module
from mmctr.tasks.folder import task_kind


def load(path: str | Path) -> ItemEncoder | Ranker | ItemSearch:
    """Open a finished run, an embedding folder or an index.

    Args:
        path: folder of `pretrain.train`, `finetune.train`, `mmctr embed` or `mmctr index`; or a file of vectors
            (Parquet, .npz, .safetensors).

    Returns:
        An `ItemEncoder` for a pretraining run, a `Ranker` for a ranking run, an `ItemSearch` for vectors.

    Raises:
        ValueError: the folder is missing, not finished, or of another kind.

    Example:
        ```python
        encoder = mmctr.load("demo/pretrain")
        ranker = mmctr.load("demo/din_table")
        search = mmctr.load("demo/index")
        print(encoder.dim, len(ranker.item_ids), len(search))
        ```
    """
    folder = user_path(path)
    if RunFolder(folder).task.is_file():
        return ItemEncoder(folder) if task_kind(folder) == "pretrain" else Ranker(folder)
    if folder.exists() and not RunFolder(folder).is_begun:
        return ItemSearch(folder)
    state = "a run that has not finished; start its recipe again" if folder.exists() else "no such folder or file"
    raise ValueError(f"{folder}: {state}")


class ItemSearch:
    """Nearest-neighbour search over the vectors of a catalog, by items, texts, pictures, users, or a mix of these.

    Args:
        path: an index, an embedding folder, or a file of vectors, which is searched exactly.
        run: the pretraining run that encodes texts and pictures; None: the run that made the vectors.
        data: the dataset whose log has the clicks of users; None: the dataset of the vectors.

    Raises:
        ValueError: the path holds no index and no vectors.

    Example:
        ```python
        search = mmctr.load("demo/index")
        for neighbour in search.search(text="red striped circle", k=5):
            print(neighbour.score, neighbour.item_id, neighbour.title)
        ```
    """

    def __init__(self, path: str | Path, run: str | None = None, data: str | None = None):
        folder = Path(path)
        self.index = ItemIndex.load(folder) if is_index(folder) else ItemIndex.build(EmbeddingTable.read(folder))
        self._searcher = Searcher(self.index, run, data)

    def __len__(self) -> int:
        """Number of items in the index."""
        return len(self.index)

    def search(
        self,
        *,
        item_id: Any = None,
        text: str | None = None,
        image: Picture | None = None,
        user_id: Any = None,
        vector: np.ndarray | None = None,
        k: int = 10,
        where: Sequence[str] = (),
    ) -> list[Neighbour]:
        """The k items nearest to a query, nearest first.

        The vector of a query of several parts is the sum of the unit vectors of the parts. Items that are parts of the
        query are left out of the result.

        Args:
            item_id: raw id of an item of the index.
            text: a text.
            image: encoded bytes, a path, a PIL image, or (H, W, 3) uint8 pixels.
            user_id: raw id of a user of the dataset, whose vector is the mean over the clicked items.
            vector: (D,), for example of `ItemEncoder.embed`; without other parts.
            k: number of neighbours.
            where: conditions on catalog columns, such as `"price<20"` (`mmctr.retrieval.filters`).

        Raises:
            ValueError: an unknown item or user, a picture that cannot be read, a malformed condition, or no part.

        Example:
            ```python
            search = mmctr.load("demo/index")
            neighbours = search.search(text="red striped circle", k=5)
            similar = search.search(item_id=neighbours[0].item_id, k=5)
            ```
        """
        given: dict[Kind, Any] = {"item_id": item_id, "text": text, "image": image, "user_id": user_id}
        parts = [Part(kind, value) for kind, value in given.items() if value is not None]
        if vector is not None:
            if parts:
                raise ValueError("a vector is a complete query: leave the other parts out")
            return self.index.search(vector, k, where=where)
        return self._searcher.answer(parts, k, where)


class Ranker:
    """A finished ranking run that scores items for a user; items and users are given by raw id.

    Args:
        run: folder of `finetune.train`.
        data: dataset folder with the current items and users; None: the dataset of the run.
        embeddings: folders with vectors of items that are new to the run.

    Raises:
        ValueError: the folder holds no finished ranking run, or the embeddings are of another pretraining run.

    Example:
        ```python
        ranker = mmctr.load("demo/din_table")
        user_id = ranker.dataset.users["user_id"][0].as_py()
        best = ranker.rank(user_id=user_id, k=5)  # [(item_id, click probability), ...]
        history = [item_id for item_id, _ in best]
        probabilities = ranker.score(ranker.cold_item_ids[:4], history=history)  # for a user who is not in the log
        ```
    """

    def __init__(self, run: str | Path, data: str | None = None, embeddings: Sequence[str] = ()):
        self.run = Path(run)
        self._scorer = Scorer(run, data, embeddings)
        self.dataset = self._scorer.dataset

    @property
    def item_ids(self) -> pa.Array:
        """(N,) raw ids of the catalog."""
        return self.dataset.catalog.item_ids

    @property
    def cold_item_ids(self) -> list[Any]:
        """Raw ids of the items of the catalog that occur in no training row.

        Example:
            ```python
            ranker = mmctr.load("demo/din_table")
            print(len(ranker.cold_item_ids), "of", len(ranker.item_ids), "items are cold")
            ```
        """
        return self.item_ids.filter(pa.array(self._scorer.cold)).to_pylist()

    def score(
        self,
        items: Sequence[Any],
        user_id: Any = None,
        history: Sequence[Any] | None = None,
        context: dict[str, Any] | None = None,
        at: float | None = None,
    ) -> np.ndarray:
        """Click probabilities of n items for one user.

        Args:
            items: raw ids of catalog items.
            user_id: raw id of the user; None, or an id that is not in the log, for an unknown user, who needs a
                `history` where an id is given.
            history: raw ids of clicked items, oldest first; None: the clicks of the user in the log.
            context: values of context columns by name; a missing column has the value of the latest impression of the
                user.
            at: time in the unit of the column `timestamp` of the log, fractions included: only earlier events count.
                None: the whole log counts.

        Returns:
            (n,) probabilities in [0, 1].

        Raises:
            UnknownId: an item is not in the catalog, or the user is not in the log and no history is given.
            ValueError: a context column that the ranker does not read.

        Example:
            ```python
            ranker = mmctr.load("demo/din_table")
            items = ranker.item_ids[:3].to_pylist()
            probabilities = ranker.score(items, history=items[:1])
            ```
        """
        return self._score_rows(self._rows(items), user_id, history, context, at)

    def rank(
        self,
        candidates: Sequence[Any] | None = None,
        user_id: Any = None,
        history: Sequence[Any] | None = None,
        k: int | None = 10,
        context: dict[str, Any] | None = None,
        at: float | None = None,
    ) -> list[tuple[Any, float]]:
        """The k candidates with the largest click probabilities for one user.

        Args:
            candidates: raw ids of catalog items; None: the whole catalog.
            user_id: as in `score`.
            history: as in `score`.
            k: number of items to return; None: all candidates.
            context: as in `score`.
            at: as in `score`.

        Returns:
            Pairs of raw id and click probability, largest probability first.

        Raises:
            UnknownId: as `score`.
            ValueError: as `score`.

        Example:
            ```python
            ranker = mmctr.load("demo/din_table")
            user_id = ranker.dataset.users["user_id"][0].as_py()
            best_cold_items = ranker.rank(ranker.cold_item_ids, user_id=user_id, k=5)
            ```
        """
        rows = np.arange(len(self.item_ids)) if candidates is None else self._rows(candidates)
        scores = self._score_rows(rows, user_id, history, context, at)
        order = np.argsort(-scores, kind="stable")[:k]
        best = self.item_ids.take(pa.array(rows[order])).to_pylist()
        return list(zip(best, scores[order].tolist(), strict=True))

    def _score_rows(
        self,
        rows: np.ndarray,
        user_id: Any,
        history: Sequence[Any] | None,
        context: dict[str, Any] | None,
        at: float | None,
    ) -> np.ndarray:
        """Click probabilities (n,) of catalog rows (n,); the other arguments are those of `score`."""
        if not len(rows):
            return np.zeros(0)
        user, past = self._user(user_id, history, at)
        return self._scorer.score(user, rows, past, context, at)

    def _rows(self, items: Sequence[Any]) -> np.ndarray:
        """(n,) catalog rows of raw ids."""
        kind = self.item_ids.type
        try:
            wanted = pa.array(list(items)).cast(kind) if len(items) else pa.array([], kind)  # an empty history
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError) as error:
            raise UnknownId(f"item ids here are {kind}, like {self.item_ids[0].as_py()!r} ({error})") from None
        rows = rows_of(wanted, self.item_ids, "items")
        unknown = np.flatnonzero(rows < 0)
        if len(unknown):
            raise UnknownId(
                f"item {wanted[int(unknown[0])].as_py()!r} is not in the catalog; ids look like "
                f"{self.item_ids[0].as_py()!r}"
            )
        return rows

    def _user(self, user_id: Any, history: Sequence[Any] | None, at: float | None) -> tuple[int, np.ndarray]:
        """The row of a user, and the catalog rows of the behaviours to read."""
        user = self._scorer.stranger
        if user_id is not None:
            try:
                user = self.dataset.user_row(user_id)
            except UnknownId as error:
                if history is None:
                    raise UnknownId(f"{error}; give a history to score for an unknown user") from None
        return user, self._scorer.history(user, at) if history is None else self._rows(history)


@dataclass(frozen=True)
class Comparison:
    """A comparison of finished ranking runs on the same rows, each run with the first run.

    Args:
        runs: the runs.

    Example:
        ```python
        comparison = mmctr.compare("demo/din_id", "demo/din_table")
        print(comparison)
        cold_gauc = comparison.to_json()["runs"][1]["test"]["cold"]["gauc"]
        ```
    """

    runs: list[Run]

    def __str__(self) -> str:
        """The comparison as a text table."""
        return comparison_table(self.runs)

    def to_json(self) -> dict[str, Any]:
        """The metrics of each run, and the paired differences to the first run with bootstrap intervals."""
        return comparison_json(self.runs)

    def write_html(self, path: str | Path) -> None:
        """Write a self-contained HTML file with tables, plots and training curves.

        Args:
            path: the file to write.
        """
        write_report(self.runs, path)


def compare(*runs: str | Path) -> Comparison:
    """Compare finished ranking runs with the first one, on the same rows.

    Args:
        *runs: run folders of `finetune.train`.

    Raises:
        ValueError: a folder is not a finished ranking run.

    Example:
        ```python
        print(mmctr.compare("demo/din_id", "demo/din_table"))
        ```
    """
    return Comparison(load_runs(runs))


def train(config: FinetuneConfig | PretrainConfig) -> ItemEncoder | Ranker:
    """Train a run in this process, by the recipe of the config, and open the finished run.

    An interrupted run continues. The command line trains with several processes.

    Args:
        config: a `FinetuneConfig` or a `PretrainConfig`, made by `load(path, ["key=value"])` or `parse({...})`.

    Returns:
        A `Ranker` for a `FinetuneConfig`, an `ItemEncoder` for a `PretrainConfig`.

    Raises:
        ValueError: the recipe refuses the config or the data; the message names the key, file or row.

    Example:
        ```python
        changes = ["data.path=demo/data", "run_dir=runs/id"]
        ranker = mmctr.train(mmctr.FinetuneConfig.load("configs/finetune/toy_din_id.yaml", changes))
        ```
    """
    recipe = "finetune" if isinstance(config, FinetuneConfig) else "pretrain"
    importlib.import_module(recipe_module(recipe)).main(config)
    return ItemEncoder(config.run_dir) if isinstance(config, PretrainConfig) else Ranker(config.run_dir)
