"""How latent dimensions of a target change the click probability that a ranker predicts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from torch import Tensor

from mmctr.concepts.disentanglement import active_dimensions
from mmctr.concepts.latents import (
    PER_STEP,
    Latents,
    sampled_rows,
    standardised,
)
from mmctr.data.batches import BehaviorBatch, ItemBatch, Jagged
from mmctr.data.tables import rows_of
from mmctr.embedders.similarity import PairCosines
from mmctr.features.behavior_collator import BehaviorCollator
from mmctr.runs.finished import ranked_impressions
from mmctr.tasks import RankingTask

MAX_IMPRESSIONS = 10_000
"""impressions that the effect on clicks is averaged over"""


@torch.inference_mode()
def click_effects(
    ranker: RankingTask,
    collator: BehaviorCollator,
    sizes: np.ndarray,
    offset: int,
    accelerator: Accelerator,
) -> np.ndarray:
    """(Z,) how the predicted chance of a click changes, on average over impressions, when a target moves on a dimension
    from a standard deviation below to one above, its history staying as it is.

    Args:
        sizes: (Z,) standard deviations of the latents; 0 leaves one out.
        offset: where they begin in the ranker's content vectors.
    """
    ranker.eval()
    width, count = ranker.embedder.content_table.shape[1], len(collator.impressions)
    total = np.zeros(len(sizes))
    for start in range(0, count, 2048):
        batch = collator(np.arange(start, min(start + 2048, count))).to(accelerator.device)
        for j in np.flatnonzero(sizes > 0):
            change = torch.zeros(width, device=accelerator.device)
            change[offset + j] = float(sizes[j])
            chances = []
            for sign in (1, -1):
                with moved_targets(ranker, batch, sign * change) as moved:
                    chances.append(torch.sigmoid(ranker.logits(moved)[0].double()))
            total[j] += float((chances[0] - chances[1]).sum())
    return total / max(count, 1)


@contextmanager
def moved_targets(ranker: RankingTask, batch: BehaviorBatch, change: Tensor) -> Iterator[BehaviorBatch]:
    """The batch with other content vectors for its targets; the same items keep their vectors in histories.

    In the batch that the context gives, targets are U further items, whose content vectors are U further rows of the
    content table of the ranker, and of an expert that reads the same table. After the context tables are as before.

    Args:
        batch: without pictures and texts, as in evaluation.
        change: (C,) added to the content vector of each target.
    """
    row, num_items = batch.items.row, len(batch.items)
    embedders = [ranker.embedder] if ranker.expert is None else [ranker.embedder, ranker.expert.task.embedder]
    before = [(embedder, embedder.content_table, embedder.has_content, embedder.pair_cosines) for embedder in embedders]
    further = torch.arange(num_items, device=row.device) + len(ranker.embedder.content_table)
    items = ItemBatch(
        torch.cat([row, further]), {name: _repeated(values) for name, values in batch.items.features.items()}
    )
    try:
        for embedder, table, has, _ in before:
            moves = embedder is ranker.embedder or (ranker.expert is not None and ranker.expert.shares_content)
            embedder.content_table = torch.cat([table, table[row] + change if moves else table[row]])
            embedder.has_content = torch.cat([has, has[row]])
            embedder.pair_cosines = PairCosines(max_kept=0)  # cosines of all pairs would serve this batch alone
        yield replace(batch, items=items, target=batch.target + num_items)
    finally:
        for embedder, table, has, cosines in before:
            embedder.content_table, embedder.has_content, embedder.pair_cosines = table, has, cosines


def _repeated(values: Tensor | Jagged) -> Tensor | Jagged:
    """A side feature of U items, twice."""
    if isinstance(values, Jagged):
        offsets = torch.cat([values.offsets, values.offsets[1:] + values.offsets[-1]])
        return Jagged(torch.cat([values.values, values.values]), offsets)
    return torch.cat([values, values])


def add_effects(
    report: dict[str, Any],
    run: Path,
    latents: Latents,
    item_ids: pa.Array,
    user: str | None,
    accelerator: Accelerator,
) -> None:
    """Put into a report what each dimension does to the clicks a ranker predicts, overall and for one user.

    Raises:
        ValueError: the ranker does not read these latents, or does not know the user.
    """
    ranker = RankingTask.load(run)
    offset = _where(ranker, latents, item_ids, run)
    dataset, part, collate = ranked_impressions(run, ranker)
    ranker.to(accelerator.device)
    picked = sampled_rows(len(part), MAX_IMPRESSIONS, 0)
    sizes = np.where(active_dimensions(latents.mu), latents.mu.std(0), 0.0)
    effects = click_effects(ranker, collate(part.take(picked)), sizes, offset, accelerator)
    for entry, effect in zip(report["dimensions"], effects, strict=True):
        entry["click_effect"] = float(effect)
    report["ranker"] = {"run": str(run), "impressions": len(picked)}
    if user is None:
        return
    row = dataset.user_row(user)
    rows = np.flatnonzero(np.asarray(part.user) == row)
    if not len(rows):
        raise ValueError(f"user {user!r} has no test impressions in {dataset.report['source']}; name another --user")
    own = part.take(rows)
    effects = click_effects(ranker, collate(own), sizes, offset, accelerator)
    latest = own.history[own.history_start[-1] : own.history_end[-1]]
    history = [dataset.catalog.item_ids[int(item)].as_py() for item in latest]
    report["user"] = {
        "user_id": dataset.users["user_id"][row].as_py(),
        "reasons": reasons(report, effects, latents, item_ids, history),
    }


def reasons(
    report: dict[str, Any],
    effects: np.ndarray,
    latents: Latents,
    item_ids: pa.Array,
    history: list[Any],
    count: int = 3,
) -> list[dict[str, Any]]:
    """What moves a user most: the end of a dimension, what it is called, and what of the history stands there."""
    place = {item_ids[int(row)].as_py(): position for position, row in enumerate(latents.rows)}
    seen = [item for item in history if item in place]
    z = standardised(latents.mu)
    found = []
    for j in np.argsort(-np.abs(effects))[:count].tolist():
        if effects[j] == 0:
            break
        sign, name = (1 if effects[j] > 0 else -1), report["dimensions"][j]["name"]
        likes = None if name is None or not name["verified"] else name["high" if sign > 0 else "low"]
        ordered = sorted(seen, key=lambda item: -sign * z[place[item], j])
        because = [item for item in ordered if sign * z[place[item], j] > 0.5][:PER_STEP]
        end = "high" if sign > 0 else "low"
        found.append(
            {"dimension": j, "end": end, "likes": likes, "click_effect": float(effects[j]), "because_of": because}
        )
    return found


def _where(ranker: RankingTask, latents: Latents, item_ids: pa.Array, run: Path) -> int:
    """The first of the columns of the ranker's content vectors that are these latents."""
    width = latents.mu.shape[1]
    if ranker.embedder.adapter is not None and ranker.catalog_ids is not None:
        rows = rows_of(item_ids.take(pa.array(latents.rows)), ranker.catalog_ids, "the run's catalog and the ranker's")
        there = rows >= 0
        table = ranker.embedder.content_table[torch.from_numpy(rows[there])].numpy()
        for offset in range(table.shape[1] - width + 1) if there.any() else ():
            if np.allclose(table[:, offset : offset + width], latents.mu[there], atol=1e-3):
                return offset
    raise ValueError(
        f"{run}: this ranker does not read the latents of the run; embed it (`mmctr embed RUN --out EMB`), and train a "
        f"ranker with task.embedder.content.path=EMB"
    )
