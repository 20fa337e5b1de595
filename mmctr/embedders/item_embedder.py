"""ItemEmbedder: fuses ID vector, side features and content vector of an item into the vector that rankers read.

There is no content, content from a frozen table, or content from an encoder trained inside the ranker; all three are
one code path, `ItemBatch -> (U, D)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, Protocol, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmctr.config import Config, Width
from mmctr.data.batches import BehaviorBatch, ItemBatch
from mmctr.embedders.content_adapter import ClickGate, ContentAdapter
from mmctr.embedders.feature_embedder import FeatureEmbedder
from mmctr.embedders.id_generators import ColdIdsConfig, IdGenerator, NoColdIds
from mmctr.embedders.memory_bank import MemoryBank, shown_items
from mmctr.embedders.similarity import PairCosines
from mmctr.features.columns import FeatureConfig, Vocabulary
from mmctr.layers.jagged import segment_ids
from mmctr.layers.row_table import RowTable

Role = Literal["both", "target", "history"]


class ContentNone(Config):
    """No content: items are IDs and side features alone."""

    name: Literal["none"] = "none"


class ContentTable(Config):
    """Content from a frozen table of vectors by item id."""

    name: Literal["table"] = "table"
    path: str | list[str]
    """an embedding folder of `mmctr embed`, a Parquet file or an .npz file of vectors; vectors of several are
    concatenated"""
    dim: int = Field(default=64, ge=1)
    """size of the content vector after the adapter"""
    hidden: list[Width] = [128]
    """hidden sizes of the adapter"""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """dropout of the hidden layers of the adapter"""
    residual: bool = False
    """whether the adapter adds a linear map of the content vector to the output of the layers, or the content vector
    unchanged where both sizes are equal: good vectors need not be learned again"""
    shown_in: Role = "both"
    """where the ranker reads the content of items: as targets, in histories, or both; elsewhere the ranker reads the
    "absent" vector of items without content"""

    @property
    def paths(self) -> list[str]:
        """The paths of all tables, as a list."""
        return [self.path] if isinstance(self.path, str) else self.path


class ContentEncoder(Config):
    """Content from the encoder of a pretraining run, which is trained further inside the ranker."""

    name: Literal["encoder"] = "encoder"
    run: str
    """run folder of `pretrain.train`"""
    max_encoded: int | None = Field(default=None, ge=1)
    """encode at most this many distinct items of a step with gradient, drawn anew at each step; the other items are
    read from a memory bank (`mmctr.embedders.memory_bank`), so that the cost of a step does not grow with the batch or
    the histories. None: all items are encoded. Each process draws among the items of that process, so the result
    depends on the number of processes, unlike all other options"""
    mode: Literal["train", "eval"] = "train"
    """mode of the encoder while it is trained. With `eval` pictures are not augmented, dropout is off and batch
    normalisation keeps the statistics of pretraining, so that training reads the same vectors as evaluation"""
    frozen: bool = False
    """whether the encoder gets no gradient; the ranker then equals one with a `table` of the vectors of the same run"""
    dim: int = Field(default=64, ge=1)
    """size of the content vector after the adapter"""
    hidden: list[Width] = [128]
    """hidden sizes of the adapter"""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """dropout of the hidden layers of the adapter"""
    residual: bool = False
    """whether the adapter adds a linear map of the vector of the encoder to the output of the layers, or the vector
    unchanged where both sizes are equal"""
    shown_in: Role = "both"
    """where the ranker reads the content of items: as targets, in histories, or both"""

    @property
    def encodes_history(self) -> bool:
        """Whether training encodes behaviours as well as targets."""
        return not self.frozen and self.shown_in != "target"

    @model_validator(mode="after")
    def _a_budget_is_of_what_learns(self) -> ContentEncoder:
        if self.frozen and self.max_encoded is not None:
            raise ValueError("max_encoded: with frozen: true nothing is encoded in training; leave one of them out")
        return self


ContentConfig = Annotated[ContentNone | ContentTable | ContentEncoder, Field(discriminator="name")]


class ContentModel(Protocol):
    """A model that gives one vector for each item, from the picture and the text of the item."""

    embedding_dim: int
    """size of the vectors"""

    def embed(self, items: ItemBatch) -> tuple[Tensor, Tensor]:
        """Vectors (E, embedding_dim) of the items to encode, and the (E,) bool mask of items with any content."""
        ...


class ItemEmbedderConfig(Config):
    """How an item becomes one vector: ID, content and side features, and the fusion of the three."""

    id_dim: int = Field(default=32, ge=0)
    """size of the ID vector; 0: no IDs"""
    id_dropout: float = Field(default=0.1, ge=0, lt=1)
    """probability that an item of a training batch gets the ID vector of the unknown item, which teaches the ranker to
    rank without IDs (DropoutNet, Volkovs et al. 2017) and trains the vector that cold items read"""
    init_std: float = Field(default=0.01, gt=0)
    """standard deviation of new embeddings"""
    content: ContentConfig = ContentNone()
    """vectors of pictures and texts: none, a frozen table, or an encoder that trains with the ranker"""
    fusion: Literal["concat", "sum", "project", "gate"] = "concat"
    """`concat`: the parts are concatenated; `sum`: the parts, all of one size, are added; `project`: the parts are
    concatenated and mapped by a linear layer to `fused_dim`, once for each distinct item, so that attention over long
    histories has fewer dimensions; `gate`: ID and content, of one size, are mixed by the training clicks of the item
    (`ClickGate`), then side features are concatenated"""
    fused_dim: int = Field(default=64, ge=1)
    """size of the item vector with the fusion `project`"""
    cold_ids: ColdIdsConfig = NoColdIds()
    """generator of ID vectors for items without an ID row, trained after the ranker, which is then frozen"""

    @model_validator(mode="after")
    def _the_gate_reads_no_cold_id(self) -> ItemEmbedderConfig:
        if self.fusion == "gate" and not isinstance(self.cold_ids, NoColdIds):
            raise ValueError("fusion: gate reads no ID of a cold item, so cold_ids would change nothing; drop one")
        return self


def concat(parts: list[Tensor]) -> Tensor:
    """Concatenate the parts [ID; side features; content], each (U, size), to (U, sum of sizes)."""
    return torch.cat(parts, dim=1)


def add(parts: list[Tensor]) -> Tensor:
    """Add the parts, each (U, D), in one space: (U, D)."""
    return torch.stack(parts).sum(0)


FUSIONS: dict[str, Callable[[list[Tensor]], Tensor]] = {"concat": concat, "sum": add, "project": concat, "gate": concat}
"""function on the parts of an item vector, by the name of the fusion"""


def as_weights(config: ItemEmbedderConfig, size: int) -> ItemEmbedderConfig:
    """The config of a linear ranker: the same sources, each mapped linearly to `size` dimensions, and added."""
    content = config.content
    if not isinstance(content, ContentNone):
        content = content.model_copy(update={"dim": size, "hidden": [], "dropout": 0.0, "residual": False})
    update = {"id_dim": size if config.id_dim else 0, "content": content, "fusion": "sum"}
    return config.model_copy(update=update | {"init_std": initial_std(config, size)})


def initial_std(config: ItemEmbedderConfig, weights: int | None) -> float:
    """Standard deviation of new embeddings or weight vectors.

    Single weights (`weights` = 1) start at zero, so that a value which never occurs in training has no influence;
    larger weight vectors must start with different entries to become different.
    """
    return 0.0 if weights == 1 else config.init_std


class ItemEmbedder(nn.Module):
    """The vectors (U, dim) of the U distinct items of a batch.

    Args:
        config: sources and fusion.
        num_ids: rows of the ID table; row 0 is the unknown item, which cold items read.
        feature_configs: the side features of items by name.
        vocabularies: the vocabulary of each side feature by name.
        table: (N, content dim) content vectors, the latest ones of an encoder, and the (N,) bool mask of items with
            content; None without content.
        encoder: the content encoder; None for other content.
        weights: for linear rankers, the size of the weight vectors of all sources, which are added; sizes and fusion of
            the config are then ignored.
        clicks: (num_ids,) training clicks of each row of the ID table, for the fusion `gate`.

    Raises:
        ValueError: the config has no source, or the sizes of the parts do not fit the fusion.
    """

    content_table: Tensor
    has_content: Tensor

    def __init__(
        self,
        config: ItemEmbedderConfig,
        num_ids: int,
        feature_configs: dict[str, FeatureConfig],
        vocabularies: dict[str, Vocabulary],
        table: tuple[Tensor, Tensor] | None = None,
        encoder: nn.Module | None = None,
        weights: int | None = None,
        clicks: Tensor | None = None,
    ):
        super().__init__()
        if weights:
            config = as_weights(config, weights)
        self.config = config
        self.generator: IdGenerator | None = None
        self.uses_generator = False
        """whether items without an ID row read a vector of `generator`; False until the generator is trained"""
        self.pair_cosines = PairCosines()
        content = config.content
        sizes = []
        self.ids = RowTable(num_ids, config.id_dim, config.init_std) if config.id_dim else None
        if config.id_dim:
            sizes.append(config.id_dim)
        self.features = FeatureEmbedder(feature_configs, vocabularies, config.init_std, weights)
        if self.features.dim:
            sizes.append(self.features.dim)
        self.encoder, self.adapter = encoder, None
        if not isinstance(content, ContentNone):
            assert table is not None
            # vectors of an encoder change in training and belong into checkpoints; those of a frozen table do not
            self.register_buffer("content_table", table[0], persistent=encoder is not None)
            self.register_buffer("has_content", table[1], persistent=encoder is not None)
            self.adapter = ContentAdapter(
                table[0].shape[1], content.hidden, content.dim, content.dropout, content.residual
            )
            sizes.append(content.dim)
        self.bank = None
        if isinstance(content, ContentEncoder) and encoder is not None:
            if content.frozen:
                encoder.requires_grad_(False)
            elif content.max_encoded is not None:
                self.bank = MemoryBank(len(self.content_table), content.max_encoded)
                # a copy, because the memory bank writes to the table and the argument belongs to the caller
                self.content_table, self.has_content = self.content_table.clone(), self.has_content.clone()
        if not sizes:
            raise ValueError("the embedder has nothing to read: give id_dim > 0, item features or content")
        if config.fusion == "sum" and len(set(sizes)) > 1:
            raise ValueError(
                f"fusion 'sum' needs parts of one size, here they are {sizes}; use 'concat' or equal sizes"
            )
        self.gate = None
        if config.fusion == "gate":
            if isinstance(content, ContentNone) or config.id_dim != content.dim:
                raise ValueError("fusion 'gate' mixes IDs and content of one size; set id_dim and content.dim equal")
            assert clicks is not None
            self.gate = ClickGate(config.id_dim, clicks)
            sizes = sizes[:-1]
        self.project = nn.Linear(sum(sizes), config.fused_dim) if config.fusion == "project" else nn.Identity()
        self.dim = {"sum": sizes[0], "project": config.fused_dim}.get(config.fusion, sum(sizes))

    def train(self, mode: bool = True) -> Self:
        """Set the training mode; a content encoder of the mode `eval` stays in evaluation mode."""
        super().train(mode)
        content = self.config.content
        if self.encoder is not None and isinstance(content, ContentEncoder) and content.mode == "eval":
            self.encoder.eval()
        return self

    @property
    def columns(self) -> dict[str, slice]:
        """The columns of `id` and of `content` in the item vectors of the fusion `concat`."""
        source = self.config.content
        content = 0 if isinstance(source, ContentNone) else source.dim
        return {"id": slice(0, self.config.id_dim), "content": slice(self.dim - content, self.dim)}

    @property
    def encodes(self) -> bool:
        """Whether batches must hold pictures and texts: in training, with a content encoder that is not frozen."""
        frozen = isinstance(self.config.content, ContentEncoder) and self.config.content.frozen
        return self.encoder is not None and self.training and not frozen

    def forward(
        self,
        items: ItemBatch,
        ids: Tensor | None = None,
        show_content: bool = True,
        content_read: Tensor | None = None,
    ) -> Tensor:
        """The vectors of U items.

        Args:
            items: U distinct items.
            ids: (U, id_dim) vectors that replace the ID vectors; None: the vectors of the ID table.
            show_content: False gives every item the "absent" content vector of items without content.
            content_read: (U,) bool, the items whose content vector a ranker will read, for the statistics of a memory
                bank; None: all.

        Returns:
            (U, dim).

        Raises:
            ValueError: an encoder is being trained, and the batch holds no pictures or texts.
        """
        parts = []
        if self.ids is not None:
            parts.append(self._id_vectors(items) if ids is None else ids)
        if self.features.dim:
            parts.append(self.features(items.features, items.row))
        if self.adapter is not None:
            absent = not show_content
            parts.append(
                self.adapter.absent_vectors(len(items)) if absent else self.adapter(*self._content(items, content_read))
            )
        if self.gate is not None:
            parts = [self.gate(items.id_rows, parts[0], parts[-1]), *parts[1:-1]]
        return self.project(FUSIONS[self.config.fusion](parts))

    def _id_vectors(self, items: ItemBatch) -> Tensor:
        """(U, id_dim): the rows of the ID table; for items without a row a generated vector, or row 0."""
        assert self.ids is not None
        vectors = self.ids(items.id_rows)
        if self.generator is None or not self.uses_generator:
            return vectors
        return torch.where((items.id_rows == 0)[:, None], self.generator.cold(self.describe(items)), vectors)

    def describe(self, items: ItemBatch) -> Tensor:
        """The descriptions (U, X) that the generator of ID vectors reads: side features and stored content vectors."""
        assert self.generator is not None
        vectors = has = None
        if self.adapter is not None:
            vectors, has = self.content_table[items.row], self.has_content[items.row]
        return self.generator.describe(self.features(items.features, items.row), vectors, has)

    def by_role(self, batch: BehaviorBatch, target_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The vectors of the items of a batch, as behaviours and as targets.

        Args:
            batch: B impressions with U distinct items.
            target_ids: (U, id_dim) vectors that replace the ID vectors of targets; the ID vectors of behaviours stay
                those of the ID table.

        Returns:
            Vectors and the (B,) positions of the targets among the vectors. There are (U, dim) vectors where the
            vectors of an item do not depend on the role; otherwise (2 U, dim), U vectors of items as behaviours and
            then U vectors of items as targets.
        """
        source = self.config.content
        shown = "both" if isinstance(source, ContentNone) else source.shown_in
        read = None if self.bank is None else shown_items(batch, shown)
        in_histories = self(batch.items, show_content=shown != "target", content_read=read)
        if target_ids is None and shown == "both":
            return in_histories, batch.target
        as_targets = self(batch.items, target_ids, shown != "history", read)
        return torch.cat([in_histories, as_targets]), batch.target + len(in_histories)

    def similarity(self, batch: BehaviorBatch) -> Tensor:
        """(H,) cosines of the contents of each behaviour and the target, NaN where one of the two has no content.

        The vectors are those of the stored table, also while an encoder trains: no gradient flows, and the vectors are
        as old as the table.
        """
        target = batch.target[segment_ids(batch.history_offsets, len(batch.history))]
        rows = batch.items.row
        # cosines of all pairs would be computed anew at every step while the encoder changes the table
        cosines = self.pair_cosines(self.content_table, rows, target, batch.history, keep=not self.encodes)
        has = self.has_content[rows]
        return torch.where(has[target] & has[batch.history], cosines, torch.nan)

    def _content(self, items: ItemBatch, shown: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Content vectors (U, content dim) and the (U,) bool mask of items with content.

        In training an encoder encodes the pictures and texts of the batch; evaluation reads the table, which `refresh`
        has filled with vectors of the same encoder.
        """
        if not self.encodes:
            return self.content_table[items.row], self.has_content[items.row]
        if items.image is None and items.input_ids is None:
            raise ValueError("this batch carries no pictures or texts, but the encoder is being trained")
        vectors, has = cast(ContentModel, self.encoder).embed(items)
        all_vectors = vectors, has
        if items.encode is not None:
            all_vectors = (
                self.content_table[items.row].index_copy(0, items.encode, vectors.to(self.content_table.dtype)),
                self.has_content[items.row].index_copy(0, items.encode, has),
            )
        if self.bank is not None:
            self.bank.step(self.content_table, self.has_content, items.row, items.encode, vectors, has, shown)
        return all_vectors

    def refresh(self, vectors: Tensor, has_content: Tensor) -> dict[str, float]:
        """Replace the stored content vectors (N, content dim) and the (N,) mask of items with content.

        Returns:
            How stale the stored vectors of a memory bank were, as `MemoryBank.renew` measures it; empty without a bank.
        """
        old, self.content_table = self.content_table, vectors.to(self.content_table.device)
        self.has_content = has_content.to(self.has_content.device)
        return {} if self.bank is None else self.bank.renew(old, self.content_table, self.has_content)
