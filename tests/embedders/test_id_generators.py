"""Generators of ID vectors against their papers' formulas written plainly."""

from __future__ import annotations

import math

import pytest
import torch

from mmctr.embedders.feature_embedder import FeatureEmbedder
from mmctr.embedders.id_generators import (
    CVAR,
    MWUF,
    CVARConfig,
    ItemDescription,
    MetaEmbedding,
    MetaEmbeddingConfig,
    MWUFConfig,
    NoColdIds,
    make_generator,
    wasserstein2,
)
from mmctr.embedders.item_embedder import ItemEmbedderConfig
from mmctr.features.columns import Vocabulary
from mmctr.tasks import RankingTaskConfig

D, W, X = 4, 3, 6


def filled(config):
    """A generator with weights and means that are not those it begins with."""
    torch.manual_seed(0)
    generator = make_generator(config, D, W, X, 0)
    assert generator is not None
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.normal_()
    generator.learn_from(torch.randn(5, D), torch.randn(5, W), torch.tensor([2, 9, 4, 4, 1]))
    return generator


def test_meta_embedding_is_a_network_of_the_description():
    generator, x = filled(MetaEmbeddingConfig(hidden=[7])), torch.randn(3, X)
    assert isinstance(generator, MetaEmbedding)
    first, _, last = generator.network
    expected = generator.mean + torch.relu(x @ first.weight.T + first.bias) @ last.weight.T + last.bias
    torch.testing.assert_close(generator.cold(x), expected)
    torch.testing.assert_close(generator.start(x), expected)
    ids = torch.randn(3, D)
    assert generator.warm(ids, x, torch.randn(3, W), torch.ones(3, dtype=torch.bool)) is ids


def test_mwuf_scales_and_shifts():
    generator, x, ids, users = filled(MWUFConfig(hidden=[])), torch.randn(3, X), torch.randn(3, D), torch.randn(3, W)
    assert isinstance(generator, MWUF)
    (scale,), (shift,) = generator.scale, generator.shift

    def warmed(v, x, u):
        return v * (1 + scale.weight @ x + scale.bias) + shift.weight @ u + shift.bias

    found = generator.warm(ids, x, users, torch.tensor([True, True, False]))
    met = [users[0], users[1], generator.nobody]
    expected = [warmed(*row) for row in zip(ids, x, met, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected))
    torch.testing.assert_close(generator.cold(x)[1], warmed(generator.mean, x[1], generator.nobody))
    torch.testing.assert_close(generator.start(x), generator.mean.expand(3, -1))


def test_cvar_decodes_the_described_latent_at_the_mean_frequency():
    generator, x = filled(CVARConfig(latent=2)), torch.randn(3, X)
    assert isinstance(generator, CVAR)
    frequency = torch.log1p(torch.tensor([2.0, 9, 4, 4, 1])) / torch.log1p(torch.tensor(9.0))
    torch.testing.assert_close(generator.relative(torch.tensor([2, 9, 4, 4, 1])), frequency)
    (told,), (decoder,) = generator.of_description, generator.decoder
    mu = (x @ told.weight.T + told.bias)[:, :2]
    given = torch.cat([mu, frequency.mean().expand(3, 1)], dim=1)
    torch.testing.assert_close(generator.cold(x), generator.mean + given @ decoder.weight.T + decoder.bias)
    drawn = generator.draw((torch.zeros(20_000, 2), torch.full((20_000, 2), 2.0)))
    assert float(drawn.std()) == pytest.approx(1e-4 * math.e, rel=0.02)


def test_wasserstein_distance_of_gaussians():
    one, other = ((torch.randn(3, 2), torch.randn(3, 2)) for _ in range(2))
    for i, found in enumerate(wasserstein2(one, other)):
        expected = 0.0
        for m, a, n, b in zip(one[0][i], one[1][i], other[0][i], other[1][i], strict=True):
            expected += (m - n) ** 2 + (a.exp().sqrt() - b.exp().sqrt()) ** 2
        torch.testing.assert_close(found, expected)
    assert wasserstein2(one, one).tolist() == [0, 0, 0]


def test_a_description_without_content_reads_the_learned_vector():
    describe = ItemDescription(2, 3)
    with torch.no_grad():
        describe.absent.copy_(torch.tensor([1.0, 2.0, 4.0]))  # type: ignore[union-attr]
    features, content = torch.tensor([[1.0, 3.0], [0.0, 5.0]]), torch.full((2, 3), torch.nan)
    content[0] = torch.tensor([3.0, 3.0, 9.0])
    found = describe(features, content, torch.tensor([True, False]))
    normed = torch.nn.functional.layer_norm
    torch.testing.assert_close(found[:, :2], normed(features, (2,)))
    torch.testing.assert_close(found[:, 2:], normed(torch.tensor([[3.0, 3, 9], [1, 2, 4]]), (3,)))


def test_a_description_keeps_how_large_a_number_is():
    """A layer norm over a number and the mark of a missing one would leave its sign."""
    values = {"price": {"name": "numeric"}, "brand": {"name": "categorical", "dim": 3}, "age": {"name": "numeric"}}
    config = RankingTaskConfig.parse({"features": {"item": values}}).features.item
    brands = Vocabulary(values=["a", "b"])
    features = FeatureEmbedder(config, {"price": Vocabulary([]), "brand": brands, "age": Vocabulary([])}, 0.5)
    describe = ItemDescription(features.dim, 0, features.embedded)
    price, age = torch.tensor([[0.5, 0.0], [1.0, 0.0], [3.0, 0.0]]), torch.tensor([[0.0, 1.0], [2.0, 0.0], [-2.0, 0.0]])
    brand = torch.tensor([1, 2, 0])
    found = describe(features({"price": price, "brand": brand, "age": age}, brand), None, None)
    normed = torch.nn.functional.layer_norm(features.tables["brand"].weight[brand], (3,))
    torch.testing.assert_close(found, torch.cat([price, age, normed], dim=1))
    alone = ItemDescription(2, 0, [False, False])
    assert alone(price, None, None).equal(price) and alone.dim == 2


def test_what_cannot_generate_is_refused():
    assert make_generator(NoColdIds(), 0, 0, 0, 0) is None
    for sizes, message in (
        ((0, W, X, 0), "mwuf makes ID vectors, but id_dim is 0"),
        ((D, W, 0, 0), "mwuf reads side features or content of an item, and there are none"),
        ((D, 0, X, 0), "mwuf reads user vectors, but user_dim is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make_generator(MWUFConfig(), *sizes)
    with pytest.raises(ValueError, match="gate reads no ID of a cold item"):
        ItemEmbedderConfig.parse({"fusion": "gate", "cold_ids": {"name": "cvar"}})
    with pytest.raises(ValueError, match="cold_ids makes ID vectors, and lr has weights"):
        RankingTaskConfig.parse({"embedder": {"cold_ids": {"name": "cvar"}}, "ranker": {"name": "lr"}})
