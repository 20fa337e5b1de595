"""Tasks that are shared: folders, cards and the hub, without a network."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml

from mmctr.cli.main import main
from mmctr.data.batches import ItemBatch
from mmctr.export.onnx_encoder import drawn_inputs
from mmctr.files import read_json
from mmctr.tasks import PretrainTask, RankingTask
from mmctr.tasks.sharing import PATTERNS, without_paths
from tests.export.test_onnx_encoder import save_run as save_encoder
from tests.export.test_onnx_encoder import task_of
from tests.helpers.serving import ServingWorld, make_task, make_world, ranking_data, save_run


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> ServingWorld:
    return make_world(tmp_path_factory.mktemp("hub") / "data")


@pytest.fixture(scope="module")
def ranker(world, tmp_path_factory) -> Path:
    task = make_task(world, {"name": "din", "attention": [6], "mlp": [5]})
    return save_run(world, task, tmp_path_factory.mktemp("machine") / "run")


def scores(world: ServingWorld, task: RankingTask) -> torch.Tensor:
    with torch.no_grad():
        return task.logits(ranking_data(world, task).collator(world.splits.test)(np.arange(20)))[0]


def no_paths_in(folder: Path, *paths: Path) -> None:
    for file in folder.rglob("*"):
        if file.suffix in (".json", ".yaml", ".md", ".txt"):
            text = file.read_text(encoding="utf-8")
            assert not [path for path in (*paths, "/nowhere") if str(path) in text], file


def test_a_ranker_comes_back_equal(world, ranker, tmp_path, capsys):
    out = tmp_path / "shared"
    main(["export", str(ranker), "--format", "pretrained", "--out", str(out)])
    assert f'RankingTask.from_pretrained("{out}")' in capsys.readouterr().out
    again, task = RankingTask.from_pretrained(out), RankingTask.load(ranker)
    assert torch.equal(scores(world, again), scores(world, task))
    no_paths_in(out, ranker.parent, world.folder.parent)
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "mmctr" and "ctr-prediction" in front["tags"]
    for words in (
        f'from_pretrained("{out.name}")',
        "| test all auc | 0.7123 |",
        "dataset: data",
        "name: din",
        "raw ids",
    ):
        assert words in card
    assert read_json(out / "metrics.json") == read_json(ranker / "metrics.json")
    with pytest.raises(ValueError, match=r"a ranking run; this needs a run of pretrain\.train"):
        PretrainTask.from_pretrained(out)


@pytest.mark.parametrize("name", ["openclip", "hf", "towers"])
def test_an_encoder_comes_back_equal(name, tmp_path):
    task = task_of(name, item_vector="concat")
    run = save_encoder(task, tmp_path / "run")
    PretrainTask.load(run).save_pretrained(tmp_path / "shared", run=run)
    again = PretrainTask.from_pretrained(tmp_path / "shared")
    items = ItemBatch(row=torch.arange(6), **drawn_inputs(task, 32, 6))
    with torch.no_grad():
        assert torch.equal(again.embed(items)[0], task.embed(items)[0])
    no_paths_in(tmp_path / "shared", tmp_path)
    assert "trained on clip" in (tmp_path / "shared" / "README.md").read_text()
    task.save_pretrained(tmp_path / "alone")  # without a run: no numbers are made up
    card = (tmp_path / "alone" / "README.md").read_text()
    assert "Metrics" not in card and "Not recorded." in card


class StubHub:
    """Keeps what is uploaded, and gives it back."""

    def __init__(self, folder: Path):
        self.folder, self.created, self.asked = folder, [], {}
        self.error: Exception | None = None

    def HfApi(self, **_: Any) -> StubHub:
        return self

    def create_repo(self, repo_id: str, **options: Any) -> str:
        if self.error is not None:
            raise self.error
        self.created.append((repo_id, options))
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, folder_path: str, allow_patterns: list[str], **_: Any) -> None:
        given = Path(folder_path)
        for file in (f for f in given.rglob("*") if f.is_file()):
            if any(file.match(pattern) for pattern in allow_patterns):
                to = self.folder / file.relative_to(given)
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, to)

    def snapshot_download(self, repo_id: str, **options: Any) -> str:
        if self.error is not None:
            raise self.error
        self.asked = {"repo_id": repo_id, **options}
        return str(self.folder)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> StubHub:
    stub = StubHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", stub.HfApi)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stub.snapshot_download)
    return stub


def test_a_pushed_ranker_comes_back_equal(world, ranker, hub, capsys):
    main(["push", str(ranker), "someone/ranker", "--private"])
    said = capsys.readouterr().out
    assert "https://hub/someone/ranker" in said and "ids of 12 users" in said
    assert hub.created == [("someone/ranker", {"private": True, "repo_type": "model", "exist_ok": True})]
    assert 'from_pretrained("someone/ranker")' in (hub.folder / "README.md").read_text()
    no_paths_in(hub.folder, ranker.parent, world.folder.parent)
    again = RankingTask.from_pretrained("someone/ranker", revision="v1")
    assert hub.asked == {"repo_id": "someone/ranker", "revision": "v1", "token": None, "allow_patterns": PATTERNS}
    assert torch.equal(scores(world, again), scores(world, RankingTask.load(ranker)))


def test_what_the_hub_refuses_is_one_line(ranker, hub, tmp_path, capsys):
    hub.error = ConnectionError("no route\nto host")
    with pytest.raises(SystemExit):
        main(["push", str(ranker), "someone/ranker"])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "the hub did not take it (no route)" in error
    with pytest.raises(ValueError, match=r"someone/else: no such folder here, .* \(no route\)"):
        RankingTask.from_pretrained("someone/else")
    for arguments, words in (
        (["export", ranker, "--format", "pretrained", "--out", tmp_path / "o", "--int8"], "--int8 is for"),
        (["push", tmp_path, "a/b"], "not the folder of a finished run"),
    ):
        with pytest.raises(SystemExit):
            main([str(part) for part in arguments])
        assert words in capsys.readouterr().err
    (tmp_path / "log.jsonl").touch()
    with pytest.raises(ValueError, match="is a run folder itself"):
        RankingTask.load(ranker).save_pretrained(tmp_path)


def test_paths_leave_and_all_else_stays():
    values = {
        "path": ["/home/me/runs/text", "runs/image"],
        "model": "local-dir:/models/vit",
        "run": "C:\\me\\run",
        "home": "~/emb",
        "separator": "/",
        "other": "//",
        "name": "package:x/y",
        "tag": "hf-hub:org/name",
        "n": 1,
        "none": None,
    }
    assert without_paths(values) == values | {
        "path": ["text", "runs/image"],
        "model": "local-dir:vit",
        "run": "run",
        "home": "emb",
    }
