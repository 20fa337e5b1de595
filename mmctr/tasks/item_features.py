"""From what towers give to the vectors that objectives and embeddings are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmctr.config import Config
from mmctr.data.batches import ItemBatch
from mmctr.encoders.base import EncoderBase


class ProjectionConfig(Config):
    """Trained layers behind each tower."""

    dim: int = Field(default=128, ge=1)
    """size of the space where pictures and texts meet"""
    hidden: list[int] = []
    """hidden sizes; none: one linear layer"""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """of the hidden layers"""
    residual: bool = False
    """instead of a space of `dim`: the layers give a change of the unit-norm features, none at first, and the features
    keep their size (CLIP-Adapter: Gao et al. 2021). Towers that share no space then still share none"""


@dataclass(frozen=True)
class ItemFeatures:
    """What the towers give, before it is scaled to unit norm; None for a modality that is not there."""

    image: Tensor | None = None
    """(E, dim)"""
    text: Tensor | None = None
    """(E, dim)"""
    query: Tensor | None = None
    """(B, dim) text features of queries"""


class Towers(NamedTuple):
    """The modules that turn pixels and tokens into features."""

    encoder: EncoderBase
    image_projection: nn.Module
    text_projection: nn.Module

    def encode(self, items: ItemBatch | None, query_ids: Tensor | None = None) -> ItemFeatures:
        """Features of the E items of a batch, from pictures and texts or from stored features of frozen towers; and of
        B queries (B, T)."""
        image = text = query = None
        if items is not None:
            image, text = items.image_features, items.text_features
            if image is None and items.image is not None:
                image = self.encoder.encode_image(items.image)
            if text is None and items.input_ids is not None:
                text = self.encoder.encode_text(items.input_ids)
            if image is not None:
                image = features_of_items(
                    self.image_projection(image), items.image_item, items.image_weight, items.has_image
                )
            if text is not None:
                text = features_of_items(self.text_projection(text), items.text_item, items.text_weight, items.has_text)
        if query_ids is not None:
            query = self.text_projection(self.encoder.encode_text(query_ids))
        return ItemFeatures(image, text, query)


def make_projection(config: ProjectionConfig | None, dim: int) -> nn.Module:
    if config is None:
        return nn.Identity()
    layers: list[nn.Module] = []
    width = dim
    for hidden in config.hidden:
        layers += [nn.Linear(width, hidden), nn.GELU(), nn.Dropout(config.dropout)]
        width = hidden
    if not config.residual:
        return nn.Sequential(*layers, nn.Linear(width, config.dim, bias=False))
    last = nn.Linear(width, dim, bias=False)
    nn.init.zeros_(last.weight)
    return Residual(nn.Sequential(*layers, last))


class Residual(nn.Module):
    """Unit-norm features plus a change of them, which reads them scaled to the size linear layers are made for."""

    def __init__(self, change: nn.Module):
        super().__init__()
        self.change = change

    def forward(self, features: Tensor) -> Tensor:
        features = unit(features)
        return features + self.change(features * features.shape[1] ** 0.5)


def features_of_items(features: Tensor, item: Tensor | None, weight: Tensor | None, has: Tensor | None) -> Tensor:
    """(E, dim) features of items: the weighted sums of the (V, dim) ones of their pictures or texts, of unit norm."""
    if item is None:
        return features
    assert weight is not None and has is not None
    weighted = unit(features) * weight[:, None]
    return weighted.new_zeros((len(has), features.shape[1])).index_add(0, item, weighted)


def unit(x: Tensor | None) -> Tensor:
    assert x is not None
    return F.normalize(x.float(), dim=-1)


def content_masks(items: ItemBatch) -> tuple[Tensor, Tensor]:
    """(E,) which items have a picture, and which have a text."""
    some = items.has_image if items.has_image is not None else items.has_text
    assert some is not None, "a batch to encode has pictures or texts"
    none = torch.zeros_like(some)
    return (
        none if items.has_image is None else items.has_image,
        none if items.has_text is None else items.has_text,
    )


def item_vectors(
    image: Tensor | None,
    has_image: Tensor,
    text: Tensor | None,
    has_text: Tensor,
    side_by_side: bool,
    dims: tuple[int, int],
) -> Tensor:
    """(E, D) or (E, D + D'): zero rows where an item has neither. Side by side, a missing one is stood in for by the
    other where both have one size."""
    rows = has_image[:, None]  # its shape, not its length: in an exported graph a length is a constant
    image = (
        rows.new_zeros((rows.shape[0], dims[0]), dtype=torch.float32)
        if image is None
        else torch.where(rows, image, 0.0)
    )
    rows = has_text[:, None]
    text = (
        rows.new_zeros((rows.shape[0], dims[1]), dtype=torch.float32) if text is None else torch.where(rows, text, 0.0)
    )
    if not side_by_side:
        return F.normalize(image + text, dim=-1)
    if image.shape[1] == text.shape[1]:
        image, text = torch.where(has_image[:, None], image, text), torch.where(has_text[:, None], text, image)
    return F.normalize(torch.cat([image, text], 1), dim=-1)


def head_inputs(
    features: ItemFeatures, has_image: Tensor, has_text: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a variational head reads of E items: unit-norm features and masks, by modality."""
    given = {"image": (features.image, has_image), "text": (features.text, has_text)}
    there = {name: pair for name, pair in given.items() if pair[0] is not None}
    return {name: unit(values) for name, (values, _) in there.items()}, {name: has for name, (_, has) in there.items()}
