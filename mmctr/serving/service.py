"""What `mmctr serve` does for a request, without HTTP: the requests and answers, and Service."""

from __future__ import annotations

import base64
import binascii
import os
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmctr.data.arrow import pc
from mmctr.data.images import read_picture
from mmctr.data.tables import rows_of
from mmctr.errors import UnknownId
from mmctr.retrieval.index import Neighbour
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
)
from mmctr.serving.scoring import Scorer
from mmctr.serving.search import KINDS, Kind, Part, Searcher


class Service:
    """What the endpoints do. Raises UnknownId for what is not there, ValueError for what makes no sense."""

    def __init__(self, searcher: Searcher, rankers: dict[str, Scorer], data: str | None = None):
        self.searcher, self.index, self.rankers = searcher, searcher.index, rankers
        if not rankers and data is None and searcher.index.identity.data is None:
            self.catalog = None
        else:
            self.catalog = (next(iter(rankers.values())) if rankers else searcher).dataset.catalog
        # heavy arithmetic side by side would take turns on the same cores
        self.busy = threading.Semaphore(os.cpu_count() or 1)
        self._text_vector = lru_cache(maxsize=4096)(lambda text: searcher.encoder.embed(texts=text))
        self._places: np.ndarray | None = None
        if self.catalog is not None:
            # (n,) catalog row of each row of the index
            self._places = rows_of(self.index.ids, self.catalog.item_ids, "the index and the catalog")

    def title(self, item_id: Any) -> str | None:
        if item_id in self.index and "title" in self.index.items.column_names:
            return self.index.items["title"][self.index.row(item_id)].as_py()
        return None

    def search(self, request: SearchRequest) -> list[Neighbour]:
        parts = [self._part(part) for part in request.parts]
        with self.busy:
            if len(parts) == 1 and parts[0].kind == "text":
                return self.index.search(self._text_vector(parts[0].value), request.k, where=request.where)
            return self.searcher.answer(parts, request.k, request.where)

    def search_picture(self, picture: bytes, k: int, where: list[str]) -> list[Neighbour]:
        with self.busy:
            return self.searcher.answer([Part("image", picture)], k, where)

    @staticmethod
    def _part(part: QueryPart) -> Part:
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
        if name not in self.rankers:
            raise ValueError(f"no {name} is served; start `mmctr serve` with --{name} RUN")
        return self.rankers[name]

    def moment(self, request: Moment) -> tuple[Scorer, int, np.ndarray]:
        """The ranker, the row of the user, and the catalog rows clicked."""
        scorer = self.scorer(request.ranker)
        user = scorer.stranger if request.user_id is None else scorer.dataset.user_row(request.user_id)
        if request.history is not None:
            return scorer, user, scorer.dataset.catalog.rows(request.history)
        return scorer, user, scorer.history(user, request.at)

    def score(self, request: ScoreRequest) -> Ranking:
        scorer, user, history = self.moment(request)
        rows = scorer.dataset.catalog.rows(request.items)
        with self.busy:
            scores = scorer.score(user, rows, history, request.context, request.at)
        return self._ranking(scorer, rows, scores, len(history))

    def rank(self, request: RankRequest) -> Ranking:
        """The best of the items nearest to what was clicked; of all of them where nothing was."""
        scorer, user, history = self.moment(request)
        rows = self.candidates(scorer, history, request.candidates, request.among)
        with self.busy:
            scores = scorer.score(user, rows, history, request.context, request.at)
        best = np.argsort(-scores, kind="stable")[: request.k]
        return self._ranking(scorer, rows[best], scores[best], len(history))

    def candidates(self, scorer: Scorer, history: np.ndarray, count: int, among: str) -> np.ndarray:
        """Catalog rows of items in the index that were not clicked."""
        if self._places is None:
            raise ValueError("the index does not say of which dataset it is; start `mmctr serve` with --data")
        allowed = (self._places >= 0) & ~np.isin(self._places, history)
        if among != "all":
            allowed &= scorer.cold[self._places] == (among == "cold")
        clicked = np.flatnonzero(np.isin(self._places, history) & ~self.index.removed)
        if not len(clicked):
            rows = self._places[allowed & ~self.index.removed]
            return rows[:: max(1, len(rows) // count)][:count]
        with self.busy:
            mean = self.index.vectors(clicked).mean(0)
            return self._places[self.index.nearest(mean[None], count, allowed)[1][0]]

    def explain(self, request: ExplainRequest) -> Explanation:
        scorer, user, history = self.moment(request)
        row = int(scorer.dataset.catalog.rows([request.item_id])[0])
        with self.busy:
            found = scorer.explain(user, row, history, request.context, request.at)
        ids = scorer.dataset.catalog.item_ids.take(pa.array(found["history"])).to_pylist()
        weights = [None] * len(ids) if found["weights"] is None else found["weights"].tolist()
        reasons = [
            Reason(item_id=item, title=self.title(item), effect=effect, weight=weight)
            for item, effect, weight in zip(ids, found["effects"].tolist(), weights, strict=True)
        ]
        return Explanation(score=found["score"], history=reasons)

    def _ranking(self, scorer: Scorer, rows: np.ndarray, scores: np.ndarray, history_length: int) -> Ranking:
        ids = scorer.dataset.catalog.item_ids.take(pa.array(rows)).to_pylist()
        cold = scorer.cold[rows].tolist()
        items = [
            Scored(item_id=item, score=score, title=self.title(item), cold=unseen)
            for item, score, unseen in zip(ids, scores.tolist(), cold, strict=True)
        ]
        return Ranking(items=items, history_length=history_length)

    def picture(self, item_id: str) -> bytes:
        if self.catalog is None or "image" not in self.catalog.table.column_names:
            raise UnknownId("there are no pictures here")
        row = int(self.catalog.rows([self.index.typed(item_id)])[0])
        return read_picture(self.catalog.picture_cell(row), self.catalog.root)

    def users(self, starts: str, count: int) -> list[Any]:
        """Ids of users that begin with some letters or digits."""
        if not self.rankers:
            return []
        ids = next(iter(self.rankers.values())).dataset.users["user_id"]
        if not starts:
            return ids.slice(0, count).to_pylist()
        return ids.filter(pc.starts_with(ids.cast(pa.string()), starts)).slice(0, count).to_pylist()

    def facts(self) -> dict[str, Any]:
        """What the page needs to know."""
        columns = {}
        for name in self.index.items.column_names:
            if name in ("item_id", "title"):
                continue
            values = self.index.items[name].combine_chunks()
            kind = values.type
            flat = pc.list_flatten(values) if pa.types.is_list(kind) else values
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
            "sample": [{"item_id": item, "title": self.title(item)} for item in self.index.sample(24)],
        }
