"""Rankers: models that turn vectors of items and context into click logits.

A new ranker is a module of this package and one more member of the union `RankerConfig`.
"""

from typing import Annotated

from pydantic import Field

from mmctr.rankers.dien import DIENConfig
from mmctr.rankers.din import DINConfig
from mmctr.rankers.embedding_mlp import EmbeddingMLPConfig
from mmctr.rankers.gbdt_lr import GBDTLRConfig
from mmctr.rankers.linear import LRConfig, LSPLMConfig

RankerConfig = Annotated[
    LRConfig | LSPLMConfig | GBDTLRConfig | EmbeddingMLPConfig | DINConfig | DIENConfig, Field(discriminator="name")
]
