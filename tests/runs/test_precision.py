"""Encoders in fewer bits: near to fp32, faster ones chosen by measuring, and never mixed in one folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mmctr.cli.main import main
from mmctr.data.batches import ItemBatch
from mmctr.data.embeddings import EmbeddingTable
from mmctr.export.onnx_encoder import cosines, drawn_inputs
from mmctr.manifests import write_manifest
from mmctr.runs import embed as embed_module
from mmctr.runs.precision import Measured, choose, lower
from tests.export.test_onnx_encoder import save_run, task_of
from tests.helpers.tiny import start


@pytest.mark.parametrize("name", ["openclip", "hf", "towers"])
@pytest.mark.parametrize("precision", ["bf16", "int8"])
@torch.inference_mode()
def test_vectors_of_fewer_bits_are_near(name, precision):
    task, exact = (task_of(name, projection={"dim": 8}) for _ in range(2))
    items = ItemBatch(row=torch.arange(12), **drawn_inputs(exact, 32, 12))
    lower(task, precision)
    (rough, has), (vectors, expected) = task.embed(items), exact.embed(items)
    assert torch.equal(has, expected) and rough.dtype == torch.float32
    cosine = cosines(rough[has].numpy(), vectors[has].numpy())
    assert cosine.min() > 0.98 and not torch.equal(rough, vectors)
    weights = dict(task.named_parameters())
    assert weights["image_projection.0.weight"].dtype == torch.float32
    if precision == "bf16":
        assert {p.dtype for part in ("image", "text") for p in task.encoder.tower_parameters(part)} == {torch.bfloat16}
    else:
        assert len(weights) < len(dict(exact.named_parameters()))


class Slow(nn.Module):
    """A task whose vectors and cost are its precision's."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.precision = "fp32"


@pytest.mark.parametrize(
    ("seconds", "angle", "expected"),
    [
        ({"fp32": 3, "bf16": 2, "int8": 1}, {"bf16": 0.01, "int8": 0.02}, "int8"),
        ({"fp32": 3, "bf16": 2, "int8": 1}, {"bf16": 0.01, "int8": 0.2}, "bf16"),
        ({"fp32": 3, "bf16": 4, "int8": 5}, {"bf16": 0.0, "int8": 0.0}, "fp32"),
        ({"fp32": 3, "bf16": 1, "int8": 1}, {"bf16": 0.1, "int8": 0.1}, "fp32"),
    ],
)
def test_the_fastest_that_keeps_the_vectors_is_chosen(monkeypatch, seconds, angle, expected):
    now = 0.0

    def embed(task, batch):
        nonlocal now
        now += seconds[task.precision]
        turn = torch.tensor(angle.get(task.precision, 0.0))
        return torch.stack([turn.cos(), turn.sin()])[None].expand(len(batch), 2), torch.ones(
            len(batch), dtype=torch.bool
        )

    monkeypatch.setattr("mmctr.runs.precision.time.perf_counter", lambda: now)
    monkeypatch.setattr("mmctr.runs.precision.lower", lambda task, name: setattr(task, "precision", name))
    measured = choose(Slow(), [range(6), range(6)], embed)  # type: ignore[arg-type]
    assert measured.precision == expected
    assert measured.rates == {name: round(12 / (2 * cost), 2) for name, cost in seconds.items()}
    for name, turn in angle.items():
        assert measured.min_cosine[name] == pytest.approx(np.cos(turn), abs=1e-6)
    assert f"precision {expected}: fp32 2 items/s" in str(measured)


@pytest.fixture
def run(toy_folder, tmp_path) -> Path:
    folder = save_run(task_of(encoder={"image": "frozen"}), tmp_path / "run")
    (folder / "config.yaml").write_text(json.dumps({"data": {"path": str(toy_folder)}}))
    return folder


def embed(run: Path, out: Path, *options: str) -> dict:
    main(["embed", str(run), "--out", str(out), "--shard-size", "50", *options])
    return json.loads((out / "manifest.json").read_text())


def test_embed_in_fewer_bits(run, tmp_path, capsys):
    """Frozen towers too, whose kept features are in fp32."""
    assert "precision" not in embed(run, tmp_path / "fp32")["identity"]
    assert embed(run, tmp_path / "bf16", "--precision", "bf16")["identity"]["precision"] == "bf16"
    exact, rough = (EmbeddingTable.read(tmp_path / name).vectors for name in ("fp32", "bf16"))
    assert cosines(exact, rough).min() > 0.995 and (exact != rough).any(1).all()
    with pytest.raises(SystemExit):
        main(["embed", str(run), "--out", str(tmp_path / "fp32"), "--precision", "bf16", "--shard-size", "50"])
    assert "another run or dataset" in capsys.readouterr().err


def test_auto_is_one_precision_for_good(run, tmp_path, monkeypatch, capsys):
    """What it was begun with holds for whoever goes on, also where something else is faster now."""
    found = Measured("bf16", {"fp32": 1.0, "bf16": 2.0}, {"fp32": 1.0, "bf16": 0.9999})
    monkeypatch.setattr(embed_module, "choose", lambda *_: found)
    out = tmp_path / "out"
    first = embed(run, out, "--precision", "auto")
    assert first["identity"]["precision"] == "bf16" and first["facts"] == found.facts()
    assert "precision bf16: fp32 1 items/s" in capsys.readouterr().out
    before = EmbeddingTable.read(out).vectors
    # as if killed before the last shard
    (out / "manifest.json").unlink()
    write_manifest(out / "begun.json", {"identity": first["identity"], "facts": first["facts"]}, [])
    sorted(out.glob("vectors-*"))[-1].unlink()
    monkeypatch.setattr(embed_module, "choose", lambda *_: pytest.fail("measured again"))
    assert embed(run, out, "--precision", "auto") == first
    np.testing.assert_array_equal(EmbeddingTable.read(out).vectors, before)
    assert "precision bf16: as in " in capsys.readouterr().out
    assert embed(run, out, "--precision", "bf16") == first


def test_auto_measures_this_catalog(run, tmp_path, capsys):
    manifest = embed(run, tmp_path / "out", "--precision", "auto")
    facts = manifest["facts"]
    chosen = manifest["identity"].get("precision", "fp32")
    fit = {name for name, cosine in facts["min_cosine"].items() if cosine >= 0.999}
    assert set(facts["items_per_s"]) == {"fp32", "bf16", "int8"} and chosen in fit
    assert facts["items_per_s"][chosen] == max(facts["items_per_s"][name] for name in fit)
    assert f"precision {chosen}: fp32" in capsys.readouterr().out


@pytest.mark.slow
def test_processes_use_one_choice(run, tmp_path):
    """Which one is fastest is close here, and processes would often differ."""
    out = tmp_path / "out"
    arguments = ["embed", run, "--out", out, "--shard-size", "20", "--precision", "auto"]
    said = start(tmp_path / "log", "mmctr", *arguments, processes=2).ok()
    manifest = json.loads((out / "manifest.json").read_text())
    chosen = manifest["identity"].get("precision", "fp32")
    assert said.count("items/s (cosine") == 3 and f"precision {chosen}: fp32" in said
    alone = embed(run, tmp_path / "alone", "--precision", chosen)
    assert alone["identity"].get("precision", "fp32") == chosen
    two, one = (EmbeddingTable.read(folder).vectors for folder in (out, tmp_path / "alone"))
    np.testing.assert_allclose(two, one, atol=1e-5)
