"""Service: the answers to the requests of `mmctr serve`, without HTTP."""

from __future__ import annotations

import base64
import binascii
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmctr.data.arrow import pc
from mmctr.data.catalog import Catalog
from mmctr.data.images import read_picture
from mmctr.data.tables import rows_of, typed_id
from mmctr.errors import UnknownId
from mmctr.retrieval.indexed_items import Neighbour
from mmctr.serving.schemas import (
    ExplainRequest,
    Explanation,
    Moment,
    QueryPart,
    Ranking,
    RankRequest,
    Reason,
    Scored,
    ScoreRequest,
    SearchRequest,
    written_id,
)
from mmctr.serving.scoring import Scorer
from mmctr.serving.search import KINDS, Kind, Part, Searcher

WAIT = 10.0
"""seconds that a request waits for a free core"""


class Busy(Exception):
    """More requests are being computed than cores can answer in time."""


class Service:
    """Answers the requests of the endpoints.

    Methods raise UnknownId for an item or user that does not exist, ValueError for other wrong requests, and Busy where
    no core becomes free in time.

    Args:
        searcher: answers searches.
        rankers: scorers by the names "ranker" and "baseline".
        data: dataset folder with pictures of items; None: the dataset of a ranker or of the index.
    """

    def __init__(self, searcher: Searcher, rankers: dict[str, Scorer], data: str | None = None):
        self.searcher, self.index, self.rankers = searcher, searcher.index, rankers
        if not rankers and data is None and searcher.index.identity.data is None:
            self.catalog = None
        else:
            self.catalog = (next(iter(rankers.values())) if rankers else searcher).dataset.catalog
        # more concurrent computations than cores would only compete for the cores
        self._slots = threading.Semaphore(os.cpu_count() or 1)
        self._text_vector = lru_cache(maxsize=4096)(lambda text: searcher.encoder.embed(texts=text))
        self._catalog_rows: np.ndarray | None = None
        """(n,) catalog row of each row of the index, -1 for none"""
        if self.catalog is not None:
            self.index.take_titles(self.catalog.table)
            self._catalog_rows = rows_of(self.index.ids, self.catalog.item_ids, "the index and the catalog")

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Within the context one of the cores is taken.

        Raises:
            Busy: no core became free within `WAIT` seconds.
        """
        if not self._slots.acquire(timeout=WAIT):
            raise Busy(f"no core became free within {WAIT:g} seconds; ask again later")
        try:
            yield
        finally:
            self._slots.release()

    def title(self, item_id: Any) -> str | None:
        """The title of an item of the index; None without a title."""
        if item_id in self.index and "title" in self.index.items.column_names:
            return self.index.items["title"][self.index.row(item_id)].as_py()
        return None

    def search(self, request: SearchRequest) -> list[Neighbour]:
        """The items nearest to a query."""
        parts = [self._part(part) for part in request.parts]
        with self.computing():
            if len(parts) == 1 and parts[0].kind == "text":
                return self.index.search(self._text_vector(parts[0].value), request.k, where=request.where)
            return self.searcher.answer(parts, request.k, request.where)

    def search_picture(self, picture: bytes, k: int, where: list[str]) -> list[Neighbour]:
        """The k items nearest to an encoded picture that fulfil the conditions."""
        with self.computing():
            return self.searcher.answer([Part("image", picture)], k, where)

    @staticmethod
    def _part(part: QueryPart) -> Part:
        """The part of a query from the part of a request."""
        given: list[Kind] = [kind for kind in KINDS if getattr(part, kind) is not None]
        if len(given) != 1:
            raise ValueError("a part of a query has one of item_id, text, image and user_id")
        kind = given[0]
        value = getattr(part, kind)
        if kind == "image":
            try:
                value = base64.b64decode(value, validate=True)
            except (binascii.Error, ValueError):
                raise ValueError("image: not base64; upload the file to /api/search/picture instead") from None
        return Part(kind, value, part.weight)

    def scorer(self, name: str) -> Scorer:
        """The scorer of a name; ValueError where there is none."""
        if name not in self.rankers:
            raise ValueError(f"no {name} is served; start `mmctr serve` with --{name} RUN")
        return self.rankers[name]

    def moment(self, request: Moment) -> tuple[Scorer, int, np.ndarray]:
        """The scorer, the row of the user, and the catalog rows (h,) of the clicked items."""
        scorer = self.scorer(request.ranker)
        user = scorer.stranger if request.user_id is None else scorer.dataset.user_row(request.user_id)
        if request.history is not None:
            return scorer, user, rows_of_items(scorer.dataset.catalog, request.history)
        return scorer, user, scorer.history(user, request.at)

    def score(self, request: ScoreRequest) -> Ranking:
        """The click probabilities of the items of a request, in the order of the request."""
        scorer, user, history = self.moment(request)
        rows = rows_of_items(scorer.dataset.catalog, request.items)
        with self.computing():
            scores = scorer.score(user, rows, history, request.context, request.at)
        return self._ranking(scorer, rows, scores, len(history))

    def rank(self, request: RankRequest) -> Ranking:
        """The items with the largest click probabilities among the `candidates`, best first."""
        scorer, user, history = self.moment(request)
        rows = self.candidates(scorer, history, request.candidates, request.among)
        with self.computing():
            scores = scorer.score(user, rows, history, request.context, request.at)
        best = np.argsort(-scores, kind="stable")[: request.k]
        return self._ranking(scorer, rows[best], scores[best], len(history))

    def candidates(self, scorer: Scorer, history: np.ndarray, count: int, among: str) -> np.ndarray:
        """Catalog rows of items to rank: the items nearest to the mean of the clicked items, clicked items excluded.

        Args:
            scorer: knows the cold items.
            history: (h,) catalog rows of the clicked items; without clicks the candidates are spread over the index.
            count: largest number of candidates.
            among: "all", "cold" or "warm" items.
        """
        if self._catalog_rows is None:
            raise ValueError("the index does not name the dataset of the vectors; start `mmctr serve` with --data")
        allowed = (self._catalog_rows >= 0) & ~np.isin(self._catalog_rows, history)
        if among != "all":
            allowed &= scorer.cold[self._catalog_rows] == (among == "cold")
        clicked = np.flatnonzero(np.isin(self._catalog_rows, history) & ~self.index.removed)
        if not len(clicked):
            rows = self._catalog_rows[allowed & ~self.index.removed]
            return rows[:: max(1, len(rows) // count)][:count]
        with self.computing():
            mean = self.index.vectors(clicked).mean(0)
            return self._catalog_rows[self.index.nearest(mean[None], count, allowed)[1][0]]

    def explain(self, request: ExplainRequest) -> Explanation:
        """The click probability of an item, and the effect of each behaviour."""
        scorer, user, history = self.moment(request)
        row = int(rows_of_items(scorer.dataset.catalog, [request.item_id])[0])
        with self.computing():
            result = scorer.explain(user, row, history, request.context, request.at)
        ids = scorer.dataset.catalog.item_ids.take(pa.array(result["history"])).to_pylist()
        weights = [None] * len(ids) if result["weights"] is None else result["weights"].tolist()
        reasons = [
            Reason(item_id=item, title=self.title(item), effect=effect, weight=weight)
            for item, effect, weight in zip(ids, result["effects"].tolist(), weights, strict=True)
        ]
        return Explanation(score=result["score"], history=reasons)

    def _ranking(self, scorer: Scorer, rows: np.ndarray, scores: np.ndarray, history_length: int) -> Ranking:
        """The answer with catalog rows (n,) and click probabilities (n,)."""
        ids = scorer.dataset.catalog.item_ids.take(pa.array(rows)).to_pylist()
        cold = scorer.cold[rows].tolist()
        items = [
            Scored(item_id=item, score=score, title=self.title(item), cold=is_cold)
            for item, score, is_cold in zip(ids, scores.tolist(), cold, strict=True)
        ]
        return Ranking(items=items, history_length=history_length)

    def picture(self, item_id: str) -> bytes:
        """The encoded picture of an item."""
        if self.catalog is None or "image" not in self.catalog.table.column_names:
            raise UnknownId("the catalog has no pictures")
        row = int(rows_of_items(self.catalog, [item_id])[0])
        return read_picture(self.catalog.picture_cell(row), self.catalog.root)

    def users(self, starts: str, count: int) -> list[Any]:
        """Raw ids of at most `count` users whose id begins with the text `starts`."""
        if not self.rankers:
            return []
        ids = next(iter(self.rankers.values())).dataset.users["user_id"]
        if not starts:
            return ids.slice(0, count).to_pylist()
        return ids.filter(pc.starts_with(ids.cast(pa.string()), starts)).slice(0, count).to_pylist()

    def facts(self) -> dict[str, Any]:
        """Facts about index, rankers and encoder for the page."""
        columns = {}
        for name in self.index.items.column_names:
            if name in ("item_id", "title"):
                continue
            values = self.index.items[name].combine_chunks()
            kind = values.type
            flat = pc.list_flatten(values) if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) else values
            distinct = flat.unique().drop_null()
            choice = len(distinct) <= (12 if pa.types.is_integer(kind) else 40) and not pa.types.is_floating(kind)
            columns[name] = {"type": str(kind), "values": sorted(map(str, distinct.to_pylist())) if choice else None}
        run = self.index.identity.run
        return {
            "items": len(self.index),
            "columns": columns,
            "rankers": {name: scorer.run.name for name, scorer in self.rankers.items()},
            "encoder": self.searcher.has_encoder,
            "run": Path(run).name if run is not None else None,
            "sample": [{"item_id": written_id(item), "title": self.title(item)} for item in self.index.sample(24)],
        }


def rows_of_items(catalog: Catalog, item_ids: Sequence[int | str]) -> np.ndarray:
    """The catalog rows (n,) of the ids of a request, in which integers may be written as text.

    Raises:
        UnknownId: an item is not in the catalog.
    """
    return catalog.rows([typed_id(item_id, catalog.item_ids) for item_id in item_ids])
