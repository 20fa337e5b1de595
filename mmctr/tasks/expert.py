"""MAKE: a ranker on content alone, trained before for several epochs, hands what it knows to a ranker on IDs.

Sheng et al. 2024 (arXiv 2407.19467). IDs overfit after an epoch on the log, while a ranker on content needs several. So
each is trained for as long as it gains by it: the first run is an ordinary one without item IDs, and the second one, of
a single epoch, reads at three levels what the first has learned:

    | of the expert                          | in the ranker                                           |
    |----------------------------------------|---------------------------------------------------------|
    | v: target and interest, before its MLP | beside context, target and interest, before the MLP     |
    | its last hidden layers                 | beside the hidden layers that are as far from the end   |
    | its logit                              | added to the logit                                      |
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmctr.data.batches import BehaviorBatch
from mmctr.embedders.item_embedder import ContentTable, ItemEmbedder
from mmctr.files import replace_file, write_json
from mmctr.rankers.base import RankerOutput
from mmctr.rankers.din import DINConfig
from mmctr.run_folder import RunFolder
from mmctr.tasks.ranking_config import RankingTaskConfig


class ContentRanker(Protocol):
    """What an expert is: a RankingTask on content alone."""

    config: RankingTaskConfig
    embedder: ItemEmbedder

    def output(self, batch: BehaviorBatch) -> RankerOutput:
        """Logits, and the inner vectors that the ranker reads."""
        ...

    def bind(self, item_ids: pa.Array) -> None:
        """Put the content vectors in the order of a catalog."""
        ...


class Expert(nn.Module):
    """The expert inside the ranker that reads it.

    Args:
        config: of the ranker.
        task: the expert.

    Raises ValueError for a run that cannot be the expert of this ranker, as `check_expert` does.
    """

    def __init__(self, config: RankingTaskConfig, task: ContentRanker):
        super().__init__()
        assert config.make is not None
        check_expert(config, task.config)
        self.task, self.frozen = task, config.make.frozen
        self.shares_content = False
        """whether it reads the content vectors that the ranker reads"""
        assert isinstance(task, nn.Module), "the expert is a module of the ranker"
        if self.frozen:
            task.requires_grad_(False)
        self.num_hidden = config.make.hidden_layers
        self.dim = 2 * task.embedder.dim  # no multi_query: that needs IDs
        """size of v"""
        ranker = task.config.ranker
        assert isinstance(ranker, DINConfig)
        widths = ranker.mlp
        self.beside = widths[len(widths) - self.num_hidden :]
        """sizes of the hidden layers that are handed over"""

    def train(self, mode: bool = True) -> Expert:
        """A frozen expert is always in evaluation mode: its statistics stay, and nothing is dropped."""
        return super().train(mode and not self.frozen)

    def forward(self, batch: BehaviorBatch) -> tuple[Tensor, list[Tensor], Tensor]:
        """v (B, dim), the hidden layers handed over (B, width) each, and the logit (B,)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            output = self.task.output(batch)
            hidden = list(output.hidden)
            return torch.cat(list(output.vectors), dim=1), hidden[len(hidden) - self.num_hidden :], output.logits

    def save(self, folder: Path, beside: ItemEmbedder) -> None:
        """`task.json`, and the table of content where `beside`, the embedder of the ranker, has another one. The ranker
        keeps the weights and the vocabulary."""
        write_json(RunFolder(folder).task, {"kind": "ranking", "config": self.task.config.model_dump(mode="json")})
        own, path = self.task.embedder, RunFolder(folder).content
        if same_content(own, beside):
            path.unlink(missing_ok=True)
            return
        table = {"content_table": own.content_table, "has_content": own.has_content}
        replace_file(path, lambda temporary: save_file(table, temporary))


def same_content(one: ItemEmbedder, other: ItemEmbedder) -> bool:
    """Whether two embedders read equal frozen tables of content."""
    if not all(isinstance(embedder.config.content, ContentTable) for embedder in (one, other)):
        return False
    tables = (one.content_table, other.content_table), (one.has_content, other.has_content)
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in tables)


def check_expert(config: RankingTaskConfig, expert: RankingTaskConfig) -> None:
    """Raises ValueError where a ranker cannot read a run of this config as its expert."""
    make = config.make
    assert make is not None
    source = f"task.make.run: {make.run}"
    if expert.ranker.name != "din" or expert.make is not None:
        kind = "itself a ranker with an expert" if expert.make else f"a {expert.ranker.name}"
        raise ValueError(f"{source} is {kind}; an expert is a DIN on content alone, see *_din_make_content.yaml")
    if expert.embedder.id_dim:
        raise ValueError(
            f"{source} reads item IDs (embedder.id_dim {expert.embedder.id_dim}), which overfit in the epochs that "
            f"content needs; train it with task.embedder.id_dim=0"
        )
    if not isinstance(expert.embedder.content, ContentTable):
        raise ValueError(
            f"{source} has its content from {expert.embedder.content.name!r}; train it on a table (`mmctr embed` makes "
            f"one of an encoder)"
        )
    if expert.max_history != config.max_history:
        raise ValueError(
            f"{source} was trained with max_history {expert.max_history}, this ranker has {config.max_history}; both "
            f"read the same batches, so set them equal"
        )
    for part in ("item", "user", "context", "cross"):
        own: dict[str, Any] = getattr(config.features, part)
        for name, feature in getattr(expert.features, part).items():
            if own.get(name) != feature:
                raise ValueError(
                    f"{source} reads the {part} feature {name!r}, which this ranker lacks or reads in another way; "
                    f"declare it here as there, or train the expert without it"
                )
    for whose, layers in (("the expert", expert.ranker.mlp), ("this ranker", config.ranker.mlp)):  # type: ignore[union-attr]
        if make.hidden_layers > len(layers):
            raise ValueError(
                f"task.make.hidden_layers: {make.hidden_layers}, but {whose} has {len(layers)} hidden layers "
                f"(ranker.mlp); take fewer"
            )
