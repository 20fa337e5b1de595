"""RankingTask: predicts clicks with an ItemEmbedder, user and context features, and a ranker."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmctr.data.batches import BehaviorBatch
from mmctr.data.tables import as_ids, read_table, rows_of
from mmctr.distributed import share_of_processes
from mmctr.embedders.feature_embedder import FeatureEmbedder
from mmctr.embedders.id_generators import make_generator
from mmctr.embedders.item_embedder import (
    ContentEncoder,
    ItemEmbedder,
    initial_std,
)
from mmctr.embedders.similarity import tier_counts
from mmctr.features.vocabulary import RankingVocabulary
from mmctr.files import read_json, replace_file, write_json
from mmctr.layers.row_table import RowTable
from mmctr.manifests import require_types
from mmctr.rankers.base import RankerInput, RankerOutput
from mmctr.run_folder import AGAIN, RunFolder
from mmctr.tasks.expert import Expert, same_content
from mmctr.tasks.folder import load_weights, save_task, task_config, task_weights
from mmctr.tasks.pretrain import PretrainTask, PretrainTaskConfig
from mmctr.tasks.ranking_config import RankingTaskConfig
from mmctr.tasks.sharing import Shareable


class RankingTask(Shareable, nn.Module):
    """A click prediction model: ItemEmbedder, user and context features, and a ranker.

    `forward` gives loss terms, `logits` gives scores.

    Args:
        config: sizes and options of all parts.
        vocabulary: items, users and feature values seen in training.
        table: (N, content dim) content vectors and the (N,) bool mask of items with content; None without content.
        encoder: the pretrained task whose encoder gives the content; None for other content.
        catalog_ids: (N,) raw ids of the items in the order of `table`; None without content.
        expert: the trained ranker of MAKE; None without an expert.

    Example:
        ```python
        from pathlib import Path

        task = mmctr.RankingTask.load(Path("demo/din_table"))
        print(task.config.ranker.name, len(task.vocabulary.item_ids))
        ```
    """

    item_decay: Tensor
    user_decay: Tensor

    def __init__(
        self,
        config: RankingTaskConfig,
        vocabulary: RankingVocabulary,
        table: tuple[Tensor, Tensor] | None = None,
        encoder: PretrainTask | None = None,
        catalog_ids: pa.Array | None = None,
        expert: RankingTask | None = None,
    ):
        super().__init__()
        self.config = config
        self.vocabulary = vocabulary
        self.catalog_ids = catalog_ids
        """(N,) raw ids of the items in the order of the content vectors; None without content"""
        self.embedder = ItemEmbedder(
            config.embedder,
            len(vocabulary.item_ids) + 1,
            config.features.item,
            vocabulary.item,
            table,
            encoder,
            config.ranker.weight_dim,
            torch.from_numpy(np.concatenate([[0], vocabulary.clicks])),
        )
        if encoder is not None:
            # the ranking loss does not read these parameters, and data-parallel training needs a gradient for all
            for parameter in encoder.loss_parameters():
                parameter.requires_grad_(False)
        std = initial_std(config.embedder, config.ranker.weight_dim)
        user_dim = (config.ranker.weight_dim or config.user_dim) if config.user_dim else 0
        self.users = RowTable(len(vocabulary.user_ids) + 1, user_dim, std) if user_dim else None
        self.context = FeatureEmbedder(
            config.features.user | config.features.context | config.features.cross,
            vocabulary.user | vocabulary.context,
            std,
            config.ranker.weight_dim,
            leaves=vocabulary.trees.num_rows if vocabulary.trees else 0,
        )
        tiers = config.simtier.dim if config.simtier else 0
        options: dict[str, Any] = {"columns": self.embedder.columns} if config.ranker.needs_columns else {}
        self.expert = None
        if config.make is not None:
            assert expert is not None
            self.expert = Expert(config, expert)
            options["expert_hidden_dims"] = self.expert.hidden_dims
            self.expert.shares_content = same_content(self.embedder, expert.embedder)
            if self.expert.shares_content:  # one copy in memory serves both
                expert.embedder.refresh(self.embedder.content_table, self.embedder.has_content)
        context_dim = user_dim + self.context.dim + tiers + (self.expert.dim if self.expert else 0)
        self.ranker = config.ranker.build(self.embedder.dim, context_dim, **options)
        # the generator is made last, so that a ranker has the same initial weights with and without a generator, which
        # is trained after the ranker (mmctr.training.generator_tasks)
        self.embedder.generator = make_generator(
            config.embedder.cold_ids,
            config.embedder.id_dim,
            user_dim,
            self.embedder.features.dim,
            table[0].shape[1] if table is not None and self.embedder.adapter is not None else 0,
            self.embedder.features.embedded,
        )
        if self.embedder.generator is not None:
            self.embedder.generator.requires_grad_(False)
        # only training reads these buffers, which `count_samples` sets
        self.register_buffer("item_decay", torch.zeros(0), persistent=False)
        self.register_buffer("user_decay", torch.zeros(0), persistent=False)

    def count_samples(self, items: np.ndarray, users: np.ndarray) -> None:
        """Set the numbers of training impressions that `mini_batch_l2` divides by.

        Args:
            items: (num_ids,) number of training impressions of each row of the item ID table; row 0, the unknown item,
                is not regularised.
            users: the same of the user ID table.
        """
        for name, counts in (("item_decay", items), ("user_decay", users)):
            decay = self.config.mini_batch_l2 / torch.from_numpy(counts).clamp(min=1).float()
            decay[0] = 0
            self.register_buffer(name, decay.to(self.item_decay.device), persistent=False)

    def logits(self, batch: BehaviorBatch, target_ids: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits and auxiliary losses of B impressions.

        Args:
            batch: B impressions with U distinct items.
            target_ids: (U, id_dim) vectors that replace the ID vectors of targets, not of behaviours; None: the vectors
                of the ID table.

        Returns:
            Logits (B,), and weighted scalar losses by name.
        """
        output = self.output(batch, target_ids)
        return output.logits, output.losses

    def output(self, batch: BehaviorBatch, target_ids: Tensor | None = None) -> RankerOutput:
        """Logits, auxiliary losses, attention weights and hidden layers; the arguments are those of `logits`."""
        vectors, target = self.embedder.by_role(batch, target_ids)
        similarity = self.embedder.similarity(batch) if self.config.compares else None
        context = self.context(batch.context, batch.user)
        if self.users is not None:
            context = torch.cat([self.users(batch.user), context], dim=1)
        if self.config.simtier is not None and similarity is not None:
            context = torch.cat([context, tier_counts(similarity, batch.history_offsets, self.config.simtier)], dim=1)
        hidden, expert_logits = [], None
        if self.expert is not None:
            vector, hidden, expert_logits = self.expert(batch)
            context = torch.cat([context, vector], dim=1)
        output: RankerOutput = self.ranker(
            RankerInput(
                items=vectors,
                target=target,
                history=batch.history,
                history_offsets=batch.history_offsets,
                context=context,
                negatives=batch.negatives,
                similarity=similarity,
                expert_hidden=hidden,
            )
        )
        return output if expert_logits is None else replace(output, logits=output.logits + expert_logits)

    def forward(self, batch: BehaviorBatch) -> dict[str, Tensor]:
        """The loss terms of B impressions: `log_loss` and the auxiliary losses, weighted scalars by name."""
        logits, losses = self.logits(batch)
        if self.config.mini_batch_l2:
            losses = {**losses, "mini_batch_l2": self._mini_batch_l2(batch)}
        return {"log_loss": F.binary_cross_entropy_with_logits(logits.float(), batch.label), **losses}

    def _mini_batch_l2(self, batch: BehaviorBatch) -> Tensor:
        """lambda / 2 sum_j |w_j|^2 / n_j over the distinct IDs j of the batch of all processes, a scalar.

        The gradient step of this term is equation 5 of Zhou et al. 2018. Negatives of an auxiliary loss do not count.
        """
        if not len(self.item_decay):
            raise ValueError("mini_batch_l2 needs the numbers of samples: call count_samples before training")
        shown = torch.zeros(len(batch.items), dtype=torch.bool, device=batch.target.device)
        shown[batch.target] = shown[batch.history] = True
        parts = [
            (self.embedder.ids, self.item_decay, batch.items.id_rows[shown]),
            (self.users, self.user_decay, batch.user),
        ]
        total = batch.label.new_zeros(())
        for table, decay, ids in parts:
            if table is not None:
                rows = torch.unique(ids)
                # the losses of processes are averaged, so processes with the same ID divide the term of that ID
                total = total + (table(rows).square().sum(1) * decay[rows] / share_of_processes(rows)).sum()
        return total / 2

    @torch.no_grad()
    def sparsity(self) -> dict[str, dict[str, int]]:
        """The number of rows, and of rows that are not zero, of each embedding table: L1 and L2,1 penalties set rows to
        zero."""
        tables = {name: module.weight for name, module in self.named_modules() if isinstance(module, RowTable)}
        return {name: {"rows": len(w), "nonzero": int((w != 0).any(1).sum())} for name, w in tables.items()}

    def parameter_parts(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by part: `id` (ID tables of items and users), `encoder`, `content` (the content adapter), `expert`
        (the expert of MAKE) and `ranker` (all other parameters)."""
        parts: dict[str, list[nn.Parameter]] = {"id": [], "encoder": [], "content": [], "expert": [], "ranker": []}
        for name, parameter in self.named_parameters():
            if name.startswith(("embedder.ids.", "users.")):
                parts["id"].append(parameter)
            elif name.startswith("embedder.encoder."):
                # temperatures take part in no ranking loss
                if not name.startswith("embedder.encoder.objectives."):
                    parts["encoder"].append(parameter)
            elif name.startswith("expert."):
                parts["expert"].append(parameter)
            else:
                parts["content" if name.startswith("embedder.adapter.") else "ranker"].append(parameter)
        return parts

    def after_step(self) -> None:
        """Do nothing: no parameter has constraints."""

    def save(self, folder: Path) -> None:
        """Write config, vocabulary, weights, the content table or the content encoder, and the expert into a folder."""
        files = RunFolder(folder)
        self.vocabulary.save(files.vocabulary)
        if isinstance(self.embedder.encoder, PretrainTask):
            self.embedder.encoder.encoder.save(files.encoder)
            write_json(files.encoder / "pretrain.json", self.embedder.encoder.config.model_dump(mode="json"))
        elif self.embedder.adapter is not None:
            table = {"content_table": self.embedder.content_table, "has_content": self.embedder.has_content}
            replace_file(files.content, lambda path: save_file(table, path))
        if self.catalog_ids is not None:
            ids = pa.table({"item_id": self.catalog_ids})
            replace_file(files.catalog, lambda path: pyarrow.parquet.write_table(ids, path))
        if self.expert is not None:
            self.expert.save(files.expert, self.embedder)
        save_task(self, self.config, "ranking", folder)

    def bind(self, item_ids: pa.Array) -> None:
        """Put the stored content vectors in the order of another catalog.

        Args:
            item_ids: (N,) raw ids of that catalog; an item without a stored vector counts as an item without content.
        """
        if self.expert is not None:
            self.expert.task.bind(item_ids)
        if self.catalog_ids is None:
            return
        if self.embedder.adapter is not None:
            rows = torch.from_numpy(rows_of(item_ids, self.catalog_ids, "the run's catalog and this dataset's"))
            has = (rows >= 0) & self.embedder.has_content.cpu()[rows.clamp(min=0)]
            self.embedder.refresh(self.embedder.content_table.cpu()[rows.clamp(min=0)], has)
        self.catalog_ids = item_ids  # without content too: an expert's vectors are saved in this order

    @classmethod
    def load(cls, folder: str | Path) -> RankingTask:
        """Load a task from a run folder, in evaluation mode.

        The content vectors are in the order of the catalog of the training; `bind` changes the order.

        Args:
            folder: a run folder of `finetune.train`, or a folder of `save_pretrained`.

        Raises:
            ValueError: the folder holds no ranking task, or a damaged file.
        """
        folder = Path(folder)
        files = RunFolder(folder)
        config = RankingTaskConfig.parse(task_config(folder, "ranking"), source=str(files.task))
        vocabulary = RankingVocabulary.load(files.vocabulary)
        weights = task_weights(folder)
        table = encoder = None
        if isinstance(config.embedder.content, ContentEncoder):
            path = files.encoder / "pretrain.json"
            pretrain = PretrainTaskConfig.parse(read_json(path), str(path))
            encoder = PretrainTask(pretrain, files.encoder)
            table = _content_table(weights, files.weights, "embedder.")
        elif files.content.is_file():
            table = read_content_table(files.content)
        ids = None
        if files.catalog.is_file():
            ids = as_ids(read_table(files.catalog).column("item_id"), "item_id", folder)
        expert = None if config.make is None else read_expert(files.expert, vocabulary, table, ids)
        task = cls(config, vocabulary, table, encoder, ids, expert)
        load_weights(task, weights, files.weights)
        task.embedder.uses_generator = task.embedder.generator is not None
        return task.eval()


def read_content_table(path: Path) -> tuple[Tensor, Tensor]:
    """The content vectors (N, D) of a ranker, and the (N,) bool mask of items with content.

    Raises:
        ValueError: the file cannot be read, or holds other tensors.
    """
    try:
        tensors = load_file(path)
    except Exception as error:
        raise ValueError(f"{path}: cannot be read ({error}); {AGAIN}") from None
    return _content_table(tensors, path)


def _content_table(tensors: dict[str, Tensor], path: Path, prefix: str = "") -> tuple[Tensor, Tensor]:
    vectors, has = tensors.get(f"{prefix}content_table"), tensors.get(f"{prefix}has_content")
    if vectors is None or has is None or vectors.ndim != 2 or has.shape != vectors.shape[:1] or has.dtype != torch.bool:
        raise ValueError(f"{path}: holds no table of content vectors; {AGAIN}")
    return vectors, has


def read_expert(
    folder: Path, vocabulary: RankingVocabulary, table: tuple[Tensor, Tensor] | None, ids: pa.Array | None
) -> RankingTask:
    """The expert from a folder written by `Expert.save`, with fresh weights: the ranker loads the weights of both.

    Args:
        folder: the folder of the expert.
        vocabulary: the vocabulary of the ranker.
        table: the content table of the ranker, which the expert reads where the folder has no table.
        ids: (N,) raw ids of the items in the order of the table.
    """
    files = RunFolder(folder)
    saved = read_json(files.task)
    require_types(saved, files.task, config=dict)
    config = RankingTaskConfig.parse(saved["config"], source=str(files.task))
    if files.content.is_file():
        table = read_content_table(files.content)
    return RankingTask(config, vocabulary, table, catalog_ids=ids)
