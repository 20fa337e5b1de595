"""Candidates of earlier steps for contrastive losses."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn

from mmctr.config import Config
from mmctr.data.batches import PairBatch
from mmctr.distributed import gather_rows
from mmctr.tasks.item_features import ItemFeatures, content_masks

if TYPE_CHECKING:
    from mmctr.tasks.pretrain import PretrainTask

_TRAINED = ("encoder", "image_projection", "text_projection")


class BankConfig(Config):
    """Candidates of earlier steps, so that a small batch has many negatives (MoCo: He et al. 2020)."""

    size: int = Field(default=4096, ge=1)
    """items kept; a multiple of fit.batch_size"""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """0: features as the encoder gave them when they were in a batch (cross-batch memory: Wang et al. 2020). Above: a
    second encoder, whose weights follow the first ones this slowly, makes them, which costs another pass"""


class MemoryBank(nn.Module):
    """Features of the latest items, (M, dim) of each modality before scaling, and their keys; the same in every
    process. Empty places have neither picture nor text."""

    image: Tensor
    text: Tensor
    has_image: Tensor
    has_text: Tensor
    keys: Tensor
    place: Tensor

    def __init__(self, task: PretrainTask, config: BankConfig, num_keys: int):
        super().__init__()
        self.config = config
        for name, dim in zip(("image", "text"), task.dims, strict=True):
            self.register_buffer(name, torch.zeros(config.size, dim))
            self.register_buffer(f"has_{name}", torch.zeros(config.size, dtype=torch.bool))
        self.register_buffer("keys", torch.full((config.size, num_keys), torch.iinfo(torch.int64).min))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))
        self.follower: nn.ModuleDict | None = None
        if config.momentum:
            self.follower = nn.ModuleDict({name: copy.deepcopy(getattr(task, name)) for name in _TRAINED})
            self.follower.requires_grad_(False)
        self._held: tuple[Tensor, ...] | None = None

    def read(self) -> tuple[ItemFeatures, Tensor, Tensor]:
        return ItemFeatures(self.image, self.text), self.has_image, self.has_text

    @torch.no_grad()
    def hold(self, task: PretrainTask, features: ItemFeatures, batch: PairBatch) -> None:
        """Keep a step's anchors until `after_step`: their own step must not meet them."""
        if self.follower is not None:
            features = self._follow(task, batch)
        anchor = batch.anchor
        has_image, has_text = (mask[anchor] for mask in content_masks(batch.items))
        image, text = (
            kept.new_zeros((len(anchor), kept.shape[1])) if x is None else x.detach()[anchor].float()
            for x, kept in ((features.image, self.image), (features.text, self.text))
        )
        self._held = tuple(gather_rows(x) for x in (image, text, has_image, has_text, batch.keys[anchor]))

    def _follow(self, task: PretrainTask, batch: PairBatch) -> ItemFeatures:
        """The features as the following encoder gives them."""
        assert self.follower is not None
        own = {name: getattr(task, name) for name in _TRAINED}
        try:
            for name in _TRAINED:
                setattr(task, name, self.follower[name])
            return task.encode(batch.items)
        finally:
            for name, module in own.items():
                setattr(task, name, module)

    @torch.no_grad()
    def after_step(self, task: PretrainTask) -> None:
        if self._held is not None:
            count = len(self._held[0])
            places = (self.place + torch.arange(count, device=self.place.device)) % len(self.keys)
            for buffer, values in zip(
                (self.image, self.text, self.has_image, self.has_text, self.keys), self._held, strict=True
            ):
                buffer[places] = values.to(buffer.dtype)
            self.place.copy_((self.place + count) % len(self.keys))
            self._held = None
        if self.follower is not None:
            for name in _TRAINED:
                pairs = zip(self.follower[name].parameters(), getattr(task, name).parameters(), strict=True)
                for slow, fast in pairs:
                    slow.lerp_(fast, 1 - self.config.momentum)
