"""Rankers: vectors in, logits out. To add one: a module, then its config in the union below."""

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
