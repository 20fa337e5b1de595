"""VariationalHead: what all variational heads share. Features of an item -> a latent Gaussian -> features again."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from mmctr.config import Config, Width
from mmctr.distributed import gather_rows
from mmctr.losses.variational import (
    ACTIVE_VARIANCE,
    gaussian_nll,
    kl_to_prior,
    product_of_experts,
)

MOMENTUM = 0.01
"""smallest weight of a batch in the running statistics of features, reached after a hundred batches"""


class BaseHeadConfig(Config):
    """Options of all heads."""

    dim: int = Field(default=10, ge=1)
    """number of latent dimensions"""
    hidden: list[Width] = [64]
    """hidden sizes of the inference networks; the networks that reconstruct the features have the sizes in reverse"""
    weight: float = Field(default=1.0, gt=0)
    """factor on the terms of the head in the loss"""
    sigma: float | None = Field(default=None, gt=0)
    """standard deviation of the noise on reconstructed features, whose standard deviation is 1. None: learned, one for
    each modality (sigma-VAE). A given value acts as beta does: at 1, beta_norm of Higgins et al. is beta Z / F"""
    modality_dropout: float = Field(default=0.2, ge=0, lt=1)
    """probability that a training item with picture and text is inferred from one of the two while both are
    reconstructed, so that an item that lacks one gets the same latents as with both"""
    train_features: bool = False
    """whether the gradient flows from the inference networks into the features; the reconstruction targets never get a
    gradient"""


class Standardise(nn.Module):
    """Centre the features of a modality and divide all D dimensions by one common standard deviation.

    Features of an encoder lie in a narrow cone; without this step a head would reconstruct the axis of the cone and
    nothing that tells items apart. Mean and variance are running statistics over the batches of all processes.

    Args:
        dim: size D of the features.
    """

    mean: Tensor
    variance: Tensor
    batches: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("variance", torch.ones(()))
        self.register_buffer("batches", torch.zeros(()))

    @torch.no_grad()
    def update(self, features: Tensor, has: Tensor) -> None:
        """Update the running statistics from a batch.

        Args:
            features: (B, D).
            has: (B,) bool, the rows that have features.
        """
        features, has = gather_rows(features.detach().float()), gather_rows(has)[:, None]
        count = has.sum().clamp(min=1)
        mean = torch.where(has, features, 0.0).sum(0) / count
        variance = torch.where(has, (features - mean).square(), 0.0).sum() / count / len(mean)
        rate = has.any() * (1 / (self.batches + 1)).clamp(min=MOMENTUM)
        # the variance about the running mean: `variance` above is about the mean of the batch
        variance = variance + (1 - rate) * (mean - self.mean).square().mean() * (self.batches > 0)
        self.mean += rate * (mean - self.mean)
        self.variance += rate * (variance - self.variance)
        self.batches += has.any()

    @property
    def log_volume(self) -> Tensor:
        """The logarithm of the volume change of standardising, a scalar: it turns a log density of standardised
        features into a log density of the features."""
        return 0.5 * len(self.mean) * (self.variance + 1e-12).log()

    def forward(self, features: Tensor) -> Tensor:
        """Standardised features (B, D) of features (B, D)."""
        return (features - self.mean) * torch.rsqrt(self.variance + 1e-12)


class VariationalHead(nn.Module):
    """Base class of heads, for B items of a process and Z latent dimensions.

    All loss terms are divided by F, the number of features of both modalities: the terms are then about as large as
    contrastive losses, and the balance between the terms is that of the papers.

    Args:
        config: the config of the head.
        image_dim: size of the features of pictures.
        text_dim: size of the features of texts.
    """

    def __init__(self, config: Any, image_dim: int, text_dim: int):
        super().__init__()
        self.config = config
        self.num_items = 0
        """number of items N of the training set"""
        dims = {"image": image_dim, "text": text_dim}
        self.num_features = sum(dims.values())
        self.inference = nn.ModuleDict({n: _mlp([d, *config.hidden, 2 * config.dim]) for n, d in dims.items()})
        self.rebuild = nn.ModuleDict({n: _mlp([config.dim, *config.hidden[::-1], d]) for n, d in dims.items()})
        self.standard = nn.ModuleDict({n: Standardise(d) for n, d in dims.items()})

        start, learned = math.log(config.sigma or 1.0), config.sigma is None
        self.log_sigma = nn.ParameterDict(
            {name: nn.Parameter(torch.tensor(start), requires_grad=learned) for name in dims}
        )

    def posterior(self, features: dict[str, Tensor], has: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The Gaussian of each item, inferred from the modalities the item has.

        Args:
            features: (B, D) unit-norm features by modality, `image` and `text`; a modality no item has may be missing.
            has: (B,) bool by modality, the items that have the modality.

        Returns:
            mu and logvar, each (B, Z); those of the prior for an item without any modality.
        """
        experts = [self.inference[name](self.standard[name](values)) for name, values in features.items()]
        mu, logvar = torch.stack(experts).chunk(2, dim=-1)  # (M, B, Z)
        return product_of_experts(mu, logvar.clamp(-10, 10), torch.stack([has[name] for name in features]))

    def decode(self, z: Tensor) -> dict[str, Tensor]:
        """Reconstructed standardised features (B, D) by modality, from latents (B, Z)."""
        return {name: layers(z) for name, layers in self.rebuild.items()}

    def forward(self, features: dict[str, Tensor], has: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss terms of B items, in nats per feature.

        Args:
            features: (B, D) unit-norm features by modality.
            has: (B,) bool by modality; every item has at least one modality.

        Returns:
            Weighted scalars by name.
        """
        if self.training:
            for name, values in features.items():
                self._layer(name).update(values, has[name])
        inputs = features if self.config.train_features else {n: values.detach() for n, values in features.items()}
        mu, logvar = self.posterior(inputs, self._modalities_to_read(has))
        z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
        targets = {name: self.standard[name](values.detach()) for name, values in features.items()}
        terms = {"rebuild": self._nll(targets, has, z).mean(), **self.penalties(z, mu, logvar)}
        return {name: self.config.weight / self.num_features * value for name, value in terms.items()}

    def _nll(self, targets: dict[str, Tensor], has: dict[str, Tensor], z: Tensor) -> Tensor:
        """(B,) negative log likelihood of the standardised features (B, D) an item has, given latents z (B, Z)."""
        reconstructed, total = self.decode(z), z.new_zeros(len(z))
        for name, values in targets.items():
            nll = gaussian_nll(values, reconstructed[name], self.log_sigma[name])
            total = total + torch.where(has[name], nll, 0.0)
        return total

    def penalties(self, z: Tensor, mu: Tensor, logvar: Tensor) -> dict[str, Tensor]:
        """The loss terms besides the reconstruction, in nats.

        Args:
            z: (B, Z) samples.
            mu: (B, Z) means.
            logvar: (B, Z) logarithms of the variances.

        Returns:
            Scalars by name.
        """
        raise NotImplementedError

    def after_step(self) -> None:
        """Update the state of the head after a training step; heads without state do nothing."""

    def _modalities_to_read(self, has: dict[str, Tensor]) -> dict[str, Tensor]:
        """The (B,) masks of the modalities the inference reads: in training, modality dropout hides some."""
        if not self.training or not self.config.modality_dropout or len(has) < 2:
            return has
        both = has["image"] & has["text"]
        drop = torch.rand(len(both), device=both.device) < self.config.modality_dropout
        first = torch.rand(len(both), device=both.device) < 0.5
        return {"image": has["image"] & ~(both & drop & first), "text": has["text"] & ~(both & drop & ~first)}

    @torch.no_grad()
    def numbers(self, features: dict[str, Tensor], has: dict[str, Tensor]) -> dict[str, float]:
        """Validation metrics of the head, without the weights of the loss.

        Args:
            features: (B, D) unit-norm features by modality.
            has: (B,) bool by modality.

        Returns:
            `elbo` in nats per feature; `kl` in nats; `active`, the number of latent dimensions in use; and for each
            modality `explained_image` or `explained_text`, the fraction of the variance of the features that the
            reconstruction from mu explains.
        """
        mu, logvar = self.posterior(features, has)
        kl = kl_to_prior(mu, logvar).sum(1).mean()
        noise = torch.randn(mu.shape, generator=torch.Generator().manual_seed(0)).to(mu)
        targets = {name: self.standard[name](values) for name, values in features.items()}
        total = self._nll(targets, has, mu + noise * torch.exp(0.5 * logvar)).mean()
        for name in targets:
            total = total + has[name].float().mean() * self._layer(name).log_volume
        numbers = {
            "elbo": float(-(total + kl) / self.num_features),
            "kl": float(kl),
            "active": float((mu.var(0) > ACTIVE_VARIANCE).sum()),
        }
        for name, reconstructed in self.decode(mu).items():
            if name in features and has[name].any():
                values, reconstructed = targets[name][has[name]], reconstructed[has[name]]
                error = (values - reconstructed).square().sum()
                numbers[f"explained_{name}"] = float(
                    1 - error / (values - values.mean(0)).square().sum().clamp(min=1e-12)
                )
        return numbers

    def _layer(self, modality: str) -> Standardise:
        """The standardising layer of a modality."""
        layer = self.standard[modality]
        assert isinstance(layer, Standardise)
        return layer


def _mlp(sizes: list[int]) -> nn.Sequential:
    """Linear layers between sizes, with GELU between the layers."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.GELU(), nn.Linear(before, after)]
    return nn.Sequential(*layers[1:])
