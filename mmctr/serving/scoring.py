"""Scorer: click probabilities of a ranking run for one user at a time, now or at an earlier time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from mmctr.data.interactions import Impressions
from mmctr.distributed import start_processes
from mmctr.features.columns import FeatureColumns, encode_table
from mmctr.files import user_path
from mmctr.runs.finished import open_ranker, ranking_data

BATCH = 4096
"""impressions that are scored at once"""


class Scorer:
    """Click probabilities of items for a user, and the effects of behaviours on a probability. Thread-safe.

    Args:
        run: folder of `finetune.train`.
        data: dataset folder with the current items and users; None: the dataset of the run.
        embeddings: folders with vectors of items that are new to the run (`bind_content`).

    Raises:
        ValueError: the run or the dataset cannot be read, or the embeddings do not fit the run.
    """

    def __init__(self, run: str | Path, data: str | None = None, embeddings: Sequence[str] = ()):
        self.run = user_path(run)
        accelerator = start_processes()
        self.task, self.dataset, _ = open_ranker(self.run, data, accelerator, embeddings=embeddings)
        self.task.to(accelerator.device).eval()
        self.device = accelerator.device
        self.ranking = ranking_data(self.task, self.dataset)
        # one more row, for an unknown user
        users = self.dataset.users
        unknown = pa.table({name: pa.nulls(1, users.schema.field(name).type) for name in users.column_names})
        self.stranger = len(users)
        features = self.task.config.features
        all_users = pa.concat_tables([users, unknown])
        self.ranking.users = encode_table(features.user, self.task.vocabulary.user, all_users, "users table")
        rows = self.ranking.user_rows
        self.ranking.user_rows = torch.cat([rows, rows.new_zeros(1)])

    @property
    def cold(self) -> np.ndarray:
        """(N,) bool, the items of the catalog that occur in no training row."""
        return self.ranking.id_rows == 0

    def history(self, user: int, at: float | None = None) -> np.ndarray:
        """The catalog rows (h,) of the items that a user has clicked, oldest first; empty for an unknown user.

        Args:
            user: row of the users of the dataset, or `stranger`.
            at: only clicks before this time, in the unit of the column `timestamp`; None: all clicks.
        """
        if user == self.stranger:
            return np.zeros(0, np.int32)
        return self.dataset.interactions.clicked_before(user, self.dataset.time(at))

    @torch.inference_mode()
    def score(
        self,
        user: int,
        items: np.ndarray,
        history: np.ndarray,
        context: dict[str, Any] | None = None,
        at: float | None = None,
    ) -> np.ndarray:
        """Click probabilities (n,) of items.

        Args:
            user: row of the users of the dataset, or `stranger` for an unknown user.
            items: (n,) catalog rows.
            history: (h,) catalog rows of the clicked items, oldest first.
            context: values of context columns; a missing column has the value of the latest impression of the user
                until `at`.
            at: time of the scoring; None: after all of the log.

        Raises:
            ValueError: a context column that the ranker does not read, or a value of another type.
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
        at: float | None = None,
    ) -> dict[str, Any]:
        """The effect of each behaviour on the score of one item.

        Args:
            user: row of the users of the dataset, or `stranger`.
            item: catalog row.
            history: (h,) catalog rows of the clicked items, oldest first.
            context: as in `score`.
            at: as in `score`.

        Returns:
            `score`, the click probability; `history` (h,), the catalog rows of the latest behaviours, which the ranker
            reads; `effects` (h,), the log-odds of a click with the whole history minus the log-odds without the
            behaviour; `weights` (h,), the attention weights, None for a ranker without attention.

        Raises:
            ValueError: as `score`.
        """
        history = np.asarray(history)[-self.task.config.max_history :]
        h = len(history)
        # the whole history, then for each behaviour the history without that behaviour
        others = ~np.eye(h, dtype=bool)
        values = np.concatenate([history, np.broadcast_to(history, (h, h))[others]])
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
        """Click probabilities (n,) of impressions with a common context, and the attention weights of behaviours."""
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

    def _context(self, user: int, given: dict[str, Any] | None, at: float | None) -> FeatureColumns:
        """One row of context columns; ValueError for a column the ranker does not read, or a value of another type."""
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
            if (moment := self.dataset.time(at)) is not None:
                after = first + int(np.searchsorted(log.time[first:after], moment, side="right"))
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
