"""Training of ID generators on old items, with the ranker frozen: `train_cold_ids`.

Behaviours keep the ID vectors of the trained ranker; only targets have generated vectors, as new items would.
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
from mmctr.evaluation.predict import LogitModel, predict, quick_metrics
from mmctr.features.behavior_collator import BehaviorCollator
from mmctr.features.ranking_data import RankingData
from mmctr.layers.row_table import RowTable
from mmctr.tasks import RankingTask
from mmctr.training.context import RunContext
from mmctr.training.fit import FitConfig, fit

logger = logging.getLogger(__name__)


def freeze(task: RankingTask) -> None:
    """Put a task into evaluation mode, without gradients for any weight, tables trained by rows included."""
    task.eval().requires_grad_(False)
    for module in task.modules():
        if isinstance(module, RowTable):
            module.by_rows = False


def mean_users(task: RankingTask, user_rows: Tensor, id_rows: Tensor) -> tuple[Tensor, Tensor]:
    """The mean user vector of the impressions of each item.

    Args:
        task: the ranker; without user vectors W is 0.
        user_rows: (n,) users of the impressions, as rows of the user table.
        id_rows: (n,) items of the impressions, as rows of the ID table.

    Returns:
        (num_ids, W) mean user vectors, zeros for items without impressions, and the (num_ids,) numbers of impressions.
    """
    ids = id_weights(task)
    num_ids, device = len(ids), ids.device
    count = torch.bincount(id_rows, minlength=num_ids).to(device)
    if task.users is None:
        return ids.new_zeros(num_ids, 0), count
    users: Tensor = task.users.weight.detach()
    total = users.new_zeros(num_ids, users.shape[1])
    for user, item in zip(user_rows.long().split(1 << 16), id_rows.long().split(1 << 16), strict=True):
        total.index_add_(0, item.to(device), users[user.to(device)])
    return total / count.clamp(min=1)[:, None], count


def id_weights(task: RankingTask) -> Tensor:
    """The ID vectors (num_ids, D) of a ranker, row 0 being the unknown item."""
    assert task.embedder.ids is not None, "the ranker has ID vectors"
    return task.embedder.ids.weight


class ColdIdsTask(nn.Module):
    """Base class of the tasks that train a generator with `fit`.

    Args:
        task: the frozen ranker, which is neither trained nor saved with this task.
        users: (num_ids, W) mean user vectors, as `mean_users` gives; row 0 is the unknown item.
        rows: (num_ids,) numbers of training rows.
    """

    def __init__(self, task: RankingTask, users: Tensor, rows: Tensor):
        super().__init__()
        self._ranker = (task,)  # inside a tuple the ranker is no submodule
        generator = task.embedder.generator
        assert generator is not None, "the ranker has a generator"
        self.generator: IdGenerator = generator
        self.users, self.rows = users, rows

    @property
    def ranker(self) -> RankingTask:
        """The frozen ranker."""
        return self._ranker[0]

    @property
    def id_vectors(self) -> Tensor:
        """The trained ID vectors (num_ids, D) of the ranker."""
        return id_weights(self.ranker)

    def logits(self, batch: BehaviorBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B,) with generated ID vectors for all targets, and the auxiliary losses of the ranker."""
        return self.ranker.logits(batch, target_ids=self.generator.cold(self.ranker.embedder.describe(batch.items)))

    def log_loss(self, batch: BehaviorBatch, target_ids: Tensor) -> Tensor:
        """Log losses (B,) of the ranker with ID vectors `target_ids` (U, D) for targets."""
        logits, _ = self.ranker.logits(batch, target_ids=target_ids)
        return F.binary_cross_entropy_with_logits(logits.float(), batch.label, reduction="none")

    def parameter_parts(self) -> dict[str, list[nn.Parameter]]:
        """All parameters, as the part `generator`."""
        return {"generator": list(self.parameters())}

    def after_step(self) -> None:
        """Do nothing: no parameter has constraints."""


@dataclass(frozen=True)
class UnknownTargets:
    """A ranker in which every target has the ID vector of the unknown item: the baseline of a generator."""

    ranker: RankingTask

    def logits(self, batch: BehaviorBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B,) with the ID vector of the unknown item for all targets, and the auxiliary losses."""
        unknown = id_weights(self.ranker)[:1]
        return self.ranker.logits(batch, target_ids=unknown.expand(len(batch.items), -1))


@dataclass(frozen=True)
class TwoBatches(Batch):
    """Two batches of the same M items, each with K rows of each item, ordered by item."""

    a: BehaviorBatch
    b: BehaviorBatch


class ItemBatches:
    """Makes TwoBatches of items with enough training rows.

    Args:
        collator: makes batches of training rows.
        size: number K of rows of an item in each of the two batches.
        seed: seed of the order of the rows.

    Raises:
        ValueError: no item has 2 K training rows.
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

    def __call__(self, positions: np.ndarray, step: int) -> TwoBatches:
        """The batches of the items at `positions` (M,) in `items`, at a step."""
        count = self.count[positions]
        first = (
            hashed_uniform(stream_seed(self.seed, "first row of an item"), step, self.items[positions].astype(np.int64))
            * count
        ).astype(np.int64)
        offset = (first[:, None] + np.arange(2 * self.size)) % count[:, None]
        rows = self.rows[self.begins[positions][:, None] + offset]
        return TwoBatches(*(self.collator(half.ravel(), step) for half in np.split(rows, 2, axis=1)))


class MetaEmbeddingTask(ColdIdsTask):
    """Training of Meta-Embedding: l = a l_a(phi) + (1 - a) l_b(phi - eta dl_a/dphi) for each item with a generated
    vector phi (arXiv 1904.12214, equations 8 to 11).

    The backward passes of rankers cannot be differentiated again, so the product of the Hessian of l_a and the gradient
    of l_b is a central difference of two gradients of l_a.
    """

    STEP = 1e-2
    """length of the step of the central difference"""

    def forward(self, batch: TwoBatches) -> dict[str, Tensor]:
        """The loss terms `cold`, with the generated vectors, and `after_step`, after a gradient step; scalars."""
        config: MetaEmbeddingConfig = self.ranker.config.embedder.cold_ids
        a, eta = config.cold_weight, config.inner_lr
        described = self.ranker.embedder.describe(batch.a.items)
        phi = self.generator.cold(described[batch.a.target[:: config.rows]])  # (M, D)
        start = phi.detach()
        loss_a, grad_a = self.loss_and_gradient(batch.a, start)
        loss_b, grad_b = self.loss_and_gradient(batch.b, start - eta * grad_a)
        step = self.STEP / grad_b.norm(dim=1, keepdim=True).clamp(min=1e-12) * grad_b
        hessian = self.loss_and_gradient(batch.a, start + step)[1] - self.loss_and_gradient(batch.a, start - step)[1]
        hessian = hessian * grad_b.norm(dim=1, keepdim=True) / (2 * self.STEP)
        # a term of value zero, whose gradient with respect to phi is the gradient of the loss
        surrogate = (phi * (a * grad_a + (1 - a) * (grad_b - eta * hessian))).sum(1).mean()
        return {"cold": a * loss_a.mean(), "after_step": (1 - a) * loss_b.mean() + surrogate - surrogate.detach()}

    def loss_and_gradient(self, batch: BehaviorBatch, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The mean log loss (M,) of each item with ID vectors `ids` (M, D), and the gradient (M, D) of the losses."""
        ids = ids.detach().requires_grad_()
        size = len(batch) // len(ids)
        spread = ids.new_zeros(len(batch.items), ids.shape[1]).index_copy(0, batch.target[::size], ids)
        losses = self.log_loss(batch, spread).view(-1, size).mean(1)
        return losses.detach(), torch.autograd.grad(losses.sum(), ids)[0]


class MWUFTask(ColdIdsTask):
    """Training of MWUF: the cold loss trains new ID vectors of the old items, the warm loss trains the two networks
    (arXiv 2105.04790, algorithm 1)."""

    generator: MWUF

    def __init__(self, task: RankingTask, users: Tensor, rows: Tensor):
        super().__init__(task, users, rows)
        self.fresh = RowTable(len(rows), len(self.generator.mean), 0.0)
        with torch.no_grad():
            self.fresh.weight.copy_(self.generator.mean)

    def forward(self, batch: BehaviorBatch) -> dict[str, Tensor]:
        """The loss terms `cold` and `warm`, scalars."""
        id_rows = batch.items.id_rows
        fresh = self.fresh(id_rows)
        described = self.ranker.embedder.describe(batch.items)
        warm = self.generator.warm(fresh.detach(), described, self.users[id_rows], self.rows[id_rows] > 0)
        return {name: self.log_loss(batch, ids).mean() for name, ids in (("cold", fresh), ("warm", warm))}


class CVARTask(ColdIdsTask):
    """Training of CVAR: log loss with the vector decoded from the latent of the description, reconstruction of the ID
    vector, and distance of the two latents (arXiv 2205.13795, equations 7 to 9)."""

    generator: CVAR

    def forward(self, batch: BehaviorBatch) -> dict[str, Tensor]:
        """The loss terms `log_loss`, `reconstruction` and `wasserstein`, weighted scalars."""
        config: CVARConfig = self.ranker.config.embedder.cold_ids
        id_rows = batch.items.id_rows
        ids, frequency = self.id_vectors[id_rows], self.generator.relative(self.rows[id_rows])
        id_latent = self.generator.of_id(ids).chunk(2, dim=1)
        description = self.ranker.embedder.describe(batch.items)
        description_latent = self.generator.of_description(description).chunk(2, dim=1)
        reconstructed = self.generator.decode(self.generator.draw(id_latent), frequency)
        generated = self.generator.decode(self.generator.draw(description_latent), frequency)
        return {
            "log_loss": self.log_loss(batch, generated).mean(),
            "reconstruction": config.reconstruction * squared_error(reconstructed, ids)[batch.target].mean(),
            "wasserstein": config.wasserstein * wasserstein2(id_latent, description_latent)[batch.target].mean(),
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
    """Train the ID generator of a trained ranker, which is frozen, and let cold items read generated vectors.

    A fraction of the old items is excluded from training, and validation is on the validation rows of these items and
    of cold items, with generated ID vectors for all targets. Checkpoints and log are in the folder `cold_ids` of the
    run folder.

    Args:
        task: the trained ranker.
        data: the dataset, encoded with the vocabulary of the ranker.
        train: the training impressions.
        validation: the validation impressions.
        config: options of the training loop.
        context: run folder, processes and seed.
        primary: the metric that chooses the best generator; "gauc_warm" and "gauc_cold" mean "gauc" here.
        steps_before: training steps of the ranker, from which a tracker counts on.

    Returns:
        The result of `fit`, and the metrics of the same rows with the unknown item in place of generated vectors, under
        "without".

    Raises:
        ValueError: no training row or validation row is left, the metric is undefined on the validation rows, the batch
            size is too small, or `fit` raises.
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

    model, batches = _model_and_batches(task, users, count, data.collator(train), config, context)
    validation_collator = data.collator(validation)

    def metrics_of(scorer: LogitModel) -> dict[str, float]:
        scores = predict(scorer, validation_collator, accelerator)
        return quick_metrics(validation, scores, np.ones(len(validation), bool))

    without = metrics_of(UnknownTargets(task))
    if primary not in without:
        raise ValueError(
            f"cold_ids.validation: {primary} is undefined on the {len(validation)} validation rows of cold items and "
            f"of {kind.validation} of the old items: no user has both clicks and other rows; raise it, or "
            f"split.validation"
        )

    result = fit(
        model.to(device),
        batches,
        config,
        context.next_phase("cold_ids", steps_before),
        evaluate=lambda: metrics_of(model),
        primary=primary,
        evaluate_first=True,
    )
    logger.info(f"cold ids: {primary} {result.best:.4f} on validation items, {without[primary]:.4f} without")
    generator.requires_grad_(False)
    task.embedder.uses_generator = True
    return result.to_json() | {"without": without}


def _model_and_batches(
    task: RankingTask,
    users: Tensor,
    count: Tensor,
    collator: BehaviorCollator,
    config: FitConfig,
    context: RunContext,
) -> tuple[ColdIdsTask, TrainBatches]:
    """The task that trains the generator of a ranker, and the training batches of that task."""
    kind = task.config.embedder.cold_ids
    if not isinstance(kind, MetaEmbeddingConfig):
        model = (CVARTask if isinstance(kind, CVARConfig) else MWUFTask)(task, users, count)
        plan = context.plan(len(collator.impressions), config.batch_size)
        return model, TrainBatches(plan, collator, config.num_workers)
    model = MetaEmbeddingTask(task, users, count)
    by_item = ItemBatches(collator, kind.rows, context.seed)
    world = context.accelerator.num_processes
    size = min(config.batch_size // (2 * kind.rows), len(by_item.items)) // world * world
    if not size:
        raise ValueError(
            f"cold_fit.batch_size: {config.batch_size} rows, with 2 * cold_ids.rows = {2 * kind.rows} of an item, "
            f"are not one item for each of {world} processes; raise it, or lower cold_ids.rows"
        )
    return model, TrainBatches(context.plan(len(by_item.items), size), by_item, config.num_workers)
