"""How a change of an item's latent dimensions changes the click probability that a ranker predicts for the item."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    ITEMS_PER_STEP,
    Latents,
    sample_rows,
    standardize,
)
from mmctr.concepts.report_types import ClickReason, ConceptsReport, Dimension, RankerEffects, UserReasons
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
    """(Z,) change of the predicted click probability, on average over impressions, for each latent dimension.

    The target item's latent is moved from a standard deviation below its value to a standard deviation above; the
    items of the history keep their values.

    Args:
        collator: makes batches of the impressions.
        sizes: (Z,) standard deviations of the latents; a dimension of size 0 gets the effect 0.
        offset: first column of the latents in the ranker's content vectors.
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


def with_click_effects(
    report: ConceptsReport,
    run: Path,
    latents: Latents,
    item_ids: pa.Array,
    user: str | None,
    accelerator: Accelerator,
) -> ConceptsReport:
    """The report with the effect of each dimension on predicted clicks, over test impressions and for one user.

    Args:
        report: a report on the latents.
        run: folder of a ranker run on the latents.
        item_ids: raw ids of the catalog.
        user: raw id of the user, None for no user.

    Raises:
        ValueError: the ranker does not read these latents, or does not know the user.
    """
    ranker = RankingTask.load(run)
    offset = _latent_offset(ranker, latents, item_ids, run)
    dataset, part, collate = ranked_impressions(run, ranker)
    ranker.to(accelerator.device)
    sample = sample_rows(len(part), MAX_IMPRESSIONS, 0)
    sizes = np.where(active_dimensions(latents.mu), latents.mu.std(0), 0.0)
    effects = click_effects(ranker, collate(part.take(sample)), sizes, offset, accelerator)
    dimensions = [
        replace(dimension, click_effect=float(effect))
        for dimension, effect in zip(report.description.dimensions, effects, strict=True)
    ]
    report = replace(
        report,
        description=replace(report.description, dimensions=dimensions),
        ranker=RankerEffects(str(run), len(sample)),
    )
    if user is None:
        return report
    row = dataset.user_row(user)
    rows = np.flatnonzero(np.asarray(part.user) == row)
    if not len(rows):
        raise ValueError(f"user {user!r} has no test impressions in {dataset.report['source']}; name another --user")
    impressions = part.take(rows)
    effects = click_effects(ranker, collate(impressions), sizes, offset, accelerator)
    latest = impressions.history[impressions.history_start[-1] : impressions.history_end[-1]]
    history = [dataset.catalog.item_ids[int(item)].as_py() for item in latest]
    reasons = click_reasons(dimensions, effects, latents, item_ids, history)
    return replace(report, user=UserReasons(dataset.users["user_id"][row].as_py(), reasons))


def click_reasons(
    dimensions: Sequence[Dimension],
    effects: np.ndarray,
    latents: Latents,
    item_ids: pa.Array,
    history: list[Any],
    count: int = 3,
) -> list[ClickReason]:
    """The dimensions with the greatest effects (Z,) on a user's predicted clicks, at most `count`, greatest first.

    Args:
        item_ids: raw ids of the catalog.
        history: raw ids of items of the user's history.
    """
    position_of = {item_ids[int(row)].as_py(): position for position, row in enumerate(latents.rows)}
    known = [item for item in history if item in position_of]
    z = standardize(latents.mu)
    reasons = []
    for j in np.argsort(-np.abs(effects))[:count].tolist():
        if effects[j] == 0:
            break
        sign, end = (1, "high") if effects[j] > 0 else (-1, "low")
        name = dimensions[j].verified_name
        likes = name and (name.high if end == "high" else name.low)
        ordered = sorted(known, key=lambda item: -sign * z[position_of[item], j])
        because = [item for item in ordered if sign * z[position_of[item], j] > 0.5][:ITEMS_PER_STEP]
        reasons.append(ClickReason(j, end, likes, float(effects[j]), because))
    return reasons


def _latent_offset(ranker: RankingTask, latents: Latents, item_ids: pa.Array, run: Path) -> int:
    """The first column of the latents in the ranker's content vectors; ValueError where there is none."""
    width = latents.mu.shape[1]
    if ranker.embedder.adapter is not None and ranker.catalog_ids is not None:
        rows = rows_of(item_ids.take(pa.array(latents.rows)), ranker.catalog_ids, "the run's catalog and the ranker's")
        known = rows >= 0
        table = ranker.embedder.content_table[torch.from_numpy(rows[known])].numpy()
        for offset in range(table.shape[1] - width + 1) if known.any() else ():
            if np.allclose(table[:, offset : offset + width], latents.mu[known], atol=1e-3):
                return offset
    raise ValueError(
        f"{run}: this ranker does not read the latents of the run; embed it (`mmctr embed RUN --out EMB`), and train a "
        f"ranker with task.embedder.content.path=EMB"
    )
