"""FeatureQueue: items of earlier steps as further candidates of contrastive losses, so that a small batch has many."""

from __future__ import annotations

import copy

import torch
from pydantic import Field
from torch import Tensor, nn

from mmctr.config import Config
from mmctr.data.batches import PairBatch
from mmctr.distributed import gather_rows
from mmctr.tasks.item_features import ItemFeatures, Towers, content_masks


class QueueConfig(Config):
    """Candidates of earlier steps, so that a small batch has many negatives (MoCo: He et al. 2020)."""

    size: int = Field(default=4096, ge=1)
    """items kept; a multiple of fit.batch_size"""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """0: features as the encoder gave them when they were in a batch (cross-batch memory: Wang et al. 2020). Above 0:
    a momentum encoder makes the features, at the price of another forward pass; a step moves each of its weights w to
    momentum * w + (1 - momentum) * the weight of the encoder"""


class FeatureQueue(nn.Module):
    """Features of the latest M items, (M, dim) of each modality before scaling, and their keys.

    The queue is the same in every process. Places not yet filled have neither picture nor text.

    Args:
        dims: sizes of the features of pictures and of texts.
        num_keys: K, see `mmctr.losses.contrastive`.
        towers: those of the task; with `momentum` the queue keeps a copy of them.
    """

    image: Tensor
    text: Tensor
    has_image: Tensor
    has_text: Tensor
    keys: Tensor
    place: Tensor

    def __init__(self, config: QueueConfig, dims: tuple[int, int], num_keys: int, towers: Towers):
        super().__init__()
        self.config = config
        for name, dim in zip(("image", "text"), dims, strict=True):
            self.register_buffer(name, torch.zeros(config.size, dim))
            self.register_buffer(f"has_{name}", torch.zeros(config.size, dtype=torch.bool))
        self.register_buffer("keys", torch.full((config.size, num_keys), torch.iinfo(torch.int64).min))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))
        self.momentum_towers: nn.ModuleDict | None = None
        if config.momentum:
            self.momentum_towers = nn.ModuleDict(
                {name: copy.deepcopy(module) for name, module in towers._asdict().items()}
            )
            self.momentum_towers.requires_grad_(False)
        self._pending: tuple[Tensor, ...] | None = None

    def read(self) -> tuple[ItemFeatures, Tensor, Tensor]:
        """The features of the M items, and the (M,) masks of those with a picture and with a text."""
        return ItemFeatures(self.image, self.text), self.has_image, self.has_text

    @torch.no_grad()
    def collect(self, features: ItemFeatures, batch: PairBatch) -> None:
        """Remember the anchors of a step, to be put in by `after_step`: no step may meet its own items in the queue."""
        if self.momentum_towers is not None:
            features = Towers._make(self.momentum_towers.values()).encode(batch.items)
        anchor = batch.anchor
        has_image, has_text = (mask[anchor] for mask in content_masks(batch.items))
        image, text = (
            kept.new_zeros((len(anchor), kept.shape[1])) if x is None else x.detach()[anchor].float()
            for x, kept in ((features.image, self.image), (features.text, self.text))
        )
        self._pending = tuple(gather_rows(x) for x in (image, text, has_image, has_text, batch.keys[anchor]))

    @torch.no_grad()
    def after_step(self, towers: Towers) -> None:
        """Replace the oldest items by those of the step, and move the momentum encoder towards the encoder."""
        if self._pending is not None:
            count = len(self._pending[0])
            places = (self.place + torch.arange(count, device=self.place.device)) % len(self.keys)
            for buffer, values in zip(
                (self.image, self.text, self.has_image, self.has_text, self.keys), self._pending, strict=True
            ):
                buffer[places] = values.to(buffer.dtype)
            self.place.copy_((self.place + count) % len(self.keys))
            self._pending = None
        if self.momentum_towers is not None:
            for name, module in towers._asdict().items():
                pairs = zip(self.momentum_towers[name].parameters(), module.parameters(), strict=True)
                for slow, fast in pairs:
                    slow.lerp_(fast, 1 - self.config.momentum)
