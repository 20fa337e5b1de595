"""RankingTask: ItemEmbedder, user and context features and a ranker."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmctr.config import Config
from mmctr.data.batches import BehaviorBatch
from mmctr.data.tables import as_ids, read_table, rows_of
from mmctr.distributed import share_of_processes
from mmctr.embedders.feature_embedder import FeatureEmbedder
from mmctr.embedders.id_generators import NoColdIds, make_generator
from mmctr.embedders.item_embedder import (
    ContentEncoder,
    ContentNone,
    ItemEmbedder,
    ItemEmbedderConfig,
    initial_std,
)
from mmctr.embedders.similarity import SimTierConfig, tier_counts
from mmctr.features.vocabulary import FeatureConfigs, RankingVocabulary
from mmctr.files import read_json, replace_file, write_json
from mmctr.layers.row_table import RowTable
from mmctr.rankers import RankerConfig
from mmctr.rankers.base import RankerInput, RankerOutput
from mmctr.rankers.din import DINConfig
from mmctr.tasks.expert import Expert, MAKEConfig, same_content
from mmctr.tasks.folder import save_task, task_config, task_weights
from mmctr.tasks.pretrain import PretrainTask, PretrainTaskConfig
from mmctr.tasks.sharing import Shareable


class RankingTaskConfig(Config):
    embedder: ItemEmbedderConfig = ItemEmbedderConfig()
    features: FeatureConfigs = FeatureConfigs()
    ranker: RankerConfig = DINConfig()
    user_dim: int = Field(default=16, ge=0)
    """size of the user ID vector; 0: none"""
    user_dropout: float = Field(default=0.05, ge=0, lt=1)
    """chance that a training impression shows an unknown user"""
    max_history: int = Field(default=50, ge=1)
    """latest behaviours read"""
    simtier: SimTierConfig | None = None
    """the ranker's context also says how many behaviours are how like the target in content; null: it does not"""
    make: MAKEConfig | None = None
    """a ranker on content alone, trained before, hands over what it knows (MAKE); null: there is none"""
    mini_batch_l2: float = Field(default=0.0, ge=0)
    """mini-batch aware regularisation of the ID vectors of items and users (Zhou et al. 2018, section 5.2): each one in
    the batch decays by this over the number of training impressions it is in, so frequent IDs decay little at a time
    and rare ones, which would overfit, much"""

    @property
    def compares(self) -> bool:
        """Whether contents of behaviours and targets are compared."""
        return self.simtier is not None or self.ranker.needs_similarity

    @model_validator(mode="after")
    def _content_fits_the_ranker(self) -> RankingTaskConfig:
        content, linear = self.embedder.content, self.ranker.weight_dim is not None
        if self.compares and isinstance(content, ContentNone):
            raise ValueError("simtier and content_attention compare contents; give embedder.content")
        if self.simtier and linear:
            raise ValueError(f"simtier is for rankers with an MLP on top; {self.ranker.name} is linear")
        if linear and not isinstance(self.embedder.cold_ids, NoColdIds):
            raise ValueError(f"cold_ids makes ID vectors, and {self.ranker.name} has weights; take another ranker")
        if linear and not isinstance(content, ContentNone) and content.shown_in == "history":
            raise ValueError(f"shown_in: history leaves no content to {self.ranker.name}, which reads targets alone")
        if self.ranker.needs_columns:
            wrong = {
                f"fusion: {self.embedder.fusion} mixes them; set embedder.fusion: concat": self.embedder.fusion
                != "concat",
                "there is no content; give embedder.content": isinstance(content, ContentNone),
                "there are no IDs; set embedder.id_dim above 0": not self.embedder.id_dim,
            }
            for reason, is_wrong in wrong.items():
                if is_wrong:
                    raise ValueError(f"ranker.multi_query attends by content and by ID, but {reason}")
        if self.make and not self.ranker.hands_over:
            raise ValueError(f"make is for din and dien; {self.ranker.name} has no place for what an expert hands over")
        return self


class RankingTask(Shareable, nn.Module):
    """ItemEmbedder, user and context features, and a ranker; `forward` gives loss terms, `logits` scores."""

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
        """raw ids of the catalog, in whose order content vectors are; None when there are none"""
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
            # what a ranking loss does not read: parameters without a gradient stop many processes
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
            options["beside"] = self.expert.beside
            self.expert.shares_content = same_content(self.embedder, expert.embedder)
            if self.expert.shares_content:  # once in memory
                expert.embedder.refresh(self.embedder.content_table, self.embedder.has_content)
        context_dim = user_dim + self.context.dim + tiers + (self.expert.dim if self.expert else 0)
        self.ranker = config.ranker.build(self.embedder.dim, context_dim, **options)
        # made last, so that a ranker starts from the same weights with and without a generator, which is trained after
        # the ranker (mmctr.training.generator_tasks)
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
        # of training alone: see count_samples
        self.register_buffer("item_decay", torch.zeros(0), persistent=False)
        self.register_buffer("user_decay", torch.zeros(0), persistent=False)

    def count_samples(self, items: np.ndarray, users: np.ndarray) -> None:
        """What `mini_batch_l2` divides by.

        Args:
            items, users: for each row of the ID tables the number of training impressions it is in; row 0, the
                unknown, is left alone.
        """
        for name, counts in (("item_decay", items), ("user_decay", users)):
            decay = self.config.mini_batch_l2 / torch.from_numpy(counts).clamp(min=1).float()
            decay[0] = 0
            self.register_buffer(name, decay.to(self.item_decay.device), persistent=False)

    def logits(
        self, batch: BehaviorBatch, target_shift: Tensor | None = None, target_ids: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(B,) logits and the ranker's auxiliary losses.

        Args:
            target_shift: (content dim,) added to the content vectors of targets, not to those of histories; also to
                those an expert reads, if they are the same.
            target_ids: (U, id_dim) in the place of the ID vectors of targets, not of those of histories.
        """
        output = self.output(batch, target_shift, target_ids)
        return output.logits, output.losses

    def output(
        self, batch: BehaviorBatch, target_shift: Tensor | None = None, target_ids: Tensor | None = None
    ) -> RankerOutput:
        """All that the ranker says; see `logits`."""
        vectors, target = self.embedder.by_role(batch, target_shift, target_ids)
        similarity = self.embedder.similarity(batch, target_shift) if self.config.compares else None
        context = self.context(batch.context, batch.user)
        if self.users is not None:
            context = torch.cat([self.users(batch.user), context], dim=1)
        if self.config.simtier is not None and similarity is not None:
            context = torch.cat([context, tier_counts(similarity, batch.history_offsets, self.config.simtier)], dim=1)
        hidden, expert_logits = [], None
        if self.expert is not None:
            shared = target_shift if self.expert.shares_content else None
            vector, hidden, expert_logits = self.expert(batch, shared)
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
                beside=hidden,
            )
        )
        return output if expert_logits is None else replace(output, logits=output.logits + expert_logits)

    def forward(self, batch: BehaviorBatch) -> dict[str, Tensor]:
        logits, losses = self.logits(batch)
        if self.config.mini_batch_l2:
            losses = {**losses, "mini_batch_l2": self._mini_batch_l2(batch)}
        return {"log_loss": F.binary_cross_entropy_with_logits(logits.float(), batch.label), **losses}

    def _mini_batch_l2(self, batch: BehaviorBatch) -> Tensor:
        """lambda / 2 sum_j |w_j|^2 / n_j over the distinct IDs j of the batch of all processes (negatives drawn for an
        auxiliary loss are no samples). Equation 5 is its gradient step."""
        if not len(self.item_decay):
            raise ValueError("mini_batch_l2 needs the numbers of samples: call count_samples before training")
        shown = torch.zeros(len(batch.items), dtype=torch.bool, device=batch.target.device)
        shown[batch.target] = shown[batch.history] = True
        item_rows: Tensor = batch.items.features["item_id"]  # type: ignore[assignment]
        parts = [(self.embedder.ids, self.item_decay, item_rows[shown]), (self.users, self.user_decay, batch.user)]
        total = batch.label.new_zeros(())
        for table, decay, ids in parts:
            if table is not None:
                rows = torch.unique(ids)
                # processes average their losses: those that share an ID share its term
                total = total + (table(rows).square().sum(1) * decay[rows] / share_of_processes(rows)).sum()
        return total / 2

    @torch.no_grad()
    def sparsity(self) -> dict[str, dict[str, int]]:
        """Rows of each embedding table and how many of them are not zero: what L1 and L2,1 penalties have left."""
        tables = {name: module.weight for name, module in self.named_modules() if isinstance(module, RowTable)}
        return {name: {"rows": len(w), "nonzero": int((w != 0).any(1).sum())} for name, w in tables.items()}

    def parameter_parts(self) -> dict[str, list[nn.Parameter]]:
        """`id`: ID tables of items and users; `encoder`; `content`: its adapter; `expert`: of MAKE; `ranker`: the
        rest."""
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
        """Nothing is constrained."""

    def save(self, folder: Path) -> None:
        """`task.json`, `vocabulary/`, `model.safetensors`, the content: its frozen table or its encoder, and the
        expert."""
        self.vocabulary.save(folder / "vocabulary")
        if self.embedder.encoder is not None:
            self.embedder.encoder.encoder.save(folder / "encoder")  # type: ignore[union-attr, operator]
            write_json(folder / "encoder" / "pretrain.json", self.embedder.encoder.config.model_dump(mode="json"))  # type: ignore[union-attr, operator]
        elif self.embedder.adapter is not None:
            table = {"content_table": self.embedder.content_table, "has_content": self.embedder.has_content}
            replace_file(folder / "content.safetensors", lambda path: save_file(table, path))
        if self.catalog_ids is not None:
            ids = pa.table({"item_id": self.catalog_ids})
            replace_file(folder / "catalog.parquet", lambda path: pyarrow.parquet.write_table(ids, path))
        if self.expert is not None:
            self.expert.save(folder / "expert", self.embedder)
        save_task(self, "ranking", folder)

    def bind(self, item_ids: pa.Array) -> None:
        """Put the kept content vectors in the order of another catalog; items they lack count as without content."""
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
        """From a run folder; content vectors are in the order of the catalog it was trained with (see `bind`)."""
        folder = Path(folder)
        config = RankingTaskConfig.parse(task_config(folder, "ranking"), source=str(folder / "task.json"))
        vocabulary = RankingVocabulary.load(folder / "vocabulary")
        weights = task_weights(folder)
        table = encoder = None
        if isinstance(config.embedder.content, ContentEncoder):
            pretrain = PretrainTaskConfig.parse(read_json(folder / "encoder" / "pretrain.json"))
            encoder = PretrainTask(pretrain, folder / "encoder")
            table = (weights["embedder.content_table"], weights["embedder.has_content"])
        elif (folder / "content.safetensors").is_file():
            content = load_file(folder / "content.safetensors")
            table = (content["content_table"], content["has_content"])
        ids = None
        if (folder / "catalog.parquet").is_file():
            ids = as_ids(read_table(folder / "catalog.parquet").column("item_id"), "item_id", folder)
        expert = None if config.make is None else read_expert(folder / "expert", vocabulary, table, ids)
        task = cls(config, vocabulary, table, encoder, ids, expert)
        task.load_state_dict(weights)
        task.embedder.generates = task.embedder.generator is not None
        return task.eval()


def read_expert(
    folder: Path, vocabulary: RankingVocabulary, table: tuple[Tensor, Tensor] | None, ids: pa.Array | None
) -> RankingTask:
    """What `Expert.save` wrote; its weights are still to be loaded.

    Args:
        table: of the ranker, which the expert reads too where it has none of its own.
    """
    path = folder / "task.json"
    config = RankingTaskConfig.parse(read_json(path)["config"], source=str(path))
    if (folder / "content.safetensors").is_file():
        content = load_file(folder / "content.safetensors")
        table = content["content_table"], content["has_content"]
    return RankingTask(config, vocabulary, table, catalog_ids=ids)
