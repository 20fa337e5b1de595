"""PretrainTask: an encoder, the objectives it is trained on, and the item embeddings that come of it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from mmctr.config import Config
from mmctr.data.batches import ItemBatch, PairBatch
from mmctr.encoders import EncoderConfig
from mmctr.losses import gather_rows
from mmctr.objectives import BankViews, ClipConfig, Objective, ObjectivesConfig, Views
from mmctr.tasks.folder import save_task, task_config, task_weights


class ProjectionConfig(Config):
    """Trained layers behind each tower."""

    dim: int = Field(default=128, ge=1)
    """size of the space where pictures and texts meet"""
    hidden: list[int] = []
    """hidden sizes; none: one linear layer"""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    residual: bool = False
    """instead of a space of `dim`: the layers give a change of the unit-norm features, none at first, and the features
    keep their size (CLIP-Adapter: Gao et al. 2021). Towers that share no space then still share none"""


class BankConfig(Config):
    """Candidates of earlier steps, so that a small batch has many negatives (MoCo: He et al. 2020)."""

    size: int = Field(default=4096, ge=1)
    """items kept; a multiple of fit.batch_size"""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """0: features as the encoder gave them when they were in a batch (cross-batch memory: Wang et al. 2020). Above: a
    second encoder, whose weights follow the first ones this slowly, makes them, which costs another pass"""


class PretrainTaskConfig(Config):
    encoder: EncoderConfig
    projection: ProjectionConfig | None = None
    """separate towers need one to be compared; others may have one, for example with both towers frozen"""
    objectives: ObjectivesConfig = ObjectivesConfig(clip=ClipConfig())
    item_vector: Literal["mean", "concat"] = "mean"
    """the embedding of an item: the mean of its unit-norm picture and text features, or both side by side; a missing
    one is stood in for by the other, and the result has unit norm"""
    matryoshka: list[int] = []
    """the objectives hold for the first so many dimensions of the features too (Kusupati et al. 2022), so that
    embeddings may be cut off there"""
    bank: BankConfig | None = None

    @field_validator("matryoshka")
    @classmethod
    def _sizes(cls, sizes: list[int]) -> list[int]:
        if any(size < 1 for size in sizes) or len(set(sizes)) < len(sizes):
            raise ValueError("sizes are different positive numbers")
        return sizes


@dataclass(frozen=True)
class ItemFeatures:
    """What the towers give, before it is scaled to unit norm; None for a modality that is not there."""

    image: Tensor | None
    """(E, dim)"""
    text: Tensor | None
    """(E, dim)"""
    query: Tensor | None = None
    """(B, dim) text features of queries"""


class PretrainTask(nn.Module):
    """Contrastive pretraining, and the item embeddings that come of it."""

    def __init__(self, config: PretrainTaskConfig, folder: Path | None = None):
        super().__init__()
        self.config = config
        self.encoder = config.encoder.build(folder)
        self.image_projection = _projection(config.projection, self.encoder.image_dim)
        self.text_projection = _projection(config.projection, self.encoder.text_dim)
        self.objectives = config.objectives.build(self.encoder.logit_scale, self.encoder.logit_bias)
        self.bank: MemoryBank | None = None
        smallest = min(self.dims)
        too_long = [size for size in config.matryoshka if size >= smallest]
        if too_long:
            raise ValueError(
                f"task.matryoshka: {too_long[0]} is not less than the {smallest} dimensions of the features"
            )

    @property
    def dims(self) -> tuple[int, int]:
        """Sizes of the features of pictures and of texts, the same where they share a space."""
        projection = self.config.projection
        if projection is not None and not projection.residual:
            return projection.dim, projection.dim
        return self.encoder.image_dim, self.encoder.text_dim

    @property
    def embedding_dim(self) -> int:
        return sum(self.dims) if self.config.item_vector == "concat" else self.dims[0]

    @property
    def shares_space(self) -> bool:
        """Whether pictures and texts can be compared: not when separate towers give features of their own."""
        projection = self.config.projection
        return self.encoder.shares_space or (projection is not None and not projection.residual)

    def _require_space(self, objectives: bool) -> None:
        """Raises ValueError where towers that share no space would be compared or averaged."""
        compared = sorted({"clip", "siglip", "query"} & set(self.config.objectives.given)) if objectives else []
        if not self.shares_space and (compared or self.config.item_vector == "mean"):
            what = f"task.objectives.{compared[0]}" if compared else "task.item_vector: mean"
            raise ValueError(
                f"{what}: the towers share no space; set task.projection to train one, or take `item_vector: concat` "
                f"and objectives on items, or export one modality (`mmctr embed --modality image`)"
            )

    def encode(self, items: ItemBatch | None, query_ids: Tensor | None = None) -> ItemFeatures:
        """Features of the items a batch carries pictures, texts, or kept features of frozen towers for; of queries."""
        image = text = query = None
        if items is not None:
            image, text = items.image_features, items.text_features
            if image is None and items.image is not None:
                image = self.encoder.encode_image(items.image)
            if text is None and items.input_ids is not None:
                text = self.encoder.encode_text(items.input_ids)
            if image is not None:
                image = _of_items(self.image_projection(image), items.image_item, items.image_weight, items.has_image)
            if text is not None:
                text = _of_items(self.text_projection(text), items.text_item, items.text_weight, items.has_text)
        if query_ids is not None:
            query = self.text_projection(self.encoder.encode_text(query_ids))
        return ItemFeatures(image, text, query)

    def image_features(self, items: ItemBatch) -> Tensor:
        """(E, dim) unit norm; rows without a picture mean nothing."""
        return _unit(self.encode(items.only("image")).image)

    def text_features(self, items: ItemBatch) -> Tensor:
        """(E, dim) unit norm; rows without text mean nothing."""
        return _unit(self.encode(items.only("text")).text)

    def views(self, features: ItemFeatures, has_image: Tensor, has_text: Tensor, size: int | None = None) -> Views:
        """What objectives read, from the first `size` dimensions of the features."""
        image, text, query = (
            None if x is None else _unit(x[:, :size]) for x in (features.image, features.text, features.query)
        )
        side_by_side = self.config.item_vector == "concat"
        dims = self.dims if size is None else (size, size)
        return Views(
            image=image,
            has_image=has_image,
            text=text,
            has_text=has_text,
            item=_item_vectors(image, has_image, text, has_text, side_by_side, dims),
            has_item=has_image | has_text,
            query_item=None
            if query is None
            else F.normalize(torch.cat([query, query], 1), dim=1)
            if side_by_side
            else query,
        )

    def forward(self, batch: PairBatch) -> dict[str, Tensor]:
        return self.terms(self.encode(batch.items, batch.query_ids), batch)

    def terms(self, features: ItemFeatures, batch: PairBatch) -> dict[str, Tensor]:
        """The weighted objectives, each the mean over the Matryoshka sizes."""
        self._require_space(objectives=True)
        has_image, has_text = _masks(batch.items)
        terms: dict[str, Tensor] = {}
        sizes = [None, *self.config.matryoshka]
        for size in sizes:
            views = self.views(features, has_image, has_text, size)
            bank = None
            if self.bank is not None:
                kept, kept_image, kept_text = self.bank.read()
                past = self.views(kept, kept_image, kept_text, size)
                bank = BankViews(past, self.bank.keys, torch.zeros(len(self.bank.keys), device=has_image.device))
            for name, config in self.config.objectives.given.items():
                term = config.weight / len(sizes) * self.objectives[name](views, batch, bank)
                terms[name] = terms[name] + term if name in terms else term
        if self.bank is not None and self.training:
            self.bank.hold(self, features, batch)
        return terms

    def chunks(self, batch: PairBatch, size: int) -> list[tuple[ItemBatch | None, Tensor | None]]:
        """What `mmctr.chunking` encodes at a time: items, then queries."""
        if self.bank is not None and self.bank.follower is not None:
            raise ValueError(
                "fit.chunk_size: the second encoder of task.bank.momentum reads whole batches; set it to 0"
            )
        items = [batch.items.part(start, start + size) for start in range(0, len(batch.items), size)]
        queries = [] if batch.query_ids is None else batch.query_ids.split(size)
        return [*((part, None) for part in items), *((None, part) for part in queries)]

    def encode_chunk(self, chunk: tuple[ItemBatch | None, Tensor | None]) -> dict[str, Tensor]:
        features = self.encode(*chunk)
        pairs = {"image": features.image, "text": features.text, "query": features.query}
        return {name: values for name, values in pairs.items() if values is not None}

    def terms_of(self, features: dict[str, Tensor], batch: PairBatch) -> dict[str, Tensor]:
        return self.terms(ItemFeatures(features.get("image"), features.get("text"), features.get("query")), batch)

    def embed(self, items: ItemBatch, size: int | None = None) -> tuple[Tensor, Tensor]:
        """Item embeddings: (E, embedding_dim) unit norm, and the (E,) mask of items with a picture or a text.

        Args:
            size: from the first so many dimensions of the features alone, see `matryoshka`.
        """
        self._require_space(objectives=False)
        views = self.views(self.encode(items), *_masks(items), size)
        return views.item, views.has_item

    def parameter_parts(self) -> dict[str, list[nn.Parameter]]:
        """`encoder`; `projection`; `heads`: temperatures and biases of the objectives."""
        return {
            "encoder": list(self.encoder.parameters()),
            "projection": [*self.image_projection.parameters(), *self.text_projection.parameters()],
            "heads": list(self.objectives.parameters()),
        }

    def start_bank(self, num_keys: int) -> None:
        """Make the memory bank, for training alone: a saved task has none."""
        if self.config.bank is not None:
            self.bank = MemoryBank(self, self.config.bank, num_keys)

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep the temperatures within their bounds; put the features of the step into the bank."""
        for objective in self.objectives.values():
            assert isinstance(objective, Objective)
            objective.after_step()
        if self.bank is not None:
            self.bank.after_step(self)

    def save(self, folder: Path) -> None:
        """`task.json`, `encoder/` (architecture, tokenizer) and `model.safetensors`."""
        self.encoder.save(folder / "encoder")
        self.bank = None
        save_task(self, "pretrain", folder)

    @classmethod
    def load(cls, folder: str | Path) -> PretrainTask:
        """From a run folder. Raises ValueError when it is not one of a pretraining run."""
        folder = Path(folder)
        config = PretrainTaskConfig.parse(task_config(folder, "pretrain"), source=str(folder / "task.json"))
        task = cls(config, folder / "encoder")
        task.load_state_dict(task_weights(folder))
        return task.eval()


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
        has_image, has_text = (mask[anchor] for mask in _masks(batch.items))
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


_TRAINED = ("encoder", "image_projection", "text_projection")


def _projection(config: ProjectionConfig | None, dim: int) -> nn.Module:
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
    return _Residual(nn.Sequential(*layers, last))


class _Residual(nn.Module):
    """Unit-norm features plus a change of them, which reads them scaled to the size linear layers are made for."""

    def __init__(self, change: nn.Module):
        super().__init__()
        self.change = change

    def forward(self, features: Tensor) -> Tensor:
        features = _unit(features)
        return features + self.change(features * features.shape[1] ** 0.5)


def _of_items(features: Tensor, item: Tensor | None, weight: Tensor | None, has: Tensor | None) -> Tensor:
    """(E, dim) features of items: the weighted sums of the (V, dim) ones of their pictures or texts, of unit norm."""
    if item is None:
        return features
    assert weight is not None and has is not None
    weighted = _unit(features) * weight[:, None]
    return weighted.new_zeros((len(has), features.shape[1])).index_add(0, item, weighted)


def _unit(x: Tensor | None) -> Tensor:
    assert x is not None
    return F.normalize(x.float(), dim=-1)


def _masks(items: ItemBatch) -> tuple[Tensor, Tensor]:
    """(E,) which items have a picture, and which have a text."""
    some = items.has_image if items.has_image is not None else items.has_text
    assert some is not None, "a batch to encode has pictures or texts"
    none = torch.zeros_like(some)
    return (none if mask is None else mask for mask in (items.has_image, items.has_text))  # type: ignore[return-value]


def _item_vectors(
    image: Tensor | None,
    has_image: Tensor,
    text: Tensor | None,
    has_text: Tensor,
    side_by_side: bool,
    dims: tuple[int, int],
) -> Tensor:
    """(E, D) or (E, D + D'): zero rows where an item has neither. Side by side, a missing one is stood in for by the
    other where both have one size."""
    rows = has_image[:, None]
    image = (
        rows.new_zeros((len(rows), dims[0]), dtype=torch.float32) if image is None else torch.where(rows, image, 0.0)
    )
    rows = has_text[:, None]
    text = rows.new_zeros((len(rows), dims[1]), dtype=torch.float32) if text is None else torch.where(rows, text, 0.0)
    if not side_by_side:
        return F.normalize(image + text, dim=-1)
    if image.shape[1] == text.shape[1]:
        image, text = torch.where(has_image[:, None], image, text), torch.where(has_text[:, None], text, image)
    return F.normalize(torch.cat([image, text], 1), dim=-1)
