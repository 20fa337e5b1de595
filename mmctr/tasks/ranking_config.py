"""The config of a ranking task: embedder, features, ranker, and the expert of MAKE."""

from __future__ import annotations

from pydantic import Field, model_validator

from mmctr.config import Config
from mmctr.embedders.id_generators import NoColdIds
from mmctr.embedders.item_embedder import ContentNone, ItemEmbedderConfig
from mmctr.embedders.similarity import SimTierConfig
from mmctr.features.vocabulary import FeatureConfigs
from mmctr.rankers import RankerConfig
from mmctr.rankers.din import DINConfig


class MAKEConfig(Config):
    """The expert on content, and what is read of it."""

    run: str
    """run folder of `finetune.train`, of a DIN on a table of content, without item IDs, on the same data and split"""
    frozen: bool = True
    """no gradient into the expert; else it learns on with the ranker, as the part `expert` of `fit.optimizer.groups`"""
    hidden_layers: int = Field(default=1, ge=0)
    """so many of its last hidden layers are handed over"""


class RankingTaskConfig(Config):
    """The model that predicts clicks: item vectors, features and a ranker."""

    embedder: ItemEmbedderConfig = ItemEmbedderConfig()
    """how an item becomes one vector"""
    features: FeatureConfigs = FeatureConfigs()
    """side features of items, users and impressions, and crosses"""
    ranker: RankerConfig = DINConfig()
    """the network on top of the vectors"""
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
