"""Features of items: from the outputs of the towers to the vectors that objectives and embeddings read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmctr.config import Config, Width
from mmctr.data.batches import ItemBatch
from mmctr.encoders.base import EncoderBase


class ProjectionConfig(Config):
    """Trained layers on the output of each tower."""

    dim: int = Field(default=128, ge=1)
    """size of the common space of pictures and texts"""
    hidden: list[Width] = []
    """hidden sizes; an empty list: one linear layer"""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """dropout of the hidden layers"""
    residual: bool = False
    """the layers compute a change that is added to the unit-norm features, initially zero, and the size of the features
    stays (CLIP-Adapter: Gao et al. 2021); `dim` is then ignored. Features of separate towers are still in separate
    spaces"""


@dataclass(frozen=True)
class ItemFeatures:
    """Features of E items before scaling to unit norm; None for a modality that the batch lacks."""

    image: Tensor | None = None
    """(E, dim) features of pictures"""
    text: Tensor | None = None
    """(E, dim) features of texts"""
    query: Tensor | None = None
    """(B, dim) text features of queries"""


class Towers(NamedTuple):
    """The modules that turn pixels and tokens into features: the encoder and a projection for each tower."""

    encoder: EncoderBase
    image_projection: nn.Module
    text_projection: nn.Module

    def encode(self, items: ItemBatch | None, query_ids: Tensor | None = None) -> ItemFeatures:
        """Features of items and of queries.

        Args:
            items: E items with pictures and texts, or with stored features of frozen towers; None: no items.
            query_ids: (B, T) tokens of queries; None: no queries.
        """
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
    """The projection of a tower with features of size `dim`; the identity where `config` is None."""
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
    """Unit-norm features plus a learned change of the features.

    Args:
        change: layers that read the features scaled to entries of mean square 1, the scale linear layers expect.
    """

    def __init__(self, change: nn.Module):
        super().__init__()
        self.change = change

    def forward(self, features: Tensor) -> Tensor:
        """Changed features (n, dim) of features (n, dim)."""
        features = unit(features)
        return features + self.change(features * features.shape[1] ** 0.5)


def features_of_items(features: Tensor, item: Tensor | None, weight: Tensor | None, has: Tensor | None) -> Tensor:
    """Features of items as weighted sums of the unit-norm features of the pictures or texts of each item.

    Args:
        features: (V, dim) features of pictures or texts.
        item: (V,) the item of each picture or text; None: item i has the one picture or text i.
        weight: (V,) weights of the pictures or texts.
        has: (E,) bool, the items with any picture or text.

    Returns:
        (E, dim).
    """
    if item is None:
        return features
    assert weight is not None and has is not None
    weighted = unit(features) * weight[:, None]
    return weighted.new_zeros((len(has), features.shape[1])).index_add(0, item, weighted)


def unit(x: Tensor | None) -> Tensor:
    """The rows of x (n, dim) scaled to unit norm, in fp32."""
    assert x is not None, "the batch holds the modality"
    return F.normalize(x.float(), dim=-1)


def content_masks(items: ItemBatch) -> tuple[Tensor, Tensor]:
    """The (E,) bool masks of the items with a picture, and of the items with a text."""
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
    """The vectors of items from unit-norm features of pictures and texts.

    Args:
        image: (E, D) features of pictures; None: no item has a picture.
        has_image: (E,) bool.
        text: (E, D') features of texts; None: no item has a text.
        has_text: (E,) bool.
        side_by_side: concatenate the features of picture and text, instead of adding; a missing modality is replaced by
            the other one where D = D'.
        dims: D and D'.

    Returns:
        (E, D), or (E, D + D') when concatenated, of unit norm; zeros for an item without picture and text.
    """
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
    """The input of a variational head for E items.

    Args:
        features: features of the E items.
        has_image: (E,) bool.
        has_text: (E,) bool.

    Returns:
        Unit-norm features (E, dim) and masks (E,), each by modality, for the modalities of the batch.
    """
    both = {"image": (features.image, has_image), "text": (features.text, has_text)}
    pairs = {name: pair for name, pair in both.items() if pair[0] is not None}
    return {name: unit(values) for name, (values, _) in pairs.items()}, {name: has for name, (_, has) in pairs.items()}
