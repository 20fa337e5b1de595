"""GBDT+LR (He et al., ADKDD 2014): logistic regression that also reads the leaves of boosted trees."""

from __future__ import annotations

from typing import Literal

from mmctr.features.trees import TreesConfig
from mmctr.rankers.base import BaseRankerConfig
from mmctr.rankers.linear import LR


class GBDTLRConfig(BaseRankerConfig):
    """Logistic regression over the leaves of boosted trees, IDs, side features and crosses (He et al. 2014).

    Each leaf has one weight. Training fits the trees first (`mmctr.features.trees`), and saves the trees with the
    vocabulary.
    """

    name: Literal["gbdt_lr"] = "gbdt_lr"
    trees: TreesConfig = TreesConfig()
    """options of the trees, which are fitted before the linear part"""

    @property
    def weight_dim(self) -> int:
        """One weight for each feature value."""
        return 1

    def build(self, dim: int, context_dim: int) -> LR:
        """The linear part, for weights of size `dim` = 1 and a context of size `context_dim`."""
        return LR(dim, context_dim)
