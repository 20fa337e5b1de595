"""Variational heads over item features: a few disentangled latent dimensions, which can be given names.

A head reads the unit-norm features of the picture and the text of an item, infers a Gaussian for each latent dimension,
and reconstructs the features from a sample. The mean `mu` of the Gaussians is then the embedding of the item.

| `name` | how the dimensions are disentangled | source |
|---|---|---|
| `beta_vae` | a weight on the KL divergence | Higgins et al. 2017 |
| `annealed_vae` | a KL divergence kept near a growing number of nats | Burgess et al. 2018, equation 8 |
| `beta_tcvae` | a weight on the total correlation, estimated from the batch | Chen et al. 2018 |
| `factor_vae` | a weight on the total correlation, estimated by a discriminator | Kim & Mnih 2018 |
| `dip_vae` | the covariance of the aggregate posterior | Kumar et al. 2018 |

A new head is a config, a class, and one more member of the union `HeadConfig`. The loss terms are functions of
`mmctr.losses.variational`.
"""

from __future__ import annotations

import itertools
import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from mmctr.config import Config
from mmctr.distributed import gather_rows
from mmctr.losses.variational import (
    ACTIVE_VARIANCE,
    dip_penalties,
    discriminator_loss,
    gaussian_nll,
    kl_parts,
    kl_to_prior,
    permuted_dimensions,
    product_of_experts,
)

MOMENTUM = 0.01
"""smallest weight of a batch in the running statistics of features, reached after a hundred batches"""


class BaseHeadConfig(Config):
    """Options of all heads."""

    dim: int = Field(default=10, ge=1)
    """number of latent dimensions"""
    hidden: list[int] = [64]
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
        features, has = gather_rows(features.detach()), gather_rows(has)[:, None]
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


class BetaVAEConfig(BaseHeadConfig):
    """Weighted KL divergence: reconstruction + beta KL (Higgins et al. 2017)."""

    name: Literal["beta_vae"] = "beta_vae"
    beta: float = Field(default=4.0, ge=0)
    """weight of the KL to the prior"""

    def build(self, image_dim: int, text_dim: int) -> BetaVAE:
        """The head, for features of pictures and texts of these sizes."""
        return BetaVAE(self, image_dim, text_dim)


class BetaVAE(VariationalHead):
    """Head with the loss reconstruction + beta KL."""

    def penalties(self, z: Tensor, mu: Tensor, logvar: Tensor) -> dict[str, Tensor]:
        """`kl`: the mean KL divergence of the items, times beta; arguments (B, Z)."""
        return {"kl": self.config.beta * kl_to_prior(mu, logvar).sum(1).mean()}


class AnnealedVAEConfig(BaseHeadConfig):
    """KL divergence near a growing capacity: reconstruction + gamma |KL - capacity| (Burgess et al. 2018)."""

    name: Literal["annealed_vae"] = "annealed_vae"
    gamma: float = Field(default=100.0, gt=0)
    """weight of the distance between the KL and the capacity"""
    capacity: float = Field(default=15.0, gt=0)
    """capacity after `capacity_steps` steps, in nats"""
    capacity_steps: int = Field(default=1000, ge=1)
    """steps in which the capacity grows from 0 to `capacity`"""

    def build(self, image_dim: int, text_dim: int) -> AnnealedVAE:
        """The head, for features of pictures and texts of these sizes."""
        return AnnealedVAE(self, image_dim, text_dim)


class AnnealedVAE(VariationalHead):
    """Head with the loss reconstruction + gamma |KL - C|, where KL is the mean over the batch of all processes: the KL
    divergence of a single item may differ from the capacity C."""

    steps: Tensor

    def __init__(self, config: AnnealedVAEConfig, image_dim: int, text_dim: int):
        super().__init__(config, image_dim, text_dim)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def penalties(self, z: Tensor, mu: Tensor, logvar: Tensor) -> dict[str, Tensor]:
        """`kl`: the distance of the mean KL divergence from the capacity, times gamma; arguments (B, Z)."""
        capacity = self.config.capacity * (self.steps / self.config.capacity_steps).clamp(max=1)
        kl = gather_rows(kl_to_prior(mu, logvar).sum(1)).mean()
        return {"kl": self.config.gamma * (kl - capacity).abs()}

    def after_step(self) -> None:
        """Count the step: the capacity grows with the number of steps."""
        self.steps += 1


class BetaTCVAEConfig(BaseHeadConfig):
    """KL divergence split into three weighted terms (beta-TCVAE: Chen et al. 2018)."""

    name: Literal["beta_tcvae"] = "beta_tcvae"
    alpha: float = Field(default=1.0, ge=0)
    """weight of the mutual information of items and latents"""
    beta: float = Field(default=30.0, ge=0)
    """weight of the total correlation; 6, the value of the paper, is for pixels and too small to align the latent
    dimensions of contrastive features"""
    gamma: float = Field(default=1.0, ge=0)
    """weight of the KL divergences of single dimensions to the prior"""

    def build(self, image_dim: int, text_dim: int) -> BetaTCVAE:
        """The head, for features of pictures and texts of these sizes."""
        return BetaTCVAE(self, image_dim, text_dim)


class BetaTCVAE(VariationalHead):
    """Head with the loss reconstruction + alpha I(x; z) + beta TC(z) + gamma sum_d KL(q(z_d) || p(z_d))."""

    def penalties(self, z: Tensor, mu: Tensor, logvar: Tensor) -> dict[str, Tensor]:
        """The three weighted parts of the KL divergence, scalars; arguments (B, Z)."""
        parts, config = kl_parts(z, mu, logvar, self.num_items), self.config
        return {
            "mutual_information": config.alpha * parts.mutual_information,
            "total_correlation": config.beta * parts.total_correlation,
            "dimension_wise_kl": config.gamma * parts.dimension_wise_kl,
        }


class FactorVAEConfig(BaseHeadConfig):
    """Total correlation estimated by a discriminator: reconstruction + KL + gamma TC (FactorVAE: Kim and Mnih 2018)."""

    name: Literal["factor_vae"] = "factor_vae"
    gamma: float = Field(default=30.0, ge=0)
    """weight of the total correlation"""
    discriminator: list[int] = [256, 256]
    """hidden sizes of the discriminator, whose learning rate is `fit.optimizer.groups.discriminator.lr`"""

    def build(self, image_dim: int, text_dim: int) -> FactorVAE:
        """The head, for features of pictures and texts of these sizes."""
        return FactorVAE(self, image_dim, text_dim)


class FactorVAE(VariationalHead):
    """Head with the loss reconstruction + KL + gamma TC(z); a discriminator estimates the density ratio in TC.

    All items of a batch train the head. The discriminator learns to tell the samples of one half of the batch from the
    permuted samples of the other half. The gradients of discriminator and head are separate, so that one optimizer
    trains both.
    """

    def __init__(self, config: FactorVAEConfig, image_dim: int, text_dim: int):
        super().__init__(config, image_dim, text_dim)
        self.discriminator = _mlp([config.dim, *config.discriminator, 2])

    def penalties(self, z: Tensor, mu: Tensor, logvar: Tensor) -> dict[str, Tensor]:
        """`kl`, `total_correlation` and the loss of the discriminator, scalars; arguments (B, Z).

        Raises:
            ValueError: a process has fewer than two items.
        """
        constant = {name: values.detach() for name, values in self.discriminator.named_parameters()}
        logits = functional_call(self.discriminator, constant, (z,))
        half = len(z) // 2
        if not half:
            raise ValueError("factor_vae permutes half of a batch: fit.batch_size must give each process 2 items")
        permuted = permuted_dimensions(z[half:].detach())
        loss = discriminator_loss(self.discriminator(z[:half].detach()), self.discriminator(permuted))
        return {
            "kl": kl_to_prior(mu, logvar).sum(1).mean(),
            "total_correlation": self.config.gamma * (logits[:, 0] - logits[:, 1]).mean(),
            # the discriminator has a separate loss, which neither `weight` nor the division by F should scale
            "discriminator": loss * self.num_features / self.config.weight,
        }


class DIPVAEConfig(BaseHeadConfig):
    """Covariance of the latents drawn towards the identity matrix (DIP-VAE: Kumar et al. 2018)."""

    name: Literal["dip_vae"] = "dip_vae"
    kind: Literal["I", "II"] = "II"
    """I: the covariance of mu is penalised; II: the covariance of z"""
    off_diagonal: float = Field(default=10.0, ge=0)
    """lambda_od: weight of the squared covariances of different dimensions"""
    diagonal: float = Field(default=10.0, ge=0)
    """lambda_d: weight of the squared distances of the variances from 1"""

    def build(self, image_dim: int, text_dim: int) -> DIPVAE:
        """The head, for features of pictures and texts of these sizes."""
        return DIPVAE(self, image_dim, text_dim)


class DIPVAE(VariationalHead):
    """Head with the loss reconstruction + KL + lambda_od sum_{i != j} Cov_ij^2 + lambda_d sum_i (Cov_ii - 1)^2."""

    def penalties(self, z: Tensor, mu: Tensor, logvar: Tensor) -> dict[str, Tensor]:
        """`kl` and `covariance`, the weighted penalties of the covariance matrix, scalars; arguments (B, Z)."""
        off, on = dip_penalties(mu, logvar if self.config.kind == "II" else None)
        kl = kl_to_prior(mu, logvar).sum(1).mean()
        return {"kl": kl, "covariance": self.config.off_diagonal * off + self.config.diagonal * on}


HeadConfig = Annotated[
    BetaVAEConfig | AnnealedVAEConfig | BetaTCVAEConfig | FactorVAEConfig | DIPVAEConfig, Field(discriminator="name")
]
