"""ItemEmbedder: ID vector, side features and content vector of an item, fused into the vector rankers read.

The content comes from nothing, from a frozen table, or from an encoder trained inside the ranker; all three are one
code path, `ItemBatch -> (U, D)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, Protocol, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmctr.config import Config
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
    """IDs and side features alone."""

    name: Literal["none"] = "none"


class ContentTable(Config):
    """Frozen vectors by item id."""

    name: Literal["table"] = "table"
    path: str | list[str]
    """an embedding folder of `mmctr embed`, a Parquet or an .npz file of vectors; several stand side by side"""
    dim: int = Field(default=64, ge=1)
    """size of the content vector after the adapter"""
    hidden: list[int] = [128]
    """hidden sizes of the adapter"""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """of the hidden layers of the adapter"""
    residual: bool = False
    """the adapter adds to its layers a linear map of what they read, or that itself where sizes agree: vectors that are
    good as they are need not be learned again"""
    shown_in: Role = "both"
    """where items show their content: as targets, in histories, or in both; elsewhere they read the "absent" vector, as
    items without content do"""

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else self.path


class ContentEncoder(Config):
    """The encoder of a pretraining run, trained on inside the ranker."""

    name: Literal["encoder"] = "encoder"
    run: str
    """run folder of `pretrain.train`"""
    max_encoded: int | None = Field(default=None, ge=1)
    """encode at most this many distinct items of a step with gradient, another draw each step; the others are read from
    a memory bank as they were when they were last encoded (`mmctr.embedders.memory_bank`), so that the cost of a step
    does not grow with its batch or its histories. None: all are encoded. Each process draws among its own items, so
    unlike all else here the result depends on the number of processes"""
    mode: Literal["train", "eval"] = "train"
    """what the encoder is while it is trained: with `eval` pictures are not augmented, dropout is off and batch norm
    keeps the statistics of pretraining, so that training sees the very vectors that evaluation and a bank hold"""
    frozen: bool = False
    """no gradient into the encoder: equals `table` with the vectors of the same run"""
    dim: int = Field(default=64, ge=1)
    """size of the content vector after the adapter"""
    hidden: list[int] = [128]
    """hidden sizes of the adapter"""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """of the hidden layers of the adapter"""
    residual: bool = False
    """the adapter adds a linear map of the encoder's vectors to its layers, or those vectors where sizes agree"""
    shown_in: Role = "both"
    """where items show their content: as targets, in histories, or in both"""

    @property
    def encodes_history(self) -> bool:
        """Whether behaviours are encoded in training, not only targets."""
        return not self.frozen and self.shown_in != "target"

    @model_validator(mode="after")
    def _a_budget_is_of_what_learns(self) -> ContentEncoder:
        if self.frozen and self.max_encoded is not None:
            raise ValueError("max_encoded: with frozen: true nothing is encoded in training; leave one of them out")
        return self


ContentConfig = Annotated[ContentNone | ContentTable | ContentEncoder, Field(discriminator="name")]


class ItemEncoder(Protocol):
    """What a content encoder gives: one vector an item, from its picture and text."""

    embedding_dim: int

    def embed(self, items: ItemBatch) -> tuple[Tensor, Tensor]:
        """(E, embedding_dim) vectors and the (E,) bool mask of items that have any content."""
        ...


class ItemEmbedderConfig(Config):
    """How an item becomes one vector: ID, content and side features, and how they are fused."""

    id_dim: int = Field(default=32, ge=0)
    """size of the ID vector; 0: no IDs"""
    id_dropout: float = Field(default=0.1, ge=0, lt=1)
    """chance that an item of a training batch shows the vector of an unknown item, which teaches the ranker to do
    without (DropoutNet, Volkovs et al. 2017) and trains the one vector that cold items read"""
    init_std: float = Field(default=0.01, gt=0)
    """spread of freshly made embeddings"""
    content: ContentConfig = ContentNone()
    """vectors of pictures and texts: none, a frozen table, or an encoder that trains with the ranker"""
    fusion: Literal["concat", "sum", "project", "gate"] = "concat"
    """`concat`: side by side; `sum`: added, all of one size; `project`: side by side, then a linear layer to
    `fused_dim`, applied once a distinct item, so that attention over long histories works in fewer dimensions; `gate`:
    ID and content, of one size, mixed by the clicks the item had in training (see `ClickGate`), then side features"""
    fused_dim: int = Field(default=64, ge=1)
    """size after `project`"""
    cold_ids: ColdIdsConfig = NoColdIds()
    """what items without an ID row of their own read in its place, learned after the ranker, which is then frozen"""

    @model_validator(mode="after")
    def _the_gate_reads_no_cold_id(self) -> ItemEmbedderConfig:
        if self.fusion == "gate" and not isinstance(self.cold_ids, NoColdIds):
            raise ValueError("fusion: gate reads no ID of a cold item, so cold_ids would change nothing; drop one")
        return self


def concat(parts: list[Tensor]) -> Tensor:
    """[ID; side features; content]: the ranker weighs them. (U, sum of sizes)"""
    return torch.cat(parts, dim=1)


def add(parts: list[Tensor]) -> Tensor:
    """ID + content in one space: content is where the ID vector starts from. Parts have one size."""
    return torch.stack(parts).sum(0)


FUSIONS: dict[str, Callable[[list[Tensor]], Tensor]] = {"concat": concat, "sum": add, "project": concat, "gate": concat}


def as_weights(config: ItemEmbedderConfig, size: int) -> ItemEmbedderConfig:
    """The same sources, each a linear function to vectors of one size, added up."""
    content = config.content
    if not isinstance(content, ContentNone):
        content = content.model_copy(update={"dim": size, "hidden": [], "dropout": 0.0, "residual": False})
    update = {"id_dim": size if config.id_dim else 0, "content": content, "fusion": "sum"}
    return config.model_copy(update=update | {"init_std": initial_std(config, size)})


def initial_std(config: ItemEmbedderConfig, weights: int | None) -> float:
    """Spread of freshly made vectors. One weight a value starts at zero: what training never sees then says nothing;
    several must differ to become different."""
    return 0.0 if weights == 1 else config.init_std


class ItemEmbedder(nn.Module):
    """`ItemBatch -> (U, dim)`.

    Args:
        num_ids: rows of the ID vocabulary, row 0 being the unknown item. A cold item has no row of its own.
        table: (N, content dim) vectors and (N,) mask of items that have one, for content from a table or where the
            encoder's vectors of the whole catalog are kept.
        encoder: the content encoder, when content comes from one.
        weights: make weight vectors of this size, added up, of everything; the sizes and the fusion of the config are
            then not looked at.
        clicks: (num_ids,) training clicks of each row of the ID table, for the fusion `gate`.

    Raises ValueError for parts that cannot be fused as the config says.
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
        self.generates = False
        """whether items without an ID row read what `generator` makes; not before it is trained"""
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
            # the encoder's vectors change in training and belong to the checkpoint; a frozen table does not
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
                # it is written to, and the caller's is his own
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
        super().train(mode)
        content = self.config.content
        if self.encoder is not None and isinstance(content, ContentEncoder) and content.mode == "eval":
            self.encoder.eval()
        return self

    @property
    def columns(self) -> dict[str, slice]:
        """Where `id` and `content` stand in the vectors of the fusion `concat`."""
        content = 0 if self.adapter is None else self.config.content.dim  # type: ignore[union-attr]
        return {"id": slice(0, self.config.id_dim), "content": slice(self.dim - content, self.dim)}

    @property
    def encodes(self) -> bool:
        """Whether batches must carry pictures and texts now."""
        frozen = isinstance(self.config.content, ContentEncoder) and self.config.content.frozen
        return self.encoder is not None and self.training and not frozen

    def forward(
        self,
        items: ItemBatch,
        ids: Tensor | None = None,
        show_content: bool = True,
        content_read: Tensor | None = None,
    ) -> Tensor:
        """The vectors of U items, (U, dim).

        Args:
            ids: (U, id_dim) in place of the ID vectors.
            show_content: False: every item reads the "absent" content vector, as items without content do.
            content_read: (U,) bool, the items whose content vector a ranker will read; None: all. A memory bank counts
                how old the vectors of these are.
        """
        parts = []
        if self.ids is not None:
            parts.append(self._id_vectors(items) if ids is None else ids)
        if self.features.dim:
            parts.append(self.features(items.features, items.row))
        if self.adapter is not None:
            absent = not show_content
            parts.append(
                self.adapter.nothing(len(items)) if absent else self.adapter(*self._content(items, content_read))
            )
        if self.gate is not None:
            parts = [self.gate(items.id_rows, parts[0], parts[-1]), *parts[1:-1]]
        return self.project(FUSIONS[self.config.fusion](parts))

    def _id_vectors(self, items: ItemBatch) -> Tensor:
        """(U, id_dim): the row of an item in the ID table; for items without a row a generated vector, or row 0."""
        assert self.ids is not None
        vectors = self.ids(items.id_rows)
        if self.generator is None or not self.generates:
            return vectors
        return torch.where((items.id_rows == 0)[:, None], self.generator.cold(self.describe(items)), vectors)

    def describe(self, items: ItemBatch) -> Tensor:
        """(U, X) what the generator of ID vectors reads of items: side features, and the stored content vectors."""
        assert self.generator is not None
        vectors = has = None
        if self.adapter is not None:
            vectors, has = self.content_table[items.row], self.has_content[items.row]
        return self.generator.describe(self.features(items.features, items.row), vectors, has)

    def by_role(self, batch: BehaviorBatch, target_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Vectors of the items of a batch in histories and as targets.

        Where both are equal, (U, dim) vectors and the (B,) positions of targets among them. Where they differ,
        (2 U, dim): U vectors of items in histories, then U vectors of items as targets.

        Args:
            target_ids: (U, id_dim) in place of the ID vectors of targets; histories keep theirs.
        """
        shown = "both" if self.adapter is None else self.config.content.shown_in  # type: ignore[union-attr]
        read = None if self.bank is None else shown_items(batch, shown)
        in_histories = self(batch.items, show_content=shown != "target", content_read=read)
        if target_ids is None and shown == "both":
            return in_histories, batch.target
        as_targets = self(batch.items, target_ids, shown != "history", read)
        return torch.cat([in_histories, as_targets]), batch.target + len(in_histories)

    def similarity(self, batch: BehaviorBatch) -> Tensor:
        """(H,) cosines of the content vectors of each behaviour and the target of the impression, NaN where one of the
        two has no content.

        The vectors are those of the stored table, also while an encoder trains: no gradient flows, and they are as old
        as the table.
        """
        target = batch.target[segment_ids(batch.history_offsets, len(batch.history))]
        rows = batch.items.row
        # a table that changes every step has no use for cosines of all its pairs
        cosines = self.pair_cosines(self.content_table, rows, target, batch.history, keep=not self.encodes)
        has = self.has_content[rows]
        return torch.where(has[target] & has[batch.history], cosines, torch.nan)

    def _content(self, items: ItemBatch, shown: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(U, content dim) and (U,) mask. In training an encoder encodes what the batch carries; evaluation reads the
        table, which `refresh` has filled with the same encoder's vectors."""
        if not self.encodes:
            return self.content_table[items.row], self.has_content[items.row]
        if items.image is None and items.input_ids is None:
            raise ValueError("this batch carries no pictures or texts, but the encoder is being trained")
        vectors, has = self.encoder.embed(items)  # type: ignore[union-attr, operator]
        together = vectors, has
        if items.encode is not None:
            together = (
                self.content_table[items.row].index_copy(0, items.encode, vectors.to(self.content_table.dtype)),
                self.has_content[items.row].index_copy(0, items.encode, has),
            )
        if self.bank is not None:
            self.bank.step(self.content_table, self.has_content, items.row, items.encode, vectors, has, shown)
        return together

    def refresh(self, vectors: Tensor, has_content: Tensor) -> dict[str, float]:
        """Replace the kept vectors of the whole catalog, (N, content dim) and (N,).

        Returns how stale those of a memory bank were, see `MemoryBank.renew`.
        """
        old, self.content_table = self.content_table, vectors.to(self.content_table.device)
        self.has_content = has_content.to(self.has_content.device)
        return {} if self.bank is None else self.bank.renew(old, self.content_table, self.has_content)
