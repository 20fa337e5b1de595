"""The stages of a `staged` split: new items get ID rows of their own, which a few of their impressions train.

Each stage is a function of the weights before it, so that a killed run goes on with the stage it was in. Every process
trains on all rows of a stage: they are few, and the result does not depend on the number of processes.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn

from mmctr.config import Config
from mmctr.data.batches import ItemBatch
from mmctr.data.hashing import stream_seed
from mmctr.data.interactions import Impressions
from mmctr.data.splits import Splits
from mmctr.evaluation.metrics import impression_metrics
from mmctr.evaluation.predict import predict
from mmctr.features.behavior_collator import BehaviorCollator
from mmctr.features.ranking_data import RankingData
from mmctr.features.vocabulary import RankingVocabulary
from mmctr.files import replace_file
from mmctr.layers.row_table import RowTable
from mmctr.rankers import GBDTLRConfig
from mmctr.run_folder import RunFolder
from mmctr.tasks import RankingTask, RankingTaskConfig
from mmctr.tasks.folder import save_weights
from mmctr.training.context import RunContext
from mmctr.training.generator_tasks import freeze, mean_users

logger = logging.getLogger(__name__)


class StagesConfig(Config):
    """How the stages of a `staged` split train."""

    trains: Literal["new_ids", "all"] = "new_ids"
    """`new_ids`: the ID rows of new items alone, as in the papers; `all`: everything but an encoder"""
    passes: int = Field(default=1, ge=1)
    """how often the rows of a stage are gone through"""
    batch_size: int = Field(default=256, ge=1)
    """rows of a step"""
    lr: float = Field(default=1e-2, gt=0)
    """of Adam, begun anew in each stage; no decay"""


def check_stages(task: RankingTaskConfig, stages: StagesConfig) -> None:
    """Raises ValueError for a ranker whose new items cannot be warmed up."""
    if isinstance(task.ranker, GBDTLRConfig):
        raise ValueError("split 'staged': gbdt_lr has trees, which stages do not train; take another ranker")
    for name, cross in task.features.cross.items():
        if "item_id" in cross.of:
            raise ValueError(
                f"split 'staged': the cross {name!r} is of item_id, and a new item's would fall where others' are; "
                f"leave it out"
            )
    if not task.embedder.id_dim and stages.trains == "new_ids":
        raise ValueError(
            "split 'staged': without ID vectors (task.embedder.id_dim is 0) a stage has nothing to train; give "
            "id_dim > 0, or stages.trains: all"
        )


def with_rows(task: RankingTask, item_ids: pa.Array, items: ItemBatch) -> RankingTask:
    """A copy of a trained task in which new items have ID rows of their own, behind the others.

    Args:
        item_ids: (n,) their raw ids.
        items: what is known of them; the rows begin with what the task's generator starts from, or, without one, with
            the row of the unknown item, which they have read so far.
    """
    task = copy.deepcopy(task)
    freeze(task)
    known = task.vocabulary
    clicks = np.concatenate([known.clicks, np.zeros(len(item_ids), known.clicks.dtype)])
    task.vocabulary = replace(known, item_ids=pa.concat_arrays([known.item_ids, item_ids]), clicks=clicks)
    embedder = task.embedder
    if embedder.ids is not None:
        old = embedder.ids.weight
        start = old[:1].expand(len(item_ids), -1)
        if embedder.generator is not None:
            with torch.no_grad():
                start = embedder.generator.start(embedder.describe(items))
        embedder.ids = RowTable(len(old) + len(item_ids), old.shape[1], 1.0).to(old.device)
        embedder.ids.weight.data = torch.cat([old, start])
        freeze(task)
    if embedder.gate is not None:
        embedder.gate.clicks = torch.cat([embedder.gate.clicks, embedder.gate.clicks.new_zeros(len(item_ids))])
    return task


def train_stage(
    task: RankingTask, collator: BehaviorCollator, first: int, config: StagesConfig, seed: int, device: torch.device
) -> float:
    """Train on all rows of a collator, each once a pass. Returns the mean log loss of the last pass.

    Args:
        first: row of the ID table where the new items begin; with `trains: new_ids` no weight before it changes, and
            no step looks at more of the table than its rows.
    """
    freeze(task)
    table, fresh = task.embedder.ids, None
    if config.trains == "all":
        task.requires_grad_(True).train()
        task.embedder.eval()  # what it keeps of an encoder is read, not made anew
        for module in (task.embedder.encoder, task.embedder.generator):
            if module is not None:
                module.requires_grad_(False)
    else:
        task.embedder.ids = fresh = _FreshRows(table, first)  # type: ignore[assignment, arg-type]
    parameters = [p for p in task.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=config.lr)
    num_rows, total = len(collator.impressions), torch.zeros((), device=device)
    for turn in range(config.passes):
        order = np.random.default_rng(stream_seed(seed, "order of rows", turn)).permutation(num_rows)
        total = torch.zeros((), device=device)
        for step, begin in enumerate(range(0, num_rows, config.batch_size)):
            torch.manual_seed(stream_seed(seed, "step", turn, step))
            batch = collator(order[begin : begin + config.batch_size], step).to(device)
            logits, _ = task.logits(batch)  # auxiliary losses are of whole trainings
            loss = F.binary_cross_entropy_with_logits(logits.float(), batch.label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(batch)
    if fresh is not None:
        task.embedder.ids = table
        table.weight.data[first:] = fresh.weight.detach()  # type: ignore[union-attr]
    freeze(task)
    return float(total) / num_rows


class _FreshRows(nn.Module):
    """An ID table of which the rows from `first` on are a parameter of their own, beside those before."""

    def __init__(self, table: RowTable, first: int):
        super().__init__()
        self.first, self.known = first, table.weight.detach()
        self.weight = nn.Parameter(self.known[first:].clone())

    def forward(self, ids: Tensor) -> Tensor:
        """(n, D) from ids (n,)."""
        place = ids - self.first
        return torch.where((place >= 0)[:, None], F.embedding(place.clamp(min=0), self.weight), self.known[ids])


def train_stages(
    task: RankingTask,
    data_of: Callable[[RankingVocabulary], RankingData],
    splits: Splits,
    config: StagesConfig,
    item_ids: pa.Array,
    context: RunContext,
) -> dict[str, np.ndarray]:
    """Scores (n,) of the test rows after each stage, by its name; the task itself is left as it is.

    Args:
        data_of: gives the rows of the dataset, encoded with a vocabulary.
        item_ids: (N,) raw ids of the catalog.

    With a generator that warms vectors (MWUF) a stage trains the plain ID rows, and the test rows read them warmed by
    the users of all stages so far.
    """
    accelerator, seed, device = context.accelerator, context.seed, context.device
    new = np.unique(splits.test.item)
    items = ItemBatch(torch.from_numpy(new).long(), data_of(task.vocabulary).items.take(torch.from_numpy(new).long()))
    first = len(task.vocabulary.item_ids) + 1
    task = with_rows(task, item_ids.take(pa.array(new)), items.to(device))
    data = data_of(task.vocabulary)
    folder = context.folder.checkpoints
    finished = [name for name in splits.stages if (folder / f"{name}.safetensors").is_file()]
    accelerator.wait_for_everyone()  # all have looked before one writes
    test, scores = data.collator(splits.test), {}
    for number, (name, part) in enumerate(splits.stages.items()):
        path = folder / f"{name}.safetensors"
        if task.embedder.gate is not None:
            rows = torch.from_numpy(data.id_rows[part.item[part.label == 1]])
            task.embedder.gate.clicks += torch.bincount(rows, minlength=first + len(new)).to(device)
        if name in finished:
            task.load_state_dict(load_file(path))
        else:
            loss = train_stage(task, data.collator(part), first, config, stream_seed(seed, "stage", number), device)
            logger.info(f"{name}: {len(part)} rows of {len(new)} new items, log loss {loss:.4f}")
            if accelerator.is_main_process:
                folder.mkdir(parents=True, exist_ok=True)
                replace_file(path, lambda out, trained=task: save_weights(trained, out))
        so_far = list(splits.stages.values())[: number + 1]
        with _warmed(task, data, so_far, first, items.to(device)):
            scores[name] = predict(task, test, accelerator)
    return scores


@contextmanager
def _warmed(
    task: RankingTask, data: RankingData, stages: list[Impressions], first: int, items: ItemBatch
) -> Iterator[None]:
    """Within, the rows of new items are what the generator makes of them."""
    embedder = task.embedder
    if embedder.generator is None or embedder.ids is None:
        yield
        return
    item, user = (torch.from_numpy(np.concatenate([getattr(s, n) for s in stages])) for n in ("item", "user"))
    own = embedder.ids.weight.data[first:]
    kept = own.clone()
    with torch.no_grad():
        id_rows = torch.from_numpy(data.id_rows)[item.long()]
        users, count = (part[first:] for part in mean_users(task, data.user_rows[user.long()], id_rows))
        own.copy_(embedder.generator.warm(kept, embedder.describe(items), users, count > 0))
    try:
        yield
    finally:
        own.copy_(kept)


def save_stages(
    folder: RunFolder, test: Impressions, predictions: pa.Table, scores: dict[str, np.ndarray]
) -> dict[str, dict[str, Any]]:
    """Write RUN/stages.parquet, the columns of `predictions` that say what a row is and a score (n,) a stage.

    Returns `metrics.json`'s "stages": the numbers of the test rows, all of new items, by stage.
    """
    columns = {name: predictions[name] for name in ("user", "item", "label")}
    table = pa.table(columns | {name: values.astype(np.float32) for name, values in scores.items()})
    replace_file(folder.stages, lambda path: pyarrow.parquet.write_table(table, path))
    labels, users = np.asarray(test.label), np.asarray(test.user)
    return {name: impression_metrics(labels, values, users) for name, values in scores.items()}
