"""The losses of ID generators against plain versions of them, and that they teach something."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from mmctr.data.prepare import open_dataset
from mmctr.data.splits import StagedSplit, split_interactions
from mmctr.data.tables import rows_of
from mmctr.embedders.id_generators import CVARConfig, MetaEmbeddingConfig, MWUFConfig, wasserstein2
from mmctr.embedders.item_embedder import ContentTable
from mmctr.evaluation.metrics import auc
from mmctr.evaluation.predict import predict
from mmctr.features.ranking_data import RankingData
from mmctr.features.vocabulary import RankingVocabulary
from mmctr.run_folder import RunFolder
from mmctr.runs.config import FinetuneConfig
from mmctr.studies.controls import factor_table
from mmctr.tasks import RankingTask, RankingTaskConfig
from mmctr.training.context import RunContext
from mmctr.training.fit import FitConfig
from mmctr.training.generator_tasks import (
    CVARTask,
    ItemBatches,
    MetaEmbeddingTask,
    MWUFTask,
    freeze,
    mean_users,
    train_cold_ids,
)
from mmctr.training.optimizers import OptimizerConfig, make_optimizer

METHODS = {
    "meta_embedding": MetaEmbeddingConfig(rows=2, validation=0.2, hidden=[8], inner_lr=2.0),
    "mwuf": MWUFConfig(hidden=[8], validation=0.2),
    "cvar": CVARConfig(latent=3, validation=0.2, noise=0.0, wasserstein=0.5, reconstruction=2.0),
}


@pytest.fixture(scope="module")
def world(toy_folder):
    """dataset, splits, data, (vectors, mask): the true factors of items are their content."""
    dataset = open_dataset(toy_folder)
    split = StagedSplit(new=0.3, rows=2, test_rows=2)
    splits = split_interactions(dataset.interactions, len(dataset.catalog), split)
    config = task_config(MWUFConfig())
    vocabulary = RankingVocabulary.learn(dataset, splits, config.features)
    data = RankingData(dataset, vocabulary, config.features, config.max_history)
    factors = factor_table(str(toy_folder))
    vectors = factors.vectors[rows_of(dataset.catalog.item_ids, factors.ids, "items")]
    return dataset, splits, data, (torch.from_numpy(vectors).float(), torch.arange(len(vectors)) % 9 > 0)


def task_config(cold_ids, **embedder) -> RankingTaskConfig:
    """Smooth activations: second differences of kinks say nothing."""
    content = ContentTable(path="x", dim=4, hidden=[])
    values = {"id_dim": 6, "init_std": 0.5, "content": content.model_dump(), "cold_ids": cold_ids.model_dump()}
    ranker = {"name": "embedding_mlp", "mlp": [7], "activation": "sigmoid"}
    features = {"item": {"brand": {"name": "categorical", "dim": 3}}}
    return RankingTaskConfig.parse(
        {"embedder": values | embedder, "ranker": ranker, "features": features, "user_dim": 3, "max_history": 5}
    )


def ranker_of(world, name: str, seed: int = 0) -> RankingTask:
    dataset, _, _, table = world
    config = task_config(METHODS[name])
    vocabulary = RankingVocabulary.learn(dataset, world[1], config.features)
    torch.manual_seed(seed)
    task = RankingTask(config, vocabulary, table, None, dataset.catalog.item_ids)
    with torch.no_grad():
        for parameter in task.embedder.generator.parameters():  # type: ignore[union-attr]
            parameter.add_(0.3 * torch.randn_like(parameter))
    return task


def prepared(world, name: str):
    """(task of the method, ranker, data of it) with a generator that is ready to learn."""
    task, splits = ranker_of(world, name), world[1]
    with torch.no_grad():
        for layer in (task.ranker.mlp[0], task.ranker.mlp[2]):  # type: ignore[index]
            layer.weight.mul_(4)  # far from linear
    freeze(task)
    data = RankingData(world[0], task.vocabulary, task.config.features, task.config.max_history)
    rows = torch.from_numpy(data.id_rows[splits.train.item])
    users, count = mean_users(task, data.user_rows[torch.from_numpy(splits.train.user).long()], rows)
    generator = task.embedder.generator
    assert generator is not None and task.embedder.ids is not None
    generator.learn_from(task.embedder.ids.weight[1:], users[1:], count[1:])
    generator.requires_grad_(True)
    kinds = {"meta_embedding": MetaEmbeddingTask, "mwuf": MWUFTask, "cvar": CVARTask}
    return kinds[name](task, users, count), task, data


def test_mean_users_are_of_the_items_own_impressions(world):
    """Of its users, not of the items of its user: user and item rows are not swapped."""
    _, task, data = prepared(world, "mwuf")
    train = world[1].train
    users, count = mean_users(
        task, data.user_rows[torch.from_numpy(train.user).long()], torch.from_numpy(data.id_rows[train.item])
    )
    for row in (1, 7, len(count) - 1):
        met = [int(data.user_rows[u]) for u, i in zip(train.user, train.item, strict=True) if data.id_rows[i] == row]
        assert int(count[row]) == len(met) > 0
        torch.testing.assert_close(users[row], task.users.weight[met].mean(0))  # type: ignore[union-attr]
    assert count[0] == 0 and not users[0].any()


def test_two_batches_hold_rows_of_the_same_items_and_no_row_twice(world):
    _, _, data = prepared(world, "meta_embedding")
    collator = data.collator(world[1].train)
    batches = ItemBatches(collator, 3, seed=1)
    seen = []
    for step in range(3):
        both = batches(np.array([4, 0, 9]), step)
        rows = [part.items.row[part.target].view(3, 3) for part in (both.a, both.b)]
        for part in rows:
            assert part[:, 0].tolist() == batches.items[[4, 0, 9]].tolist() and (part == part[:, :1]).all()
        seen.append(torch.cat([both.a.user, both.b.user]).tolist())
    assert len({tuple(users) for users in seen}) > 1
    start, count = batches.begins[4], batches.count[4]
    assert len(set(batches.rows[start : start + count])) == count >= 6
    assert (world[1].train.item[batches.rows[start : start + count]] == batches.items[4]).all()
    with pytest.raises(ValueError, match=r"cold_ids.rows: 900 rows in two batches are more than any item has"):
        ItemBatches(collator, 900, seed=1)


def plain_losses(task: RankingTask, batch, ids: torch.Tensor) -> torch.Tensor:
    """(B,) of Embedding & MLP, one impression after another and without its own backward passes, so that it can be
    differentiated twice. A target reads its vector of `ids` (U, D), histories what the ranker knows."""
    known, shown = task.embedder(batch.items).detach(), task.embedder(batch.items, ids=ids)
    losses = []
    for b in range(len(batch)):
        history = known[batch.history[batch.history_offsets[b] : batch.history_offsets[b + 1]]]
        pooled = history.sum(0) / max(len(history), 1)
        top = torch.cat([task.users.weight[batch.user[b]], shown[batch.target[b]], pooled])  # type: ignore[union-attr]
        losses.append(F.binary_cross_entropy_with_logits(task.ranker.mlp(top)[0], batch.label[b]))
    return torch.stack(losses)


def gradients(loss: torch.Tensor, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float = 1e-4) -> None:
    assert found.keys() == expected.keys() and found
    for name, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=rtol * scale, msg=name)


def test_meta_embedding_is_two_losses_with_a_step_between(world):
    """a l_a(phi) + (1 - a) l_b(phi - eta dl_a / dphi), differentiated twice, Hessian and all."""
    model, task, data = prepared(world, "meta_embedding")
    batch = ItemBatches(data.collator(world[1].train), 2, seed=1)(np.arange(6), 0)
    terms = model(batch)
    found = gradients(torch.stack(list(terms.values())).sum(), model)

    def of_items(part, vectors):
        ids = torch.zeros(len(part.items), 6).index_copy(0, part.target[::2], vectors)
        return plain_losses(task, part, ids).view(-1, 2).mean(1)

    def loss(second_order: bool):
        phi = task.embedder.generator.cold(task.embedder.describe(batch.a.items))[batch.a.target[::2]]  # type: ignore[union-attr]
        loss_a = of_items(batch.a, phi)
        (slope,) = torch.autograd.grad(loss_a.sum(), phi, create_graph=second_order, retain_graph=True)
        return (0.1 * loss_a + 0.9 * of_items(batch.b, phi - 2.0 * slope)).mean()

    torch.testing.assert_close(terms["cold"] + terms["after_step"], loss(True))
    check_gradients(found, gradients(loss(True), model), rtol=2e-3)
    with pytest.raises(AssertionError):  # the Hessian counts
        check_gradients(found, gradients(loss(False), model), rtol=2e-2)


def test_mwuf_is_a_cold_loss_for_vectors_and_a_warm_one_for_networks(world):
    model, task, data = prepared(world, "mwuf")
    with torch.no_grad():
        model.fresh.weight += torch.randn_like(model.fresh.weight)
    batch = data.collator(world[1].train)(np.arange(12))
    terms = model(batch)
    found = gradients(torch.stack(list(terms.values())).sum(), model)

    own = batch.items.features["item_id"]
    cold = plain_losses(task, batch, model.fresh(own)).mean()
    generator, x = task.embedder.generator, task.embedder.describe(batch.items)
    scale, shift = generator.scale(x), generator.shift(model.users[own])  # type: ignore[union-attr, operator]
    # every history item has been someone's target too: all have users
    warm = plain_losses(task, batch, model.fresh(own).detach() * (1 + scale) + shift).mean()
    torch.testing.assert_close(terms["cold"], cold)
    torch.testing.assert_close(terms["warm"], warm)
    check_gradients(found, gradients(cold + warm, model))
    # of large tables a step touches the rows of its batch alone
    assert make_optimizer(model, OptimizerConfig(rows_from=0)).row_tables.keys() == {model.fresh.weight}
    model.zero_grad()
    model(batch)["cold"].backward()
    assert model.fresh.pop_gradient()[0].equal(own.unique()) and model.fresh.weight.grad is None


def test_cvar_is_a_log_loss_a_reconstruction_and_a_distance(world):
    model, task, data = prepared(world, "cvar")
    batch = data.collator(world[1].train)(np.arange(12))
    terms = model(batch)
    found = gradients(torch.stack(list(terms.values())).sum(), model)

    generator, own = task.embedder.generator, batch.items.features["item_id"]
    ids, frequency = task.embedder.ids.weight[own], generator.relative(model.rows[own])[:, None]  # type: ignore[union-attr, operator, index]
    mu, logvar = generator.of_id(ids).split(3, dim=1)  # type: ignore[union-attr, operator]
    told_mu, told_logvar = generator.of_description(task.embedder.describe(batch.items)).split(3, dim=1)  # type: ignore[union-attr, operator]
    made = generator.mean + generator.decoder(torch.cat([told_mu, frequency], 1))  # type: ignore[union-attr, operator]
    again = generator.mean + generator.decoder(torch.cat([mu, frequency], 1))  # type: ignore[union-attr, operator]
    of_rows = batch.target
    expected = {
        "log_loss": plain_losses(task, batch, made).mean(),
        "reconstruction": 2.0 * (again - ids).square().sum(1)[of_rows].mean(),
        "wasserstein": 0.5 * wasserstein2((mu, logvar), (told_mu, told_logvar))[of_rows].mean(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)
    check_gradients(found, gradients(torch.stack(list(expected.values())).sum(), model))


@pytest.mark.parametrize("name", METHODS)
def test_a_generator_learns_and_the_ranker_stays(world, name, tmp_path):
    """Frozen IDs that say which items are clicked: what is generated for old and for new items says so too."""
    dataset, splits, _, table = world
    task = ranker_of(world, name)
    vectors = table[0]
    data = RankingData(dataset, task.vocabulary, task.config.features, task.config.max_history)
    # a ranker that reads a score off the first ID dimension, and a log in which one factor is clicked
    liked = vectors[:, 0] > 0
    train, validation, test = (
        replace(part, label=liked.numpy()[part.item].astype(np.uint8))
        for part in (splits.train, splits.validation, splits.test)
    )
    with torch.no_grad():
        for layer in (task.ranker.mlp[0], task.ranker.mlp[2]):  # type: ignore[index]
            layer.weight.zero_()
            layer.bias.zero_()
        task.ranker.mlp[0].weight[0, 3] = 1.0  # type: ignore[index]
        task.ranker.mlp[2].weight[0, 0], task.ranker.mlp[2].bias[0] = 8.0, -4.0  # type: ignore[index]
        own = torch.from_numpy(data.id_rows)
        task.embedder.ids.weight[own[own > 0], 0] = 4.0 * liked[own > 0].float() - 2.0  # type: ignore[union-attr]
    before = {key: value.clone() for key, value in task.state_dict().items() if "generator" not in key}
    cold = data.collator(test)
    accelerator = Accelerator(cpu=True)
    assert not task.embedder.uses_generator and auc(test.label, predict(task, cold, accelerator)) == 0.5
    fit = FitConfig.parse({"epochs": 6, "batch_size": 64, "optimizer": {"lr": 2e-2}, "warmup": 0})
    if name == "meta_embedding":
        fit = FitConfig.parse(fit.model_dump() | {"epochs": 16, "evaluations": 0.1, "optimizer": {"lr": 6e-2}})
    done = train_cold_ids(
        task,
        data,
        train,
        validation,
        fit,
        RunContext(RunFolder(tmp_path), accelerator, 0, "x"),
        "auc",
    )
    assert done["best"] > 0.8 > done["without"]["auc"] == 0.5  # a few held-out items, whose rows it has not seen
    known = table[1].numpy()[test.item]
    assert auc(test.label[known], predict(task, cold, accelerator)[known]) > 0.9
    for key, value in before.items():
        torch.testing.assert_close(task.state_dict()[key], value, rtol=0, atol=0)
    task.save(tmp_path)
    again = RankingTask.load(tmp_path)
    np.testing.assert_array_equal(predict(again, cold, accelerator), predict(task, cold, accelerator))


def test_held_out_items_do_not_teach(world, tmp_path, monkeypatch):
    """Nothing of the result depends on their training rows, and nothing but their rows is validated."""
    dataset, splits, _, _ = world
    results, validated = [], []
    monkeypatch.setattr(
        "mmctr.training.generator_tasks.quick_metrics", lambda part, *_: validated.append(part.item) or {"auc": 0.5}
    )
    for flip in (False, True):
        task = ranker_of(world, "cvar")
        data = RankingData(dataset, task.vocabulary, task.config.features, task.config.max_history)
        held = np.zeros(len(dataset.catalog), bool)
        held[np.unique(validated[0]) if validated else []] = True
        label = splits.train.label ^ (held[splits.train.item] & flip).astype(np.uint8)
        train_cold_ids(
            task,
            data,
            replace(splits.train, label=label),
            splits.validation,
            FitConfig(batch_size=64),
            RunContext(RunFolder(tmp_path / str(flip)), Accelerator(cpu=True), 0, "x"),
            "auc",
        )
        results.append(task.state_dict())
    shown = np.unique(np.concatenate(validated))
    assert 0 < len(shown) < 0.35 * len(task.vocabulary.item_ids) and np.isin(splits.train.item, shown).any()
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=0, atol=0)


def test_a_batch_too_small_for_an_item_is_refused(world, tmp_path):
    task, splits = ranker_of(world, "meta_embedding"), world[1]
    data = RankingData(world[0], task.vocabulary, task.config.features, task.config.max_history)
    context = RunContext(RunFolder(tmp_path), Accelerator(cpu=True), 0, "x")
    with pytest.raises(ValueError, match=r"cold_fit.batch_size: 3 rows, with 2 \* cold_ids.rows = 4 of an item"):
        train_cold_ids(task, data, splits.train, splits.validation, FitConfig(batch_size=3), context, "auc")


def test_too_few_rows_of_held_out_items_are_refused(world, tmp_path):
    task, splits = ranker_of(world, "mwuf"), world[1]
    data = RankingData(world[0], task.vocabulary, task.config.features, task.config.max_history)
    one_a_user = splits.validation.take(np.unique(splits.validation.user, return_index=True)[1])
    context = RunContext(RunFolder(tmp_path), Accelerator(cpu=True), 0, "x")
    with pytest.raises(ValueError, match=r"cold_ids.validation: gauc is undefined on the \d+ validation rows"):
        train_cold_ids(task, data, splits.train, one_a_user, FitConfig(batch_size=64), context, "gauc")


def test_what_belongs_to_the_whole_run_cannot_be_set_for_the_second_phase():
    values = {"data": {"path": "x"}, "run_dir": "y", "fit": {"tracker": "wandb"}}
    assert FinetuneConfig.parse(values | {"cold_fit": {"tracker": "wandb"}}).cold_fit.tracker == "wandb"
    for name, value in (("tracker", "mlflow"), ("mixed_precision", "bf16")):
        with pytest.raises(ValueError, match=f"cold_fit.{name}: '{value}', but .* set fit.{name} instead"):
            FinetuneConfig.parse(values | {"cold_fit": {name: value}})
