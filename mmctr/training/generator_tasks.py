"""The training of ID generators on old items, with the ranker frozen: `train_cold_ids`.

Histories keep the ID vectors the ranker was trained with; targets alone read what is generated, as a new item would.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmctr.data.batches import Batch, BehaviorBatch
from mmctr.data.hashing import hashed_uniform, stream_seed
from mmctr.data.interactions import Impressions
from mmctr.data.loaders import TrainBatches
from mmctr.embedders.id_generators import (
    CVAR,
    MWUF,
    CVARConfig,
    IdGenerator,
    MetaEmbeddingConfig,
    NoColdIds,
    squared_error,
    wasserstein2,
)
from mmctr.evaluation.predict import Scores, predict, quick_metrics
from mmctr.features.behavior_collator import BehaviorCollator
from mmctr.features.ranking_data import RankingData
from mmctr.layers.row_table import RowTable
from mmctr.tasks import RankingTask
from mmctr.training.context import RunContext
from mmctr.training.fit import FitConfig, fit

logger = logging.getLogger(__name__)


def freeze(task: RankingTask) -> None:
    """Evaluation mode, no gradient for any weight, and none kept by tables that were trained by rows."""
    task.eval().requires_grad_(False)
    for module in task.modules():
        if isinstance(module, RowTable):
            module.by_rows = False


def mean_users(task: RankingTask, user_rows: Tensor, id_rows: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of the ID table the mean user vector (num_ids, W) of some impressions, and how many they are.

    Args:
        user_rows, id_rows: (n,) user and item of each impression, as rows of the task's tables.

    A ranker without user vectors has W = 0.
    """
    ids: Tensor = task.embedder.ids.weight  # type: ignore[union-attr, assignment]
    num_ids, device = len(ids), ids.device
    count = torch.bincount(id_rows, minlength=num_ids).to(device)
    if task.users is None:
        return ids.new_zeros(num_ids, 0), count
    users: Tensor = task.users.weight.detach()
    total = users.new_zeros(num_ids, users.shape[1])
    for user, item in zip(user_rows.long().split(1 << 16), id_rows.long().split(1 << 16), strict=True):
        total.index_add_(0, item.to(device), users[user.to(device)])
    return total / count.clamp(min=1)[:, None], count


class ColdIdsTask(nn.Module):
    """A generator as `fit` trains it: `forward` gives named, weighted loss terms.

    Args:
        task: the frozen ranker; it is no part of what is trained and saved.
        users, rows: (num_ids, W) and (num_ids,), see `mean_users`; row 0 is the unknown item.
    """

    def __init__(self, task: RankingTask, users: Tensor, rows: Tensor):
        super().__init__()
        self._ranker = (task,)  # a tuple hides it from the modules
        self.generator: IdGenerator = task.embedder.generator  # type: ignore[assignment]
        self.users, self.rows = users, rows

    @property
    def ranker(self) -> RankingTask:
        return self._ranker[0]

    @property
    def id_vectors(self) -> Tensor:
        """(num_ids, D) those the ranker was trained with."""
        return self.ranker.embedder.ids.weight  # type: ignore[union-attr]

    def logits(self, batch: BehaviorBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """(B,) as if every target were new."""
        return self.ranker.logits(batch, target_ids=self.generator.cold(self.ranker.embedder.describe(batch.items)))

    def log_loss(self, batch: BehaviorBatch, target_ids: Tensor) -> Tensor:
        """(B,) log losses with (U, D) ID vectors for targets."""
        logits, _ = self.ranker.logits(batch, target_ids=target_ids)
        return F.binary_cross_entropy_with_logits(logits.float(), batch.label, reduction="none")

    def parameter_parts(self) -> dict[str, list[nn.Parameter]]:
        return {"generator": list(self.parameters())}

    def after_step(self) -> None:
        """Nothing is constrained."""


@dataclass(frozen=True)
class UnknownTargets:
    """A ranker to which every target shows the ID of the unknown item: what a generator has to beat."""

    ranker: RankingTask

    def logits(self, batch: BehaviorBatch) -> tuple[Tensor, dict[str, Tensor]]:
        unknown: Tensor = self.ranker.embedder.ids.weight[:1]  # type: ignore[union-attr, assignment]
        return self.ranker.logits(batch, target_ids=unknown.expand(len(batch.items), -1))


@dataclass(frozen=True)
class TwoBatches(Batch):
    """Two batches of the same M items, K rows of each item in both, item by item."""

    a: BehaviorBatch
    b: BehaviorBatch


class ItemBatches:
    """(places in `items`, step) -> TwoBatches.

    Raises ValueError when no item has twice `size` rows.
    """

    def __init__(self, collator: BehaviorCollator, size: int, seed: int):
        part = collator.impressions
        shuffled = np.random.default_rng(stream_seed(seed, "rows of an item")).permutation(len(part))
        self.collator, self.size, self.seed = collator, size, seed
        self.rows = shuffled[np.argsort(part.item[shuffled], kind="stable")]
        items, begins, count = np.unique(part.item[self.rows], return_index=True, return_counts=True)
        enough = count >= 2 * size
        if not enough.any():
            raise ValueError(
                f"cold_ids.rows: {size} rows in two batches are more than any item has in training "
                f"({count.max(initial=0)}); lower it"
            )
        self.items, self.begins, self.count = items[enough], begins[enough], count[enough]

    def __call__(self, places: np.ndarray, step: int) -> TwoBatches:
        count = self.count[places]
        first = (
            hashed_uniform(stream_seed(self.seed, "first row of an item"), step, self.items[places].astype(np.int64))
            * count
        ).astype(np.int64)
        place = (first[:, None] + np.arange(2 * self.size)) % count[:, None]
        rows = self.rows[self.begins[places][:, None] + place]
        return TwoBatches(*(self.collator(half.ravel(), step) for half in np.split(rows, 2, axis=1)))


class MetaEmbeddingTask(ColdIdsTask):
    """l = a l_a(phi) + (1 - a) l_b(phi - eta dl_a/dphi) for each item, phi generated. (arXiv 1904.12214, equations 8
    to 11.)

    The rankers' own backward passes cannot be differentiated again, so the Hessian of l_a, times the gradient of l_b,
    is a central difference of two gradients of l_a.
    """

    STEP = 1e-2
    """length of the difference's step"""

    def forward(self, batch: TwoBatches) -> dict[str, Tensor]:
        config: MetaEmbeddingConfig = self.ranker.config.embedder.cold_ids
        a, eta = config.cold_weight, config.inner_lr
        described = self.ranker.embedder.describe(batch.a.items)
        phi = self.generator.cold(described[batch.a.target[:: config.rows]])  # (M, D)
        start = phi.detach()
        loss_a, grad_a = self.of_items(batch.a, start)
        loss_b, grad_b = self.of_items(batch.b, start - eta * grad_a)
        step = self.STEP / grad_b.norm(dim=1, keepdim=True).clamp(min=1e-12) * grad_b
        bend = self.of_items(batch.a, start + step)[1] - self.of_items(batch.a, start - step)[1]
        bend = bend * grad_b.norm(dim=1, keepdim=True) / (2 * self.STEP)
        through = (phi * (a * grad_a + (1 - a) * (grad_b - eta * bend))).sum(1).mean()
        return {"cold": a * loss_a.mean(), "after_step": (1 - a) * loss_b.mean() + through - through.detach()}

    def of_items(self, batch: BehaviorBatch, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(M,) mean log loss of each item with ID vectors (M, D), and its gradient (M, D)."""
        ids = ids.detach().requires_grad_()
        size = len(batch) // len(ids)
        spread = ids.new_zeros(len(batch.items), ids.shape[1]).index_copy(0, batch.target[::size], ids)
        losses = self.log_loss(batch, spread).view(-1, size).mean(1)
        return losses.detach(), torch.autograd.grad(losses.sum(), ids)[0]


class MWUFTask(ColdIdsTask):
    """The cold loss trains fresh ID vectors of the old items, the warm loss the two networks. (arXiv 2105.04790,
    algorithm 1.)"""

    generator: MWUF

    def __init__(self, task: RankingTask, users: Tensor, rows: Tensor):
        super().__init__(task, users, rows)
        self.fresh = RowTable(len(rows), len(self.generator.mean), 0.0)
        with torch.no_grad():
            self.fresh.weight.copy_(self.generator.mean)

    def forward(self, batch: BehaviorBatch) -> dict[str, Tensor]:
        own = batch.items.id_rows
        fresh = self.fresh(own)
        described = self.ranker.embedder.describe(batch.items)
        warm = self.generator.warm(fresh.detach(), described, self.users[own], self.rows[own] > 0)
        return {name: self.log_loss(batch, ids).mean() for name, ids in (("cold", fresh), ("warm", warm))}


class CVARTask(ColdIdsTask):
    """Log loss through the vector that is told from the description, reconstruction of the ID vector from its own
    latent, and the distance of the two latents. (arXiv 2205.13795, equations 7 to 9.)"""

    generator: CVAR

    def forward(self, batch: BehaviorBatch) -> dict[str, Tensor]:
        config: CVARConfig = self.ranker.config.embedder.cold_ids
        own = batch.items.id_rows
        ids, frequency = self.id_vectors[own], self.generator.relative(self.rows[own])
        of_id = self.generator.of_id(ids).chunk(2, dim=1)
        told = self.generator.of_description(self.ranker.embedder.describe(batch.items)).chunk(2, dim=1)
        again = self.generator.decode(self.generator.draw(of_id), frequency)
        made = self.generator.decode(self.generator.draw(told), frequency)
        return {
            "log_loss": self.log_loss(batch, made).mean(),
            "reconstruction": config.reconstruction * squared_error(again, ids)[batch.target].mean(),
            "wasserstein": config.wasserstein * wasserstein2(of_id, told)[batch.target].mean(),
        }


def train_cold_ids(
    task: RankingTask,
    data: RankingData,
    train: Impressions,
    validation: Impressions,
    config: FitConfig,
    context: RunContext,
    primary: str,
    steps_before: int = 0,
) -> dict[str, Any]:
    """Train the generator of a finished ranker, which is frozen by this, and let its cold items read it.

    Some old items are held out, rows and all. Validation is on rows of these and of cold items, old ones shown as if
    they were new; `primary` "gauc_warm" and "gauc_cold" are then "gauc". Returns what `fit` does, and the numbers of
    the same rows "without" a generator; checkpoints and log go to RUN/cold_ids, and a tracker counts on from
    `steps_before`, the ranker's steps. Raises ValueError as `fit`, `BatchPlan` and `ItemBatches` do, and where no row
    is left.
    """
    primary = "auc" if primary == "auc" else "gauc"
    accelerator, seed = context.accelerator, context.seed
    freeze(task)
    generator, ids, kind = task.embedder.generator, task.embedder.ids, task.config.embedder.cold_ids
    assert generator is not None and ids is not None and not isinstance(kind, NoColdIds)
    is_validation = (
        hashed_uniform(stream_seed(seed, "validation items of a generator"), 0, np.arange(len(data.id_rows)))
        < kind.validation
    )
    train = train.take(~is_validation[train.item])
    validation = validation.take((is_validation | (data.id_rows == 0))[validation.item])
    for name, part, remedy in (("validation", validation, "raise"), ("training", train, "lower")):
        if not len(part):
            raise ValueError(f"cold_ids.validation: {kind.validation} of the items leaves no {name} row; {remedy} it")
    device, rows = ids.weight.device, torch.from_numpy(data.id_rows)[torch.from_numpy(train.item).long()]
    users, count = mean_users(task, data.user_rows[torch.from_numpy(train.user).long()], rows)
    old = torch.nonzero(count[1:] > 0)[:, 0] + 1
    generator.learn_from(ids.weight[old], users[old], count[old])
    generator.requires_grad_(True)

    collator = data.collator(train)
    if isinstance(kind, MetaEmbeddingConfig):
        model: ColdIdsTask = MetaEmbeddingTask(task, users, count)
        by_item = ItemBatches(collator, kind.rows, seed)
        world = accelerator.num_processes
        size = min(config.batch_size // (2 * kind.rows), len(by_item.items)) // world * world
        if not size:
            raise ValueError(
                f"cold_fit.batch_size: {config.batch_size} rows, with 2 * cold_ids.rows = {2 * kind.rows} of an item, "
                f"are not one item for each of {world} processes; raise it, or lower cold_ids.rows"
            )
        batches: TrainBatches = TrainBatches(context.plan(len(by_item.items), size), by_item, config.num_workers)
    else:
        model = (CVARTask if isinstance(kind, CVARConfig) else MWUFTask)(task, users, count)
        batches = TrainBatches(context.plan(len(train), config.batch_size), collator, config.num_workers)

    shown = data.collator(validation)

    def numbers_of(scorer: Scores) -> dict[str, float]:
        return quick_metrics(validation, predict(scorer, shown, accelerator), np.ones(len(validation), bool))

    without = numbers_of(UnknownTargets(task))
    if primary not in without:
        raise ValueError(
            f"cold_ids.validation: {primary} is undefined on the {len(validation)} validation rows of cold items and "
            f"of {kind.validation} of the old ones: no user has clicked and other rows there; raise it, or "
            f"split.validation"
        )

    result = fit(
        model.to(device),
        batches,
        config,
        context.next_phase("cold_ids", steps_before),
        evaluate=lambda: numbers_of(model),
        primary=primary,
        evaluate_first=True,
    )
    logger.info(f"cold ids: {primary} {result.best:.4f} on validation items, {without[primary]:.4f} without")
    generator.requires_grad_(False)
    task.embedder.generates = True
    return result.to_json() | {"without": without}
