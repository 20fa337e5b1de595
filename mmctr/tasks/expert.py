"""MAKE: an expert, a ranker on content alone that was trained before, inside a ranker on IDs.

Sheng et al. 2024 (arXiv 2407.19467). IDs overfit after one epoch on the log, while a ranker on content needs several
epochs. So each of the two is trained for a suitable time: the first run is an ordinary run without item IDs, and the
second run, of a single epoch, reads the output of the first ranker, the expert, at three levels:

    | output of the expert                           | use in the ranker                                            |
    |------------------------------------------------|--------------------------------------------------------------|
    | v: target and interest, the input of the MLP   | concatenated to the input of the MLP                         |
    | the last hidden layers of the MLP              | concatenated to the last hidden layers, in the same order    |
    | the logit                                      | added to the logit                                           |
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
from mmctr.rankers.dien import DIENConfig
from mmctr.rankers.din import DINConfig
from mmctr.run_folder import RunFolder
from mmctr.tasks.ranking_config import RankingTaskConfig


class ContentRanker(Protocol):
    """A RankingTask on content alone, as the expert uses it."""

    config: RankingTaskConfig
    embedder: ItemEmbedder

    def output(self, batch: BehaviorBatch) -> RankerOutput:
        """Logits (B,), and the vectors and hidden layers that the other ranker reads."""
        ...

    def bind(self, item_ids: pa.Array) -> None:
        """Put the content vectors in the order of a catalog with the raw ids `item_ids` (N,)."""
        ...


class Expert(nn.Module):
    """The expert, as a module of the ranker that reads the expert.

    Args:
        config: the config of the ranker.
        task: the trained ranker on content.

    Raises:
        ValueError: the task cannot be the expert of this ranker (`check_expert`).
    """

    def __init__(self, config: RankingTaskConfig, task: ContentRanker):
        super().__init__()
        assert config.make is not None
        check_expert(config, task.config)
        self.task, self.frozen = task, config.make.frozen
        self.shares_content = False
        """whether the expert and the ranker read the same content vectors"""
        assert isinstance(task, nn.Module), "the expert is a module of the ranker"
        if self.frozen:
            task.requires_grad_(False)
        self.num_hidden = config.make.hidden_layers
        self.dim = 2 * task.embedder.dim  # no multi_query: that needs IDs
        """size of v, the target and the interest vector"""
        ranker = task.config.ranker
        assert isinstance(ranker, DINConfig)
        widths = ranker.mlp
        self.hidden_dims = widths[len(widths) - self.num_hidden :]
        """sizes of the hidden layers that the ranker reads"""

    def train(self, mode: bool = True) -> Expert:
        """Set the training mode; a frozen expert stays in evaluation mode, with fixed statistics and no dropout."""
        return super().train(mode and not self.frozen)

    def forward(self, batch: BehaviorBatch) -> tuple[Tensor, list[Tensor], Tensor]:
        """The output of the expert for B impressions.

        Returns:
            v (B, dim), the last hidden layers, each (B, width), and the logits (B,).
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            output = self.task.output(batch)
            hidden = list(output.hidden)
            return torch.cat(list(output.vectors), dim=1), hidden[len(hidden) - self.num_hidden :], output.logits

    def save(self, folder: Path, ranker_embedder: ItemEmbedder) -> None:
        """Write `task.json`, and the content table where the table of the ranker is another one.

        The ranker saves the weights and the vocabulary of the expert.

        Args:
            folder: the folder of the expert.
            ranker_embedder: the embedder of the ranker.
        """
        write_json(RunFolder(folder).task, {"kind": "ranking", "config": self.task.config.model_dump(mode="json")})
        embedder, path = self.task.embedder, RunFolder(folder).content
        if same_content(embedder, ranker_embedder):
            path.unlink(missing_ok=True)
            return
        table = {"content_table": embedder.content_table, "has_content": embedder.has_content}
        replace_file(path, lambda temporary: save_file(table, temporary))


def same_content(one: ItemEmbedder, other: ItemEmbedder) -> bool:
    """Whether two embedders read equal frozen content tables."""
    if not all(isinstance(embedder.config.content, ContentTable) for embedder in (one, other)):
        return False
    tables = (one.content_table, other.content_table), (one.has_content, other.has_content)
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in tables)


def check_expert(config: RankingTaskConfig, expert: RankingTaskConfig) -> None:
    """Check that a ranker can read another ranker as an expert.

    Args:
        config: the config of the ranker, with `make`.
        expert: the config of the expert.

    Raises:
        ValueError: the expert is no DIN on a content table without item IDs, or history length, features or numbers of
            hidden layers do not fit.
    """
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
        features: dict[str, Any] = getattr(config.features, part)
        for name, feature in getattr(expert.features, part).items():
            if features.get(name) != feature:
                raise ValueError(
                    f"{source} reads the {part} feature {name!r}, which this ranker lacks or reads in another way; "
                    f"declare it as the expert does, or train the expert without it"
                )
    for owner, ranker in (("the expert", expert.ranker), ("this ranker", config.ranker)):
        assert isinstance(ranker, DINConfig | DIENConfig), "no other ranker reads an expert"
        if make.hidden_layers > len(ranker.mlp):
            raise ValueError(
                f"task.make.hidden_layers: {make.hidden_layers}, but {owner} has {len(ranker.mlp)} hidden layers "
                f"(ranker.mlp); take fewer"
            )
