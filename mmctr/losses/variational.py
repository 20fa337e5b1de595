"""Terms of variational autoencoders, in nats, exact over many processes.

B rows of a process (the same in all), Z latent dimensions. What is a mean over a batch is that over the rows of all
processes; the gradient is that of one process holding them all, once data-parallel training has averaged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmctr.distributed import gather_rows, own_columns

LOG_2PI = math.log(2 * math.pi)


def log_normal(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log N(z; mu, exp(logvar)) of each element, of any shapes that broadcast."""
    return -0.5 * (LOG_2PI + logvar + (z - mu).square() * torch.exp(-logvar))


def kl_to_prior(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)) of each element."""
    return 0.5 * (mu.square() + logvar.exp() - logvar - 1)


def gaussian_nll(x: Tensor, mean: Tensor, log_sigma: Tensor) -> Tensor:
    """-log N(x; mean, sigma^2 I), summed over features: (B, D) -> (B,).

    With a learned sigma (sigma-VAE: Rybkin et al. 2021) it tends to D log of the root mean squared error, so the weight
    of the KL beside it means the same whatever the size and number of features: unit-norm features of D dimensions
    have squared errors of at most 4 in all, beside which a KL of a few nats would win at once.
    """
    return -log_normal(x, mean, 2 * log_sigma).sum(1)


def product_of_experts(mu: Tensor, logvar: Tensor, has: Tensor) -> tuple[Tensor, Tensor]:
    """The posterior of rows that have some of M modalities (Wu & Goodman 2018): the product of the prior N(0, 1) and
    the Gaussian experts of those there are.

    Args:
        mu, logvar: (M, B, Z).
        has: (M, B) bool.

    Returns:
        mu and logvar, (B, Z); of a row that has none, the prior's.
    """
    precision = torch.where(has[..., None], torch.exp(-logvar), 0.0)
    total = 1 + precision.sum(0)
    return (precision * torch.where(has[..., None], mu, 0.0)).sum(0) / total, -total.log()


@dataclass(frozen=True)
class KLParts:
    """The mean KL to the prior in three (Chen et al. 2018, equation 2): estimates from one batch, scalars."""

    mutual_information: Tensor
    """between items and latents"""
    total_correlation: Tensor
    """between latent dimensions"""
    dimension_wise_kl: Tensor
    """of each dimension's aggregate to the prior, summed"""


def kl_parts(z: Tensor, mu: Tensor, logvar: Tensor, num_items: int) -> KLParts:
    """The parts of the mean KL, by minibatch stratified sampling (Chen et al. 2018, appendix C). They add up to the
    batch's mean of log q(z|x) - log p(z).

    Args:
        z: (B, Z) one sample of each posterior.
        num_items: N, of which the batch is a part.
    """
    log_qz, log_qz_each = aggregate_log_densities(z, mu, logvar, num_items)
    log_q_given = log_normal(z, mu, logvar).sum(1)
    log_p = log_normal(z, torch.zeros_like(z), torch.zeros_like(z)).sum(1)
    product = log_qz_each.sum(1)
    return KLParts((log_q_given - log_qz).mean(), (log_qz - product).mean(), (product - log_p).mean())


def aggregate_log_densities(z: Tensor, mu: Tensor, logvar: Tensor, num_items: int) -> tuple[Tensor, Tensor]:
    """Estimates of log q(z) (B,) and of log q(z_d) (B, Z), q being the mean posterior of all N items."""
    own = own_columns(len(z), z.device)
    all_mu, all_logvar = gather_rows(mu), gather_rows(logvar)
    log_weights = stratified_log_weights(own, len(all_mu), num_items)
    log_q = log_normal(z[:, None], all_mu[None], all_logvar[None])  # (B, C, Z)
    joint = torch.logsumexp(log_weights + log_q.sum(2), dim=1)
    return joint, torch.logsumexp(log_weights[..., None] + log_q, dim=1)


def stratified_log_weights(own: Tensor, num_columns: int, num_items: int) -> Tensor:
    """(B, C) logarithms of the weights of C = M + 1 items in the estimate of q(z_i) for the item in column own[i].

    With M = C - 1: 1 / N for the item itself, (N - M) / (N M) for one other, here the next, and 1 / M for the rest, so
    that a row sums to 1. (Published code that strides through a matrix of M columns puts 1 / N elsewhere.)

    Raises ValueError for a batch of less than 2 items or of more than there are.
    """
    others = num_columns - 1
    if not 1 <= others < num_items:
        raise ValueError(f"a batch of {num_columns} items of {num_items}: the total correlation needs 2 to {num_items}")
    weights = torch.full((len(own), num_columns), 1 / others, dtype=torch.float64, device=own.device)
    rows = torch.arange(len(own), device=own.device)
    weights[rows, (own + 1) % num_columns] = (num_items - others) / (num_items * others)
    weights[rows, own] = 1 / num_items
    return weights.log().float()


def dip_penalties(mu: Tensor, logvar: Tensor | None) -> tuple[Tensor, Tensor]:
    """DIP-VAE (Kumar et al. 2018): sums of the squares of what is off the diagonal of a covariance, and of what its
    diagonal differs from 1. It is that of mu (I), or with `logvar` that of z, mean variances added (II)."""
    means = gather_rows(mu)
    centred = means - means.mean(0)
    covariance = centred.T @ centred / len(means)
    if logvar is not None:
        covariance = covariance + torch.diag(gather_rows(logvar).exp().mean(0))
    diagonal = covariance.diagonal()
    return covariance.square().sum() - diagonal.square().sum(), (diagonal - 1).square().sum()


def permuted_dimensions(z: Tensor) -> Tensor:
    """(B, Z) with each column in an order of its own: samples of the product of the marginals (Kim & Mnih 2018)."""
    order = torch.rand_like(z).argsort(0)
    return z.gather(0, order)


def discriminator_loss(logits: Tensor, permuted_logits: Tensor) -> Tensor:
    """The cross-entropy of telling samples of q(z), class 0, from permuted ones, class 1: (B, 2) each."""
    zeros = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    ones = torch.ones(len(permuted_logits), dtype=torch.int64, device=logits.device)
    return 0.5 * (F.cross_entropy(logits, zeros) + F.cross_entropy(permuted_logits, ones))


ACTIVE_VARIANCE = 0.01
"""a latent dimension whose mean varies less over items says nothing (Burda et al. 2016)"""
