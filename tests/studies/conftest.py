"""A study of two methods and two seeds on the toy folder, made once for all tests of studies."""

from __future__ import annotations

import shutil

import pytest

from mmctr.studies.config import StudyConfig
from mmctr.studies.results import study_results
from mmctr.studies.runner import run_study
from tests.helpers.studies import Launcher, write_study


@pytest.fixture(scope="session")
def finished_study(toy_folder, tmp_path_factory):
    """(study, its folder, results, launched cells) of one finished study; tests leave it as they found it."""
    folder, launch = tmp_path_factory.mktemp("study"), Launcher()
    study = StudyConfig.load(write_study(folder, toy_folder))
    outcomes = run_study(study, folder / "out", launch=launch, jobs=2)
    assert [one.state for one in outcomes] == ["made"] * 4, [one.reason for one in outcomes]
    return study, folder, study_results(study, outcomes), launch.calls


@pytest.fixture
def copied_study(finished_study, tmp_path):
    """The same study and runs, where they may be changed; the paths of its configs stay those of the original."""
    study, folder, results, _ = finished_study
    shutil.copytree(folder / "out", tmp_path / "out")
    # tables are named in the configs, so their place counts
    shutil.rmtree(tmp_path / "out" / "tables")
    (tmp_path / "out" / "tables").symlink_to(folder / "out" / "tables")
    return study, tmp_path / "out", results
