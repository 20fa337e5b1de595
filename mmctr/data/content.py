"""The content of a catalog that encoders read: pictures and tokens, or features computed once by frozen towers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mmctr.data.batches import Features, ItemBatch
from mmctr.data.hashing import hashed_uniform, stream_seed
from mmctr.data.picture_cache import Pictures


class Content(Protocol):
    """A source of pictures and texts of items, addressed by row number."""

    def batch(self, rows: Tensor) -> ItemBatch:
        """The pictures and texts of the items with the (n,) row numbers `rows`."""
        ...


@dataclass(frozen=True)
class PictureField:
    """At most one picture per catalog item."""

    pictures: Pictures
    weight: float = 1.0
    """weight of this picture among all pictures of an item, before normalisation"""
    features: Tensor | None = None
    """(N, F) output of a frozen image tower; None: the pictures themselves are read"""

    @property
    def has(self) -> np.ndarray:
        """(N,) bool: whether the item has a picture in this field."""
        return self.pictures.index >= 0

    def take(self, rows: Tensor) -> Tensor:
        """The pictures (n, 3, S, S) uint8 of (n,) catalog rows, or the features (n, F) of the pictures."""
        return self.pictures.take(rows)[0] if self.features is None else self.features[rows]


@dataclass(frozen=True)
class TextField:
    """At most one text per catalog item."""

    input_ids: Tensor
    """(N, T) int32 token ids"""
    has_text: Tensor
    """(N,) bool"""
    weight: float = 1.0
    """weight of this text among all texts of an item, before normalisation"""
    features: Tensor | None = None
    """(N, F) output of a frozen text tower; None: the tokens themselves are read"""

    @property
    def has(self) -> np.ndarray:
        """(N,) bool: whether the item has a text in this field."""
        return self.has_text.numpy()

    def take(self, rows: Tensor) -> Tensor:
        """The token ids (n, T) int64 of (n,) catalog rows, or the features (n, F) of the texts."""
        return self.input_ids[rows].long() if self.features is None else self.features[rows]


@dataclass(frozen=True)
class ItemContent:
    """Pictures and texts of a catalog, for batches whose items are encoded; an item may have several of both."""

    pictures: tuple[PictureField, ...] = ()
    texts: tuple[TextField, ...] = ()

    @property
    def has_image(self) -> np.ndarray | None:
        """(N,) bool; None when the catalog has no pictures."""
        return np.any([field.has for field in self.pictures], axis=0) if self.pictures else None

    @property
    def has_text(self) -> np.ndarray | None:
        """(N,) bool; None when the catalog has no texts."""
        return np.any([field.has for field in self.texts], axis=0) if self.texts else None

    def batch(
        self,
        rows: Tensor,
        features: Features | None = None,
        encode: Tensor | None = None,
        draw: tuple[int, int] | None = None,
    ) -> ItemBatch:
        """The `ItemBatch` of some catalog rows, with the content of all of these items or of a part.

        Args:
            rows: (U,) catalog rows.
            features: side features of the items, (U, ...) each.
            encode: (E,) positions in `rows` of the items whose content the batch holds; None: all items.
            draw: (seed, step): of several pictures or texts of an item one is drawn with probabilities proportional to
                the weights, the same draw in every process, so that the mean of a loss over steps is the weighted sum
                over pictures and texts. None: the batch holds all pictures and texts, with normalised weights.
        """
        picked = rows if encode is None else rows[encode]
        of_picture, of_text = (
            None if draw is None else (stream_seed(draw[0], name), draw[1]) for name in ("picture", "text")
        )
        image, has_image, image_item, image_weight = _field_values(self.pictures, picked, of_picture)
        text, has_text, text_item, text_weight = _field_values(self.texts, picked, of_text)
        image_is_features = bool(self.pictures) and self.pictures[0].features is not None
        text_is_features = bool(self.texts) and self.texts[0].features is not None
        return ItemBatch(
            row=rows,
            features=features or {},
            image=None if image_is_features else image,
            has_image=has_image,
            input_ids=None if text_is_features else text,
            has_text=has_text,
            encode=encode,
            image_features=image if image_is_features else None,
            text_features=text if text_is_features else None,
            image_item=image_item,
            image_weight=image_weight,
            text_item=text_item,
            text_weight=text_weight,
        )


def _field_values(
    fields: Sequence[PictureField] | Sequence[TextField], rows: Tensor, draw: tuple[int, int] | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The (V, ...) pictures or texts of (n,) items, the (n,) mask of items that have any, and for several fields the
    (V,) position of the item and the (V,) weight of each picture or text."""
    if not fields:
        return None, None, None, None
    if len(fields) == 1:
        return fields[0].take(rows), torch.from_numpy(fields[0].has[rows.numpy()]), None, None
    has = np.stack([field.has[rows.numpy()] for field in fields], axis=1)  # (n, fields)
    weight = has * np.array([field.weight for field in fields])
    weight = weight / np.maximum(weight.sum(1, keepdims=True), 1e-12)
    some = torch.from_numpy(has.any(1))
    if draw is None:
        shows = [np.flatnonzero(column) for column in has.T]
        values = torch.cat([field.take(rows[torch.from_numpy(at)]) for field, at in zip(fields, shows, strict=True)])
        share = np.concatenate([weight[at, number] for number, at in enumerate(shows)])
        return values, some, torch.from_numpy(np.concatenate(shows)), torch.from_numpy(share).float()
    # the field in whose share of [0, 1) the draw falls; rounding must not lead beyond the last field of the item
    uniform = hashed_uniform(*draw, rows.numpy())
    chosen = np.minimum((uniform[:, None] >= np.cumsum(weight, 1)).sum(1), len(fields) - 1)
    chosen = np.where(np.take_along_axis(has, chosen[:, None], 1)[:, 0], chosen, has.argmax(1))
    values = fields[0].take(rows)
    for number, field in enumerate(fields[1:], start=1):
        at = torch.from_numpy(np.flatnonzero(chosen == number))
        values[at] = field.take(rows[at])
    return values, some, None, None
