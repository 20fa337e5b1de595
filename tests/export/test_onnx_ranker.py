"""Exported rankers score raw columns as the task scores batches, at sizes they were not exported with."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mmctr.cli.main import main
from mmctr.data.batches import Jagged
from mmctr.export.onnx_graph import Axis, Graph, Port, Session, int8_entry, quantise, write_graph
from mmctr.export.onnx_ranker import PREFIX, RankerGraph, catalog_vectors, context_features, draw, export_ranker
from mmctr.export.padded_rankers import padded_logits
from mmctr.features.trees import TreesConfig
from mmctr.layers.mlp import MLP
from mmctr.tasks import RankingTask
from tests.helpers.serving import MAX_HISTORY, ServingWorld, make_task, make_world, ranking_data, save_run
from tests.helpers.tiny import CLONE

RANKERS = {
    "lr": {"name": "lr"},
    "ls_plm": {"name": "ls_plm", "pieces": 3},
    "embedding_mlp": {"name": "embedding_mlp", "mlp": [5], "activation": "dice"},
    "din": {"name": "din", "attention": [6, 4], "mlp": [5]},
    "dien": {"name": "dien", "mlp": [5], "hidden_dim": 4},
}
VARIANTS = RANKERS | {
    "embedding_mlp sum": {"name": "embedding_mlp", "mlp": [5], "pooling": "sum"},
    "din multi_query": {"name": "din", "attention": [6], "mlp": [5], "multi_query": True},
    "din softmax": {"name": "din", "attention": [6], "mlp": [], "weights": "softmax", "activation": "prelu"},
    "dien augru_official": {"name": "dien", "mlp": [5], "gate": "augru_official"},
    "dien agru": {"name": "dien", "mlp": [5], "gate": "agru"},
    "dien aigru": {"name": "dien", "mlp": [5], "gate": "aigru", "activation": "relu"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> ServingWorld:
    return make_world(tmp_path_factory.mktemp("serving") / "data")


@pytest.mark.parametrize("name", VARIANTS)
def test_the_padded_form_is_the_ranker(world, name):
    """Also with no behaviour anywhere, and whatever stands in the padding."""
    task = make_task(world, VARIANTS[name])
    vectors, _ = catalog_vectors(task, world.dataset)
    graph = RankerGraph(task)
    for sizes in ((6, 5, 3), (1, 0, 0), (4, 1, 1)):
        inputs, expected = draw(task, vectors, *sizes)
        with torch.no_grad():
            torch.testing.assert_close(graph(inputs)["logit"], expected["logit"], rtol=1e-4, atol=1e-4)
            if "history" in inputs:
                there = torch.arange(sizes[1])[None] < inputs["history_length"][:, None]
                inputs["history"] = torch.where(there[..., None], inputs["history"], torch.nan)
                torch.testing.assert_close(graph(inputs)["logit"], expected["logit"], rtol=1e-4, atol=1e-4)
    assert len(draw(task, vectors, 6, 5, 3)[1]["logit"].unique()) == 6


def test_a_ranker_without_a_padded_form_is_refused():
    x = torch.zeros(1, 1, 2)
    with pytest.raises(ValueError, match="MLP has no padded form"):
        padded_logits(MLP(2, [], 1, "relu"), x[0], x, torch.ones(1), x[0])


def raw_inputs(world: ServingWorld, task, rows: np.ndarray, vectors: Tensor) -> dict[str, Tensor]:
    """What a server that knows the raw tables, the vectors and the vocabularies gives to the graph.

    Crosses alone are taken from the batch: their hash is the one thing a server has to write itself.
    """
    part = world.splits.test
    log = world.dataset.interactions
    users, columns = world.columns["users"], world.columns["log"]
    batch = ranking_data(world, task).collator(part)(rows)
    histories = [
        part.history[a:b][-MAX_HISTORY:] for a, b in zip(part.history_start[rows], part.history_end[rows], strict=True)
    ]
    length = max(map(len, histories))
    history = torch.full((len(rows), length, vectors.shape[1]), 7.0)
    for row, items in zip(history, histories, strict=True):
        row[: len(items)] = vectors[torch.from_numpy(np.asarray(items, np.int64))]
    known = task.vocabulary.user_ids.to_pylist()
    user_ids = [world.dataset.users["user_id"][int(u)].as_py() for u in part.user[rows]]
    inputs = {
        "target": vectors[torch.from_numpy(part.item[rows].astype(np.int64))],
        "history": history,
        "history_length": torch.tensor([len(items) for items in histories]),
        "user": torch.tensor([known.index(user) + 1 if user in known else 0 for user in user_ids]),
    }
    # the timestamp is the number of the row in the raw log
    raw_rows = [int(log.time[i]) for i in part.source[rows]]
    features, vocabularies = context_features(task)
    for name, config in features.items():
        if config.__class__.__name__ == "CrossFeature":
            inputs[PREFIX + name] = padded(batch.context[name])
            continue
        where = users if name in users else columns
        values = [
            where[name][users["user_id"].index(u) if name in users else r]
            for u, r in zip(user_ids, raw_rows, strict=True)
        ]
        words = vocabularies[name].values
        if config.name == "numeric":
            inputs[PREFIX + name] = torch.tensor([np.nan if v is None else v for v in values], dtype=torch.float64)
        elif config.name == "categorical":
            inputs[PREFIX + name] = torch.tensor([words.index(v) + 1 if v in words else 0 for v in values])
        else:
            lists = [[words.index(w) + 1 if w in words else 0 for w in (v or "").split("|") if w] for v in values]
            longest = max(map(len, lists))
            inputs[PREFIX + name] = torch.tensor([row + [0] * (longest - len(row)) for row in lists])
    return inputs


def padded(feature: Any) -> Tensor:
    assert isinstance(feature, Jagged)
    return torch.nn.utils.rnn.pad_sequence(
        list(feature.values.split(feature.offsets.diff().tolist())), batch_first=True
    )


@pytest.mark.lowest
@pytest.mark.parametrize("name", RANKERS)
def test_an_exported_ranker_scores_as_the_task(world, name, tmp_path, capsys):
    task = make_task(world, RANKERS[name], all_features=name in ("lr", "din"))
    save_run(world, task, tmp_path / "run")
    options = ["--int8"] if name == "din" else []
    main(["export", str(tmp_path / "run"), "--format", "onnx", "--out", str(tmp_path / "out"), *options])
    said = capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / "onnx.json").read_text())
    entry = manifest["graphs"]["ranker.onnx"]
    assert "ranker.onnx: differs from torch by" in said and 0 < entry["max_difference"] < 1e-4
    stored = load_file(tmp_path / "out" / "items.safetensors")
    items = pq.read_table(tmp_path / "out" / "items.parquet")
    assert items["item_id"].to_pylist() == world.columns["items"]["item_id"]
    assert items["title"].to_pylist() == world.columns["items"]["title"]
    assert str(tmp_path) not in (tmp_path / "out" / "onnx.json").read_text()

    session = Session(tmp_path / "out" / "ranker.onnx")
    collator, count = ranking_data(world, task).collator(world.splits.test), 0
    for rows in np.split(np.arange(len(world.splits.test)), [1, 4]):  # 1, 3 and all other impressions
        inputs = raw_inputs(world, task, rows, stored["vectors"])
        assert set(entry["inputs"]) <= set(inputs)
        found = session({port: inputs[port] for port in entry["inputs"]})
        with torch.no_grad():
            logits = task.logits(collator(rows))[0]
        np.testing.assert_allclose(found["logit"], logits.numpy(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found["probability"], torch.sigmoid(logits).numpy(), atol=1e-4)
        count += len(np.unique(found["logit"]))
    assert count > 20 and (items["id_row"].to_numpy() == 0).any()
    if name == "din":
        facts = entry["int8"]
        rough = Session(tmp_path / "out" / facts["file"])({port: inputs[port] for port in entry["inputs"]})
        assert np.abs(rough["probability"] - found["probability"]).max() > 0
        limit = facts["differences"]["max_probability_difference"]
        assert bool(facts["warning"]) == (limit > 0.02) and f"max probability difference {limit:.4g}" in said


def test_an_unknown_item_is_one_of_which_nothing_is_known(world):
    """As the task scores an item of another catalog, all of whose columns are empty."""
    task = make_task(world, RANKERS["din"])
    vectors, unknown = catalog_vectors(task, world.dataset)
    e = task.embedder
    parts = [
        e.ids.weight[0],
        e.features.tables["brand"].weight[0],
        torch.zeros(3),  # no genre
        torch.tensor([0.0, 1.0]),  # no price
        e.adapter.layers(e.adapter.absent[None])[0],
    ]
    torch.testing.assert_close(unknown, torch.cat(parts))
    assert len(vectors) == 30 and e.has_content.sum() == world.content[1].sum()


def test_what_cannot_be_exported_is_one_line(world, tmp_path, capsys, monkeypatch):
    def refused(*arguments: Any) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(["export", *map(str, arguments), "--format", "onnx"])
        error = capsys.readouterr().err
        assert stopped.value.code == 1 and error.startswith("error: ") and error.count("\n") == 1
        return error

    assert "not the folder of a finished run" in refused(tmp_path, "--out", tmp_path / "o")
    run = save_run(world, make_task(world, RANKERS["lr"]), tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    assert "would be replaced: no ONNX export of mmctr" in refused(run, "--out", tmp_path / "full")
    monkeypatch.setattr("mmctr.export.onnx_export.find_spec", lambda name: None if name == "onnxruntime" else name)
    assert "needs onnxruntime: pip install 'mmctr[onnx]'" in refused(run, "--out", tmp_path / "o")


class Wrong(torch.nn.Module):
    """Differs from itself once it is exported, and knows one size alone."""

    def __init__(self, one_size: bool):
        super().__init__()
        self.one_size = one_size

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x = inputs["x"]
        if self.one_size:
            return {"y": x + torch.ones(len(x))}
        return {"y": x + 0.001 * torch.compiler.is_compiling()}


@pytest.mark.parametrize(("one_size", "message"), [(False, "differs from torch by 1.00e-03"), (True, "on sizes")])
def test_a_graph_that_is_not_the_model_is_refused(tmp_path, one_size, message):
    port = {"x": Port([Axis("B")], "float32", "")}
    graph = Graph("wrong", Wrong(one_size), {"x": torch.zeros(3)}, port, {"y": port["x"]})
    with pytest.raises(ValueError, match=message):
        write_graph(graph, tmp_path, [({"x": torch.zeros(2)}, {"y": torch.zeros(2)})])


def test_a_graph_without_matrix_products_gains_nothing_from_int8(tmp_path):
    port = {"x": Port([Axis("B")], "float32", "")}
    graph = Graph("add", Wrong(False), {"x": torch.zeros(3)}, port, {"y": port["x"]})
    write_graph(graph, tmp_path, [])
    entry = int8_entry(quantise(tmp_path / "add.onnx"), {"min_cosine": 1.0}, "")
    assert entry["int8_products"] == 0 and "nothing is gained" in entry["warning"]


def test_no_module_imports_onnx_until_it_is_asked_to():
    """It is an extra: everything else must work without it."""
    for path in (CLONE / "mmctr").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] in ("onnx", "onnxscript", "onnxruntime")], path


def test_trees_are_refused_with_the_reason(world, tmp_path):
    task = make_task(world, RANKERS["lr"])
    trees = ranking_data(world, task).fit_trees(TreesConfig(num_trees=3, min_rows=5), world.splits.train, 0.0, 0)
    config = type(task.config).parse(task.config.model_dump(mode="json") | {"ranker": {"name": "gbdt_lr"}})
    leafy = RankingTask(config, replace(task.vocabulary, trees=trees), world.content)
    save_run(world, leafy, tmp_path / "run")
    with pytest.raises(ValueError, match="gbdt_lr has no graph: the trees are LightGBM's"):
        export_ranker(tmp_path / "run", tmp_path, None, False)
