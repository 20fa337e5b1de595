from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from mmctr.data.batches import ItemBatch, Jagged
from mmctr.data.features import CategoricalFeature, MultiValuedFeature, NumericFeature, Vocabulary
from mmctr.fusion import (
    ContentAdapter,
    ContentEncoder,
    ContentTable,
    FeatureEmbedder,
    ItemEmbedder,
    ItemEmbedderConfig,
)

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


def embedder(content=None, encoder=None, table=None, **config) -> ItemEmbedder:
    torch.manual_seed(0)
    values = {"id_dim": 4} | config
    if content is not None:
        values["content"] = content
    return ItemEmbedder(ItemEmbedderConfig(**values), N + 1, {}, {}, table, encoder)


def test_an_unknown_item_starts_at_zero_and_cannot_read_an_id_row():
    """A cold item (ID row 0) keeps its vector whatever happens to the rows of the others."""
    for fusion in ("concat", "sum", "project"):
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


def test_a_history_table_equals_encoding_all_while_it_is_fresh():
    encoder = Pixels()
    model = embedder(
        ContentEncoder(run="x", history="table", dim=3, hidden=[7]), encoder=encoder, table=table_of(encoder)
    ).train()
    rows = [0, 1, 2, 4, 5]
    some = items(rows, encode=torch.tensor([1, 2, 3]))
    torch.testing.assert_close(model(some), model(items(rows)))
    with torch.no_grad():
        encoder.layer.bias += torch.arange(K)  # now the table is stale: histories still read it, targets do not
    stale, full = model(some), model(items(rows))
    same = [torch.allclose(a, b) for a, b in zip(stale, full, strict=True)]
    assert same == [False, True, True, True, True]  # the last one has no picture
    model.refresh(*table_of(encoder))
    torch.testing.assert_close(model(some), full)


def test_side_features():
    configs = {
        "brand": CategoricalFeature(dim=3),
        "tags": MultiValuedFeature(dim=2),
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
            torch.stack([(tags[1] + tags[2]) / 2, torch.zeros(2), tags[2]]),
            price,
        ],
        1,
    )
    assert model.dim == 7
    torch.testing.assert_close(model(features, price), expected)
    none = replace(features["tags"], values=torch.tensor([], dtype=torch.int64), offsets=torch.tensor([0, 0, 0, 0]))
    assert model(features | {"tags": none}, price)[:, 3:5].eq(0).all()
    assert FeatureEmbedder({}, {}, 0.5)({}, price).shape == (3, 0)
