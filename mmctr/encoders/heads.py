"""Variational heads over item features: a few latent dimensions, disentangled, that may be given names.

A head reads the unit-norm features of an item's picture and text, infers a Gaussian for each of its latent dimensions
and rebuilds the features from a sample. Its mean `mu` is then the embedding of the item.

| `name` | pulls the dimensions apart by | source |
|---|---|---|
| `beta_vae` | a weight on the KL | Higgins et al. 2017 |
| `annealed_vae` | a KL that is held at a growing number of nats | Burgess et al. 2018, equation 8 |
| `beta_tcvae` | a weight on the total correlation, estimated from the batch | Chen et al. 2018 |
| `factor_vae` | the same, estimated by a discriminator | Kim & Mnih 2018 |
| `dip_vae` | the covariance of the aggregate posterior | Kumar et al. 2018 |

To add one: a config above its class, a line of the union. The terms are functions in `mmctr.losses.variational`.
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
"""of the running statistics of features, once there were a hundred batches"""


class BaseHeadConfig(Config):
    """What all heads have."""

    dim: int = Field(default=10, ge=1)
    """latent dimensions"""
    hidden: list[int] = [64]
    """hidden sizes of the inference networks, and in reverse of those that rebuild the features"""
    weight: float = Field(default=1.0, gt=0)
    """factor on the terms of the head in the loss"""
    sigma: float | None = Field(default=None, gt=0)
    """standard deviation of the noise on rebuilt features, which vary by 1. None: learned, one of each modality
    (sigma-VAE). A given one acts as beta does: at 1, beta_norm of Higgins et al. is beta Z / F"""
    modality_dropout: float = Field(default=0.2, ge=0, lt=1)
    """chance that a training item that has both modalities is inferred from one of them alone while both are rebuilt,
    so that items that lack one get the latents they would have with it"""
    train_features: bool = False
    """whether the gradient goes on from the inference networks into the features; what is rebuilt is never trained"""


class Standardise(nn.Module):
    """Features of a modality about their mean, in units of what they vary by: one scale for all D of them.

    Those of an encoder lie in a narrow cone; taken as they are, a head would rebuild the axis of the cone and nothing
    of what tells items apart. Statistics are running ones over the batches of all processes.
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
        """Read a batch: features (B, D) of the rows that have them, (B,) bool."""
        features, has = gather_rows(features.detach()), gather_rows(has)[:, None]
        count = has.sum().clamp(min=1)
        mean = torch.where(has, features, 0.0).sum(0) / count
        variance = torch.where(has, (features - mean).square(), 0.0).sum() / count / len(mean)
        rate = has.any() * (1 / (self.batches + 1)).clamp(min=MOMENTUM)
        # about the mean of all: a batch's own varies about its own
        variance = variance + (1 - rate) * (mean - self.mean).square().mean() * (self.batches > 0)
        self.mean += rate * (mean - self.mean)
        self.variance += rate * (variance - self.variance)
        self.batches += has.any()

    @property
    def log_volume(self) -> Tensor:
        """What standardising takes from a density's logarithm: densities are of features as they come."""
        return 0.5 * len(self.mean) * (self.variance + 1e-12).log()

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) * torch.rsqrt(self.variance + 1e-12)


class VariationalHead(nn.Module):
    """Base of all heads: B items of a process, Z latents.

    Losses are divided by F, the number of features: their size is then near that of contrastive ones, and the balance
    between their terms stays what the papers say.
    """

    def __init__(self, config: Any, image_dim: int, text_dim: int):
        super().__init__()
        self.config = config
        self.num_items = 0
        """N of the training set"""
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
        """mu and logvar (B, Z) of items from what they have of `image` and `text`: the prior where that is nothing.

        Args:
            features: (B, D) unit norm, by modality; one that no item has may be left out.
            has: (B,) bool each.
        """
        experts = [self.inference[name](self.standard[name](values)) for name, values in features.items()]
        mu, logvar = torch.stack(experts).chunk(2, dim=-1)  # (M, B, Z)
        return product_of_experts(mu, logvar.clamp(-10, 10), torch.stack([has[name] for name in features]))

    def decode(self, z: Tensor) -> dict[str, Tensor]:
        """(B, Z) -> rebuilt features of each modality, (B, D), standardised."""
        return {name: layers(z) for name, layers in self.rebuild.items()}

    def forward(self, features: dict[str, Tensor], has: dict[str, Tensor]) -> dict[str, Tensor]:
        """The terms of the loss, in nats a feature. Every item has a modality or more."""
        if self.training:
            for name, values in features.items():
                self.standard[name].update(values, has[name])  # type: ignore[operator]
        inputs = features if self.config.train_features else {n: values.detach() for n, values in features.items()}
        mu, logvar = self.posterior(inputs, self._shown(has))
        z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
        targets = {name: self.standard[name](values.detach()) for name, values in features.items()}
        terms = {"rebuild": self._nll(targets, has, z).mean(), **self.penalties(z, mu, logvar)}
        return {name: self.config.weight / self.num_features * value for name, value in terms.items()}

    def _nll(self, targets: dict[str, Tensor], has: dict[str, Tensor], z: Tensor) -> Tensor:
        """(B,) of the standardised features there are, given latents."""
        rebuilt, total = self.decode(z), z.new_zeros(len(z))
        for name, values in targets.items():
            total = total + torch.where(has[name], gaussian_nll(values, rebuilt[name], self.log_sigma[name]), 0.0)
        return total

    def penalties(self, z: Tensor, mu: Tensor, logvar: Tensor) -> dict[str, Tensor]:
        """Everything but reconstruction, in nats: scalars."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Called once a training step."""

    def _shown(self, has: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.training or not self.config.modality_dropout or len(has) < 2:
            return has
        both = has["image"] & has["text"]
        drop = torch.rand(len(both), device=both.device) < self.config.modality_dropout
        first = torch.rand(len(both), device=both.device) < 0.5
        return {"image": has["image"] & ~(both & drop & first), "text": has["text"] & ~(both & drop & ~first)}

    @torch.no_grad()
    def numbers(self, features: dict[str, Tensor], has: dict[str, Tensor]) -> dict[str, float]:
        """What the head does on validation items: `elbo` in nats a feature and `kl` in nats, without the weights of the
        loss; `active` dimensions; and for each modality `explained`, the fraction of the variance of its features that
        mu rebuilds."""
        mu, logvar = self.posterior(features, has)
        kl = kl_to_prior(mu, logvar).sum(1).mean()
        noise = torch.randn(mu.shape, generator=torch.Generator().manual_seed(0)).to(mu)
        targets = {name: self.standard[name](values) for name, values in features.items()}
        total = self._nll(targets, has, mu + noise * torch.exp(0.5 * logvar)).mean()
        for name in targets:
            total = total + has[name].float().mean() * self.standard[name].log_volume  # type: ignore[operator]
        found = {
            "elbo": float(-(total + kl) / self.num_features),
            "kl": float(kl),
            "active": float((mu.var(0) > ACTIVE_VARIANCE).sum()),
        }
        for name, rebuilt in self.decode(mu).items():
            if name in features and has[name].any():
                values, rebuilt = targets[name][has[name]], rebuilt[has[name]]
                error = (values - rebuilt).square().sum()
                found[f"explained_{name}"] = float(
                    1 - error / (values - values.mean(0)).square().sum().clamp(min=1e-12)
                )
        return found


def _mlp(sizes: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.GELU(), nn.Linear(before, after)]
    return nn.Sequential(*layers[1:])


class BetaVAEConfig(BaseHeadConfig):
    """Weighted KL: reconstruction + beta KL (Higgins et al. 2017)."""

    name: Literal["beta_vae"] = "beta_vae"
    beta: float = Field(default=4.0, ge=0)
    """weight of the KL to the prior"""

    def build(self, image_dim: int, text_dim: int) -> BetaVAE:
        return BetaVAE(self, image_dim, text_dim)


class BetaVAE(VariationalHead):
    """reconstruction + beta KL."""

    def penalties(self, z: Tensor, mu: Tensor, logvar: Tensor) -> dict[str, Tensor]:
        return {"kl": self.config.beta * kl_to_prior(mu, logvar).sum(1).mean()}


class AnnealedVAEConfig(BaseHeadConfig):
    """KL held at a capacity that grows: reconstruction + gamma |KL - capacity| (Burgess et al. 2018)."""

    name: Literal["annealed_vae"] = "annealed_vae"
    gamma: float = Field(default=100.0, gt=0)
    """weight of the distance between the KL and the capacity"""
    capacity: float = Field(default=15.0, gt=0)
    """nats the KL is held at in the end"""
    capacity_steps: int = Field(default=1000, ge=1)
    """steps in which it grows to that, from 0"""

    def build(self, image_dim: int, text_dim: int) -> AnnealedVAE:
        return AnnealedVAE(self, image_dim, text_dim)


class AnnealedVAE(VariationalHead):
    """reconstruction + gamma |KL - C|, of the KL's mean over the batch: that of single items may differ from C."""

    steps: Tensor

    def __init__(self, config: AnnealedVAEConfig, image_dim: int, text_dim: int):
        super().__init__(config, image_dim, text_dim)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def penalties(self, z: Tensor, mu: Tensor, logvar: Tensor) -> dict[str, Tensor]:
        capacity = self.config.capacity * (self.steps / self.config.capacity_steps).clamp(max=1)
        kl = gather_rows(kl_to_prior(mu, logvar).sum(1)).mean()
        return {"kl": self.config.gamma * (kl - capacity).abs()}

    def after_step(self) -> None:
        self.steps += 1


class BetaTCVAEConfig(BaseHeadConfig):
    """KL taken apart into three weighted terms (beta-TCVAE: Chen et al. 2018)."""

    name: Literal["beta_tcvae"] = "beta_tcvae"
    alpha: float = Field(default=1.0, ge=0)
    """of the mutual information of items and latents"""
    beta: float = Field(default=30.0, ge=0)
    """of the total correlation; the paper's 6 is for pixels, and too little to turn the axes of contrastive features"""
    gamma: float = Field(default=1.0, ge=0)
    """of each dimension's KL to the prior"""

    def build(self, image_dim: int, text_dim: int) -> BetaTCVAE:
        return BetaTCVAE(self, image_dim, text_dim)


class BetaTCVAE(VariationalHead):
    """reconstruction + alpha I(x; z) + beta TC(z) + gamma sum_d KL(q(z_d) || p(z_d))."""

    def penalties(self, z: Tensor, mu: Tensor, logvar: Tensor) -> dict[str, Tensor]:
        parts, config = kl_parts(z, mu, logvar, self.num_items), self.config
        return {
            "mutual_information": config.alpha * parts.mutual_information,
            "total_correlation": config.beta * parts.total_correlation,
            "dimension_wise_kl": config.gamma * parts.dimension_wise_kl,
        }


class FactorVAEConfig(BaseHeadConfig):
    """Total correlation estimated by a discriminator: reconstruction + KL + gamma TC (Kim and Mnih 2018)."""

    name: Literal["factor_vae"] = "factor_vae"
    gamma: float = Field(default=30.0, ge=0)
    """weight of the total correlation"""
    discriminator: list[int] = [256, 256]
    """its hidden sizes; its learning rate is `fit.optimizer.groups.discriminator.lr`"""

    def build(self, image_dim: int, text_dim: int) -> FactorVAE:
        return FactorVAE(self, image_dim, text_dim)


class FactorVAE(VariationalHead):
    """reconstruction + KL + gamma TC(z), the ratio of densities in TC being that of a discriminator.

    All items of a batch train the head. The discriminator tells samples of one half from the other half, permuted. Its
    gradient and the head's do not mix, so that one optimiser trains both.
    """

    def __init__(self, config: FactorVAEConfig, image_dim: int, text_dim: int):
        super().__init__(config, image_dim, text_dim)
        self.discriminator = _mlp([config.dim, *config.discriminator, 2])

    def penalties(self, z: Tensor, mu: Tensor, logvar: Tensor) -> dict[str, Tensor]:
        held = {name: values.detach() for name, values in self.discriminator.named_parameters()}
        logits = functional_call(self.discriminator, held, (z,))
        half = len(z) // 2
        if not half:
            raise ValueError("factor_vae permutes half of a batch: fit.batch_size must give each process 2 items")
        permuted = permuted_dimensions(z[half:].detach())
        own = discriminator_loss(self.discriminator(z[:half].detach()), self.discriminator(permuted))
        return {
            "kl": kl_to_prior(mu, logvar).sum(1).mean(),
            "total_correlation": self.config.gamma * (logits[:, 0] - logits[:, 1]).mean(),
            "discriminator": own * self.num_features / self.config.weight,  # a loss of its own, not one in nats
        }


class DIPVAEConfig(BaseHeadConfig):
    """Covariance of the latents pulled to the identity (DIP-VAE: Kumar et al. 2018)."""

    name: Literal["dip_vae"] = "dip_vae"
    kind: Literal["I", "II"] = "II"
    """the covariance is that of mu (I) or of z (II)"""
    off_diagonal: float = Field(default=10.0, ge=0)
    """lambda_od: weight of the squared covariances of different dimensions"""
    diagonal: float = Field(default=10.0, ge=0)
    """lambda_d: weight of the squared distances of the variances from 1"""

    def build(self, image_dim: int, text_dim: int) -> DIPVAE:
        return DIPVAE(self, image_dim, text_dim)


class DIPVAE(VariationalHead):
    """reconstruction + KL + lambda_od sum_{i != j} Cov_ij^2 + lambda_d sum_i (Cov_ii - 1)^2."""

    def penalties(self, z: Tensor, mu: Tensor, logvar: Tensor) -> dict[str, Tensor]:
        off, on = dip_penalties(mu, logvar if self.config.kind == "II" else None)
        kl = kl_to_prior(mu, logvar).sum(1).mean()
        return {"kl": kl, "covariance": self.config.off_diagonal * off + self.config.diagonal * on}


HeadConfig = Annotated[
    BetaVAEConfig | AnnealedVAEConfig | BetaTCVAEConfig | FactorVAEConfig | DIPVAEConfig, Field(discriminator="name")
]
