"""A pretraining run on a catalog with every kind of bad row: it goes on, counts them, and shifts nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from mmctr.data.embeddings import EmbeddingTable
from tests.data.test_catalog import bomb, noise
from tests.helpers.tiny import losses, pretrain_values, start, write_config
from tests.helpers.worlds import picture

pytestmark = pytest.mark.slow

ODD_TITLES = ["x" * 100_000, "猫 и собака 🐈", "a\0b", "\n\t", "'; DROP TABLE items; --"]
PICTURES = {"cut.jpg": noise()[:-400], "zero.jpg": b"", "text.jpg": b"I am no picture " * 50, "bomb.png": bomb()}
REJECTED = {"truncated": 1, "empty": 1, "not_a_picture": 1, "too_large": 1, "missing": 1, "escapes_folder": 1}


def write_catalogs(toy_folder: Path, folder: Path) -> tuple[Path, Path, set[int]]:
    """The toy catalog with a few odd titles; the same with bad rows between its rows, none of which is a pair; and the
    ids of those that have a picture or a text all the same."""
    toy = pyarrow.parquet.read_table(toy_folder / "items.parquet").to_pylist()
    for row, title in zip(toy, ODD_TITLES, strict=False):
        row["title"] = title
    good_picture = next(row["image"] for row in toy if row["image"])
    (folder / "secret.png").write_bytes(picture())
    bad = [{"title": "words", "image": f"bad/{name}"} for name in PICTURES]
    bad += [{"title": "words", "image": path} for path in ("images/gone.png", "../secret.png")]
    bad += [{"title": "words"}, {"image": good_picture}, {"title": "  ", "image": good_picture}]
    embedded = set(range(len(bad)))
    bad += [{}, {"item_id": None, "title": "words", "image": good_picture}]
    bad += [{"item_id": toy[0]["item_id"], "title": "the second of its id", "image": good_picture}]
    rows = []
    for number, row in enumerate(toy):
        rows += [row, *({"item_id": number} | values for values in bad[number : number + 1])]
    schema = pyarrow.parquet.read_schema(toy_folder / "items.parquet")
    for name, values in (("clean", toy), ("bad", rows)):
        shutil.copytree(toy_folder, folder / name)
        (folder / name / "bad").mkdir()
        pyarrow.parquet.write_table(pa.Table.from_pylist(values, schema), folder / name / "items.parquet")
        for file, data in PICTURES.items():
            (folder / name / "bad" / file).write_bytes(data)
    return folder / "clean", folder / "bad", embedded


@pytest.mark.parametrize(
    "objectives", [{"clip": {}}, {"clip": {}, "behavior": {}, "group": {"column": "factor_shape"}}]
)
def test_bad_rows_are_counted_and_shift_nothing(toy_folder, tmp_path, objectives):
    clean, bad, embedded = write_catalogs(toy_folder, tmp_path)
    runs, metrics = {}, {}
    for data in (clean, bad):
        values = pretrain_values(data, objectives=objectives)
        config = write_config(tmp_path / f"{data.name}.yaml", values)
        runs[data] = tmp_path / f"run_{data.name}"
        start(tmp_path, "pretrain.train", config, f"run_dir={runs[data]}").ok()
        metrics[data] = json.loads((runs[data] / "metrics.json").read_text())
    before, found = metrics[clean], metrics[bad]
    rejected = {
        reason: count - before["rejected_pictures"].get(reason, 0)
        for reason, count in found["rejected_pictures"].items()
    }
    assert rejected == REJECTED
    aside = found["items_set_aside"]
    assert aside["no item_id"] == 1 and aside["repeated item_id (the first one is kept)"]["count"] == 1
    assert found["without_content"] == before["without_content"] + 1
    assert np.isfinite(losses(runs[bad])).all()
    if list(objectives) == ["clip"]:  # bad rows are no pairs: the run is that without them, bit for bit
        assert losses(runs[bad]) == losses(runs[clean])

    tables = {}
    for data in (clean, bad):
        start(tmp_path, "mmctr", "embed", runs[bad], "--data", data, "--out", tmp_path / f"vectors_{data.name}").ok()
        tables[data] = EmbeddingTable.read(tmp_path / f"vectors_{data.name}")
    place = {item_id: row for row, item_id in enumerate(tables[bad].ids.to_pylist())}
    ids = tables[clean].ids.to_pylist()
    assert set(place) - set(ids) == embedded
    shared = [place[item_id] for item_id in ids]
    np.testing.assert_allclose(tables[bad].vectors[shared], tables[clean].vectors, atol=1e-6)
