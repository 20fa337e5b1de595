"""Terms of variational autoencoders against exact values on small data."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from mmctr.losses.variational import (
    aggregate_log_densities,
    dip_penalties,
    discriminator_loss,
    gaussian_nll,
    kl_parts,
    kl_to_prior,
    log_normal,
    permuted_dimensions,
    product_of_experts,
    stratified_log_weights,
)

N, B, Z = 2000, 64, 10


def posteriors(seed: int, count: int = N, dim: int = Z) -> tuple[Tensor, Tensor]:
    """mu and logvar of items whose first two dimensions go together."""
    generator = torch.Generator().manual_seed(seed)
    mu = torch.randn(count, dim, generator=generator)
    if dim > 1:
        mu[:, 1] = 0.8 * mu[:, 0] + 0.6 * mu[:, 1]
    return mu, torch.log(torch.rand(count, dim, generator=generator) * 0.4 + 0.2)


def exact(z: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """log q(z) and log q(z_d), q being the mean of the posteriors of all items: double precision, one row at a time."""
    joint, each = [], []
    for row in z.double():
        log_q = Normal(mu.double(), (0.5 * logvar.double()).exp()).log_prob(row)
        joint.append(torch.logsumexp(log_q.sum(1), 0) - math.log(len(mu)))
        each.append(torch.logsumexp(log_q, 0) - math.log(len(mu)))
    return torch.stack(joint), torch.stack(each)


def test_densities_and_divergences_are_those_of_torch():
    mu, logvar = posteriors(0, 7, 3)
    z = torch.randn(7, 3)
    normal = Normal(mu, (0.5 * logvar).exp())
    torch.testing.assert_close(log_normal(z, mu, logvar), normal.log_prob(z))
    torch.testing.assert_close(kl_to_prior(mu, logvar), kl_divergence(normal, Normal(0.0, 1.0)))
    sigma = torch.tensor(0.3)
    torch.testing.assert_close(gaussian_nll(z, mu, sigma.log()), -Normal(mu, sigma).log_prob(z).sum(1))


def test_a_learned_sigma_ends_at_the_root_mean_squared_error():
    x, mean = torch.randn(50, 8), torch.randn(50, 8)
    log_sigma = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([log_sigma], max_iter=50)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = gaussian_nll(x, mean, log_sigma).mean()
        value.backward()
        return value

    optimizer.step(loss)
    torch.testing.assert_close(log_sigma.detach().exp(), (x - mean).square().mean().sqrt(), rtol=1e-3, atol=0)


def test_the_product_of_experts_is_the_product_of_their_densities():
    mu, logvar = (torch.stack(values) for values in zip(posteriors(1, 4, 2), posteriors(2, 4, 2), strict=True))
    has = torch.tensor([[True, True, False, False], [True, False, True, False]])
    got_mu, got_logvar = product_of_experts(mu, logvar, has)
    grid = torch.linspace(-9, 9, 20_001)
    for row in range(4):
        for dim in range(2):
            density = Normal(0.0, 1.0).log_prob(grid)
            for expert in range(2):
                if has[expert, row]:
                    density = density + log_normal(grid, mu[expert, row, dim], logvar[expert, row, dim])
            weight = torch.softmax(density, 0)
            mean = (weight * grid).sum()
            torch.testing.assert_close(got_mu[row, dim], mean, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(
                got_logvar[row, dim].exp(), (weight * (grid - mean).square()).sum(), rtol=1e-3, atol=1e-4
            )
    assert not got_mu[3].any() and not got_logvar[3].any()  # nothing there: the prior


@pytest.mark.parametrize(("columns", "items"), [(2, 2), (4, 100), (64, 64), (64, 2000)])
def test_stratified_weights(columns, items):
    own = torch.arange(columns)
    weights = stratified_log_weights(own, columns, items).exp()
    others = columns - 1
    for row in range(columns):
        expected = torch.full((columns,), 1 / others)
        expected[(row + 1) % columns] = (items - others) / (items * others)
        expected[row] = 1 / items
        torch.testing.assert_close(weights[row], expected)
    torch.testing.assert_close(weights.sum(1), torch.ones(columns))


def test_the_weights_give_the_density_without_bias():
    """The mean over many batches of what is inside the logarithm is q(z_i): in the paper's lemma z_i is fixed."""
    mu, logvar = posteriors(3, 30, 1)
    z = mu + (0.5 * logvar).exp() * torch.randn(30, 1, generator=torch.Generator().manual_seed(4))
    truth = exact(z, mu, logvar)[0].exp()
    generator, total, rounds = torch.Generator().manual_seed(5), torch.zeros(30, dtype=torch.float64), 4000
    for _ in range(rounds):
        for item in range(3):
            others = torch.randperm(29, generator=generator)[:7]
            batch = torch.cat([torch.tensor([item]), others + (others >= item)])
            total[item] += aggregate_log_densities(z[batch], mu[batch], logvar[batch], 30)[0][0].exp()
    torch.testing.assert_close(total[:3] / rounds, truth[:3], rtol=0.03, atol=0)


def test_total_correlation_is_within_a_nat_of_the_exact_one():
    mu, logvar = posteriors(6)
    generator = torch.Generator().manual_seed(7)
    z = mu + (0.5 * logvar).exp() * torch.randn(N, Z, generator=generator)
    joint, each = exact(z, mu, logvar)
    truth = {"log_qz": joint.mean(), "tc": (joint - each.sum(1)).mean()}
    found = {"log_qz": 0.0, "tc": 0.0}
    order = torch.randperm(N, generator=generator)
    batches = order[: N // B * B].view(-1, B)
    for batch in batches:
        log_qz, log_each = aggregate_log_densities(z[batch], mu[batch], logvar[batch], N)
        found["log_qz"] += float(log_qz.mean()) / len(batches)
        found["tc"] += float((log_qz - log_each.sum(1)).mean()) / len(batches)
    assert abs(found["log_qz"] - truth["log_qz"]) < 1 and abs(found["tc"] - truth["tc"]) < 1
    assert truth["tc"] > 0.2  # there is something to find


def test_the_parts_add_up_to_the_kl():
    mu, logvar = posteriors(8, B)
    z = mu + (0.5 * logvar).exp() * torch.randn(B, Z)
    parts = kl_parts(z, mu, logvar, N)
    whole = (log_normal(z, mu, logvar) - log_normal(z, torch.zeros(B, Z), torch.zeros(B, Z))).sum(1).mean()
    torch.testing.assert_close(parts.mutual_information + parts.total_correlation + parts.dimension_wise_kl, whole)


def test_batches_that_have_no_total_correlation():
    mu, logvar = posteriors(9, 5)
    for rows, items in ((1, 10), (5, 4)):
        with pytest.raises(ValueError, match=f"a batch of {rows} items of {items}"):
            kl_parts(mu[:rows], mu[:rows], logvar[:rows], items)


def test_dip_penalties_are_those_of_the_covariance():
    mu, logvar = posteriors(10, 40, 3)
    covariance = torch.cov(mu.T, correction=0)
    for values, matrix in ((None, covariance), (logvar, covariance + torch.diag(logvar.exp().mean(0)))):
        off, on = dip_penalties(mu, values)
        expected_off = sum(matrix[i, j] ** 2 for i in range(3) for j in range(3) if i != j)
        expected_on = sum((matrix[i, i] - 1) ** 2 for i in range(3))
        torch.testing.assert_close(off, expected_off)
        torch.testing.assert_close(on, expected_on)


def test_permuting_keeps_each_dimension_and_breaks_their_ties():
    torch.manual_seed(0)
    z = torch.randn(5000, 1).expand(-1, 3) + torch.tensor([0.0, 10.0, 20.0])
    permuted = permuted_dimensions(z)
    torch.testing.assert_close(permuted.sort(0).values, z.sort(0).values)
    assert torch.corrcoef(permuted.T).triu(1).abs().max() < 0.06


def test_a_discriminator_finds_the_total_correlation():
    """The logits of the best discriminator differ by log q(z) - log prod q(z_d): of a normal with correlation r their
    mean is -log(1 - r^2) / 2."""
    torch.manual_seed(0)
    r = 0.8
    first = torch.randn(20_000)
    z = torch.stack([first, r * first + math.sqrt(1 - r**2) * torch.randn(20_000)], 1)
    squares = torch.stack([z[:, 0] ** 2, z[:, 1] ** 2, z[:, 0] * z[:, 1]], 1)
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    for _ in range(150):
        permuted = permuted_dimensions(z)
        features = torch.stack([permuted[:, 0] ** 2, permuted[:, 1] ** 2, permuted[:, 0] * permuted[:, 1]], 1)
        optimizer.zero_grad()
        discriminator_loss(net(squares), net(features)).backward()
        optimizer.step()
    logits = net(squares)
    torch.testing.assert_close(
        (logits[:, 0] - logits[:, 1]).mean(), torch.tensor(-0.5 * math.log(1 - r**2)), rtol=0.08, atol=0
    )
