"""Vectors of another program: an .npz file has ids and vectors alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mmctr.cli.main import main
from mmctr.data.embeddings import EmbeddingTable
from mmctr.retrieval.index import ItemIndex
from mmctr.serving.search import Searcher
from mmctr.serving.service import Service
from tests.helpers.worlds import write_dataset


@pytest.fixture
def vectors(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MMCTR_CACHE", str(tmp_path / "cache"))
    write_dataset(tmp_path / "d", {"item_id": [3, 1, 2], "title": ["three", "one", None]})
    np.savez(tmp_path / "v.npz", item_id=np.arange(1, 5), vectors=np.eye(4, dtype=np.float32) + 0.1)
    return tmp_path / "v.npz"


def titles(neighbours: list[dict]) -> dict:
    return {one["item_id"]: one["title"] for one in neighbours}


def test_titles_come_from_the_dataset(vectors, capsys):
    expected = {1: "one", 2: None, 4: None}
    data = str(vectors.parent / "d")
    main(["search", str(vectors), "--item", "3", "--data", data, "--json"])
    assert titles(json.loads(capsys.readouterr().out)) == expected
    main(["index", str(vectors), "--data", data])
    capsys.readouterr()
    main(["search", f"{vectors}.index", "--item", "3", "--json"])
    assert titles(json.loads(capsys.readouterr().out)) == expected
    index = ItemIndex.build(EmbeddingTable.read(vectors))
    served = Service(Searcher(index, data=data), {})
    assert served.title(3) is None  # no dataset was named to the service, and the vectors name none
    assert Service(Searcher(index, data=data), {}, data).title(3) == "three"


def test_home_folder_in_paths(vectors, monkeypatch, capsys):
    """`--out=~/x` reaches the program as it is."""
    monkeypatch.setenv("HOME", str(vectors.parent))
    main(["index", "~/v.npz", "--out=~/i", "--data=~/d"])
    assert (vectors.parent / "i" / "index.json").is_file()
    main(["search", "~/i", "--item", "1", "--json"])
    assert titles(json.loads(capsys.readouterr().out.splitlines()[-1]))[3] == "three"
    assert len(ItemIndex.load("~/i")) == len(EmbeddingTable.read("~/v.npz")) == 4


def test_a_folder_without_embeddings_is_not_advised_to_embed_again(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["index", str(tmp_path)])
    assert "give a folder that `mmctr embed` has written" in capsys.readouterr().err
    (tmp_path / "begun.json").write_text("{}")
    with pytest.raises(SystemExit):
        main(["index", str(tmp_path)])
    assert "run `mmctr embed` again, it goes on" in capsys.readouterr().err
