from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.nn.functional import normalize

from mmctr.encoders.heads import HeadConfig
from mmctr.encoders.variational_head import Standardise, VariationalHead
from mmctr.losses.variational import dip_penalties, gaussian_nll, kl_parts, kl_to_prior

HEADS = {
    "beta_vae": {"beta": 3.0},
    "annealed_vae": {"gamma": 7.0, "capacity": 5.0, "capacity_steps": 4},
    "beta_tcvae": {"alpha": 0.5, "beta": 4.0, "gamma": 2.0},
    "factor_vae": {"gamma": 5.0, "discriminator": [8]},
    "dip_vae": {"kind": "I", "off_diagonal": 2.0, "diagonal": 3.0},
}
IMAGE, TEXT, B, N = 6, 4, 12, 40


def build(name: str, **values) -> VariationalHead:
    torch.manual_seed(0)
    given = {"name": name, "dim": 3, "hidden": [8], **HEADS[name], **values}
    head = TypeAdapter(HeadConfig).validate_python(given).build(IMAGE, TEXT)
    head.num_items = N
    return head


def batch(seed: int = 1) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Features of items; the first two lack a picture, the third a text."""
    torch.manual_seed(seed)
    features = {"image": normalize(torch.randn(B, IMAGE), dim=1), "text": normalize(torch.randn(B, TEXT), dim=1)}
    has = {"image": torch.arange(B) >= 2, "text": torch.arange(B) != 2}
    return features, has


@pytest.mark.parametrize("name", HEADS)
def test_terms_are_those_of_the_paper(name, monkeypatch):
    head, (features, has) = build(name, weight=0.5).eval(), batch()
    noise = torch.randn(B, 3)
    monkeypatch.setattr(torch, "randn_like", lambda x: noise)
    head.after_step()
    for n in features:
        head.standard[n].update(features[n], has[n])
    terms = head(features, has)

    mu, logvar = head.posterior(features, has)
    z = mu + noise * (0.5 * logvar).exp()
    rebuilt, scale = head.decode(z), 0.5 / (IMAGE + TEXT)
    nll = sum(
        gaussian_nll(head.standard[n](features[n][row : row + 1]), rebuilt[n][row : row + 1], head.log_sigma[n]).sum()
        for n in ("image", "text")
        for row in range(B)
        if has[n][row]
    )
    torch.testing.assert_close(terms["rebuild"], scale * nll / B)
    kl = kl_to_prior(mu, logvar).sum() / B
    if name == "beta_vae":
        torch.testing.assert_close(terms["kl"], scale * 3 * kl)
    elif name == "annealed_vae":  # one step of four
        torch.testing.assert_close(terms["kl"], scale * 7 * (kl - 5 / 4).abs())
    elif name == "beta_tcvae":
        parts = kl_parts(z, mu, logvar, N)
        torch.testing.assert_close(terms["mutual_information"], scale * 0.5 * parts.mutual_information)
        torch.testing.assert_close(terms["total_correlation"], scale * 4 * parts.total_correlation)
        torch.testing.assert_close(terms["dimension_wise_kl"], scale * 2 * parts.dimension_wise_kl)
    elif name == "factor_vae":
        logits = head.discriminator(z)
        torch.testing.assert_close(terms["kl"], scale * kl)
        torch.testing.assert_close(terms["total_correlation"], scale * 5 * (logits[:, 0] - logits[:, 1]).mean())
    else:
        off, on = dip_penalties(mu, None)
        torch.testing.assert_close(terms["covariance"], scale * (2 * off + 3 * on))


@pytest.mark.parametrize("train_features", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_gradients_reach_what_they_should(name, train_features):
    head, (features, has) = build(name, train_features=train_features), batch()
    for values in features.values():
        values.requires_grad_()
    sum(head(features, has).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    assert all((values.grad is not None) == train_features for values in features.values())
    if train_features:  # an item's missing modality says nothing, whatever its features
        assert not features["image"].grad[:2].any() and features["image"].grad[3].any()


def test_the_discriminator_and_the_head_train_on_their_own_losses():
    head, (features, has) = build("factor_vae"), batch()
    terms = head(features, has)
    judge, rest = list(head.discriminator.parameters()), list(head.inference.parameters())
    assert torch.autograd.grad(terms["total_correlation"], judge, retain_graph=True, allow_unused=True) == (None,) * 4
    assert all(
        g is None for g in torch.autograd.grad(terms["discriminator"], rest, allow_unused=True, retain_graph=True)
    )
    assert all(g.any() for g in torch.autograd.grad(terms["discriminator"], judge))


def test_a_missing_modality_changes_nothing_else():
    head, (features, has) = build("beta_vae").eval(), batch()
    mu, logvar = head.posterior(features, has)
    other = {"image": features["image"].clone(), "text": features["text"]}
    other["image"][:2] = 9.0
    assert torch.equal(head.posterior(other, has)[0], mu)
    only_text = {"text": features["text"][:2]}, {"text": has["text"][:2]}
    torch.testing.assert_close(head.posterior(*only_text)[0], mu[:2])
    assert (logvar[3:] < 0).all()  # a product of experts is narrower than the prior


def test_modality_dropout_is_of_training_items_that_have_both():
    head, (_, has) = build("beta_vae", modality_dropout=0.9), batch()
    big = {name: mask.repeat(500) for name, mask in has.items()}
    shown = head._modalities_to_read(big)
    both = big["image"] & big["text"]
    assert torch.equal(shown["image"][~both], big["image"][~both])
    assert (shown["image"] | shown["text"]).all()  # never both
    dropped = {name: float((both & ~mask).sum() / both.sum()) for name, mask in shown.items()}
    assert dropped == pytest.approx({"image": 0.45, "text": 0.45}, abs=0.02)
    assert head.eval()._modalities_to_read(big) is big


def factors(count: int, seed: int = 0) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Three independent factors, and features that are linear in them, each factor as strong as no other one."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(count, 3, generator=generator)
    basis = torch.linalg.qr(torch.randn(10, 3, generator=generator))[0]
    mixed = (truth * torch.tensor([0.5, 0.3, 0.2])) @ basis.T + 0.02 * torch.randn(count, 10, generator=generator)
    mixed += torch.ones(10)  # unit norm then costs little of them
    features = {"image": normalize(mixed[:, :IMAGE], dim=1), "text": normalize(mixed[:, IMAGE:], dim=1)}
    return truth, features, {name: torch.ones(count, dtype=torch.bool) for name in features}


def train(head: VariationalHead, features: dict[str, Tensor], has: dict[str, Tensor], steps: int = 250) -> None:
    optimizer = torch.optim.Adam(head.parameters(), lr=5e-3)
    head.num_items, size = len(features["image"]), 128
    for step in range(steps):
        rows = torch.randperm(len(features["image"]), generator=torch.Generator().manual_seed(step))[:size]
        terms = head({n: x[rows] for n, x in features.items()}, {n: x[rows] for n, x in has.items()})
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        head.after_step()


@pytest.mark.parametrize("name", HEADS)
def test_heads_find_what_features_are_made_of(name):
    values = {"annealed_vae": {"capacity": 6.0, "capacity_steps": 200, "gamma": 20.0}, "beta_vae": {"beta": 1.0}}
    values |= {"dip_vae": {"off_diagonal": 5.0, "diagonal": 5.0}, "factor_vae": {"gamma": 2.0}}
    head = build(name, dim=4, hidden=[32], **values.get(name, {}))
    truth, features, has = factors(2500, seed=2)
    held_out = {n: x[2000:] for n, x in features.items()}, {n: x[2000:] for n, x in has.items()}
    before = head.numbers(*held_out)
    train(head, {n: x[:2000] for n, x in features.items()}, {n: x[:2000] for n, x in has.items()})
    numbers = head.eval().numbers(*held_out)
    assert numbers["explained_image"] > 0.85 and numbers["explained_text"] > 0.8
    assert numbers["elbo"] > before["elbo"] and numbers["active"] >= 2 and numbers["kl"] > 2
    mu, _ = head.posterior(*held_out)
    found = torch.corrcoef(torch.cat([mu.T, truth[2000:].T]))[:4, 4:].abs()
    if name == "beta_tcvae":  # each factor has a dimension of its own; normal ones may be rotated by the others
        assert (found.max(0).values > 0.9).all() and len(set(found.argmax(0).tolist())) == 3


def test_a_head_that_collapsed_says_so():
    head = build("beta_vae", beta=500.0)
    _, features, has = factors(2000)
    train(head, features, has, steps=200)
    numbers = head.eval().numbers(features, has)
    assert numbers["active"] == 0 and numbers["kl"] < 0.1 and abs(numbers["explained_image"]) < 0.1


def test_statistics_of_features_are_those_of_all_items():
    standard = Standardise(IMAGE)
    torch.manual_seed(0)
    x, has = torch.randn(600, IMAGE) * 0.1 + torch.arange(IMAGE), torch.rand(600) < 0.7
    for rows in torch.arange(600).view(6, 100):
        standard.update(torch.where(has[rows, None], x[rows], torch.nan), has[rows])
        standard.update(x[rows], torch.zeros(100, dtype=torch.bool))  # nothing there: nothing learned
    torch.testing.assert_close(standard.mean, x[has].mean(0), rtol=1e-2, atol=2e-2)
    torch.testing.assert_close(standard.variance, x[has].var(0, correction=0).mean(), rtol=0.03, atol=0)
    values = standard(x[has])
    assert values.mean(0).abs().max() < 0.2 and values.var() == pytest.approx(1, abs=0.05)
    for _ in range(400):  # features that drift are followed
        standard.update(x[:100] + 5, torch.ones(100, dtype=torch.bool))
    torch.testing.assert_close(standard.mean, x[:100].mean(0) + 5, rtol=0, atol=0.1)


def test_a_given_sigma_is_kept():
    head = build("beta_vae", sigma=0.1)
    assert head.log_sigma["image"].exp().item() == pytest.approx(0.1)
    assert not head.log_sigma["image"].requires_grad and build("beta_vae").log_sigma["image"].requires_grad
