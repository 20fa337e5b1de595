"""ID vectors for items that have none of their own, made from what is known of them: Meta-Embedding, MWUF, CVAR.

A generator reads the side features and the content vector of an item and gives a vector in the place of its row of the
ID table. `mmctr.training.generator_tasks` trains it on old items, with the ranker frozen; the `ItemEmbedder` then reads
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmctr.config import Config


class NoColdIds(Config):
    """Items without an ID row read the row of the unknown item."""

    name: Literal["none"] = "none"


class GeneratorConfig(Config):
    """What all generators share."""

    validation: float = Field(default=0.1, gt=0, lt=1)
    """seeded fraction of the old items that the generator does not learn from. It is judged by their validation rows,
    and by those of cold items where there are any: with items it has learned from it seems ever better"""


class MetaEmbeddingConfig(GeneratorConfig):
    """Meta-Embedding: a generated vector that ranks well now and better after one step on a few rows."""

    name: Literal["meta_embedding"] = "meta_embedding"
    hidden: list[int] = [64]
    """hidden sizes of the generator"""
    rows: int = Field(default=10, ge=1)
    """training rows of an item in each of its two batches; old items with fewer than twice as many teach nothing"""
    cold_weight: float = Field(default=0.1, ge=0, le=1)
    """a of the loss a l_a + (1 - a) l_b: what ranking without any row counts for, against ranking after the step"""
    inner_lr: float = Field(default=0.1, gt=0)
    """learning rate of the one step on the vector"""


class MWUFConfig(GeneratorConfig):
    """Meta Warm Up Framework: the ID vector scaled by what the item is, and shifted by who has met it."""

    name: Literal["mwuf"] = "mwuf"
    hidden: list[int] = [64]
    """hidden sizes of both networks"""


class CVARConfig(GeneratorConfig):
    """Conditional variational autoencoder of ID vectors, its latents also told from what the item is."""

    name: Literal["cvar"] = "cvar"
    latent: int = Field(default=16, ge=1)
    """size Z of the latent"""
    hidden: list[int] = []
    """hidden sizes of encoders and decoder; the authors' code has none"""
    reconstruction: float = Field(default=1.0, ge=0)
    """weight of the squared error of the ID vector that is decoded from its own latent"""
    wasserstein: float = Field(default=0.2, ge=0)
    """weight of the distance between the latents of the ID vector and of the item's description; the authors' code adds
    it up over batches of 2048 rows with 1e-4, which is 0.2 of a mean"""
    noise: float = Field(default=1e-4, ge=0)
    """factor on the standard deviation of drawn latents; the authors' code has 1e-4, a plain VAE 1"""


ColdIdsConfig = Annotated[NoColdIds | MetaEmbeddingConfig | MWUFConfig | CVARConfig, Field(discriminator="name")]


class Network(nn.Sequential):
    """Linear and ReLU for each hidden size, then a linear layer that starts near zero."""

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
    """What is known of an item besides its ID, side by side: its embedded side features and its content vector, each
    layer-normed, and numbers, which are standardised over items. An item without content reads a learned vector in
    place of its own.

    Args:
        embedded: (features_dim,) which of the features' dimensions are of embeddings; None: all.
    """

    def __init__(self, features_dim: int, content_dim: int, embedded: Sequence[bool] | None = None):
        super().__init__()
        self.dim = features_dim + content_dim
        is_embedded = [True] * features_dim if embedded is None else list(embedded)
        self.numbers = [place for place, yes in enumerate(is_embedded) if not yes]
        self.embedded = [place for place, yes in enumerate(is_embedded) if yes]
        self.features = nn.LayerNorm(len(self.embedded)) if self.embedded else None
        self.content, self.absent = None, None
        if content_dim:
            self.content, self.absent = nn.LayerNorm(content_dim), nn.Parameter(torch.zeros(content_dim))

    def forward(self, features: Tensor, content: Tensor | None, has_content: Tensor | None) -> Tensor:
        """(U, features_dim), (U, content_dim) and (U,) bool -> (U, dim)."""
        parts = [features[:, self.numbers].float()] if self.numbers else []
        if self.features is not None:
            parts.append(self.features(features[:, self.embedded].float()))
        if self.content is not None:
            assert content is not None and has_content is not None
            parts.append(self.content(torch.where(has_content[:, None], content.float(), self.absent)))  # type: ignore[arg-type]
        return torch.cat(parts, dim=1)


class IdGenerator(nn.Module):
    """Descriptions of items -> their ID vectors.

    Args:
        id_dim: size D of ID vectors.
        describe: makes the descriptions (U, X).

    Buffers hold what was learned of old items without training: they are filled by `learn_from`.
    """

    mean: Tensor

    def __init__(self, id_dim: int, describe: ItemDescription):
        super().__init__()
        self.describe = describe
        self.register_buffer("mean", torch.zeros(id_dim))

    def learn_from(self, ids: Tensor, users: Tensor, rows: Tensor) -> None:
        """Take over the means over old items.

        Args:
            ids: (n, D) their trained ID vectors.
            users: (n, W) mean vector of the users in each one's training rows.
            rows: (n,) how many these are.
        """
        self.mean.copy_(ids.mean(0))

    def cold(self, x: Tensor) -> Tensor:
        """(U, X) -> (U, D): what an item without any row reads."""
        raise NotImplementedError

    def start(self, x: Tensor) -> Tensor:
        """(U, X) -> (U, D): what a fresh row of the ID table begins with."""
        return self.cold(x)

    def warm(self, ids: Tensor, x: Tensor, users: Tensor, has_users: Tensor) -> Tensor:
        """What is read of trained rows (U, D) of new items. `users` (U, W) is the mean user vector of their rows so
        far, `has_users` (U,) whether there were any."""
        return ids


class MetaEmbedding(IdGenerator):
    """phi = mean + network(x). (Pan et al. 2019, arXiv 1904.12214, section 3; the mean of the old ID vectors takes the
    place of a bias that would have to be learned.)"""

    def __init__(self, config: MetaEmbeddingConfig, id_dim: int, describe: ItemDescription):
        super().__init__(id_dim, describe)
        self.network = Network(describe.dim, config.hidden, id_dim)

    def cold(self, x: Tensor) -> Tensor:
        return self.mean + self.network(x)


class MWUF(IdGenerator):
    """v_warm = v * scale(x) + shift(u), u the mean vector of the users of the item's rows.

    (Zhu et al. 2021, arXiv 2105.04790, section 3.3. Scale starts at 1 and shift at 0.) A fresh v is the mean of the old
    ID vectors; an item that nobody has met has the mean of the old items' u.
    """

    nobody: Tensor

    def __init__(self, config: MWUFConfig, id_dim: int, user_dim: int, describe: ItemDescription):
        super().__init__(id_dim, describe)
        self.scale = Network(describe.dim, config.hidden, id_dim)
        self.shift = Network(user_dim, config.hidden, id_dim)
        self.register_buffer("nobody", torch.zeros(user_dim))

    def learn_from(self, ids: Tensor, users: Tensor, rows: Tensor) -> None:
        super().learn_from(ids, users, rows)
        self.nobody.copy_(users.mean(0))

    def start(self, x: Tensor) -> Tensor:
        return self.mean.expand(len(x), -1)

    def cold(self, x: Tensor) -> Tensor:
        return self.start(x) * (1 + self.scale(x)) + self.shift(self.nobody)

    def warm(self, ids: Tensor, x: Tensor, users: Tensor, has_users: Tensor) -> Tensor:
        users = torch.where(has_users[:, None], users, self.nobody)
        return ids * (1 + self.scale(x)) + self.shift(users)


class CVAR(IdGenerator):
    """z ~ N(mu(v), sigma(v)) of an ID vector v, z' ~ N(mu'(x), sigma'(x)) of a description x, and a decoder of
    [z, frequency] to ID vectors.

    (Zhao et al. 2022, arXiv 2205.13795, section 4. Of its two variants this is "init only": new items begin with what
    is generated for them.) The frequency of an item is log(1 + training rows) over that of the most frequent one; new
    items are decoded at the mean of the old items, as they are to be read as items one knows.
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
        super().learn_from(ids, users, rows)
        self.most_rows.copy_(rows.max())
        self.frequency.copy_(self.relative(rows).mean())

    def relative(self, rows: Tensor) -> Tensor:
        """(n,) frequencies, 0 to 1, of items with so many training rows."""
        return torch.log1p(rows.float()) / torch.log1p(self.most_rows.float())

    def decode(self, z: Tensor, frequency: Tensor) -> Tensor:
        """(U, Z) and (U,) -> (U, D)."""
        return self.mean + self.decoder(torch.cat([z, frequency[:, None]], dim=1))

    def draw(self, latent: tuple[Tensor, Tensor]) -> Tensor:
        mu, logvar = latent
        return mu + self.noise * torch.exp(logvar / 2) * torch.randn_like(mu)

    def cold(self, x: Tensor) -> Tensor:
        mu = self.of_description(x).chunk(2, dim=1)[0]
        return self.decode(mu, self.frequency.expand(len(x)))


def wasserstein2(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """(U,) squared 2-Wasserstein distances of diagonal Gaussians, (mu, logvar) each (U, Z):
    |mu - mu'|^2 + |sigma - sigma'|^2 (arXiv 2205.13795, equation 7)."""
    sigmas = [torch.exp(logvar / 2) for _, logvar in (one, other)]
    return (one[0] - other[0]).square().sum(1) + (sigmas[0] - sigmas[1]).square().sum(1)


def squared_error(x: Tensor, y: Tensor) -> Tensor:
    """(U,) |x - y|^2 of the rows of (U, D)."""
    return F.mse_loss(x, y, reduction="none").sum(1)


def make_generator(
    config: NoColdIds | MetaEmbeddingConfig | MWUFConfig | CVARConfig,
    id_dim: int,
    user_dim: int,
    features_dim: int,
    content_dim: int,
    embedded: Sequence[bool] | None = None,
) -> IdGenerator | None:
    """The generator of a ranker with parts of these sizes; None for `none`. `embedded` is of `ItemDescription`.

    Raises ValueError for a ranker without IDs, without anything to read of an item, or, for MWUF, without users.
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
