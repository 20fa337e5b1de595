"""What encoders read of a catalog: its pictures and tokens, or the features that frozen towers made of them."""

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
    """Items by number, to be encoded."""

    def batch(self, rows: Tensor) -> ItemBatch:
        """(n,) numbers -> their pictures and texts."""
        ...


@dataclass(frozen=True)
class PictureField:
    """One picture an item."""

    pictures: Pictures
    weight: float = 1.0
    """beside the item's other pictures"""
    features: Tensor | None = None
    """(N, F) of a frozen image tower"""

    @property
    def has(self) -> np.ndarray:
        """(N,) bool"""
        return self.pictures.index >= 0

    def take(self, rows: Tensor) -> Tensor:
        """Pictures (n, 3, S, S) of catalog rows, or their features (n, F)."""
        return self.pictures.take(rows)[0] if self.features is None else self.features[rows]


@dataclass(frozen=True)
class TextField:
    """One text an item."""

    input_ids: Tensor
    """(N, T) int32"""
    has_text: Tensor
    """(N,) bool"""
    weight: float = 1.0
    features: Tensor | None = None
    """(N, F) of a frozen text tower"""

    @property
    def has(self) -> np.ndarray:
        return self.has_text.numpy()

    def take(self, rows: Tensor) -> Tensor:
        return self.input_ids[rows].long() if self.features is None else self.features[rows]


@dataclass(frozen=True)
class ItemContent:
    """Pictures and texts of a catalog, for batches whose items are to be encoded; an item may have several of each."""

    pictures: tuple[PictureField, ...] = ()
    texts: tuple[TextField, ...] = ()

    @property
    def has_image(self) -> np.ndarray | None:
        """(N,) bool; None when the catalog has no pictures."""
        return np.any([field.has for field in self.pictures], axis=0) if self.pictures else None

    @property
    def has_text(self) -> np.ndarray | None:
        return np.any([field.has for field in self.texts], axis=0) if self.texts else None

    def batch(
        self,
        rows: Tensor,
        features: Features | None = None,
        encode: Tensor | None = None,
        draw: tuple[int, int] | None = None,
    ) -> ItemBatch:
        """The ItemBatch of the given catalog rows, with the content of all of them or of the positions `encode`.

        Args:
            draw: (seed, step): of several pictures or texts each item shows one, drawn by their weights, the same in
                every process; None: it shows all, with their weights. In the mean over steps a loss is then the
                weighted sum over the pictures and texts.
        """
        picked = rows if encode is None else rows[encode]
        of_picture, of_text = (
            None if draw is None else (stream_seed(draw[0], name), draw[1]) for name in ("picture", "text")
        )
        image, has_image, image_item, image_weight = _shown(self.pictures, picked, of_picture)
        text, has_text, text_item, text_weight = _shown(self.texts, picked, of_text)
        kept_image = bool(self.pictures) and self.pictures[0].features is not None
        kept_text = bool(self.texts) and self.texts[0].features is not None
        return ItemBatch(
            row=rows,
            features=features or {},
            image=None if kept_image else image,
            has_image=has_image,
            input_ids=None if kept_text else text,
            has_text=has_text,
            encode=encode,
            image_features=image if kept_image else None,
            text_features=text if kept_text else None,
            image_item=image_item,
            image_weight=image_weight,
            text_item=text_item,
            text_weight=text_weight,
        )


def _shown(
    fields: Sequence[PictureField] | Sequence[TextField], rows: Tensor, draw: tuple[int, int] | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """What items show: (V, ...) pictures or texts, the (n,) mask of items that have any, and for several fields the
    (V,) item of each and its weight."""
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
    # the field in whose share of [0, 1) the draw falls; rounding must not lead beyond the last one there is
    uniform = hashed_uniform(*draw, rows.numpy())
    chosen = np.minimum((uniform[:, None] >= np.cumsum(weight, 1)).sum(1), len(fields) - 1)
    chosen = np.where(np.take_along_axis(has, chosen[:, None], 1)[:, 0], chosen, has.argmax(1))
    values = fields[0].take(rows)
    for number, field in enumerate(fields[1:], start=1):
        at = torch.from_numpy(np.flatnonzero(chosen == number))
        values[at] = field.take(rows[at])
    return values, some, None, None
