"""Exports read back by us and, where they are installed, by the libraries they are for (see benchmarks/exports.py)."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from mmctr.data.embeddings import EmbeddingTable
from mmctr.export.formats import FORMATS, export
from tests.cli.test_main import output, refused
from tests.helpers.tiny import CLONE

KINDS = {"integers": [2**40, 7, 10], "text": ["a b", "07", "Größe, 1"]}
VECTORS = np.array([[0.1, -1e-30, 3.4e38, 2], [1 / 3, 0, -0.0, 5e-9], [123456.79, 7, 1e-7, -2.5]], np.float32)


@pytest.fixture(params=KINDS)
def source(request, tmp_path):
    """(path of a table, its ids)."""
    np.savez(tmp_path / "source.npz", item_id=np.array(KINDS[request.param]), vectors=VECTORS)
    return str(tmp_path / "source.npz"), KINDS[request.param]


@pytest.mark.parametrize("form", ["parquet", "npz", "safetensors"])
def test_read_back_as_an_embedding_table(form, source, tmp_path):
    path, ids = source
    told = export(path, form, tmp_path / "new" / f"v.{form}")
    assert told == f"{tmp_path / 'new' / f'v.{form}'}: 3 vectors of 4 dimensions"
    table = EmbeddingTable.read(tmp_path / "new" / f"v.{form}")
    assert table.ids.to_pylist() == ids
    assert table.vectors.tobytes() == VECTORS.tobytes()


def test_parquet_is_of_a_fixed_size(source, tmp_path):
    path, _ = source
    export(path, "parquet", tmp_path / "v.parquet")
    assert pq.read_schema(tmp_path / "v.parquet").field("vector").type == pa.list_(pa.float32(), 4)


def test_datasets(source, tmp_path):
    import datasets

    path, ids = source
    export(path, "datasets", tmp_path / "d")
    export(path, "datasets", tmp_path / "d")  # its own folder is replaced
    loaded = datasets.load_from_disk(tmp_path / "d")
    assert list(loaded["item_id"]) == ids
    np.testing.assert_array_equal(loaded.with_format("numpy")["vector"][:], VECTORS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="mine: the folder is not empty, and would be replaced: no exported dataset"):
        export(path, "datasets", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_fuxictr_file(source, tmp_path):
    path, ids = source
    told = export(path, "fuxictr", tmp_path / "v.npz")
    with np.load(tmp_path / "v.npz", allow_pickle=False) as arrays:
        assert arrays["key"].tolist() == ids and arrays["value"].tobytes() == VECTORS.tobytes()
    lines = (tmp_path / "v.npz.yaml").read_text()
    assert lines in told
    (column,) = yaml.safe_load(lines)["feature_cols"]
    assert column["pretrained_emb"] == str(tmp_path / "v.npz") and column["pretrain_dim"] == 4


def test_recbole_file(source, tmp_path):
    path, ids = source
    export(path, "recbole", tmp_path / "shop" / "shop.pictures")
    head, *lines = (tmp_path / "shop" / "shop.pictures").read_text(encoding="utf-8").splitlines()
    assert head == "iid:token\titem_vector:float_seq"
    rows = [line.split("\t") for line in lines]
    assert [row[0] for row in rows] == [str(item) for item in ids]
    read = np.array([[float(x) for x in row[1].split(" ")] for row in rows]).astype(np.float32)
    assert read.tobytes() == VECTORS.tobytes()
    config = yaml.safe_load((tmp_path / "shop" / "shop.pictures.yaml").read_text())
    assert config == {
        "additional_feat_suffix": ["pictures"],
        "alias_of_item_id": ["iid"],
        "preload_weight": {"iid": "item_vector"},
    }


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_torcheasyrec_file(ending, source, tmp_path):
    path, ids = source
    export(path, "torcheasyrec", tmp_path / f"v.{ending}")
    config = (tmp_path / f"v.{ending}.config").read_text()
    assert "value_dim: 4\n" in config and ('separator: "|"' in config) == (ending == "csv")
    if ending == "parquet":
        table = pq.read_table(tmp_path / "v.parquet")
        assert pa.types.is_list(table.schema.field("item_vector").type)
        vectors = np.array(table["item_vector"].to_pylist(), np.float32)
    else:
        table = pa.csv.read_csv(
            tmp_path / "v.csv", convert_options=pa.csv.ConvertOptions(column_types={"item_id": "string"})
        )
        vectors = np.array([text.split("|") for text in table["item_vector"].to_pylist()], np.float32)
        ids = [str(item) for item in ids]
    assert table["item_id"].to_pylist() == ids and vectors.tobytes() == VECTORS.tobytes()


def test_mistakes_are_one_line_and_leave_what_was_there(tmp_path, capsys):
    np.savez(tmp_path / "v.npz", item_id=np.array([1, 2, 3]), vectors=VECTORS)
    for form, name, message in (
        ("parqet", "x", "did you mean 'parquet'?"),
        ("word2vec", "x", f"it is one of {', '.join(FORMATS)}"),
        ("parquet", "x.pq", "ends in .parquet"),
        ("npz", "x.npy", "ends in .npz"),
        ("fuxictr", "x.h5", "ends in .npz"),
        ("torcheasyrec", "x.npz", "ends in .parquet or .csv"),
        ("recbole", "shop", "DATASET.SUFFIX"),
        ("recbole", "shop.item", "the suffix being none of inter, user, item"),
    ):
        assert message in refused(capsys, "export", tmp_path / "v.npz", "--format", form, "--out", tmp_path / name)
        assert not (tmp_path / name).exists()
    assert "no such" in refused(capsys, "export", tmp_path / "none", "--format", "npz", "--out", tmp_path / "x.npz")
    for bad in ("tab\there", 'a "quote"', "NA", ""):
        np.savez(tmp_path / "bad.npz", item_id=np.array(["fine", bad]), vectors=VECTORS[:2])
        error = refused(capsys, "export", tmp_path / "bad.npz", "--format", "recbole", "--out", tmp_path / "s.emb")
        assert f"would not read the item id {bad!r}" in error
    pq.write_table(pa.table({"item_id": ["a\0", "b"], "v": VECTORS[:2].tolist()}), tmp_path / "zero.parquet")
    error = refused(capsys, "export", tmp_path / "zero.parquet", "--format", "npz", "--out", tmp_path / "z.npz")
    assert r"the id 'a\x00'" in error
    text = output(capsys, "export", tmp_path / "v.npz", "--format", "fuxictr", "--out", tmp_path / "f.npz")
    assert "pretrain_dim: 4" in text


def test_broken_safetensors_are_named(tmp_path):
    letters = np.frombuffer(b"abc", np.uint8)
    tensors = {
        "keys": ({"vectors": VECTORS}, "needs the tensors `item_id` and `vectors`"),
        "places": ({"vectors": VECTORS, "item_id": letters, "item_id_offsets": np.array([0, 1, 2])}, "not places"),
        "back": ({"vectors": VECTORS, "item_id": letters, "item_id_offsets": np.array([0, 2, 1, 3])}, "not places"),
        "bytes": (
            {"vectors": VECTORS, "item_id": letters | 128, "item_id_offsets": np.array([0, 1, 2, 3])},
            "not UTF-8",
        ),
        "count": ({"vectors": VECTORS, "item_id": np.array([1, 2])}, r"2 ids but vectors of shape \(3, 4\)"),
    }
    for name, (arrays, message) in tensors.items():
        save_file(arrays, tmp_path / f"{name}.safetensors")
        assert load_file(tmp_path / f"{name}.safetensors")  # the file itself is sound
        with pytest.raises(ValueError, match=rf"{name}\.safetensors.*{message}"):
            EmbeddingTable.read(tmp_path / f"{name}.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.safetensors: needs"):
        EmbeddingTable.read(tmp_path / "text.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("library", ["fuxictr", "recbole"])
def test_the_library_reads_the_same_vectors(library):
    pytest.importorskip(library)
    command = [sys.executable, str(CLONE / "benchmarks" / "exports.py"), library, "--items", "40"]
    done = subprocess.run(command, cwd=CLONE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["equal vectors"] == {"integers": 40, "text": 40}
