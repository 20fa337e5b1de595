"""ONNX graphs of rankers on IDs alone, and on columns with names that torch keeps for itself."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmctr.cli.main import main
from tests.helpers.tiny import finetune_values, start, write_config

pytestmark = pytest.mark.slow
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def test_a_ranker_without_content(runs, tmp_path, capsys):
    main(["export", str(runs / "id"), "--format", "onnx", "--out", str(tmp_path / "onnx")])
    assert "differs from torch by" in capsys.readouterr().out and (tmp_path / "onnx" / "ranker.onnx").is_file()


def test_columns_of_any_name(toy_folder, tmp_path, capsys):
    """Trained, loaded, scored and exported."""
    (tmp_path / "d").mkdir()
    items, log = (pq.read_table(toy_folder / f"{name}.parquet") for name in ("items", "interactions"))
    words = pa.array(["x", "y"])
    pick = np.random.default_rng(0).integers(0, 2, len(log))
    pq.write_table(
        items.append_column("type", words.take(pa.array(pick[: len(items)]))), tmp_path / "d" / "items.parquet"
    )
    log = log.append_column("price.usd", pa.array(pick * 1.5)).append_column("values", words.take(pa.array(pick)))
    pq.write_table(log.append_column("a/b é", words.take(pa.array(pick))), tmp_path / "d" / "interactions.parquet")
    values = finetune_values(tmp_path / "d", None, epochs=1)
    values["task"]["features"] = {
        "item": {"type": {"name": "categorical"}},
        "context": {
            "price.usd": {"name": "numeric"},
            "values": {"name": "categorical"},
            "a/b é": {"name": "multi_valued"},
        },
    }
    start(tmp_path, "finetune.train", write_config(tmp_path / "c.yaml", values), f"run_dir={tmp_path / 'run'}").ok()
    main(["export", str(tmp_path / "run"), "--format", "onnx", "--out", str(tmp_path / "onnx")])
    assert "differs from torch by" in capsys.readouterr().out
    ports = json.loads((tmp_path / "onnx" / "onnx.json").read_text())["graphs"]["ranker.onnx"]["inputs"]
    assert {"feature.price.usd", "feature.values", "feature.a/b é"} <= set(ports)
