"""DIN with two attentions, by content and by ID, against a padded version that says it in full."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import pad

from mmctr.layers.jagged import segment_ids
from mmctr.rankers.base import RankerInput
from mmctr.rankers.din import DIN, DINConfig
from mmctr.tasks import RankingTask, RankingTaskConfig
from tests.helpers.references import repeated
from tests.helpers.serving import ServingWorld, make_task, make_world, ranking_data
from tests.rankers.test_din import explicit_unit

D, C = 7, 3
COLUMNS = {"id": slice(0, 2), "content": slice(4, 7)}  # side features between them
LENGTHS = [3, 0, 1, 5]
CONTENT = {"name": "table", "path": "x"}


def din(weights="intensity", activation="dice") -> DIN:
    torch.manual_seed(0)
    config = DINConfig(attention=[6, 5], mlp=[7], weights=weights, activation=activation, multi_query=True)
    model = config.build(D, C, columns=COLUMNS)
    for name, parameter in model.named_parameters():
        if name.endswith("alpha"):
            torch.nn.init.normal_(parameter)
    return model


def padded_reference(model: DIN, x: RankerInput) -> torch.Tensor:
    segments, longest = segment_ids(x.history_offsets, len(x.history)), 9
    target, history = x.items[x.target], x.items[x.history]
    scores = [
        explicit_unit(unit, target[segments][:, first:last], history[:, first:last])
        for unit, (first, last) in ((model.unit, (4, 7)), (model.id_unit, (0, 2)))
    ]
    rows = []
    for b in range(len(x.target)):
        start, end = x.history_offsets[b : b + 2].tolist()
        keys = pad(history[start:end], (0, 0, 0, longest - (end - start)))
        sums = []
        for score in scores:
            a = score[start:end]
            a = torch.softmax(a, 0) if model.config.weights == "softmax" else a
            sums.append((pad(a, (0, longest - len(a)))[:, None] * keys).sum(0))
        rows.append(torch.cat([x.context[b], target[b], *sums, *(total * target[b] for total in sums)]))
    return model.mlp(torch.stack(rows)).squeeze(1)


@pytest.mark.parametrize("activation", ["dice", "relu"])
@pytest.mark.parametrize("weights", ["intensity", "softmax"])
def test_equals_the_padded_version_in_value_and_gradient(weights, activation):
    model, x = din(weights, activation).train(), repeated(LENGTHS, 12, D, C)
    results = []
    for forward in (lambda: model(x).logits, lambda: padded_reference(model, x)):
        model.zero_grad()
        x.items.grad = x.context.grad = None
        logits = forward()
        (logits * torch.arange(1.0, 5)).sum().backward()
        leaves = [x.items, x.context, *model.parameters()]
        results.append([logits.detach(), *(leaf.grad.clone() for leaf in leaves)])
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    names = [name for name, _ in model.named_parameters()]
    assert any(name.startswith("id_unit.") for name in names) and results[0][1].abs().sum(0).all()


def test_each_attention_sees_its_own_columns_alone():
    model, x = din(), repeated(LENGTHS, 12, D, C)
    model.eval()
    seen = []
    for unit in (model.unit, model.id_unit):
        unit.register_forward_hook(lambda module, arguments, output: seen.append(output))
    with torch.no_grad():
        model(x)
        for columns, moves in ((slice(4, 7), [True, False]), (slice(0, 2), [False, True]), (slice(2, 4), [False] * 2)):
            before, items = seen[:2], x.items.clone()
            items[:, columns] += 1
            del seen[2:]
            model(replace(x, items=items))
            assert [not torch.equal(a, b) for a, b in zip(before, seen[2:], strict=True)] == moves
        weights = model(x).history_weights
        assert weights is not None
        torch.testing.assert_close(weights, (seen[0] + seen[1]) / 2)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> ServingWorld:
    return make_world(tmp_path_factory.mktemp("queries") / "data")


def test_a_task_says_which_columns_are_content_and_ids(world, tmp_path):
    task = make_task(world, {"name": "din", "attention": [4], "mlp": [5], "multi_query": True})
    batch = ranking_data(world, task).collator(world.splits.test)(np.arange(20))
    items, embedder = batch.items, task.embedder
    with torch.no_grad():
        vectors = embedder(items)
        content = embedder.adapter(embedder.content_table[items.row], embedder.has_content[items.row])
        content_columns, id_columns = task.ranker.columns
        torch.testing.assert_close(vectors[:, content_columns], content)
        torch.testing.assert_close(vectors[:, id_columns], embedder.ids(items.features["item_id"]))
        assert embedder.dim > 6  # side features are in between
        logits = task.logits(batch)[0]
        task.save(tmp_path)
        assert torch.equal(RankingTask.load(tmp_path).logits(batch)[0], logits)


@pytest.mark.parametrize(
    ("embedder", "ranker", "message"),
    [
        ({"content": CONTENT, "fusion": "project"}, {}, "fusion: project mixes them; set embedder.fusion: concat"),
        ({}, {}, "there is no content; give embedder.content"),
        ({"content": CONTENT, "id_dim": 0}, {}, "there are no IDs; set embedder.id_dim above 0"),
        ({"content": CONTENT}, {"weights": "softmax", "content_attention": True}, "keep one of them"),
    ],
)
def test_where_there_are_no_two_queries_it_is_refused(embedder, ranker, message):
    with pytest.raises(ValueError, match=message):
        RankingTaskConfig.parse({"embedder": embedder, "ranker": {"name": "din", "multi_query": True} | ranker})
    with pytest.raises(ValueError, match="multi_query needs the columns"):
        DINConfig(multi_query=True).build(D, C)
