"""Exported encoders give the vectors of `PretrainTask.embed`, whatever an item lacks and however many there are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmctr.cli.main import main
from mmctr.data.batches import ItemBatch
from mmctr.export.onnx_encoder import cosines, drawn_inputs, graphs_of
from mmctr.export.onnx_graph import Session, write_graph
from mmctr.files import write_json
from mmctr.runs.finished import load_encoder
from mmctr.tasks import PretrainTask, PretrainTaskConfig
from tests.encoders.test_encoders import ENCODERS
from tests.helpers.towers import open_adapters


def task_of(name: str = "openclip", encoder: dict[str, Any] | None = None, **values: Any) -> PretrainTask:
    torch.manual_seed(0)
    config = {"encoder": ENCODERS[name] | (encoder or {}), **values}
    return PretrainTask(PretrainTaskConfig.parse(config)).eval()


def save_run(task: PretrainTask, run: Path) -> Path:
    task.save(run)
    write_json(
        run / "config.yaml", {"data": {"path": str(run / "nowhere"), "image_resize": "squash"}, "run_dir": str(run)}
    )
    return run


def test_an_exported_run(tmp_path, capsys):
    """Adapters are merged into the text tower, the image tower is frozen."""
    task = task_of(encoder={"image": "frozen", "text": "lora"})
    open_adapters(task.encoder)
    run, out = save_run(task, tmp_path / "run"), tmp_path / "out"
    main(["export", str(run), "--format", "onnx", "--out", str(out), "--int8"])
    said = capsys.readouterr().out
    manifest = json.loads((out / "onnx.json").read_text())
    assert manifest["pictures"]["resize"] == "squash" and manifest["pictures"]["size"] == 32
    assert str(tmp_path) not in json.dumps(manifest)

    # pictures and texts of a server: made as the manifest says
    texts = [example["text"] for example in manifest["tokenizer"]["examples"]]
    input_ids = torch.tensor([example["input_ids"] for example in manifest["tokenizer"]["examples"]])
    assert torch.equal(input_ids, task.encoder.tokenize(texts).long())
    count = len(texts)
    inputs = {
        "image": torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8),
        "has_image": torch.tensor([True, False, True, False, True]),
        "input_ids": input_ids,
        "has_text": torch.tensor([True, True, False, False, True]),
    }
    with torch.no_grad():
        vectors, has = load_encoder(run).embed(ItemBatch(row=torch.arange(count), **inputs))
        image, text = (
            task.image_features(ItemBatch(row=torch.arange(count), **inputs)),
            task.text_features(ItemBatch(row=torch.arange(count), **inputs)),
        )
    found = Session(out / "item.onnx")(inputs)
    np.testing.assert_allclose(found["vector"], vectors.numpy(), atol=1e-4)
    assert found["has_content"].tolist() == has.tolist() == [True, True, True, False, True]
    assert (found["vector"][3] == 0).all()
    for name, port, expected in (("image", "image", image), ("text", "input_ids", text)):
        for some in (slice(0, 1), slice(0, count)):
            got = Session(out / f"{name}.onnx")({port: inputs[port][some]})["vector"]
            np.testing.assert_allclose(got, expected[some].numpy(), atol=1e-4)

    for name, entry in manifest["graphs"].items():
        facts = entry["int8"]
        assert entry["max_difference"] < 1e-4 and f"{name}: differs from torch by" in said
        given = {port: inputs[port] for port in entry["inputs"]}
        exact, rough = (Session(out / file)(given)["vector"] for file in (name, facts["file"]))
        cosine = cosines(exact, rough)[[0, 1, 2, 4]]
        assert 0.9 < facts["differences"]["min_cosine"] < 1 and cosine.min() > 0.9 and (exact != rough).any()
        assert facts["megabytes"] < entry["megabytes"] and facts["int8_products"] > 0 and not facts["warning"]


@pytest.mark.lowest
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("hf", {"item_vector": "concat"}),
        ("towers", {"projection": {"dim": 8}, "head": {"name": "beta_vae", "dim": 6}}),
    ],
)
def test_the_item_graph_of_other_tasks(name, values, tmp_path):
    """Side by side; means of latents, of transformers' towers."""
    task = task_of(name, **values)
    drawn = drawn_inputs(task, 32, 7)
    *_, graph = graphs_of(task, drawn, embeds=True)
    checks = []
    for count in (1, 5):
        inputs = {port: drawn[port][:count] for port in graph.inputs}
        with torch.no_grad():
            vector, has = task.embed(ItemBatch(row=torch.arange(count), **inputs))
        checks.append((inputs, {"vector": vector, "has_content": has}))
    entry = write_graph(graph, tmp_path, checks)
    assert graph.name == "item" and entry["outputs"]["vector"]["shape"] == ["B", task.embedding_dim]
    assert entry["max_difference"] < 1e-4 and entry["checked_sizes"] == [{"B": 1}, {"B": 5}]
    assert len(np.unique(checks[1][1]["vector"].numpy(), axis=0)) == 5


def test_towers_without_a_common_space_have_no_item_graph():
    task = task_of("towers")
    drawn = drawn_inputs(task, 32, 3)
    found = {}
    for graph in graphs_of(task, drawn, embeds=False):
        found[graph.name] = graph.module({port: drawn[port] for port in graph.inputs})["vector"]
    assert list(found) == ["image", "text"]
    items = ItemBatch(row=torch.arange(3), image=drawn["image"], has_image=torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(found["image"], task.image_features(items))
