"""The config of a ranking task: item embedder, features, ranker, and the expert of MAKE."""

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
    """The expert of MAKE, a ranker on content, and the layers of the expert that the ranker reads."""

    run: str
    """run folder of `finetune.train`, of a DIN on a content table, without item IDs, on the same data and split"""
    frozen: bool = True
    """whether the expert gets no gradient; false: it is trained further with the ranker, as the part `expert` of
    `fit.optimizer.groups`"""
    hidden_layers: int = Field(default=1, ge=0)
    """number of last hidden layers of the expert that the ranker reads"""


class RankingTaskConfig(Config):
    """The model that predicts clicks: item vectors, features and a ranker."""

    embedder: ItemEmbedderConfig = ItemEmbedderConfig()
    """how an item becomes one vector"""
    features: FeatureConfigs = FeatureConfigs()
    """side features of items, users and impressions, and crosses"""
    ranker: RankerConfig = DINConfig()
    """the network that reads the vectors"""
    user_dim: int = Field(default=16, ge=0)
    """size of the user ID vector; 0: no user ID vectors"""
    user_dropout: float = Field(default=0.05, ge=0, lt=1)
    """probability that a training impression has the unknown user"""
    max_history: int = Field(default=50, ge=1)
    """number of latest behaviours that the ranker reads"""
    simtier: SimTierConfig | None = None
    """the context of the ranker includes the numbers of behaviours by content similarity to the target; null: it does
    not"""
    make: MAKEConfig | None = None
    """the ranker reads an expert, a ranker on content alone that was trained before (MAKE); null: no expert"""
    mini_batch_l2: float = Field(default=0.0, ge=0)
    """mini-batch aware regularisation of the ID vectors of items and users (Zhou et al. 2018, section 5.2): each ID in
    a batch decays by this value over the number of training impressions with the ID, so that frequent IDs decay little
    at each step and rare IDs, which overfit most, decay much"""

    @property
    def compares(self) -> bool:
        """Whether the ranker reads content similarities of behaviours and targets."""
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
        if self.make and not self.ranker.reads_expert:
            raise ValueError(f"make is for din and dien; {self.ranker.name} cannot read an expert")
        return self
