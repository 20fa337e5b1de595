"""Scorer: a ranker's run answers for one user at a time, now or as of an earlier moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator

from mmctr.data.interactions import Impressions
from mmctr.features.columns import FeatureColumns, encode_table
from mmctr.runs.finished import open_ranker, ranking_data

BATCH = 4096


class Scorer:
    """Click probabilities of items for a user, and what of the history they rest on.

    Args:
        run: run folder of a ranker.
        data: dataset with the items and users of today; the run's own when None.
        embeddings: where items that are new to the ranker have their vectors; see `bind_content`.

    Safe in many threads.
    """

    def __init__(self, run: str | Path, data: str | None = None, embeddings: Sequence[str] = ()):
        self.run = Path(run)
        accelerator = Accelerator()
        self.task, self.dataset, _ = open_ranker(self.run, data, accelerator, embeddings=embeddings)
        self.task.to(accelerator.device).eval()
        self.device = accelerator.device
        self.ranking = ranking_data(self.task, self.dataset)
        # one more row: a user whom nobody knows
        users = self.dataset.users
        nobody = pa.table({name: pa.nulls(1, users.schema.field(name).type) for name in users.column_names})
        self.stranger = len(users)
        features = self.task.config.features
        everyone = pa.concat_tables([users, nobody])
        self.ranking.users = encode_table(features.user, self.task.vocabulary.user, everyone, "users table")
        rows = self.ranking.user_rows
        self.ranking.user_rows = torch.cat([rows, rows.new_zeros(1)])

    @property
    def cold(self) -> np.ndarray:
        """(N,) mask of catalog rows that no training row held."""
        return self.ranking.id_rows == 0

    def history(self, user: int, at: int | None = None) -> np.ndarray:
        """(h,) catalog rows of what a user row clicked before a time, or ever; none for a stranger."""
        if user == self.stranger:
            return np.zeros(0, np.int32)
        return self.dataset.interactions.clicked_before(user, at)

    @torch.inference_mode()
    def score(
        self,
        user: int,
        items: np.ndarray,
        history: np.ndarray,
        context: dict[str, Any] | None = None,
        at: int | None = None,
    ) -> np.ndarray:
        """(n,) click probabilities.

        Args:
            user: row of the dataset's users, or `stranger`.
            items: (n,) catalog rows.
            history: (h,) catalog rows of what was clicked, oldest first.
            context: values of context columns; what is not given is as in the user's latest impression until `at`.
        """
        count = len(items)
        part = Impressions(
            np.full(count, user),
            np.asarray(items),
            np.zeros(count, np.uint8),
            np.zeros(count, np.int64),
            np.asarray(history),
            np.zeros(count, np.int64),
            np.full(count, len(history)),
        )
        return self._probabilities(part, self._context(user, context, at))[0]

    @torch.inference_mode()
    def explain(
        self,
        user: int,
        item: int,
        history: np.ndarray,
        context: dict[str, Any] | None = None,
        at: int | None = None,
    ) -> dict[str, Any]:
        """What each behaviour that is read does to the score of one item.

        Returns:
            `score`; `history` (h,) catalog rows, the latest the ranker reads; `effects` (h,), the log-odds of a click
            with the whole history minus those without this behaviour; `weights` (h,), what attention gives it, None
            for a ranker without attention.
        """
        history = np.asarray(history)[-self.task.config.max_history :]
        h = len(history)
        # the whole history, then one without each behaviour
        kept = ~np.eye(h, dtype=bool)
        values = np.concatenate([history, np.broadcast_to(history, (h, h))[kept]])
        lengths = np.concatenate([[h], np.full(h, max(h - 1, 0))])
        ends = lengths.cumsum()
        part = Impressions(
            np.full(h + 1, user),
            np.full(h + 1, item),
            np.zeros(h + 1, np.uint8),
            np.zeros(h + 1, np.int64),
            values,
            ends - lengths,
            ends,
        )
        scores, weights = self._probabilities(part, self._context(user, context, at))
        odds = np.log(scores) - np.log1p(-scores)
        return {
            "score": float(scores[0]),
            "history": history,
            "effects": odds[0] - odds[1:],
            "weights": None if weights is None else weights[:h],
        }

    def _probabilities(self, part: Impressions, context: FeatureColumns) -> tuple[np.ndarray, np.ndarray | None]:
        collator = replace(self.ranking.collator(part), context=context)
        scores, weights = [], []
        for start in range(0, len(part), BATCH):
            batch = collator(np.arange(start, min(start + BATCH, len(part)))).to(self.device)
            output = self.task.output(batch)
            scores.append(torch.sigmoid(output.logits.double()).cpu().numpy())
            weights.append(output.history_weights)
        if any(part is None for part in weights):
            return np.concatenate(scores), None
        return np.concatenate(scores), torch.cat(weights).float().cpu().numpy()

    def _context(self, user: int, given: dict[str, Any] | None, at: int | None) -> FeatureColumns:
        """One row of context columns. Raises ValueError for a column that the ranker does not read, or a value that is
        not of its type."""
        features, given = self.task.config.features.context, given or {}
        for name in given:
            if name not in features:
                raise ValueError(f"context {name!r}: this ranker reads {', '.join(features) or 'no context columns'}")
        if not features:
            return FeatureColumns({})
        table, latest = self.dataset.context, None
        if user != self.stranger:
            log = self.dataset.interactions
            first, after = np.searchsorted(log.user, [user, user + 1])
            if at is not None:
                after = first + int(np.searchsorted(log.time[first:after], at, side="right"))
            latest = int(after) - 1 if after > first else None
        columns = {}
        for name in features:
            kind = table.schema.field(name).type
            if name in given:
                try:
                    columns[name] = pa.array([given[name]], kind)
                except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
                    raise ValueError(f"context {name!r}: {given[name]!r} is no {kind}") from None
            else:
                columns[name] = pa.nulls(1, kind) if latest is None else table[name].slice(latest, 1)
        return encode_table(features, self.task.vocabulary.context, pa.table(columns), "context")
