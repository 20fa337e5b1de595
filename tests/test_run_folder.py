"""RunFolder: it names every file that a run leaves, and the page on runs names each; damaged folders are refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mmctr.run_folder import RunFolder
from tests.helpers.tiny import CLONE


def file_names() -> set[str]:
    properties = {name for name, value in vars(RunFolder).items() if isinstance(value, property)}
    return {getattr(RunFolder(Path("x")), name).name for name in properties if not name.startswith("is_")}


def test_every_file_of_a_run_has_a_name(runs):
    known = file_names()
    for run in ("pretrain", "id", "table", "joint", "trees"):
        left = {path.name for path in (runs / run).iterdir()}
        # the trees of GBDT+LR are part of the vocabulary, and lie in the run folder until it is saved
        assert left - {"trees.json", ".lock"} <= known, run
        folder = RunFolder(runs / run)
        assert folder.is_begun and folder.is_finished and folder.read_config()["run_dir"]
        assert folder.read_metrics()["validation"] and len(folder.weights_fingerprint()) == 16
    assert not RunFolder(runs / "embeddings").is_begun


def test_the_page_on_runs_names_every_file():
    page = (CLONE / "docs" / "runs.md").read_text(encoding="utf-8")
    named = {name.rstrip("/") for name in re.findall(r"^(\w[\w.]*/?) {2,}", page, flags=re.MULTILINE)}
    assert named == file_names()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, r"not a run folder \(no config.yaml\)"), ("a: [1", "not valid YAML"), ("7", "holds no config")],
)
def test_a_folder_without_a_readable_config_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        RunFolder(tmp_path).read_config()


def test_metrics_of_a_run_that_has_not_finished_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"not a finished run \(no metrics.json\)"):
        RunFolder(tmp_path).read_metrics()
