"""PretrainTask: an encoder, the objectives it is trained on, a head, and the item embeddings that come of it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import field_validator, model_validator
from torch import Tensor, nn

from mmctr.config import Config
from mmctr.data.batches import ItemBatch, PairBatch
from mmctr.encoders import EncoderConfig
from mmctr.encoders.heads import HeadConfig, VariationalHead
from mmctr.losses.objectives import ClipConfig, Objective, ObjectivesConfig, QueuedViews, Views
from mmctr.run_folder import RunFolder
from mmctr.tasks.folder import save_task, task_config, task_weights
from mmctr.tasks.item_features import (
    ItemFeatures,
    ProjectionConfig,
    Towers,
    content_masks,
    head_inputs,
    item_vectors,
    make_projection,
    unit,
)
from mmctr.tasks.queue import FeatureQueue, QueueConfig
from mmctr.tasks.sharing import Shareable


class PretrainTaskConfig(Config):
    """The model that is pretrained and the objectives it is trained with."""

    encoder: EncoderConfig
    """towers of pictures and texts"""
    projection: ProjectionConfig | None = None
    """separate towers need one to be compared; others may have one, for example with both towers frozen"""
    objectives: ObjectivesConfig = ObjectivesConfig(clip=ClipConfig())
    """none, `{}`, where a head is all that is trained"""
    head: HeadConfig | None = None
    """a variational head over the features; its mean is then the embedding of an item, not scaled to unit norm"""
    item_vector: Literal["mean", "concat"] = "mean"
    """the embedding of an item: the mean of its unit-norm picture and text features, or both side by side; a missing
    one is stood in for by the other, and the result has unit norm"""
    matryoshka: list[int] = []
    """the objectives hold for the first so many dimensions of the features too (Kusupati et al. 2022), so that
    embeddings may be cut off there"""
    queue: QueueConfig | None = None
    """features of earlier steps as further negatives; null: the batch alone"""

    @field_validator("matryoshka")
    @classmethod
    def _sizes(cls, sizes: list[int]) -> list[int]:
        if any(size < 1 for size in sizes) or len(set(sizes)) < len(sizes):
            raise ValueError("sizes are different positive numbers")
        return sizes

    @model_validator(mode="after")
    def _something_to_train(self) -> PretrainTaskConfig:
        if not self.objectives.given and self.head is None:
            raise ValueError(f"objectives: give at least one of {', '.join(ObjectivesConfig.model_fields)}, or a head")
        if self.head is not None and self.matryoshka:
            raise ValueError("matryoshka: embeddings of a head cannot be cut off; leave one of the two out")
        return self


class PretrainTask(Shareable, nn.Module):
    """Contrastive pretraining, and the item embeddings that come of it."""

    def __init__(self, config: PretrainTaskConfig, folder: Path | None = None):
        super().__init__()
        self.config = config
        self.encoder = config.encoder.build(folder)
        self.image_projection = make_projection(config.projection, self.encoder.image_dim)
        self.text_projection = make_projection(config.projection, self.encoder.text_dim)
        self.objectives = config.objectives.build(self.encoder.logit_scale, self.encoder.logit_bias)
        self.head: VariationalHead | None = None
        if config.head is not None:
            self.head = config.head.build(*self.dims)
        self.queue: FeatureQueue | None = None
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
        if self.head is not None:
            return self.head.config.dim
        return sum(self.dims) if self.config.item_vector == "concat" else self.dims[0]

    @property
    def shares_space(self) -> bool:
        """Whether pictures and texts can be compared: not when separate towers give features of their own."""
        projection = self.config.projection
        return self.encoder.shares_space or (projection is not None and not projection.residual)

    def require_space(self, objectives: bool) -> None:
        """Raises ValueError where towers that share no space would be compared or averaged."""
        compared = sorted({"clip", "siglip", "query"} & set(self.config.objectives.given)) if objectives else []
        averaged = self.config.item_vector == "mean" and (self.config.objectives.given or self.head is None)
        if not self.shares_space and (compared or averaged):
            what = f"task.objectives.{compared[0]}" if compared else "task.item_vector: mean"
            raise ValueError(
                f"{what}: the towers share no space; set task.projection to train one, or take `item_vector: concat` "
                f"and objectives on items, or export one modality (`mmctr embed --modality image`)"
            )

    def encode(self, items: ItemBatch | None, query_ids: Tensor | None = None) -> ItemFeatures:
        """Features of the items a batch carries pictures, texts, or kept features of frozen towers for; of queries."""
        return self.towers.encode(items, query_ids)

    @property
    def towers(self) -> Towers:
        """The encoder and the projections behind its two towers."""
        return Towers(self.encoder, self.image_projection, self.text_projection)

    def image_features(self, items: ItemBatch) -> Tensor:
        """(E, dim) unit norm; rows without a picture mean nothing."""
        return unit(self.encode(items.only("image")).image)

    def text_features(self, items: ItemBatch) -> Tensor:
        """(E, dim) unit norm; rows without text mean nothing."""
        return unit(self.encode(items.only("text")).text)

    def views(self, features: ItemFeatures, has_image: Tensor, has_text: Tensor, size: int | None = None) -> Views:
        """What objectives read, from the first `size` dimensions of the features."""
        image, text, query = (
            None if x is None else unit(x[:, :size]) for x in (features.image, features.text, features.query)
        )
        query_item = None
        if query is not None:
            asked = torch.ones(len(query), dtype=torch.bool, device=query.device)
            query_item = self.item_vectors(None, ~asked, query, asked, size)
        return Views(
            image=image,
            has_image=has_image,
            text=text,
            has_text=has_text,
            item=self.item_vectors(image, has_image, text, has_text, size),
            has_item=has_image | has_text,
            query_item=query_item,
        )

    def item_vectors(
        self, image: Tensor | None, has_image: Tensor, text: Tensor | None, has_text: Tensor, size: int | None = None
    ) -> Tensor:
        """(E, embedding_dim) vectors of items from unit-norm features of `size` dimensions."""
        dims = self.dims if size is None else (size, size)
        return item_vectors(image, has_image, text, has_text, self.config.item_vector == "concat", dims)

    def forward(self, batch: PairBatch) -> dict[str, Tensor]:
        return self.terms(self.encode(batch.items, batch.query_ids), batch)

    def terms(self, features: ItemFeatures, batch: PairBatch) -> dict[str, Tensor]:
        """The weighted objectives, each the mean over the Matryoshka sizes; `head_...` of the head."""
        self.require_space(objectives=True)
        has_image, has_text = content_masks(batch.items)
        terms: dict[str, Tensor] = {}
        sizes = [None, *self.config.matryoshka] if self.objectives else []
        for size in sizes:
            views = self.views(features, has_image, has_text, size)
            queue = None
            if self.queue is not None:
                kept, kept_image, kept_text = self.queue.read()
                past = self.views(kept, kept_image, kept_text, size)
                queue = QueuedViews(past, self.queue.keys)
            for name, config in self.config.objectives.given.items():
                term = config.weight / len(sizes) * self.objectives[name](views, batch, queue)
                terms[name] = terms[name] + term if name in terms else term
        if self.head is not None:
            read, has = head_inputs(features, has_image, has_text)
            anchor = batch.anchor
            found = self.head({n: x[anchor] for n, x in read.items()}, {n: x[anchor] for n, x in has.items()})
            terms |= {f"head_{name}": value for name, value in found.items()}
        if self.queue is not None and self.training:
            self.queue.collect(features, batch)
        return terms

    def chunks(self, batch: PairBatch, size: int) -> list[tuple[ItemBatch | None, Tensor | None]]:
        """What `mmctr.training.grad_cache` encodes at a time: items, then queries."""
        if self.queue is not None and self.queue.momentum_towers is not None:
            raise ValueError(
                "fit.chunk_size: the second encoder of task.queue.momentum reads whole batches; set it to 0"
            )
        items = [batch.items.part(start, start + size) for start in range(0, len(batch.items), size)]
        queries = [] if batch.query_ids is None else batch.query_ids.split(size)
        return [*((part, None) for part in items), *((None, part) for part in queries)]

    def encode_chunk(self, chunk: tuple[ItemBatch | None, Tensor | None]) -> dict[str, Tensor]:
        return {name: values for name, values in vars(self.encode(*chunk)).items() if values is not None}

    def terms_of(self, features: dict[str, Tensor], batch: PairBatch) -> dict[str, Tensor]:
        return self.terms(ItemFeatures(**features), batch)

    def embed(self, items: ItemBatch, size: int | None = None) -> tuple[Tensor, Tensor]:
        """Item embeddings: (E, embedding_dim), and the (E,) mask of items with a picture or a text. They are of unit
        norm, or, with a head, the means of the latents.

        Args:
            size: from the first so many dimensions of the features alone, see `matryoshka`.
        """
        self.require_space(objectives=False)
        if self.head is not None:
            has_image, has_text = content_masks(items)
            mu, _ = self.head.posterior(*head_inputs(self.encode(items), has_image, has_text))
            return mu, has_image | has_text
        views = self.views(self.encode(items), *content_masks(items), size)
        return views.item, views.has_item

    def parameter_parts(self) -> dict[str, list[nn.Parameter]]:
        """`encoder`; `projection`; `temperatures` and biases of objectives; `head`; `discriminator` of `factor_vae`."""
        head = {} if self.head is None else dict(self.head.named_parameters())
        judges = {name: value for name, value in head.items() if name.startswith("discriminator.")}
        return {
            "encoder": list(self.encoder.parameters()),
            "projection": [*self.image_projection.parameters(), *self.text_projection.parameters()],
            "temperatures": list(self.objectives.parameters()),
            "head": [value for name, value in head.items() if name not in judges],
            "discriminator": list(judges.values()),
        }

    def loss_parameters(self) -> list[nn.Parameter]:
        """What only losses read, not `embed`."""
        parts = self.parameter_parts()
        unread = [] if self.head is None else [*self.head.rebuild.parameters(), *self.head.log_sigma.parameters()]
        return [*parts["temperatures"], *parts["discriminator"], *unread]

    def start_training(self, num_keys: int, num_items: int) -> None:
        """What training alone has, not a saved task: the feature queue, and the number of items the head is told."""
        if self.config.queue is not None:
            self.queue = FeatureQueue(self.config.queue, self.dims, num_keys, self.towers)
        if self.head is not None:
            self.head.num_items = num_items

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep the temperatures within their bounds; put the features of the step into the queue."""
        for objective in self.objectives.values():
            assert isinstance(objective, Objective)
            objective.after_step()
        if self.head is not None:
            self.head.after_step()
        if self.queue is not None:
            self.queue.after_step(self.towers)

    def init_from(self, folder: str | Path) -> None:
        """Take encoder and projections of a run. Raises ValueError when they are of another architecture."""
        PretrainTaskConfig.parse(task_config(Path(folder), "pretrain"), source=f"{folder}/task.json")
        parts = ("encoder.", "image_projection.", "text_projection.")
        own = {name: value for name, value in self.state_dict().items() if name.startswith(parts)}
        given = {name: value for name, value in task_weights(Path(folder)).items() if name.startswith(parts)}
        for name in [*own, *(name for name in given if name not in own)]:
            if name not in own or name not in given or own[name].shape != given[name].shape:
                shapes = " and ".join(str(list(x[name].shape)) if name in x else "none" for x in (given, own))
                raise ValueError(f"init_from {folder}: {name} is {shapes}, there and here; give the same task.encoder")
        self.load_state_dict(given, strict=False)

    def save(self, folder: Path) -> None:
        """`task.json`, `encoder/` (architecture, tokenizer) and `model.safetensors`."""
        self.encoder.save(RunFolder(folder).encoder)
        self.queue = None
        save_task(self, self.config, "pretrain", folder)

    @classmethod
    def load(cls, folder: str | Path) -> PretrainTask:
        """From a run folder. Raises ValueError when it is not one of a pretraining run."""
        folder = Path(folder)
        config = PretrainTaskConfig.parse(task_config(folder, "pretrain"), source=str(RunFolder(folder).task))
        task = cls(config, RunFolder(folder).encoder)
        task.load_state_dict(task_weights(folder))
        return task.eval()
