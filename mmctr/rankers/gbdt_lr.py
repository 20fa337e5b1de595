"""GBDT+LR (He et al., ADKDD 2014): logistic regression that also reads the leaves of boosted trees."""

from __future__ import annotations

from typing import Literal

from mmctr.features.trees import TreesConfig
from mmctr.rankers.base import BaseRankerConfig
from mmctr.rankers.linear import LR


class GBDTLRConfig(BaseRankerConfig):
    """The linear part is that of `lr`, with one weight a leaf beside those of IDs, side features and crosses. Training
    fits the trees first (see `mmctr.features.trees`); they are kept with the vocabulary."""

    name: Literal["gbdt_lr"] = "gbdt_lr"
    trees: TreesConfig = TreesConfig()
    """the trees that are fitted before the linear part"""

    @property
    def weight_dim(self) -> int:
        return 1

    def build(self, dim: int, context_dim: int) -> LR:
        return LR(dim, context_dim)
