"""The batches of tensors that encoders, embedders and rankers read. Read this file first.

Letters, everywhere in this repository:

    B  impressions                D  embedding dimension
    U  distinct items of a batch  T  text tokens
    E  items encoded (E <= U)     Z  latent dimension
    H  history values             N  catalog items
    L  longest history            K  neighbours

Each distinct item of a batch appears once in `items`; targets and histories are positions in `items`. An item that is
the target of one impression and a value of forty histories is therefore embedded once. One exception exists: where
only targets are encoded and histories read a table, an item that is both a target and a history value appears twice,
since the item has two vectors. Histories are jagged: one flat array of values, and the offsets at which the slice of
each impression begins. The cost of a step grows with the number of behaviours, not with `B * longest history`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dataclasses import Field


def _moved(value: Any, device: torch.device | str, non_blocking: bool) -> Any:
    if isinstance(value, Tensor | Batch):
        return value.to(device, non_blocking=non_blocking)
    if isinstance(value, dict):
        return {name: _moved(part, device, non_blocking) for name, part in value.items()}
    return value


class Batch:
    """Base class of the frozen dataclasses of tensors: all tensors of a batch move together."""

    if TYPE_CHECKING:  # what `dataclasses` requires of a dataclass instance
        __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Copy every tensor of the batch to a device.

        Args:
            device: target device.
            non_blocking: return before the copies have finished; needs pinned memory to have an effect.

        Returns:
            A new batch of the same class; values that are not tensors are unchanged.
        """
        moved = {f.name: _moved(getattr(self, f.name), device, non_blocking) for f in fields(self)}
        return replace(self, **moved)

    def pin_memory(self) -> Self:
        """Copy every tensor of the batch to page-locked memory, from which copies to a GPU are asynchronous."""
        pinned = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, dict):
                value = {name: part.pin_memory() for name, part in value.items()}
            elif isinstance(value, Tensor | Batch):
                value = value.pin_memory()
            pinned[f.name] = value
        return replace(self, **pinned)


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
    """(E, 3, H, W) uint8; black for an item without a picture"""
    has_image: Tensor | None = None
    """(E,) bool"""
    input_ids: Tensor | None = None
    """(E, T) int token ids of the texts"""
    has_text: Tensor | None = None
    """(E,) bool"""
    encode: Tensor | None = None
    """(E,) positions of the items whose pictures and texts this batch holds; None: the content of all items, E = U"""
    image_features: Tensor | None = None
    """(E, F) output of a frozen image tower for the pictures, instead of `image`"""
    text_features: Tensor | None = None
    """(E, F') output of a frozen text tower for the texts, instead of `input_ids`"""
    image_item: Tensor | None = None
    """(V,) for items with several pictures: position among the E items of the item that each picture shows; `image` or
    `image_features` then have V rows. None: picture i shows item i"""
    image_weight: Tensor | None = None
    """(V,) weight of each picture in the features of the item it shows; the weights of one item sum to 1"""
    text_item: Tensor | None = None
    """(V',) for items with several texts: position among the E items of the item that each text describes"""
    text_weight: Tensor | None = None
    """(V',) weight of each text in the features of the item it describes"""

    def __len__(self) -> int:
        return len(self.row)

    @property
    def id_rows(self) -> Tensor:
        """(U,) int: rows of the ID vocabulary, 0 for items unseen in training."""
        rows = self.features["item_id"]
        assert isinstance(rows, Tensor)
        return rows

    def only(self, modality: str) -> ItemBatch:
        """The same items with the content of one modality.

        Args:
            modality: "image" to keep the pictures alone, "text" to keep the texts alone.
        """
        has, values, item, weight = _TEXT if modality == "image" else _IMAGE
        return replace(self, **dict.fromkeys((has, *values, item, weight)))

    def part(self, start: int, end: int) -> ItemBatch:
        """The items `start:end` of a batch in which every item is encoded.

        Args:
            start: position of the first item.
            end: position after the last item.

        Returns:
            A batch of `end - start` items without side features.
        """
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
    """One partner item for each of the B anchors of a `PairBatch`."""

    item: Tensor
    """(B,) positions of the partners in `PairBatch.items`; the position of the anchor where no partner exists"""
    has_partner: Tensor
    """(B,) bool: whether the anchor has a partner"""
    log_q: Tensor | None = None
    """(B,) log of the frequency with which the partner is drawn, the `log_q` of `mmctr.losses.contrastive.pair_loss`"""


@dataclass(frozen=True)
class PairBatch(Batch):
    """B items to pretrain on, and the partner items that the objectives need."""

    items: ItemBatch
    """U distinct items: the anchors and all partners"""
    anchor: Tensor
    """(B,) distinct positions in `items`"""
    keys: Tensor
    """(U, K) int keys: two items that agree in any of the K columns are not negatives of each other"""
    partners: dict[str, PartnerBatch] = field(default_factory=dict)
    """partner items by the name under which an objective reads the partners: "clicked", "shown" or "group" """
    query_ids: Tensor | None = None
    """(B, T) tokens of a query for which the anchor was clicked"""
    has_query: Tensor | None = None
    """(B,) bool: whether the anchor has a query"""
    query: Tensor | None = None
    """(B,) number of the query: rows with equal queries are not negatives of each other"""
    groups: dict[str, Tensor] = field(default_factory=dict)
    """column name -> (U,) int group of each item, negative for an item without a group"""
    teacher: Tensor | None = None
    """(U, D') unit-norm vectors of a teacher"""
    has_teacher: Tensor | None = None
    """(U,) bool: whether the item has a teacher vector"""

    def __len__(self) -> int:
        return len(self.anchor)


def jagged_rows(start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Concatenate the ranges `start[i]:end[i]`.

    Args:
        start: (n,) int64 first index of each range.
        end: (n,) int64 index after the last one of each range.

    Returns:
        The (V,) int64 indices and the (n + 1,) int64 offsets at which the indices of each range begin.
    """
    lengths = end - start
    offsets = torch.zeros(len(start) + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=offsets[1:])
    total = int(offsets[-1])
    shift = torch.repeat_interleave(start - offsets[:-1], lengths, output_size=total)
    return torch.arange(total) + shift, offsets
