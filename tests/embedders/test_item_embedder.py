from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from mmctr.data.batches import BehaviorBatch, ItemBatch, Jagged
from mmctr.embedders.feature_embedder import FeatureEmbedder
from mmctr.embedders.item_embedder import (
    ContentAdapter,
    ContentEncoder,
    ContentTable,
    ItemEmbedder,
    ItemEmbedderConfig,
)
from mmctr.features.columns import CategoricalFeature, MultiValuedFeature, NumericFeature, Vocabulary

N, K = 6, 5


class Pixels(nn.Module):
    """An encoder whose vector is a linear function of the picture; items without a picture have no content."""

    embedding_dim = K

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(3, K)

    def embed(self, items: ItemBatch):
        return self.layer(items.image.float().mean((2, 3)) / 255), items.has_image


def pictures() -> torch.Tensor:
    return torch.randint(0, 256, (N, 3, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


HAS = torch.tensor([True, True, False, True, True, False])


def items(rows, ids=None, encode=None, carry=True) -> ItemBatch:
    rows = torch.tensor(rows)
    picked = rows if encode is None else rows[encode]
    return ItemBatch(
        row=rows,
        features={"item_id": rows + 1 if ids is None else torch.tensor(ids)},
        image=pictures()[picked] if carry else None,
        has_image=HAS[picked] if carry else None,
        encode=encode,
    )


def table_of(encoder: Pixels) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        vectors, has = encoder.embed(items(list(range(N))))
    return vectors, has


CLICKS = torch.tensor([1000, 0, 3, 8, 20, 55, 400])
"""of the ID rows; the first is of the unknown item, whose number must not be looked at"""


def embedder(content=None, encoder=None, table=None, **config) -> ItemEmbedder:
    torch.manual_seed(0)
    values = {"id_dim": 4} | config
    if content is not None:
        values["content"] = content
    return ItemEmbedder(ItemEmbedderConfig(**values), N + 1, {}, {}, table, encoder, clicks=CLICKS)


def batch_of(batch: ItemBatch, target, history, offsets) -> BehaviorBatch:
    target = torch.tensor(target)
    return BehaviorBatch(
        items=batch,
        target=target,
        history=torch.tensor(history),
        history_offsets=torch.tensor(offsets),
        user=torch.zeros_like(target),
        context={},
        label=torch.zeros(len(target)),
    )


def test_an_unknown_item_starts_at_zero_and_cannot_read_an_id_row():
    """A cold item (ID row 0) keeps its vector whatever happens to the rows of the others."""
    for fusion in ("concat", "sum", "project", "gate"):
        model = embedder(
            ContentTable(path="x", dim=4, hidden=[]), table=(torch.randn(N, K), torch.ones(N) > 0), fusion=fusion
        )
        cold, warm = items([2], ids=[0], carry=False), items([2], carry=False)
        before, other = model(cold), model(warm)
        assert model.ids.weight[0].eq(0).all()
        with torch.no_grad():
            model.ids.weight[1:] += 1
        assert torch.equal(model(cold), before) and not torch.equal(model(warm), other)


def test_dimensions_of_the_fusions():
    table = (torch.randn(N, K), torch.ones(N) > 0)
    content = ContentTable(path="x", dim=3, hidden=[7])
    assert embedder(content, table=table).dim == 7
    assert embedder(content, table=table, fusion="project", fused_dim=9).dim == 9
    assert embedder(content, table=table, fusion="sum", id_dim=3).dim == 3
    assert embedder(content, table=table, id_dim=0).dim == 3
    for model in (embedder(content, table=table), embedder(content, table=table, fusion="project", fused_dim=9)):
        assert model(items([0, 2, 5], carry=False)).shape == (3, model.dim)
    with pytest.raises(ValueError, match=r"'sum' needs parts of one size, here they are \[4, 3\]"):
        embedder(content, table=table, fusion="sum")
    with pytest.raises(ValueError, match="nothing to read"):
        embedder(id_dim=0)


def test_fusions_by_hand():
    content = ContentTable(path="x", dim=4, hidden=[])
    table = (torch.randn(N, K), torch.ones(N) > 0)
    both = embedder(content, table=table), embedder(content, table=table, fusion="sum")
    for model in both:
        batch = items([1, 4], carry=False)
        id_part, content_part = model.ids(batch.features["item_id"]), model.adapter(table[0][[1, 4]], table[1][[1, 4]])
        parts = [id_part, content_part]
        expected = torch.cat(parts, 1) if model.config.fusion == "concat" else id_part + content_part
        torch.testing.assert_close(model(batch), expected)


def test_items_without_content_read_the_absent_vector():
    torch.manual_seed(0)
    adapter = ContentAdapter(K, [8], 3, 0.0)
    vectors, has = torch.randn(4, K), torch.tensor([True, False, True, False])
    out = adapter(vectors, has)
    torch.testing.assert_close(out[1], out[3])
    torch.testing.assert_close(out[1], adapter.layers(adapter.absent))
    assert not torch.allclose(adapter(vectors, ~has)[0], out[0])
    out[has].sum().backward(retain_graph=True)
    assert adapter.absent.grad.eq(0).all()
    (out[1] * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert adapter.absent.grad.abs().sum() > 0
    changed = vectors.clone()
    changed[1] = torch.nan  # what stands there is never read
    assert torch.equal(adapter(changed, has), out)


def test_a_frozen_encoder_equals_its_table():
    encoder = Pixels()
    by_table = embedder(ContentTable(path="x", dim=3, hidden=[7]), table=table_of(encoder))
    frozen = embedder(ContentEncoder(run="x", frozen=True, dim=3, hidden=[7]), encoder=encoder, table=table_of(encoder))
    for training in (True, False):
        for carry in (True, False):
            batch = items([0, 2, 4, 5], carry=carry)
            assert torch.equal(frozen.train(training)(batch), by_table.train(training)(batch))
    assert not any(p.requires_grad for p in frozen.encoder.parameters())
    with pytest.raises(ValueError, match="with frozen: true nothing is encoded"):
        ContentEncoder(run="x", frozen=True, max_encoded=3)


def test_a_live_encoder_equals_its_table_and_gets_a_gradient():
    encoder = Pixels()
    by_table = embedder(ContentTable(path="x", dim=3, hidden=[7]), table=table_of(encoder))
    live = embedder(ContentEncoder(run="x", dim=3, hidden=[7]), encoder=encoder, table=table_of(encoder))
    batch = items([0, 2, 4, 5])
    out = live.train()(batch)
    torch.testing.assert_close(out, by_table(batch))
    (out**2).sum().backward()
    assert encoder.layer.weight.grad.abs().sum() > 0
    torch.testing.assert_close(live.eval()(items([0, 2, 4, 5], carry=False)), out)
    with pytest.raises(ValueError, match="carries no pictures or texts"):
        live.train()(items([0], carry=False))


def test_encoding_some_equals_encoding_all_while_the_table_is_fresh():
    encoder = Pixels()
    model = embedder(ContentEncoder(run="x", dim=3, hidden=[7]), encoder=encoder, table=table_of(encoder)).train()
    rows = [0, 1, 2, 4, 5]
    some = items(rows, encode=torch.tensor([1, 2, 3]))
    torch.testing.assert_close(model(some), model(items(rows)))
    with torch.no_grad():
        encoder.layer.bias += torch.arange(K)  # now the table is stale, for those that are not encoded
    stale, full = model(some), model(items(rows))
    same = [torch.allclose(a, b) for a, b in zip(stale, full, strict=True)]
    assert same == [False, True, True, True, True]  # the last one has no picture
    model.refresh(*table_of(encoder))
    torch.testing.assert_close(model(some), full)


@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_side_features(pooling):
    configs = {
        "brand": CategoricalFeature(dim=3),
        "tags": MultiValuedFeature(dim=2, pooling=pooling),
        "price": NumericFeature(),
    }
    vocabularies = {"brand": Vocabulary(["a", "b"]), "tags": Vocabulary(["x", "y"]), "price": Vocabulary([], 0.0, 1.0)}
    torch.manual_seed(0)
    model = FeatureEmbedder(configs, vocabularies, 0.5)
    price = torch.tensor([[1.5, 0.0], [0.0, 1.0], [2.0, 0.0]])
    features = {
        "brand": torch.tensor([1, 0, 2]),
        "tags": Jagged(torch.tensor([1, 2, 2]), torch.tensor([0, 2, 2, 3])),
        "price": price,
    }
    tags = model.tables["tags"].weight
    expected = torch.cat(
        [
            model.tables["brand"].weight[[1, 0, 2]],
            torch.stack([(tags[1] + tags[2]) / (2 if pooling == "mean" else 1), torch.zeros(2), tags[2]]),
            price,
        ],
        1,
    )
    assert model.dim == 7
    torch.testing.assert_close(model(features, price), expected)
    none = replace(features["tags"], values=torch.tensor([], dtype=torch.int64), offsets=torch.tensor([0, 0, 0, 0]))
    assert model(features | {"tags": none}, price)[:, 3:5].eq(0).all()
    assert FeatureEmbedder({}, {}, 0.5)({}, price).shape == (3, 0)


def gated(**config) -> ItemEmbedder:
    table = (torch.randn(N, K, generator=torch.Generator().manual_seed(3)), HAS)
    model = embedder(ContentTable(path="x", dim=4, hidden=[5]), table=table, fusion="gate", init_std=1.0, **config)
    with torch.no_grad():
        model.gate.slope.copy_(torch.tensor([1.0, 0.5, 2.0, -0.3]))
        model.gate.bias.copy_(torch.tensor([-3.0, 0.0, -1.0, 0.5]))
    return model


def test_the_gate_by_hand():
    """g ID + (1 - g) content with g = (1 + clicks)^slope / ((1 + clicks)^slope + e^-bias), and 0 without clicks."""
    model, rows = gated(), [0, 1, 2, 3, 4, 5]
    content, ids = model.adapter(model.content_table, model.has_content).detach(), model.ids.weight.detach()[1:]
    slope, bias = model.gate.slope.tolist(), model.gate.bias.tolist()
    for row, vector in zip(rows, model(items(rows, carry=False)), strict=True):
        clicks = float(CLICKS[row + 1])
        for d in range(4):
            power = (1 + clicks) ** slope[d]
            g = power / (power + math.exp(-bias[d])) if clicks else 0.0
            assert vector[d].item() == pytest.approx(float(g * ids[row, d] + (1 - g) * content[row, d]), rel=1e-4)
    assert model.dim == 4


def test_a_cold_item_reads_its_content_alone():
    """Neither an ID row nor the gate has a part in it; the same for one that ID dropout shows as unknown."""
    model = gated()
    batch = items([2, 3], ids=[0, 0], carry=False)  # the second has 20 clicks, but its ID is not shown
    with torch.no_grad():
        model.ids.weight[0] = 7.0
    out = model(batch)
    torch.testing.assert_close(out, model.adapter(model.content_table[[2, 3]], HAS[[2, 3]]))
    assert model.gate.weight(torch.tensor([0, 1])).eq(0).all() and (model.gate.weight(torch.tensor([2])) > 0).all()
    out.sum().backward()
    for parameter in (model.ids.weight, model.gate.slope, model.gate.bias):
        assert parameter.grad.eq(0).all()  # there, as many processes need it
    model.zero_grad()
    model(items([3], carry=False)).sum().backward()
    assert model.ids.weight.grad[4].ne(0).all() and model.gate.slope.grad.ne(0).all()
    assert "gate.clicks" not in model.state_dict()


def test_a_gate_mixes_two_parts_of_one_size_and_leaves_the_features():
    table = (torch.randn(N, K), HAS)
    for config in ({"content": ContentTable(path="x", dim=3)}, {"content": ContentTable(path="x", dim=4), "id_dim": 0}):
        with pytest.raises(ValueError, match="mixes IDs and content of one size"):
            embedder(table=table, fusion="gate", **config)
    with pytest.raises(ValueError, match="mixes IDs and content of one size"):
        embedder(fusion="gate")
    torch.manual_seed(0)
    config = ItemEmbedderConfig(id_dim=4, content=ContentTable(path="x", dim=4), fusion="gate")
    words = {"brand": CategoricalFeature(dim=3)}
    model = ItemEmbedder(config, N + 1, words, {"brand": Vocabulary(["a"])}, table, clicks=CLICKS)
    batch = items([1, 4], carry=False)
    batch.features["brand"] = torch.tensor([1, 0])
    assert model.dim == 7
    plain = ItemEmbedder(config, N + 1, {}, {}, table, clicks=CLICKS)
    plain.load_state_dict(model.state_dict(), strict=False)
    expected = torch.cat([plain(batch), model.features.tables["brand"].weight[[1, 0]]], 1)
    torch.testing.assert_close(model(batch), expected)


@pytest.mark.parametrize("out_dim", [3, K])
def test_a_residual_adapter_by_hand(out_dim):
    torch.manual_seed(0)
    adapter = ContentAdapter(K, [8], out_dim, 0.0, residual=True)
    vectors, has = torch.randn(4, K), torch.tensor([True, True, False, True])
    x = torch.nn.functional.layer_norm(torch.where(has[:, None], vectors, adapter.absent), (K,))
    first, last = adapter.layers[1], adapter.layers[-1]
    mlp = torch.nn.functional.gelu(x @ first.weight.T + first.bias) @ last.weight.T + last.bias
    straight = x if out_dim == K else x @ adapter.skip.weight.T
    torch.testing.assert_close(adapter(vectors, has), straight + mlp)
    torch.testing.assert_close(adapter.absent_vectors(2), adapter(vectors, has)[[2, 2]])
    without = ContentAdapter(K, [8], out_dim, 0.0)
    assert without.skip is None and not any("skip" in name for name in without.state_dict())


@pytest.mark.parametrize("shown_in", ["both", "target", "history"])
def test_content_shown_in_one_role_alone(shown_in):
    """Elsewhere an item reads what one without content does: two embedders show it, with all content and with none."""
    table = (torch.randn(N, K, generator=torch.Generator().manual_seed(3)), HAS)
    model = embedder(ContentTable(path="x", dim=3, hidden=[7], shown_in=shown_in), table=table)
    full, bare = (embedder(ContentTable(path="x", dim=3, hidden=[7]), table=(table[0], h)) for h in (HAS, ~HAS & HAS))
    batch = batch_of(items([0, 1, 3, 4], carry=False), [0, 2, 2], [0, 1, 2, 3, 3], [0, 2, 2, 5])
    vectors, target = model.by_role(batch)
    as_target, as_history = {"both": (full, full), "target": (full, bare), "history": (bare, full)}[shown_in]
    torch.testing.assert_close(vectors[target], as_target(batch.items)[batch.target])
    torch.testing.assert_close(vectors[batch.history], as_history(batch.items)[batch.history])
    assert len(vectors) == (4 if shown_in == "both" else 8)


def test_a_live_encoder_shown_in_targets_needs_to_encode_no_history():
    """The batch carries the pictures of targets alone; the result is that of encoding all."""
    encoder = Pixels()
    content = ContentEncoder(run="x", shown_in="target", dim=3, hidden=[7])
    model = embedder(content, encoder=encoder, table=table_of(encoder)).train()
    with torch.no_grad():
        encoder.layer.bias += torch.arange(K)  # the table is stale
    rows = [0, 3, 1, 0, 4]
    some, full = items(rows, encode=torch.tensor([0, 1])), items(rows)
    results = [model.by_role(batch_of(batch, [0, 1], [2, 3, 4], [0, 2, 3])) for batch in (some, full)]
    for (vectors, target), other in zip(results, reversed(results), strict=True):
        torch.testing.assert_close(vectors[target], other[0][other[1]])
        torch.testing.assert_close(vectors[2:5], other[0][2:5])
    assert not content.encodes_history and ContentEncoder(run="x").encodes_history


def test_a_live_encoder_is_compared_by_its_kept_table():
    """What it makes of the batch at hand has no part in it, and no gradient comes from it."""
    encoder = Pixels()
    live = embedder(ContentEncoder(run="x", dim=3, hidden=[7]), encoder=encoder, table=table_of(encoder)).train()
    frozen = embedder(ContentTable(path="x", dim=3, hidden=[7]), table=table_of(encoder))
    batch = batch_of(items([0, 2, 3, 4]), [0, 1, 2], [0, 1, 2, 3, 3], [0, 2, 3, 5])
    expected = frozen.similarity(batch)
    assert expected.isnan().tolist() == [False, True, True, False, False] and expected[0].item() == pytest.approx(1)
    with torch.no_grad():
        encoder.layer.weight.neg_()
    torch.testing.assert_close(live.similarity(batch), expected, equal_nan=True)
    live.refresh(*table_of(encoder))
    found = live.similarity(batch)
    assert not torch.allclose(found[3:], expected[3:]) and not found.requires_grad
