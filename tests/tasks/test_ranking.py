from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from accelerate import Accelerator

from mmctr.data.content import ItemContent, PictureField, TextField
from mmctr.data.prepare import open_dataset
from mmctr.data.splits import ColdItemsSplit, split_interactions
from mmctr.embedders.item_embedder import ContentEncoder, ContentTable, ItemEmbedderConfig
from mmctr.evaluation.predict import embed_catalog
from mmctr.features.behavior_collator import NegativeSampler
from mmctr.features.ranking_data import RankingData
from mmctr.features.vocabulary import RankingVocabulary
from mmctr.rankers import DIENConfig, DINConfig, LRConfig, LSPLMConfig
from mmctr.tasks import RankingTask, RankingTaskConfig
from mmctr.training.optimizers import OptimizerConfig, make_optimizer
from tests.tasks.test_pretrain import pretrain_task


@pytest.fixture(scope="module")
def world(toy_folder):
    dataset = open_dataset(toy_folder)
    splits = split_interactions(dataset.interactions, len(dataset.catalog), ColdItemsSplit(cold=0.2))
    config = RankingTaskConfig()
    vocabulary = RankingVocabulary.learn(dataset, splits, config.features)
    data = RankingData(dataset, vocabulary, config.features, max_history=10)
    encoder = pretrain_task().eval()
    input_ids, has_text = dataset.catalog.tokens(["title"], encoder.encoder.tokenize, encoder.encoder.tokenizer_key)
    pictures = PictureField(dataset.catalog.pictures(32, "shortest"))
    content = ItemContent((pictures,), (TextField(input_ids, has_text),))
    table = embed_catalog(encoder, content, len(dataset.catalog), Accelerator(cpu=True))
    return dataset, splits, vocabulary, data, content, table


def ranking_task(world, content=None) -> RankingTask:
    dataset, _, vocabulary, _, _, table = world
    embedder = ItemEmbedderConfig(id_dim=4) if content is None else ItemEmbedderConfig(id_dim=4, content=content)
    config = RankingTaskConfig(embedder=embedder, ranker=DINConfig(attention=[6], mlp=[8]), user_dim=3)
    encoder = pretrain_task().eval() if isinstance(content, ContentEncoder) else None
    torch.manual_seed(0)
    some = None if content is None else table
    return RankingTask(config, vocabulary, some, encoder, dataset.catalog.item_ids)


CONTENTS = {
    "none": None,
    "table": ContentTable(path="x", dim=6, hidden=[5]),
    "encoder": ContentEncoder(run="x", dim=6, hidden=[5]),
    "bank": ContentEncoder(run="x", max_encoded=20, dim=6, hidden=[5]),
    "frozen": ContentEncoder(run="x", frozen=True, dim=6, hidden=[5]),
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS.keys())
def test_a_saved_ranker_loads_equal(world, content, tmp_path):
    _, splits, _, data, _, _ = world
    task = ranking_task(world, content).eval()
    task.save(tmp_path / "run")
    torch.manual_seed(99)
    again = RankingTask.load(tmp_path / "run")
    batch = data.collator(splits.test)(np.arange(50))
    with torch.no_grad():
        logits = task.logits(batch)[0]
        assert torch.equal(again.logits(batch)[0], logits) and logits.std() > 0
    assert again.config == task.config and again.vocabulary.item_ids.equals(task.vocabulary.item_ids)
    assert json.loads((tmp_path / "run" / "task.json").read_text())["kind"] == "ranking"


def test_a_frozen_encoder_gives_the_logits_and_gradients_of_its_table(world):
    _, splits, _, data, _, _ = world
    results = []
    for name in ("table", "frozen"):
        task = ranking_task(world, CONTENTS[name]).train()
        batch = data.collator(splits.train)(np.arange(64))
        loss = task(batch)["log_loss"]
        loss.backward()
        results.append((loss.detach(), task.embedder.adapter.absent.grad, task.users.weight.grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_every_trained_parameter_of_a_joint_ranker_gets_a_gradient(world):
    """Data-parallel training stops at a parameter without one."""
    _, splits, _, data, content, _ = world
    for max_encoded in (None, 8):
        task = ranking_task(world, ContentEncoder(run="x", max_encoded=max_encoded, dim=6, hidden=[5])).train()
        batch = data.collator(splits.train, content=content, max_encoded=max_encoded)(np.arange(32))
        task(batch)["log_loss"].backward()
        missing = [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing
        assert task.embedder.encoder.encoder.model.visual.conv1.weight.grad.abs().sum() > 0
        parts = task.parameter_parts()
        assert {id(p) for part in parts.values() for p in part} >= {id(p) for p in task.parameters() if p.requires_grad}


def test_encoding_targets_alone_gives_the_logits_of_encoding_all(world):
    """While the table is fresh: it was made by the same encoder in evaluation mode, which has no dropout here."""
    _, splits, _, data, content, _ = world
    rows, logits = np.arange(40), []
    for encode_history in (True, False):
        task = ranking_task(world, CONTENTS["encoder"]).train()
        batch = data.collator(splits.train, content=content, encode_history=encode_history)(rows)
        assert (batch.items.encode is None) == encode_history
        logits.append(task.logits(batch)[0])
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)


def test_each_distinct_item_once_equals_naive_encoding(world):
    """The logits of a batch are those of its impressions one by one."""
    _, splits, _, data, _, _ = world
    task, collator = ranking_task(world, CONTENTS["table"]).eval(), data.collator(splits.test)
    with torch.no_grad():
        whole = task.logits(collator(np.arange(30)))[0]
        single = torch.cat([task.logits(collator(np.array([row])))[0] for row in range(30)])
    torch.testing.assert_close(whole, single, rtol=1e-4, atol=1e-5)


def test_a_table_is_bound_to_another_catalog_by_id(world):
    dataset, _, _, _, _, table = world
    task = ranking_task(world, CONTENTS["table"]).eval()
    ids = dataset.catalog.item_ids
    order = np.random.default_rng(0).permutation(len(ids))[:50]
    new = pa.concat_arrays([ids.take(pa.array(order)), pa.array([1, 2], type=ids.type)])
    task.bind(new)
    assert task.embedder.content_table.shape == (52, task.embedder.content_table.shape[1])
    torch.testing.assert_close(task.embedder.content_table[:50], table[0][order])
    assert task.embedder.has_content.tolist() == [*table[1][order].tolist(), False, False]
    assert task.catalog_ids.equals(new)
    task.bind(ids)  # and back: items that were not in between are without content now
    kept = torch.zeros(len(ids), dtype=torch.bool)
    kept[order] = True
    assert torch.equal(task.embedder.has_content, kept & table[1])


@pytest.mark.parametrize("rows_from", [0, 10**6])
def test_mini_batch_aware_l2_is_the_formula_and_touches_the_rows_of_the_batch(world, rows_from):
    """Zhou et al. 2018, section 5.2, with counts over all training rows, an ID many times in a batch counting once."""
    dataset, splits, vocabulary, data, _, _ = world
    lam = 2.0
    config = RankingTaskConfig(embedder=ItemEmbedderConfig(id_dim=4, init_std=0.3), user_dim=3, mini_batch_l2=lam)
    torch.manual_seed(0)
    task = RankingTask(config, vocabulary).train()
    rows = np.arange(40)
    batch = data.collator(splits.train, negatives=NegativeSampler(splits.train, 0))(rows)
    with pytest.raises(ValueError, match="call count_samples"):
        task(batch)
    task.count_samples(*data.samples(splits.train))

    train = splits.train
    n_items, n_users = np.zeros(len(dataset.catalog)), np.zeros(len(dataset.users))
    in_batch: tuple[set[int], set[int]] = (set(), set())
    for row in range(len(train)):
        start = max(train.history_start[row], train.history_end[row] - data.max_history)
        items = {int(train.item[row]), *train.history[start : train.history_end[row]].tolist()}
        n_items[list(items)] += 1
        n_users[train.user[row]] += 1
        if row in rows:
            in_batch[0].update(items)
            in_batch[1].add(int(train.user[row]))
    expected = 0.0
    touched = []
    parts = ((task.embedder.ids, data.id_rows, n_items), (task.users, data.user_rows.numpy(), n_users))
    for (table, own_row, counts), ids in zip(parts, in_batch, strict=True):
        pairs = [(int(own_row[i]), counts[i]) for i in ids]
        assert min(row for row, _ in pairs) > 0
        expected += sum(lam / 2 / n * float(table.weight[row].detach().square().sum()) for row, n in pairs)
        touched.append({row for row, _ in pairs})

    optimizer = make_optimizer(task, OptimizerConfig(rows_from=rows_from))
    term = task(batch)["mini_batch_l2"]
    assert term.item() == pytest.approx(expected, rel=1e-4) and expected > 0.1
    term.backward()
    for (table, _, _), some in zip(parts, touched, strict=True):
        if rows_from:
            grad = table.weight.grad
        else:
            distinct, grads = table.pop_gradient()
            grad = torch.zeros_like(table.weight).index_add_(0, distinct, grads)
        assert set(grad.abs().sum(1).nonzero().squeeze(1).tolist()) == some
    assert optimizer is not None and task.state_dict().keys().isdisjoint({"item_decay", "user_decay"})


@pytest.mark.parametrize("ranker", [DINConfig(attention=[6], mlp=[8]), LSPLMConfig(pieces=3), DIENConfig(mlp=[8])])
def test_rows_in_double_have_the_same_loss_and_gradient(world, ranker):
    """Losses are means over rows, and those of DIEN over steps, so a learning rate holds for any size of a batch."""
    _, splits, vocabulary, data, _, _ = world
    config = RankingTaskConfig(embedder=ItemEmbedderConfig(id_dim=4), ranker=ranker, user_dim=3)
    torch.manual_seed(0)
    task = RankingTask(config, vocabulary).train()
    with torch.no_grad():
        for parameter in task.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    rows = np.arange(0, len(splits.train), 40)
    found = []
    for times in (1, 2):
        batch = data.collator(splits.train)(np.tile(rows, times))
        terms = task(
            replace(batch, negatives=torch.flip(batch.history[: len(batch.history) // times], [0]).repeat(times))
        )
        task.zero_grad()
        sum(terms.values()).backward()
        found.append(({n: t.detach() for n, t in terms.items()}, {n: p.grad for n, p in task.named_parameters()}))
    assert len(found[0][0]) == (2 if ranker.needs_negatives else 1)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_single_weights_start_at_zero_and_those_of_pieces_do_not(world):
    for ranker, started in ((LRConfig(), False), (LSPLMConfig(pieces=2), True)):
        task = RankingTask(RankingTaskConfig(ranker=ranker), world[2])
        assert bool(task.embedder.ids.weight.any()) == bool(task.users.weight.any()) == started


def test_an_unknown_id_is_not_regularised(world):
    _, splits, vocabulary, data, _, _ = world
    config = RankingTaskConfig(embedder=ItemEmbedderConfig(id_dim=4), user_dim=3, mini_batch_l2=1.0)
    task = RankingTask(config, vocabulary).train()
    task.count_samples(*data.samples(splits.train))
    with torch.no_grad():
        task.embedder.ids.weight[0] = task.users.weight[0] = 100.0
    dropped = data.collator(splits.train, id_dropout=0.999, user_dropout=0.999)(np.arange(64))
    assert task(dropped)["mini_batch_l2"].item() < 1


def test_an_encoder_with_a_head_trains_inside_a_ranker(world):
    """Content is the mean of the latents; what only the head's own losses read takes no part."""
    dataset, splits, vocabulary, data, content, _ = world
    head = {"name": "factor_vae", "dim": 3, "hidden": [8], "discriminator": [4]}
    encoder = pretrain_task(head=head).eval()
    table = embed_catalog(encoder, content, len(dataset.catalog), Accelerator(cpu=True))
    assert table[0].shape == (len(dataset.catalog), 3)
    embedder = ItemEmbedderConfig(id_dim=4, content=CONTENTS["encoder"])
    config = RankingTaskConfig(embedder=embedder, ranker=DINConfig(attention=[6], mlp=[8]), user_dim=3)
    task = RankingTask(config, vocabulary, table, encoder, dataset.catalog.item_ids).train()
    batch = data.collator(splits.train, content=content)(np.arange(32))
    torch.stack(list(task(batch).values())).sum().backward()
    missing = [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == [] and encoder.head is not None
    assert all(p.grad is not None and p.grad.any() for p in encoder.head.inference.parameters())
    assert not any(
        p.requires_grad for p in (*encoder.head.rebuild.parameters(), *encoder.head.discriminator.parameters())
    )
