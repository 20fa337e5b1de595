"""The stages of a `staged` split: new items get rows in the ID table, which a few impressions of the items train.

Each stage is a function of the weights before the stage, so that a killed run continues with the unfinished stage.
Every process trains on all rows of a stage: a stage has few rows, and the result does not depend on the number of
processes.
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
from mmctr.training.checkpoints import load_weights_folder, save_weights_folder
from mmctr.training.context import RunContext
from mmctr.training.generator_tasks import freeze, mean_users

logger = logging.getLogger(__name__)


class StagesConfig(Config):
    """Training options of the stages of a `staged` split."""

    trains: Literal["new_ids", "all"] = "new_ids"
    """`new_ids`: only the ID rows of new items are trained, as in the papers; `all`: all parameters but an encoder"""
    passes: int = Field(default=1, ge=1)
    """number of passes over the rows of a stage"""
    batch_size: int = Field(default=256, ge=1)
    """rows of a step"""
    lr: float = Field(default=1e-2, gt=0)
    """constant learning rate of Adam, whose state is new in each stage"""


def check_stages(task: RankingTaskConfig, stages: StagesConfig) -> None:
    """Check that the stages can train the new items of a ranker.

    Raises:
        ValueError: the ranker has trees, a cross of item IDs, or nothing that the stages train.
    """
    if isinstance(task.ranker, GBDTLRConfig):
        raise ValueError("split 'staged': gbdt_lr has trees, which stages do not train; take another ranker")
    for name, cross in task.features.cross.items():
        if "item_id" in cross.of:
            raise ValueError(
                f"split 'staged': the cross {name!r} is of item_id, and values of new items would collide with those "
                f"of old items; leave it out"
            )
    if not task.embedder.id_dim and stages.trains == "new_ids":
        raise ValueError(
            "split 'staged': without ID vectors (task.embedder.id_dim is 0) a stage has nothing to train; give "
            "id_dim > 0, or stages.trains: all"
        )


def add_item_rows(task: RankingTask, item_ids: pa.Array, items: ItemBatch) -> RankingTask:
    """A copy of a trained task in which new items have rows at the end of the ID table.

    The initial values of the rows are those of the generator of the task, or, without a generator, the row of the
    unknown item.

    Args:
        task: the trained ranker.
        item_ids: (n,) raw ids of the new items.
        items: side features and content of the n new items.
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
    """Train on all rows of a collator, each row once per pass.

    Args:
        task: the ranker, with rows of new items.
        collator: makes batches of the rows of the stage.
        first: first row of the new items in the ID table; with `trains: new_ids` only this row and later rows change,
            and a step reads only the rows of the batch.
        config: options of the stages.
        seed: seed of the stage.
        device: device of the task.

    Returns:
        The mean log loss of the last pass.
    """
    freeze(task)
    table, fresh = task.embedder.ids, None
    if config.trains == "all":
        task.requires_grad_(True).train()
        task.embedder.eval()  # vectors of an encoder are read from the table, not computed anew
        for module in (task.embedder.encoder, task.embedder.generator):
            if module is not None:
                module.requires_grad_(False)
    else:
        assert table is not None, "check_stages refuses a ranker without ID vectors"
        task.embedder.ids = fresh = _FreshRows(table, first)  # type: ignore[assignment]
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
    if fresh is not None and table is not None:
        task.embedder.ids = table
        table.weight.data[first:] = fresh.weight.detach()
    freeze(task)
    return float(total) / num_rows


class _FreshRows(nn.Module):
    """An ID table in which the rows from `first` on are a separate parameter, and the rows before are constant."""

    def __init__(self, table: RowTable, first: int):
        super().__init__()
        self.first, self.known = first, table.weight.detach()
        self.weight = nn.Parameter(self.known[first:].clone())

    def forward(self, ids: Tensor) -> Tensor:
        """The ID vectors (n, D) of rows `ids` (n,)."""
        position = ids - self.first
        return torch.where((position >= 0)[:, None], F.embedding(position.clamp(min=0), self.weight), self.known[ids])


def train_stages(
    task: RankingTask,
    data_of: Callable[[RankingVocabulary], RankingData],
    splits: Splits,
    config: StagesConfig,
    item_ids: pa.Array,
    context: RunContext,
) -> dict[str, np.ndarray]:
    """Train the stages on a copy of a task, and score the test rows after each stage.

    With a generator for warm items (MWUF) a stage trains the plain ID rows, and the test rows read the ID vectors that
    the generator computes from these rows and the users of all stages so far.

    Args:
        task: the trained ranker, which is not changed.
        data_of: gives the dataset, encoded with a vocabulary.
        splits: the stages and the test rows.
        config: options of the stages.
        item_ids: (N,) raw ids of the catalog.
        context: run folder, processes and seed.

    Returns:
        Click probabilities (n,) of the test rows by the name of the stage.
    """
    accelerator, seed, device = context.accelerator, context.seed, context.device
    new = np.unique(splits.test.item)
    items = ItemBatch(torch.from_numpy(new).long(), data_of(task.vocabulary).items.take(torch.from_numpy(new).long()))
    first = len(task.vocabulary.item_ids) + 1
    task = add_item_rows(task, item_ids.take(pa.array(new)), items.to(device))
    data = data_of(task.vocabulary)
    folder = context.folder.checkpoints
    finished = [name for name in splits.stages if (folder / name).is_dir()]
    accelerator.wait_for_everyone()  # all processes have listed the files before one process writes
    test, scores = data.collator(splits.test), {}
    for number, (name, part) in enumerate(splits.stages.items()):
        path = folder / name
        if task.embedder.gate is not None:
            rows = torch.from_numpy(data.id_rows[part.item[part.label == 1]])
            task.embedder.gate.clicks += torch.bincount(rows, minlength=first + len(new)).to(device)
        if name in finished:
            task.load_state_dict(load_weights_folder(path))
        else:
            loss = train_stage(task, data.collator(part), first, config, stream_seed(seed, "stage", number), device)
            logger.info(f"{name}: {len(part)} rows of {len(new)} new items, log loss {loss:.4f}")
            if accelerator.is_main_process:
                folder.mkdir(parents=True, exist_ok=True)
                save_weights_folder(task, path)
        so_far = list(splits.stages.values())[: number + 1]
        with _warmed(task, data, so_far, first, items.to(device)):
            scores[name] = predict(task, test, accelerator)
    return scores


@contextmanager
def _warmed(
    task: RankingTask, data: RankingData, stages: list[Impressions], first: int, items: ItemBatch
) -> Iterator[None]:
    """Within the context the ID rows of new items are the vectors that the generator gives for warm items."""
    embedder = task.embedder
    if embedder.generator is None or embedder.ids is None:
        yield
        return
    item, user = (torch.from_numpy(np.concatenate([getattr(s, n) for s in stages])) for n in ("item", "user"))
    new_rows = embedder.ids.weight.data[first:]
    plain_rows = new_rows.clone()
    with torch.no_grad():
        id_rows = torch.from_numpy(data.id_rows)[item.long()]
        users, count = (part[first:] for part in mean_users(task, data.user_rows[user.long()], id_rows))
        new_rows.copy_(embedder.generator.warm(plain_rows, embedder.describe(items), users, count > 0))
    try:
        yield
    finally:
        new_rows.copy_(plain_rows)


def save_stages(
    folder: RunFolder, test: Impressions, predictions: pa.Table, scores: dict[str, np.ndarray]
) -> dict[str, dict[str, Any]]:
    """Write `stages.parquet` with user, item and label of each test row, and the scores after each stage.

    Args:
        folder: the run folder.
        test: the n test rows, all of new items.
        predictions: table with the columns user, item and label of the test rows.
        scores: click probabilities (n,) by the name of the stage.

    Returns:
        The metrics of the test rows by stage, the entry "stages" of metrics.json.
    """
    columns = {name: predictions[name] for name in ("user", "item", "label")}
    table = pa.table(columns | {name: values.astype(np.float32) for name, values in scores.items()})
    replace_file(folder.stages, lambda path: pyarrow.parquet.write_table(table, path))
    labels, users = np.asarray(test.label), np.asarray(test.user)
    return {name: impression_metrics(labels, values, users) for name, values in scores.items()}
