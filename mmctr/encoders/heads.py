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

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.func import functional_call

from mmctr.config import Width
from mmctr.distributed import gather_rows
from mmctr.encoders.variational_head import BaseHeadConfig, VariationalHead, _mlp
from mmctr.losses.variational import (
    dip_penalties,
    discriminator_loss,
    kl_parts,
    kl_to_prior,
    permuted_dimensions,
)


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
    discriminator: list[Width] = [256, 256]
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
        logits = functional_call(self.discriminator, constant, (z,)).float()
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
