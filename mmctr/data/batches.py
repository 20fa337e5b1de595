"""The batches every other file speaks of. READ FIRST.

Letters, everywhere in this repository:

    B  impressions                D  embedding dimension
    U  distinct items of a batch  T  text tokens
    E  items encoded (E <= U)     Z  latent dimension
    H  history values             N  catalog items
    L  longest history            K  neighbours

Each distinct item of a batch appears once in `items`; targets and histories are positions into it, so an item that
is the target of one impression and stands in forty histories is embedded once. (The one exception: where only targets
are encoded and histories read a table, an item that is both appears twice, since it has two vectors.) Histories are
jagged: one flat array of values and the offsets where each impression's slice begins, so a step costs what the
behaviours cost, not `B * longest history`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor


def _moved(value: Any, device: torch.device | str, non_blocking: bool) -> Any:
    if isinstance(value, Tensor | Batch):
        return value.to(device, non_blocking=non_blocking)
    if isinstance(value, dict):
        return {name: _moved(part, device, non_blocking) for name, part in value.items()}
    return value


class Batch:
    """Base of the frozen dataclasses below: moves all its tensors together."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        moved = {f.name: _moved(getattr(self, f.name), device, non_blocking) for f in fields(self)}  # type: ignore[arg-type]
        return replace(self, **moved)  # type: ignore[type-var]

    def pin_memory(self) -> Self:
        pinned = {}
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, dict):
                value = {name: part.pin_memory() for name, part in value.items()}
            elif isinstance(value, Tensor | Batch):
                value = value.pin_memory()
            pinned[f.name] = value
        return replace(self, **pinned)  # type: ignore[type-var]


@dataclass(frozen=True)
class Jagged(Batch):
    """Lists of different lengths: list i is `values[offsets[i]:offsets[i + 1]]`."""

    values: Tensor
    """(V,) int"""
    offsets: Tensor
    """(n + 1,) int, from 0 to V"""


Features = dict[str, "Tensor | Jagged"]
"""Named side features: (n,) int rows of a vocabulary where 0 means unknown, a `Jagged` of such rows, or (n, 2) float
`[standardised value, is missing]`."""


@dataclass(frozen=True)
class ItemBatch(Batch):
    """U distinct items."""

    row: Tensor
    """(U,) int: rows of the catalog"""
    features: Features = field(default_factory=dict)
    """side features, (U, ...) each; `item_id` is the row of the ID vocabulary, 0 for items unseen in training"""
    image: Tensor | None = None
    """(E, 3, H, W) uint8; black where there is no picture"""
    has_image: Tensor | None = None
    """(E,) bool"""
    input_ids: Tensor | None = None
    """(E, T) int"""
    has_text: Tensor | None = None
    """(E,) bool"""
    encode: Tensor | None = None
    """(E,) positions of the items whose pictures and texts are here; None: all of them, E = U"""
    image_features: Tensor | None = None
    """(E, F) what a frozen image tower makes of the pictures, instead of `image`"""
    text_features: Tensor | None = None
    """(E, F') what a frozen text tower makes of the texts, instead of `input_ids`"""
    image_item: Tensor | None = None
    """(V,) for items with several pictures: which of the E each one shows; `image` or `image_features` then have V
    rows. None: picture i is item i's"""
    image_weight: Tensor | None = None
    """(V,) share of each picture in the features of its item"""
    text_item: Tensor | None = None
    """(V',) the same for texts"""
    text_weight: Tensor | None = None

    def __len__(self) -> int:
        return len(self.row)

    @property
    def id_rows(self) -> Tensor:
        """(U,) int: rows of the ID vocabulary, 0 for items unseen in training."""
        rows = self.features["item_id"]
        assert isinstance(rows, Tensor)
        return rows

    def only(self, modality: str) -> ItemBatch:
        """With the pictures ("image") or the texts ("text") alone."""
        has, values, item, weight = _TEXT if modality == "image" else _IMAGE
        return replace(self, **dict.fromkeys((has, *values, item, weight)))

    def part(self, start: int, end: int) -> ItemBatch:
        """The items start:end, where all are encoded."""
        changed: dict[str, Any] = {"row": self.row[start:end], "features": {}}
        for has, values, item, weight in (_IMAGE, _TEXT):
            of_item = getattr(self, item)
            shown: Any = slice(start, end)
            if of_item is not None:
                shown = torch.nonzero((of_item >= start) & (of_item < end))[:, 0]
                changed |= {item: of_item[shown] - start, weight: getattr(self, weight)[shown]}
            if getattr(self, has) is not None:
                changed[has] = getattr(self, has)[start:end]
            changed |= {name: getattr(self, name)[shown] for name in values if getattr(self, name) is not None}
        return replace(self, **changed)


_IMAGE = ("has_image", ("image", "image_features"), "image_item", "image_weight")
_TEXT = ("has_text", ("input_ids", "text_features"), "text_item", "text_weight")


@dataclass(frozen=True)
class BehaviorBatch(Batch):
    """B impressions."""

    items: ItemBatch
    target: Tensor
    """(B,) positions in `items`"""
    history: Tensor
    """(H,) positions in `items`, oldest first within an impression, newest last"""
    history_offsets: Tensor
    """(B + 1,) int"""
    user: Tensor
    """(B,) rows of the user vocabulary, 0 for users unseen in training"""
    context: Features
    """user columns and context columns, (B, ...) each"""
    label: Tensor
    """(B,) float, 0 or 1"""
    negatives: Tensor | None = None
    """(H,) positions in `items` of sampled non-clicked items, for rankers with an auxiliary loss"""

    def __len__(self) -> int:
        return len(self.label)


@dataclass(frozen=True)
class PartnerBatch(Batch):
    """A partner for each anchor of a `PairBatch`."""

    item: Tensor
    """(B,) positions in `items`; the anchor itself where there is none"""
    there: Tensor
    """(B,) bool"""
    log_q: Tensor | None = None
    """(B,) how often the partner is drawn, see `mmctr.losses.contrastive.pair_loss`"""


@dataclass(frozen=True)
class PairBatch(Batch):
    """B items to pretrain on, and the partners that objectives ask for."""

    items: ItemBatch
    """U distinct items: the anchors and all partners"""
    anchor: Tensor
    """(B,) positions in `items`, each another one"""
    keys: Tensor
    """(U, K) what tells items apart, see `mmctr.losses.contrastive`"""
    partners: dict[str, PartnerBatch] = field(default_factory=dict)
    query_ids: Tensor | None = None
    """(B, T) tokens of a query for which the anchor was clicked"""
    has_query: Tensor | None = None
    query: Tensor | None = None
    """(B,) number of the query: equal ones are no negatives of each other"""
    groups: dict[str, Tensor] = field(default_factory=dict)
    """(U,) group of each item by column, negative for none"""
    teacher: Tensor | None = None
    """(U, D') unit norm"""
    has_teacher: Tensor | None = None
    """(U,) bool"""

    def __len__(self) -> int:
        return len(self.anchor)


def jagged_rows(start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Concatenate the ranges `start[i]:end[i]`.

    Returns the (V,) indices and the (n + 1,) offsets, both int64.
    """
    lengths = end - start
    offsets = torch.zeros(len(start) + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=offsets[1:])
    total = int(offsets[-1])
    shift = torch.repeat_interleave(start - offsets[:-1], lengths, output_size=total)
    return torch.arange(total) + shift, offsets
