"""SimTier and the cosines it counts, against loops; a ranker that compares contents, from batch to logits."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn.functional import cosine_similarity

from mmctr.data.batches import BehaviorBatch
from mmctr.embedders.item_embedder import ItemEmbedder
from mmctr.embedders.similarity import PairCosines, SimTierConfig, tier_counts, tier_of
from mmctr.export.onnx_ranker import export_ranker
from mmctr.tasks import RankingTask, RankingTaskConfig
from tests.helpers.serving import ServingWorld, make_task, make_world, ranking_data, save_run

NAN = math.nan
DIN = {"name": "din", "attention": [4], "mlp": [5]}
SATA = DIN | {"weights": "softmax", "content_attention": True}


def looped(similarity: list[float], offsets: list[int], tiers: int) -> list[list[int]]:
    """The paper's sentence, a tier at a time: N equal ranges, how many similarities fall into each."""
    edges = [-1 + 2 * t / tiers for t in range(tiers + 1)]
    rows = []
    for start, end in itertools.pairwise(offsets):
        values = similarity[start:end]
        row = [sum(edges[t] <= c < edges[t + 1] for c in values) for t in range(tiers)]
        row[-1] += sum(c == 1 for c in values)  # the last range has an upper end
        rows.append([*row, sum(math.isnan(c) for c in values)])
    return rows


@pytest.mark.parametrize("tiers", [1, 2, 3, 4, 20])
def test_simtier_is_the_histogram(tiers):
    drawn = (torch.rand(40, generator=torch.Generator().manual_seed(0)) * 2 - 1).tolist()
    similarity = [1.0, -1.0, 0.0, 0.5, NAN, -0.5, *drawn, NAN, 1.0]
    offsets = [0, 0, 4, 5, 47, 47, 48]
    expected = looped(similarity, offsets, tiers)
    given = torch.tensor(similarity), torch.tensor(offsets)
    counts = tier_counts(*given, SimTierConfig(tiers=tiers, log=False))
    assert counts.tolist() == expected and counts.sum() == len(similarity)
    torch.testing.assert_close(tier_counts(*given, SimTierConfig(tiers=tiers)), torch.tensor(expected).log1p())
    nobody = tier_counts(torch.zeros(0), torch.zeros(4, dtype=torch.int64), SimTierConfig(tiers=tiers))
    assert nobody.tolist() == [[0.0] * (tiers + 1)] * 3


def test_the_edges_of_tiers():
    """1 is in the last tier, not in one of its own behind it; an inner edge is in the tier above."""
    edges = torch.tensor([[-1.0, -0.5, 0.0], [0.5, 1.0, NAN]])
    assert tier_of(edges, 4).tolist() == [[0, 1, 2], [3, 3, 4]]
    outside = torch.tensor([-1 - 1e-6, 1 + 1e-6])  # rounding
    assert tier_of(outside, 4).tolist() == [0, 3]


@pytest.mark.parametrize("kept", [0, 100])
def test_cosines_of_pairs(kept):
    """Looked up among all there are, or made for each pair."""
    g = torch.Generator().manual_seed(0)
    table, rows = torch.randn(9, 4, generator=g), torch.tensor([7, 2, 0, 2])
    table[0] = 0
    i, j = torch.randint(0, 4, (2, 30), generator=g)
    cosines = PairCosines(kept)

    def expected():
        return cosine_similarity(table[rows[i]], table[rows[j]])

    torch.testing.assert_close(cosines(table, rows, i, j), expected())
    before = expected()
    table[2] += 1  # written to
    assert not torch.allclose(expected(), before)
    torch.testing.assert_close(cosines(table, rows, i, j), expected())
    table = torch.randn(9, 4, generator=g)  # another one
    torch.testing.assert_close(cosines(table, rows, i, j), expected())
    with torch.inference_mode():
        table = table + 1
        torch.testing.assert_close(cosines(table, rows, i, j), expected())
    leaf = torch.ones(1, requires_grad=True)
    (leaf * cosines(table, rows, i, j)).sum().backward()  # made in inference mode, read in training
    assert cosines(table, rows, i, j).abs().max() <= 1 and leaf.grad is not None


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> ServingWorld:
    return make_world(tmp_path_factory.mktemp("similarity") / "data")


def with_options(world: ServingWorld, ranker: dict, simtier: dict | None = None, **embedder) -> RankingTask:
    task = make_task(world, ranker, **embedder)
    if simtier is None:
        return task
    config = RankingTaskConfig.parse(task.config.model_dump(mode="json") | {"simtier": simtier})
    torch.manual_seed(0)
    return RankingTask(config, task.vocabulary, world.content, catalog_ids=task.catalog_ids).eval()


def batch_of(world: ServingWorld, task: RankingTask, rows: int = 30) -> BehaviorBatch:
    return ranking_data(world, task).collator(world.splits.test)(np.arange(rows))


def explicit(world: ServingWorld, batch: BehaviorBatch, shift: torch.Tensor | float = 0.0) -> list[float]:
    """The cosine of each behaviour and its target, one by one."""
    vectors, has = world.content
    offsets, found = batch.history_offsets.tolist(), []
    for b, target in enumerate(batch.items.row[batch.target].tolist()):
        for row in batch.items.row[batch.history[offsets[b] : offsets[b + 1]]].tolist():
            both = bool(has[target] and has[row])
            found.append(float(cosine_similarity(vectors[target] + shift, vectors[row], dim=0)) if both else NAN)
    return found


def test_the_similarity_of_a_batch(world):
    task = make_task(world, SATA)
    batch = batch_of(world, task)
    expected = torch.tensor(explicit(world, batch))
    assert 0 < expected.isnan().sum() < len(expected) == len(batch.history)
    found = task.embedder.similarity(batch)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert not found.requires_grad


@pytest.mark.parametrize("ranker", [DIN, {"name": "dien", "mlp": [5]}, {"name": "embedding_mlp", "mlp": [5]}])
def test_simtier_is_read_by_the_mlp_as_context(world, ranker):
    """As a ranker that is given the histograms by hand, behind user and features."""
    task = with_options(world, ranker, {"tiers": 5, "log": False})
    batch, seen = batch_of(world, task), []
    task.ranker.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        logits = task.logits(batch)[0]
        (given,) = seen
        counts = torch.tensor(looped(explicit(world, batch), batch.history_offsets.tolist(), 5)).float()
        bare = torch.cat([task.users(batch.user), task.context(batch.context, batch.user)], dim=1)
        torch.testing.assert_close(given.context, torch.cat([bare, counts], dim=1))
        assert counts[:, :5].std() > 0
        changed = task.ranker(replace(given, context=torch.cat([bare, counts.flip(0)], dim=1))).logits
    assert not torch.allclose(changed, logits)


@pytest.mark.parametrize(("ranker", "simtier"), [(SATA, None), (SATA, {"tiers": 3})])
def test_impressions_do_not_see_each_other_and_a_saved_task_loads_equal(world, ranker, simtier, tmp_path):
    task = with_options(world, ranker, simtier)
    collator = ranking_data(world, task).collator(world.splits.test)
    with torch.no_grad():
        whole = task.logits(collator(np.arange(20)))[0]
        single = torch.cat([task.logits(collator(np.array([row])))[0] for row in range(20)])
        torch.testing.assert_close(whole, single, rtol=1e-4, atol=1e-5)
        task.save(tmp_path)
        assert torch.equal(RankingTask.load(tmp_path).logits(collator(np.arange(20)))[0], whole)
        # another catalog, in another order: the kept cosines are made anew
        order = np.arange(len(world.dataset.catalog))[::-1].copy()
        batch = collator(np.arange(20))
        task.bind(world.dataset.catalog.item_ids.take(pa.array(order)))
        moved = replace(batch, items=replace(batch.items, row=len(order) - 1 - batch.items.row))
        torch.testing.assert_close(task.logits(moved)[0], whole)


def test_every_parameter_gets_a_gradient(world):
    """Data-parallel training stops at one without; also when nothing can be compared."""
    task = with_options(world, SATA, {"tiers": 3}).train()
    for has in (True, False):
        task.embedder.refresh(task.embedder.content_table, task.embedder.has_content & has)
        task.zero_grad()
        task(batch_of(world, task))["log_loss"].backward()
        assert [name for name, p in task.named_parameters() if p.grad is None] == []
        grads = {name: p.grad for name, p in task.ranker.content.named_parameters()}
        assert all(grad.isfinite().all() for grad in grads.values()) and grads["unknown"].any()
        assert bool(grads["log_tau"].any()) == has


def test_nothing_is_compared_when_no_option_asks(world, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("compared")

    monkeypatch.setattr(ItemEmbedder, "similarity", refuse)
    task = make_task(world, DIN)
    seen = []
    task.ranker.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        task.logits(batch_of(world, task))
    assert seen[0].similarity is None
    with pytest.raises(AssertionError, match="compared"):
        compared = make_task(world, SATA)
        compared.logits(batch_of(world, compared))


def test_what_cannot_be_compared_is_refused():
    table = {"name": "table", "path": "x"}
    for values, message in (
        ({"simtier": {"tiers": 4}}, "give embedder.content"),
        ({"ranker": SATA}, "give embedder.content"),
        ({"ranker": {"name": "lr"}, "simtier": {}, "embedder": {"content": table}}, "lr is linear"),
        ({"ranker": {"name": "lr"}, "embedder": {"content": table | {"shown_in": "history"}}}, "reads targets alone"),
    ):
        with pytest.raises(ValueError, match=message):
            RankingTaskConfig.parse(values)
    with pytest.raises(ValueError, match="set weights: softmax"):
        RankingTaskConfig.parse({"ranker": {"name": "din", "content_attention": True}, "embedder": {"content": table}})


@pytest.mark.parametrize(
    ("ranker", "simtier", "shown_in"), [(SATA, None, "both"), (DIN, {"tiers": 3}, "both"), (DIN, None, "target")]
)
def test_onnx_is_refused_with_the_reason(world, ranker, simtier, shown_in, tmp_path):
    content = {"name": "table", "path": "/nowhere/e", "dim": 3, "hidden": [4], "shown_in": shown_in}
    run = save_run(world, with_options(world, ranker, simtier, content=content), tmp_path / "run")
    with pytest.raises(ValueError, match="simtier, content_attention and shown_in"):
        export_ranker(run, tmp_path, None, False)
