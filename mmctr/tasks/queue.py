"""FeatureQueue: features of items of earlier steps as further negatives of contrastive losses."""

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
    """Features of earlier steps, so that a small batch has many negatives (MoCo: He et al. 2020)."""

    size: int = Field(default=4096, ge=1)
    """number of items in the queue; a multiple of fit.batch_size"""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """0: the queue holds features as the encoder computed them in earlier steps (cross-batch memory: Wang et al. 2020).
    Above 0: a momentum encoder computes the features of the queue, at the price of another forward pass; each step
    moves each weight w of the momentum encoder to momentum * w + (1 - momentum) * the weight of the encoder"""


class FeatureQueue(nn.Module):
    """Features and keys of the latest M items: (M, dim) for each modality, before scaling to unit norm, and (M, K).

    All processes hold the same queue. Positions not yet filled count as items without picture and text.

    Args:
        config: size and momentum.
        dims: sizes of the features of pictures and of texts.
        num_keys: number K of keys of an item (`mmctr.losses.contrastive`).
        towers: the towers of the task; with `momentum` the queue holds a copy.
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
        """The features of the M items, and the (M,) bool masks of the items with a picture and with a text."""
        return ItemFeatures(self.image, self.text), self.has_image, self.has_text

    @torch.no_grad()
    def collect(self, features: ItemFeatures, batch: PairBatch) -> None:
        """Store the features of the anchors of a step, which `after_step` puts into the queue after the loss has read
        the queue.

        Args:
            features: features of the items of the batch.
            batch: the batch, with B anchors.
        """
        if self.momentum_towers is not None:
            features = Towers._make(self.momentum_towers.values()).encode(batch.items)
        anchor = batch.anchor
        has_image, has_text = (mask[anchor] for mask in content_masks(batch.items))
        image, text = (
            queued.new_zeros((len(anchor), queued.shape[1])) if x is None else x.detach()[anchor].float()
            for x, queued in ((features.image, self.image), (features.text, self.text))
        )
        self._pending = tuple(gather_rows(x) for x in (image, text, has_image, has_text, batch.keys[anchor]))

    @torch.no_grad()
    def after_step(self, towers: Towers) -> None:
        """Replace the oldest items by the items of the step, and move the momentum encoder towards the encoder.

        Args:
            towers: the towers of the task.
        """
        if self._pending is not None:
            count = len(self._pending[0])
            positions = (self.place + torch.arange(count, device=self.place.device)) % len(self.keys)
            for buffer, values in zip(
                (self.image, self.text, self.has_image, self.has_text, self.keys), self._pending, strict=True
            ):
                buffer[positions] = values.to(buffer.dtype)
            self.place.copy_((self.place + count) % len(self.keys))
            self._pending = None
        if self.momentum_towers is not None:
            for name, module in towers._asdict().items():
                pairs = zip(self.momentum_towers[name].parameters(), module.parameters(), strict=True)
                for slow, fast in pairs:
                    slow.lerp_(fast, 1 - self.config.momentum)
