"""FeatureEmbedder: turns the declared side features of items, users or impressions into one vector."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmctr.data.batches import Features, Jagged
from mmctr.features.columns import FeatureConfig, MultiValuedFeature, Vocabulary, table_rows
from mmctr.features.crosses import CrossFeature
from mmctr.features.trees import LEAVES
from mmctr.layers.named_modules import NamedModules
from mmctr.layers.row_table import RowTable


class FeatureEmbedder(nn.Module):
    """Embed declared side features of n rows and concatenate the embeddings to (n, dim).

    Args:
        configs: the features by name.
        vocabularies: the vocabulary of each feature by name.
        init_std: standard deviation of new embeddings.
        weights: each feature, numbers included, gives a vector of this size, and the vectors are added instead of
            concatenated: for linear rankers. None: embeddings of the configured sizes, concatenated.
        leaves: rows of the table for the leaves of trees, averaged over the trees; 0: no trees. Needs `weights`.
    """

    def __init__(
        self,
        configs: Mapping[str, FeatureConfig | CrossFeature],
        vocabularies: dict[str, Vocabulary],
        init_std: float,
        weights: int | None = None,
        leaves: int = 0,
    ):
        super().__init__()
        assert weights or not leaves, "only linear rankers read leaves"
        self.tables, self.numbers = NamedModules(), NamedModules()
        self.dim, self.weights = 0, weights
        self.embedded: list[bool] = []
        """for each dimension, whether the dimension belongs to an embedding (True) or to a number (False)"""
        self.names = list(configs)
        self.summed = {n for n, c in configs.items() if isinstance(c, MultiValuedFeature) and c.pooling == "sum"}
        for name, config in configs.items():
            is_cross = isinstance(config, CrossFeature)
            rows = config.buckets + 1 if is_cross else table_rows(config, vocabularies[name])
            dim = weights or config.dim
            if rows is None:
                if weights:
                    self.numbers[name] = nn.Linear(2, weights, bias=False)
                dim = weights or 2
            else:
                self.tables[name] = RowTable(rows, dim, 0.0 if is_cross else init_std)
            self.dim += dim
            self.embedded += [rows is not None] * dim
        if leaves and weights:
            self.names.append(LEAVES)
            self.tables[LEAVES] = RowTable(leaves, weights, 0.0)
        if weights and self.names:
            self.dim = weights

    def forward(self, features: Features, like: Tensor) -> Tensor:
        """The vectors of n rows.

        Args:
            features: the values of each feature by name, of n rows.
            like: a tensor of n rows, which gives number of rows and device where no feature is declared.

        Returns:
            (n, dim).
        """
        parts = [self._embed(name, features[name]) for name in self.names]
        if self.weights and parts:
            return torch.stack(parts).sum(0)
        return torch.cat(parts, dim=1) if parts else like.new_zeros((len(like), 0), dtype=torch.float32)

    def _embed(self, name: str, feature: Tensor | Jagged) -> Tensor:
        """The (n, d) vectors of one feature."""
        if isinstance(feature, Jagged):
            table = self.tables[name]
            assert isinstance(table, RowTable)
            if not len(feature.values):
                return table.weight[:1].expand(len(feature.offsets) - 1, -1) * 0
            # an empty list gives a vector of zeros
            weight, values = table.pick(feature.values)
            pooling = "sum" if name in self.summed else "mean"
            return nn.functional.embedding_bag(values, weight, feature.offsets[:-1], mode=pooling)
        if name in self.tables:
            return self.tables[name](feature)
        return self.numbers[name](feature) if name in self.numbers else feature
