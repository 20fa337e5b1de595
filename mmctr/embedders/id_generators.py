"""Generators of ID vectors for items without a row in the ID table: Meta-Embedding, MWUF and CVAR.

A generator reads the side features and the content vector of an item and gives a vector that replaces the missing row
of the ID table. `mmctr.training.generator_tasks` trains a generator on old items, with the ranker frozen; the
`ItemEmbedder` then uses the generator for cold items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmctr.config import Config, Width


class NoColdIds(Config):
    """No generator: items without an ID row read the row of the unknown item."""

    name: Literal["none"] = "none"


class GeneratorConfig(Config):
    """Options of all generators."""

    validation: float = Field(default=0.1, gt=0, lt=1)
    """seeded fraction of the old items that the generator is not trained on. The validation rows of this fraction and
    of cold items choose the best generator: on training items a generator would look ever better"""


class MetaEmbeddingConfig(GeneratorConfig):
    """Meta-Embedding (Pan et al. 2019): a generated vector that ranks well, and better after one gradient step."""

    name: Literal["meta_embedding"] = "meta_embedding"
    hidden: list[Width] = [64]
    """hidden sizes of the generator"""
    rows: int = Field(default=10, ge=1)
    """training rows of an item in each of the two batches of the item; old items with fewer than twice as many rows are
    left out"""
    cold_weight: float = Field(default=0.1, ge=0, le=1)
    """a of the loss a l_a + (1 - a) l_b, where l_a is the loss with the generated vector and l_b the loss after one
    gradient step"""
    inner_lr: float = Field(default=0.1, gt=0)
    """learning rate of the gradient step on the generated vector"""


class MWUFConfig(GeneratorConfig):
    """Meta Warm Up Framework (Zhu et al. 2021): the ID vector, scaled by a function of the item description and shifted
    by a function of the users of the item."""

    name: Literal["mwuf"] = "mwuf"
    hidden: list[Width] = [64]
    """hidden sizes of the scaling and of the shifting network"""


class CVARConfig(GeneratorConfig):
    """Conditional variational autoencoder of ID vectors (Zhao et al. 2022), with latents that are also inferred from
    the item description."""

    name: Literal["cvar"] = "cvar"
    latent: int = Field(default=16, ge=1)
    """size Z of the latent vectors"""
    hidden: list[Width] = []
    """hidden sizes of both encoders and of the decoder; the code of the authors has no hidden layers"""
    reconstruction: float = Field(default=1.0, ge=0)
    """weight of the squared error of an ID vector decoded from the latent of the same ID vector"""
    wasserstein: float = Field(default=0.2, ge=0)
    """weight of the distance between the latents of the ID vector and of the item description; the code of the authors
    has 1e-4 times a sum over batches of 2048 rows, which is 0.2 times a mean"""
    noise: float = Field(default=1e-4, ge=0)
    """factor on the standard deviation of sampled latents; 1e-4 in the code of the authors, 1 in a plain VAE"""


ColdIdsConfig = Annotated[NoColdIds | MetaEmbeddingConfig | MWUFConfig | CVARConfig, Field(discriminator="name")]


class Network(nn.Sequential):
    """Linear layer and ReLU for each hidden size, then a linear layer with initial outputs near zero.

    Args:
        in_dim: size of the input.
        hidden: hidden sizes.
        out_dim: size of the output.
    """

    def __init__(self, in_dim: int, hidden: list[int], out_dim: int):
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(in_dim, width), nn.ReLU()]
            in_dim = width
        last = nn.Linear(in_dim, out_dim)
        with torch.no_grad():
            last.weight.mul_(0.1)
            last.bias.zero_()
        super().__init__(*layers, last)


class ItemDescription(nn.Module):
    """Concatenate the inputs of a generator: numbers, layer-normed embedded features, and the layer-normed content.

    An item without content gets a learned vector in place of the content vector. Numbers are standardised over items
    before.

    Args:
        features_dim: size of the vector of side features.
        content_dim: size of the content vector; 0: no content.
        embedded: (features_dim,) for each dimension of the side features, whether it belongs to an embedding; None: all
            dimensions do.
    """

    def __init__(self, features_dim: int, content_dim: int, embedded: Sequence[bool] | None = None):
        super().__init__()
        self.dim = features_dim + content_dim
        is_embedded = [True] * features_dim if embedded is None else list(embedded)
        self.numbers = [dimension for dimension, embeds in enumerate(is_embedded) if not embeds]
        self.embedded = [dimension for dimension, embeds in enumerate(is_embedded) if embeds]
        self.features = nn.LayerNorm(len(self.embedded)) if self.embedded else None
        self.content, self.absent = None, None
        if content_dim:
            self.content, self.absent = nn.LayerNorm(content_dim), nn.Parameter(torch.zeros(content_dim))

    def forward(self, features: Tensor, content: Tensor | None, has_content: Tensor | None) -> Tensor:
        """The descriptions of U items.

        Args:
            features: (U, features_dim) vectors of the side features.
            content: (U, content_dim) content vectors; None without content.
            has_content: (U,) bool; None without content.

        Returns:
            (U, dim).
        """
        parts = [features[:, self.numbers].float()] if self.numbers else []
        if self.features is not None:
            parts.append(self.features(features[:, self.embedded].float()))
        if self.content is not None and self.absent is not None:
            assert content is not None and has_content is not None, "this description reads content"
            parts.append(self.content(torch.where(has_content[:, None], content.float(), self.absent)))
        return torch.cat(parts, dim=1)


class IdGenerator(nn.Module):
    """Base class of generators: ID vectors (U, D) from item descriptions (U, X).

    The buffers hold statistics of the old items, which `learn_from` sets.

    Args:
        id_dim: size D of ID vectors.
        describe: makes the descriptions (U, X).
    """

    mean: Tensor

    def __init__(self, id_dim: int, describe: ItemDescription):
        super().__init__()
        self.describe = describe
        self.register_buffer("mean", torch.zeros(id_dim))

    def learn_from(self, ids: Tensor, users: Tensor, rows: Tensor) -> None:
        """Set the statistics of n old items.

        Args:
            ids: (n, D) trained ID vectors.
            users: (n, W) mean vector of the users in the training rows of each item.
            rows: (n,) number of training rows of each item.
        """
        self.mean.copy_(ids.mean(0))

    def cold(self, x: Tensor) -> Tensor:
        """ID vectors (U, D) of items without any training row, from descriptions x (U, X)."""
        raise NotImplementedError

    def start(self, x: Tensor) -> Tensor:
        """Initial values (U, D) of new rows of the ID table, from descriptions x (U, X)."""
        return self.cold(x)

    def warm(self, ids: Tensor, x: Tensor, users: Tensor, has_users: Tensor) -> Tensor:
        """ID vectors of new items that have a few training rows.

        Args:
            ids: (U, D) trained rows of the ID table.
            x: (U, X) descriptions.
            users: (U, W) mean vector of the users in the training rows of each item.
            has_users: (U,) bool, whether an item has any training row.

        Returns:
            (U, D).
        """
        return ids


class MetaEmbedding(IdGenerator):
    """Meta-Embedding, phi = mean + network(x) (Pan et al. 2019, arXiv 1904.12214, section 3).

    The mean of the old ID vectors replaces the learned bias of the paper.

    Args:
        config: hidden sizes of the network.
        id_dim: size D of ID vectors.
        describe: makes the descriptions (U, X).
    """

    def __init__(self, config: MetaEmbeddingConfig, id_dim: int, describe: ItemDescription):
        super().__init__(id_dim, describe)
        self.network = Network(describe.dim, config.hidden, id_dim)

    def cold(self, x: Tensor) -> Tensor:
        """ID vectors (U, D) of items without any training row, from descriptions x (U, X)."""
        return self.mean + self.network(x)


class MWUF(IdGenerator):
    """Meta Warm Up Framework, v_warm = v * scale(x) + shift(u) (Zhu et al. 2021, arXiv 2105.04790, section 3.3).

    u is the mean vector of the users in the training rows of the item; an item without rows has the mean u of the old
    items. The scale starts at 1 and the shift at 0. A new v is the mean of the old ID vectors.

    Args:
        config: hidden sizes of the networks.
        id_dim: size D of ID vectors.
        user_dim: size W of user vectors.
        describe: makes the descriptions (U, X).
    """

    nobody: Tensor

    def __init__(self, config: MWUFConfig, id_dim: int, user_dim: int, describe: ItemDescription):
        super().__init__(id_dim, describe)
        self.scale = Network(describe.dim, config.hidden, id_dim)
        self.shift = Network(user_dim, config.hidden, id_dim)
        self.register_buffer("nobody", torch.zeros(user_dim))

    def learn_from(self, ids: Tensor, users: Tensor, rows: Tensor) -> None:
        """Set the statistics of n old items: ID vectors (n, D), user vectors (n, W), numbers of rows (n,)."""
        super().learn_from(ids, users, rows)
        self.nobody.copy_(users.mean(0))

    def start(self, x: Tensor) -> Tensor:
        """The mean of the old ID vectors, (U, D), for descriptions x (U, X)."""
        return self.mean.expand(len(x), -1)

    def cold(self, x: Tensor) -> Tensor:
        """ID vectors (U, D) of items without any training row, from descriptions x (U, X)."""
        return self.start(x) * (1 + self.scale(x)) + self.shift(self.nobody)

    def warm(self, ids: Tensor, x: Tensor, users: Tensor, has_users: Tensor) -> Tensor:
        """Scaled and shifted ID vectors (U, D); the arguments are those of `IdGenerator.warm`."""
        users = torch.where(has_users[:, None], users, self.nobody)
        return ids * (1 + self.scale(x)) + self.shift(users)


class CVAR(IdGenerator):
    """Conditional variational autoencoder of ID vectors (Zhao et al. 2022, arXiv 2205.13795, section 4).

    An ID vector v has the latent z ~ N(mu(v), sigma(v)), a description x the latent z' ~ N(mu'(x), sigma'(x)), and one
    decoder maps [latent, frequency] to ID vectors. This is the variant "init only" of the paper: the generated vector
    is the initial value of the ID vector of a new item. The frequency of an item is log(1 + training rows), divided by
    the largest one; new items are decoded at the mean frequency of the old items.

    Args:
        config: sizes and noise.
        id_dim: size D of ID vectors.
        describe: makes the descriptions (U, X).
    """

    frequency: Tensor
    most_rows: Tensor

    def __init__(self, config: CVARConfig, id_dim: int, describe: ItemDescription):
        super().__init__(id_dim, describe)
        self.noise = config.noise
        self.of_id = Network(id_dim, config.hidden, 2 * config.latent)
        self.of_description = Network(describe.dim, config.hidden, 2 * config.latent)
        self.decoder = Network(config.latent + 1, config.hidden, id_dim)
        self.register_buffer("frequency", torch.zeros(1))
        self.register_buffer("most_rows", torch.ones(1))

    def learn_from(self, ids: Tensor, users: Tensor, rows: Tensor) -> None:
        """Set the statistics of n old items: ID vectors (n, D), user vectors (n, W), numbers of rows (n,)."""
        super().learn_from(ids, users, rows)
        self.most_rows.copy_(rows.max())
        self.frequency.copy_(self.relative(rows).mean())

    def relative(self, rows: Tensor) -> Tensor:
        """Relative frequencies (n,) in [0, 1] of items with `rows` (n,) training rows."""
        return torch.log1p(rows.float()) / torch.log1p(self.most_rows.float())

    def decode(self, z: Tensor, frequency: Tensor) -> Tensor:
        """ID vectors (U, D) of latents z (U, Z) and frequencies (U,)."""
        return self.mean + self.decoder(torch.cat([z, frequency[:, None]], dim=1))

    def draw(self, latent: tuple[Tensor, Tensor]) -> Tensor:
        """Samples (U, Z) of Gaussians, given as mu and logvar (U, Z), with the standard deviation times `noise`."""
        mu, logvar = latent
        return mu + self.noise * torch.exp(logvar / 2) * torch.randn_like(mu)

    def cold(self, x: Tensor) -> Tensor:
        """ID vectors (U, D) decoded from the mean latents of descriptions x (U, X)."""
        mu = self.of_description(x).chunk(2, dim=1)[0]
        return self.decode(mu, self.frequency.expand(len(x)))


def wasserstein2(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """Squared 2-Wasserstein distances of diagonal Gaussians (Zhao et al. 2022, arXiv 2205.13795, equation 7).

    Args:
        one: mu and logvar, each (U, Z).
        other: mu' and logvar', each (U, Z).

    Returns:
        (U,) |mu - mu'|^2 + |sigma - sigma'|^2.
    """
    mus, sigmas = zip(*((mu.float(), torch.exp(logvar.float() / 2)) for mu, logvar in (one, other)), strict=True)
    return (mus[0] - mus[1]).square().sum(1) + (sigmas[0] - sigmas[1]).square().sum(1)


def squared_error(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances |x - y|^2 (U,) of the rows of x and y, each (U, D)."""
    return (x.float() - y.float()).square().sum(1)


def make_generator(
    config: NoColdIds | MetaEmbeddingConfig | MWUFConfig | CVARConfig,
    id_dim: int,
    user_dim: int,
    features_dim: int,
    content_dim: int,
    embedded: Sequence[bool] | None = None,
) -> IdGenerator | None:
    """The generator that a config asks for; None for `none`.

    Args:
        config: the kind of the generator and the options.
        id_dim: size of ID vectors.
        user_dim: size of user vectors; 0: no user vectors.
        features_dim: size of the vector of the side features of items.
        content_dim: size of content vectors; 0: no content.
        embedded: as in `ItemDescription`.

    Raises:
        ValueError: the ranker has no ID vectors, neither side features nor content, or, for MWUF, no user vectors.
    """
    if isinstance(config, NoColdIds):
        return None
    if not id_dim:
        raise ValueError(f"cold_ids: {config.name} makes ID vectors, but id_dim is 0; give id_dim > 0, or name: none")
    if not features_dim + content_dim:
        raise ValueError(
            f"cold_ids: {config.name} reads side features or content of an item, and there are none; give "
            f"features.item, embedder.content, or name: none"
        )
    describe = ItemDescription(features_dim, content_dim, embedded)
    if isinstance(config, MetaEmbeddingConfig):
        return MetaEmbedding(config, id_dim, describe)
    if isinstance(config, CVARConfig):
        return CVAR(config, id_dim, describe)
    if not user_dim:
        raise ValueError("cold_ids: mwuf reads user vectors, but user_dim is 0; give user_dim > 0, or another name")
    return MWUF(config, id_dim, user_dim, describe)
