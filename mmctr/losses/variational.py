"""Loss terms of variational autoencoders, in nats, exact for any number of processes.

Terms are computed in float32, also within autocast.

B is the number of rows of a process, equal in all processes, and Z the number of latent dimensions. A mean over a batch
is a mean over the rows of all processes. After data-parallel training has averaged gradients over processes, the
gradient equals the gradient of one process with the whole batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmctr.distributed import gather_rows, own_columns
from mmctr.layers.precision import in_float32

LOG_2PI = math.log(2 * math.pi)


@in_float32
def log_normal(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """The elementwise log density log N(z; mu, exp(logvar)) for tensors whose shapes broadcast."""
    return -0.5 * (LOG_2PI + logvar + (z - mu).square() * torch.exp(-logvar))


@in_float32
def kl_to_prior(mu: Tensor, logvar: Tensor) -> Tensor:
    """The elementwise divergence KL(N(mu, exp(logvar)) || N(0, 1)) for tensors of equal shape."""
    return 0.5 * (mu.square() + logvar.exp() - logvar - 1)


@in_float32
def gaussian_nll(x: Tensor, mean: Tensor, log_sigma: Tensor) -> Tensor:
    """The negative log likelihood -log N(x; mean, sigma^2 I), summed over features.

    With a learned sigma (sigma-VAE: Rybkin et al. 2021) the term tends to D times the log of the root mean squared
    error, so that the weight of the KL term has the same meaning for features of any scale and number. With a constant
    sigma of 1, unit-norm features have a squared error of at most 4, and a KL term of a few nats would dominate.

    Args:
        x: (B, D) features.
        mean: (B, D) reconstructed features.
        log_sigma: logarithm of sigma, a scalar.

    Returns:
        (B,) nats.
    """
    return -log_normal(x, mean, 2 * log_sigma).sum(1)


@in_float32
def product_of_experts(mu: Tensor, logvar: Tensor, has: Tensor) -> tuple[Tensor, Tensor]:
    """The posterior of rows with some of M modalities (Wu & Goodman 2018): the product of the prior N(0, 1) and the
    Gaussian experts of the modalities that a row has.

    Args:
        mu: (M, B, Z) means of the experts.
        logvar: (M, B, Z) log variances of the experts.
        has: (M, B) bool: whether a row has a modality.

    Returns:
        The (B, Z) means and (B, Z) log variances; the prior for a row without modalities.
    """
    precision = torch.where(has[..., None], torch.exp(-logvar), 0.0)
    total = 1 + precision.sum(0)
    return (precision * torch.where(has[..., None], mu, 0.0)).sum(0) / total, -total.log()


@dataclass(frozen=True)
class KLParts:
    """The three parts of the mean KL to the prior (Chen et al. 2018, equation 2): scalar estimates from one batch."""

    mutual_information: Tensor
    """mutual information of items and latents"""
    total_correlation: Tensor
    """total correlation of the latent dimensions"""
    dimension_wise_kl: Tensor
    """KL of the aggregate posterior of each dimension to the prior, summed over dimensions"""


@in_float32
def kl_parts(z: Tensor, mu: Tensor, logvar: Tensor, num_items: int) -> KLParts:
    """Estimate the parts of the mean KL by minibatch stratified sampling (Chen et al. 2018, appendix C). The sum of the
    parts is the mean of log q(z|x) - log p(z) over the batch.

    Args:
        z: (B, Z) one sample of the posterior of every row.
        mu: (B, Z) means of the posteriors.
        logvar: (B, Z) log variances of the posteriors.
        num_items: N, number of training items.

    Raises:
        ValueError: the batch has less than 2 or more than N items.
    """
    log_qz, log_qz_each = aggregate_log_densities(z, mu, logvar, num_items)
    log_q_given = log_normal(z, mu, logvar).sum(1)
    log_p = log_normal(z, torch.zeros_like(z), torch.zeros_like(z)).sum(1)
    product = log_qz_each.sum(1)
    return KLParts((log_q_given - log_qz).mean(), (log_qz - product).mean(), (product - log_p).mean())


@in_float32
def aggregate_log_densities(z: Tensor, mu: Tensor, logvar: Tensor, num_items: int) -> tuple[Tensor, Tensor]:
    """Estimate the log density of the aggregate posterior q, the mean posterior of all N items.

    Args:
        z: (B, Z) one sample of the posterior of every row.
        mu: (B, Z) means of the posteriors.
        logvar: (B, Z) log variances of the posteriors.
        num_items: N, number of training items.

    Returns:
        (B,) estimates of log q(z) and (B, Z) estimates of log q(z_d).

    Raises:
        ValueError: the batch has less than 2 or more than N items.
    """
    own = own_columns(len(z), z.device)
    all_mu, all_logvar = gather_rows(mu), gather_rows(logvar)
    log_weights = stratified_log_weights(own, len(all_mu), num_items)
    log_q = log_normal(z[:, None], all_mu[None], all_logvar[None])  # (B, C, Z)
    joint = torch.logsumexp(log_weights + log_q.sum(2), dim=1)
    return joint, torch.logsumexp(log_weights[..., None] + log_q, dim=1)


def stratified_log_weights(own: Tensor, num_columns: int, num_items: int) -> Tensor:
    """Logarithms of the weights of C items in the estimate of q(z_i) (Chen et al. 2018, appendix C).

    With M = C - 1 the weights are 1 / N for the item itself, (N - M) / (N M) for one other item, here the next one, and
    1 / M for the remaining items, so that a row sums to 1. (Published code that strides through a matrix of M columns
    gives the weight 1 / N to other items.)

    Args:
        own: (B,) column of the item of every row.
        num_columns: C, number of items in the batches of all processes.
        num_items: N, number of training items.

    Returns:
        (B, C) float32.

    Raises:
        ValueError: C is less than 2 or more than N.
    """
    others = num_columns - 1
    if not 1 <= others < num_items:
        raise ValueError(f"a batch of {num_columns} items of {num_items}: the total correlation needs 2 to {num_items}")
    weights = torch.full((len(own), num_columns), 1 / others, dtype=torch.float64, device=own.device)
    rows = torch.arange(len(own), device=own.device)
    weights[rows, (own + 1) % num_columns] = (num_items - others) / (num_items * others)
    weights[rows, own] = 1 / num_items
    return weights.log().float()


@in_float32
def dip_penalties(mu: Tensor, logvar: Tensor | None) -> tuple[Tensor, Tensor]:
    """The penalties of DIP-VAE (Kumar et al. 2018) on a covariance matrix: of mu (DIP-VAE-I), or with `logvar` of z,
    where the mean variances are added to the diagonal (DIP-VAE-II).

    Args:
        mu: (B, Z) means of the posteriors.
        logvar: (B, Z) log variances of the posteriors; None: the covariance of mu.

    Returns:
        The sum of the squared off-diagonal entries, and the sum of the squared differences of the diagonal from 1.
    """
    means = gather_rows(mu)
    centred = means - means.mean(0)
    covariance = centred.T @ centred / len(means)
    if logvar is not None:
        covariance = covariance + torch.diag(gather_rows(logvar).exp().mean(0))
    diagonal = covariance.diagonal()
    return covariance.square().sum() - diagonal.square().sum(), (diagonal - 1).square().sum()


def permuted_dimensions(z: Tensor) -> Tensor:
    """Permute every column of z (B, Z) independently: samples of the product of the marginals (Kim & Mnih 2018)."""
    order = torch.rand_like(z).argsort(0)
    return z.gather(0, order)


@in_float32
def discriminator_loss(logits: Tensor, permuted_logits: Tensor) -> Tensor:
    """The cross-entropy of a discriminator between samples of q(z), class 0, and permuted samples, class 1.

    Args:
        logits: (B, 2) logits of samples of q(z).
        permuted_logits: (B, 2) logits of permuted samples.

    Returns:
        The loss, a scalar.
    """
    zeros = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    ones = torch.ones(len(permuted_logits), dtype=torch.int64, device=logits.device)
    return 0.5 * (F.cross_entropy(logits, zeros) + F.cross_entropy(permuted_logits, ones))


ACTIVE_VARIANCE = 0.01
"""variance over items of the posterior mean below which a latent dimension is inactive (Burda et al. 2016)"""
