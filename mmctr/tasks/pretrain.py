"""PretrainTask: an encoder with training objectives and an optional head, which gives item embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import field_validator, model_validator
from torch import Tensor, nn

from mmctr.config import Config, Width
from mmctr.data.batches import ItemBatch, PairBatch
from mmctr.encoders import EncoderConfig
from mmctr.encoders.heads import HeadConfig
from mmctr.encoders.variational_head import VariationalHead
from mmctr.losses.objectives import ClipConfig, Objective, ObjectivesConfig, QueuedViews, Views
from mmctr.run_folder import RunFolder
from mmctr.tasks.folder import load_weights, save_task, task_config, task_weights
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
    """The pretrained model and the training objectives."""

    encoder: EncoderConfig
    """towers of pictures and texts"""
    projection: ProjectionConfig | None = None
    """trained layers on the output of each tower. Separate towers need a projection before pictures and texts can be
    compared; for other encoders it is optional, for example with both towers frozen"""
    objectives: ObjectivesConfig = ObjectivesConfig(clip=ClipConfig())
    """training losses; `{}`, no losses, where only a head is trained"""
    head: HeadConfig | None = None
    """a variational head over the features; the mean of the latents is then the embedding of an item, not scaled to
    unit norm"""
    item_vector: Literal["mean", "concat"] = "mean"
    """the embedding of an item: the mean of the unit-norm features of picture and text, or the concatenation, scaled to
    unit norm; a missing modality is replaced by the other one"""
    matryoshka: list[Width] = []
    """numbers of leading dimensions of the features for which the objectives are trained as well (Kusupati et al.
    2022), so that embeddings can be cut to these sizes"""
    queue: QueueConfig | None = None
    """features of earlier steps as further negatives; null: negatives come from the batch alone"""

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
    """A pretraining model: an encoder with objectives, which gives item embeddings.

    Args:
        config: encoder, objectives and head.
        folder: the folder of a saved encoder, for the same architecture with fresh weights; None: the encoder that the
            config names.

    Raises:
        ValueError: the encoder cannot be built, or a Matryoshka size is too large.

    Example:
        ```python
        from mmctr.data.batches import ItemBatch
        import torch

        task = mmctr.PretrainTask.load("demo/pretrain")
        input_ids = task.encoder.tokenize(["red dress", "blue dress"]).long()
        batch = ItemBatch(row=torch.arange(2), input_ids=input_ids, has_text=torch.ones(2, dtype=torch.bool))
        with torch.inference_mode():
            vectors, has_content = task.embed(batch)
        print(vectors.shape, has_content)
        ```
    """

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
        """Sizes of the features of pictures and of texts; equal where pictures and texts can be compared."""
        projection = self.config.projection
        if projection is not None and not projection.residual:
            return projection.dim, projection.dim
        return self.encoder.image_dim, self.encoder.text_dim

    @property
    def embedding_dim(self) -> int:
        """Size of an item embedding."""
        if self.head is not None:
            return self.head.config.dim
        return sum(self.dims) if self.config.item_vector == "concat" else self.dims[0]

    @property
    def shares_space(self) -> bool:
        """Whether features of pictures and texts can be compared: not for separate towers without a projection."""
        projection = self.config.projection
        return self.encoder.shares_space or (projection is not None and not projection.residual)

    def require_space(self, objectives: bool) -> None:
        """Check that features of towers without a common space are neither compared nor averaged.

        Args:
            objectives: whether the objectives are going to be computed, not only embeddings.

        Raises:
            ValueError: an objective or the item vector would mix features of different spaces.
        """
        compared = sorted({"clip", "siglip", "query"} & set(self.config.objectives.given)) if objectives else []
        averaged = self.config.item_vector == "mean" and (self.config.objectives.given or self.head is None)
        if not self.shares_space and (compared or averaged):
            key = f"task.objectives.{compared[0]}" if compared else "task.item_vector: mean"
            raise ValueError(
                f"{key}: the towers share no space; set task.projection to train one, or take `item_vector: concat` "
                f"and objectives on items, or export one modality (`mmctr embed --modality image`)"
            )

    def encode(self, items: ItemBatch | None, query_ids: Tensor | None = None) -> ItemFeatures:
        """Features of E items, from pictures and texts or from stored features of frozen towers, and of queries.

        Args:
            items: E items; None: no items.
            query_ids: (B, T) tokens of queries; None: no queries.
        """
        return self.towers.encode(items, query_ids)

    @property
    def towers(self) -> Towers:
        """The encoder, and the projections on the outputs of the two towers."""
        return Towers(self.encoder, self.image_projection, self.text_projection)

    def image_features(self, items: ItemBatch) -> Tensor:
        """Unit-norm features (E, dim) of pictures; rows of items without a picture are arbitrary."""
        return unit(self.encode(items.only("image")).image)

    def text_features(self, items: ItemBatch) -> Tensor:
        """Unit-norm features (E, dim) of texts; rows of items without a text are arbitrary."""
        return unit(self.encode(items.only("text")).text)

    def views(self, features: ItemFeatures, has_image: Tensor, has_text: Tensor, size: int | None = None) -> Views:
        """The input of the objectives.

        Args:
            features: features of E items, and of queries.
            has_image: (E,) bool.
            has_text: (E,) bool.
            size: number of leading dimensions of the features to use; None: all.
        """
        image, text, query = (
            None if x is None else unit(x[:, :size]) for x in (features.image, features.text, features.query)
        )
        query_item = None
        if query is not None:
            has_query = torch.ones(len(query), dtype=torch.bool, device=query.device)
            query_item = self.item_vectors(None, ~has_query, query, has_query, size)
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
        """The vectors of items from unit-norm features.

        Args:
            image: (E, dim) features of pictures; None: no item has a picture.
            has_image: (E,) bool.
            text: (E, dim) features of texts; None: no item has a text.
            has_text: (E,) bool.
            size: size of the features where they were cut to leading dimensions; None: the full size.

        Returns:
            (E, dim) of unit norm, or (E, 2 dim) where the item vector is a concatenation.
        """
        dims = self.dims if size is None else (size, size)
        return item_vectors(image, has_image, text, has_text, self.config.item_vector == "concat", dims)

    def forward(self, batch: PairBatch) -> dict[str, Tensor]:
        """The loss terms of a batch, weighted scalars by name."""
        return self.terms(self.encode(batch.items, batch.query_ids), batch)

    def terms(self, features: ItemFeatures, batch: PairBatch) -> dict[str, Tensor]:
        """The loss terms of a batch from the features of the items.

        Args:
            features: features of the items and queries of the batch.
            batch: the batch.

        Returns:
            Weighted scalars by name: each objective, averaged over the Matryoshka sizes, and the terms of the head with
            the prefix `head_`.
        """
        self.require_space(objectives=True)
        has_image, has_text = content_masks(batch.items)
        terms: dict[str, Tensor] = {}
        sizes = [None, *self.config.matryoshka] if self.objectives else []
        for size in sizes:
            views = self.views(features, has_image, has_text, size)
            queue = None
            if self.queue is not None:
                queued, queued_has_image, queued_has_text = self.queue.read()
                queue = QueuedViews(self.views(queued, queued_has_image, queued_has_text, size), self.queue.keys)
            for name, config in self.config.objectives.given.items():
                term = config.weight / len(sizes) * self.objectives[name](views, batch, queue)
                terms[name] = terms[name] + term if name in terms else term
        if self.head is not None:
            inputs, has = head_inputs(features, has_image, has_text)
            anchor = batch.anchor
            head_terms = self.head({n: x[anchor] for n, x in inputs.items()}, {n: x[anchor] for n, x in has.items()})
            terms |= {f"head_{name}": value for name, value in head_terms.items()}
        if self.queue is not None and self.training:
            self.queue.collect(features, batch)
        return terms

    def chunks(self, batch: PairBatch, size: int) -> list[tuple[ItemBatch | None, Tensor | None]]:
        """The parts of a batch that `mmctr.training.grad_cache` encodes one at a time: items, then queries.

        Args:
            batch: the batch.
            size: largest number of items or queries of a part.

        Raises:
            ValueError: the queue has a momentum encoder, which reads whole batches.
        """
        if self.queue is not None and self.queue.momentum_towers is not None:
            raise ValueError(
                "fit.chunk_size: the second encoder of task.queue.momentum reads whole batches; set it to 0"
            )
        items = [batch.items.part(start, start + size) for start in range(0, len(batch.items), size)]
        queries = [] if batch.query_ids is None else batch.query_ids.split(size)
        return [*((part, None) for part in items), *((None, part) for part in queries)]

    def encode_chunk(self, chunk: tuple[ItemBatch | None, Tensor | None]) -> dict[str, Tensor]:
        """Features (rows of the chunk, dim) of a part that `chunks` gave, by name."""
        return {name: values for name, values in vars(self.encode(*chunk)).items() if values is not None}

    def terms_of(self, features: dict[str, Tensor], batch: PairBatch) -> dict[str, Tensor]:
        """The loss terms of a batch from features by name, concatenated over all parts."""
        return self.terms(ItemFeatures(**features), batch)

    def embed(self, items: ItemBatch, size: int | None = None) -> tuple[Tensor, Tensor]:
        """The embeddings of E items: vectors of unit norm, or, with a head, the means of the latents.

        Args:
            items: items with pictures, texts, or stored features of frozen towers.
            size: number of leading dimensions of the features to use, a size of `matryoshka`; None: all. A head always
                reads all.

        Returns:
            (E, embedding_dim), and the (E,) bool mask of items with a picture or a text.

        Raises:
            ValueError: the item vector would average features of different spaces.
        """
        self.require_space(objectives=False)
        if self.head is not None:
            has_image, has_text = content_masks(items)
            mu, _ = self.head.posterior(*head_inputs(self.encode(items), has_image, has_text))
            return mu, has_image | has_text
        views = self.views(self.encode(items), *content_masks(items), size)
        return views.item, views.has_item

    def parameter_parts(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by part: `encoder`, `projection`, `temperatures` (and biases of the objectives), `head`, and
        `discriminator` (of the head `factor_vae`)."""
        head = {} if self.head is None else dict(self.head.named_parameters())
        discriminator = {name: value for name, value in head.items() if name.startswith("discriminator.")}
        return {
            "encoder": list(self.encoder.parameters()),
            "projection": [*self.image_projection.parameters(), *self.text_projection.parameters()],
            "temperatures": list(self.objectives.parameters()),
            "head": [value for name, value in head.items() if name not in discriminator],
            "discriminator": list(discriminator.values()),
        }

    def loss_parameters(self) -> list[nn.Parameter]:
        """The parameters that only losses read, and `embed` does not."""
        parts = self.parameter_parts()
        decoder = [] if self.head is None else [*self.head.rebuild.parameters(), *self.head.log_sigma.parameters()]
        return [*parts["temperatures"], *parts["discriminator"], *decoder]

    def start_training(self, num_keys: int, num_items: int) -> None:
        """Make the state that only training has: the feature queue, and the number of items for the head.

        Args:
            num_keys: number K of keys of an item.
            num_items: number of training items.
        """
        if self.config.queue is not None:
            self.queue = FeatureQueue(self.config.queue, self.dims, num_keys, self.towers)
        if self.head is not None:
            self.head.num_items = num_items

    @torch.no_grad()
    def after_step(self) -> None:
        """Clamp the temperatures to the allowed range, and update the head and the feature queue."""
        for objective in self.objectives.values():
            assert isinstance(objective, Objective)
            objective.after_step()
        if self.head is not None:
            self.head.after_step()
        if self.queue is not None:
            self.queue.after_step(self.towers)

    def init_from(self, folder: str | Path) -> None:
        """Load the weights of encoder and projections from another pretraining run.

        Args:
            folder: the run folder.

        Raises:
            ValueError: the folder holds no pretraining task, or the architectures differ.
        """
        PretrainTaskConfig.parse(task_config(Path(folder), "pretrain"), source=f"{folder}/task.json")
        parts = ("encoder.", "image_projection.", "text_projection.")
        current = {name: value for name, value in self.state_dict().items() if name.startswith(parts)}
        given = {name: value for name, value in task_weights(Path(folder)).items() if name.startswith(parts)}
        for name in [*current, *(name for name in given if name not in current)]:
            if name not in current or name not in given or current[name].shape != given[name].shape:
                given_shape, shape = (list(x[name].shape) if name in x else "none" for x in (given, current))
                raise ValueError(
                    f"init_from {folder}: {name} is {given_shape} in that run and {shape} in this one; give the same "
                    f"task.encoder"
                )
        self.load_state_dict(given, strict=False)

    def save(self, folder: Path) -> None:
        """Write `task.json`, `encoder/` (architecture and tokenizer) and `model.safetensors`; the feature queue, which
        only training needs, is dropped."""
        self.encoder.save(RunFolder(folder).encoder)
        self.queue = None
        save_task(self, self.config, "pretrain", folder)

    @classmethod
    def load(cls, folder: str | Path) -> PretrainTask:
        """Load a task from a run folder, in evaluation mode.

        Args:
            folder: a run folder of `pretrain.train`, or a folder of `save_pretrained`.

        Raises:
            ValueError: the folder holds no pretraining task, or a damaged file.
        """
        folder = Path(folder)
        config = PretrainTaskConfig.parse(task_config(folder, "pretrain"), source=str(RunFolder(folder).task))
        task = cls(config, RunFolder(folder).encoder)
        load_weights(task, task_weights(folder), RunFolder(folder).weights)
        return task.eval()
