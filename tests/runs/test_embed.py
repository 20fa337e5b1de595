"""Appending to embeddings costs what the new items cost, and mistakes are found before anything is encoded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from mmctr.cli.main import main
from mmctr.data import picture_building
from mmctr.data.embeddings import EmbeddingTable
from mmctr.runs import embed
from tests.helpers.damage import rewrite

pytestmark = pytest.mark.slow


@pytest.fixture
def grown(toy_folder, tmp_path) -> Path:
    """The dataset with two more items."""
    shutil.copytree(toy_folder, tmp_path / "data")
    items = pq.read_table(toy_folder / "items.parquet")
    new = items.slice(0, 2).set_column(0, "item_id", pa.array([91, 92], items.schema.field("item_id").type))
    pq.write_table(pa.concat_tables([items, new]), tmp_path / "data" / "items.parquet")
    return tmp_path / "data"


def counted(monkeypatch, module, name: str) -> list[int]:
    """One entry for each call of a function of a module."""
    calls: list[int] = []
    function = getattr(module, name)

    def count(*arguments, **options):
        calls.append(1)
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, count)
    return calls


def test_appending_reads_the_new_items_alone(runs, grown, tmp_path, monkeypatch):
    """Not a picture of the other items is decoded, though the grown catalog has no caches."""
    shutil.copytree(runs / "embeddings", tmp_path / "e")
    decoded = counted(monkeypatch, picture_building, "decode_picture")
    arguments = ["embed", str(runs / "pretrain"), "--data", str(grown), "--out", str(tmp_path / "e"), "--append"]
    main(arguments)
    assert len(decoded) <= 2
    before, after = EmbeddingTable.read(runs / "embeddings"), EmbeddingTable.read(tmp_path / "e")
    assert after.ids.to_pylist() == [*before.ids.to_pylist(), 91, 92]
    main(arguments)  # nothing is new
    assert len(EmbeddingTable.read(tmp_path / "e")) == len(after) and len(decoded) <= 2


@pytest.mark.parametrize(("column", "message"), [(None, "no column 'price'"), (["a", "b"], "of other types")])
def test_columns_of_the_index_are_checked_before_encoding(runs, grown, tmp_path, monkeypatch, capsys, column, message):
    shutil.copytree(runs / "embeddings", tmp_path / "e")
    items = pq.read_table(grown / "items.parquet")
    priced = tmp_path / "priced"
    priced.mkdir()
    pq.write_table(items.append_column("price", pa.array(range(len(items)))), priced / "items.parquet")
    index = ["index", str(tmp_path / "e"), "--out", str(tmp_path / "i"), "--columns", "price", "--data", str(priced)]
    main(index)
    if column is not None:
        values = pa.array((column * len(items))[: len(items)])
        pq.write_table(items.append_column("price", values), grown / "items.parquet")
    called = counted(monkeypatch, embed, "embed_items")
    with pytest.raises(SystemExit):
        arguments = ["embed", str(runs / "pretrain"), "--data", str(grown), "--out", str(tmp_path / "e"), "--append"]
        main([*arguments, "--index", str(tmp_path / "i")])
    assert message in capsys.readouterr().err and not called


@pytest.mark.parametrize("streamed", [False, True])
def test_refused_pictures_are_counted_by_reason_with_the_remedy(runs, toy_folder, tmp_path, capsys, streamed):
    """An export with addresses in place of files: all pictures are refused, and embed says so."""
    items = pq.read_table(toy_folder / "items.parquet")
    place = items.column_names.index("image")
    addresses = pa.array([f"https://shop.example/{row}.jpg" for row in range(len(items))])
    (tmp_path / "d").mkdir()
    pq.write_table(items.set_column(place, "image", addresses), tmp_path / "d" / "items.parquet")
    run = runs / "pretrain"
    if streamed:
        run = tmp_path / "run"
        shutil.copytree(runs / "pretrain", run)
        values = yaml.safe_load((run / "config.yaml").read_text())
        values["data"] |= {"path": str(tmp_path / "d"), "stream": {}}
        (run / "config.yaml").write_text(yaml.safe_dump(values))
        rewrite(run / "task.json", {})
    source = [] if streamed else ["--data", str(tmp_path / "d")]
    main(["embed", str(run), *source, "--out", str(tmp_path / "e")])
    told = capsys.readouterr().err
    assert str(len(items)) in told and "url" in told and "download the picture into the dataset folder" in told
