from __future__ import annotations

import os

import pyarrow as pa
import pyarrow.parquet
import pytest

from mmctr.data.prepare import FORMAT, open_dataset, prepare
from tests.data.test_prepare import ITEMS, LOG, rows
from tests.helpers.worlds import write_dataset


def test_prepared_once_and_anew_when_a_table_changes(tmp_path):
    folder = write_dataset(tmp_path / "d", ITEMS, LOG, {"user_id": [1, 2], "age": [3, 4]})
    prepare(folder, tmp_path / "out")
    made = (tmp_path / "out" / "prepared.json").stat().st_ino
    prepare(folder, tmp_path / "out")
    assert (tmp_path / "out" / "prepared.json").stat().st_ino == made
    for stem in ("items", "interactions", "users"):
        table = pyarrow.parquet.read_table(folder / f"{stem}.parquet")
        pyarrow.parquet.write_table(
            table.append_column(f"new_{stem}", pa.array([stem] * len(table))), folder / f"{stem}.parquet"
        )
        dataset = prepare(folder, tmp_path / "out")
        tables = {"items": dataset.catalog.table, "interactions": dataset.context, "users": dataset.users}
        assert set(tables[stem][f"new_{stem}"].to_pylist()) == {stem}


def test_open_dataset_uses_the_cache_and_prepared_folders(tmp_path, cache_folder, monkeypatch):
    monkeypatch.setenv("MMCTR_CACHE", str(tmp_path / "cache"))
    folder = write_dataset(tmp_path / "my data", ITEMS, LOG)
    first = open_dataset(folder)
    assert first.folder.parent == tmp_path / "cache" and first.folder.name.startswith("my data-")
    assert open_dataset(str(folder)).folder == first.folder and rows(open_dataset(first.folder)) == rows(first)
    write_dataset(folder, ITEMS | {"title": ["other", "new", "titles"]})
    assert open_dataset(folder).catalog.table["title"].to_pylist() == ["other", "new", "titles"]


def test_what_prepare_does_not_overwrite(tmp_path):
    folder = write_dataset(tmp_path / "d", ITEMS, LOG)
    with pytest.raises(ValueError, match=r"d: the folder is not empty and was not made by `mmctr prepare`"):
        prepare(folder, folder)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file: the folder is not empty"):
        prepare(folder, tmp_path / "file")
    out = prepare(folder, tmp_path / "out").folder
    with pytest.raises(ValueError, match="out: is a prepared folder already"):
        prepare(out, tmp_path / "again")
    (out / "my results.txt").write_text("mine")
    write_dataset(folder, ITEMS | {"title": ["other", "new", "titles"]})
    with pytest.raises(ValueError, match=r"out: .*choose another --out \(it would replace 'my results.txt'\)"):
        prepare(folder, out)
    assert (out / "my results.txt").read_text() == "mine"


def test_a_failure_leaves_the_old_prepared_folder(tmp_path):
    folder = write_dataset(tmp_path / "d", ITEMS, LOG)
    before = rows(prepare(folder, tmp_path / "out"))
    write_dataset(folder, ITEMS, LOG | {"label": [5] * 4})
    with pytest.raises(ValueError, match="label"):
        prepare(folder, tmp_path / "out")
    assert rows(open_dataset(tmp_path / "out")) == before and sorted(os.listdir(tmp_path)) == ["d", "out"]


def test_a_folder_of_another_version_is_named(tmp_path):
    out = prepare(write_dataset(tmp_path / "d", ITEMS), tmp_path / "out").folder
    text = (out / "prepared.json").read_text().replace(f'"format": {FORMAT}', '"format": 99')
    (out / "prepared.json").write_text(text)
    with pytest.raises(ValueError, match=r"out: prepared by another version \(format 99\); run `mmctr prepare` again"):
        open_dataset(out)
