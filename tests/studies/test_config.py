"""A study that cannot be made is refused in one sentence, before anything runs."""

from __future__ import annotations

import pytest

from mmctr.studies.config import StudyConfig
from mmctr.studies.runner import run_study
from tests.helpers.studies import Launcher, write_study


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(baseline="id"), "baseline: no method is called 'id'; it is one of ids, content"),
        (lambda v: v.update(oracle="truth"), "oracle: no method is called 'truth'"),
        (lambda v: v.update(oracle="ids"), "oracle: 'ids' is the baseline too"),
        (lambda v: v.update(seeds=[1, 1]), "holds a seed twice"),
        (lambda v: v.update(seeds=[]), "seeds: .*at least 1"),
        (lambda v: v.update(methods={}), "methods: .*at least 1"),
        (lambda v: v.update(protocol={}), "unknown key 'protocol'; did you mean 'protocols'"),
        (lambda v: v["protocols"].update(b={"name": "temporl"}), "protocols.b.name: unknown name.*'temporal'"),
        (lambda v: v["methods"].update({"../up": v["methods"]["ids"]}), "'../up' is also that of a folder"),
        (lambda v: v["methods"]["content"].update(table="factor"), "methods.content.table: 'factor' is not among"),
        (lambda v: v["methods"]["ids"].update(set=["seed=1"]), "methods.ids.set: seed is the same for all methods"),
        (lambda v: v["methods"]["ids"].update(set=["split.cold=0.2"]), "split.cold is the same for all methods"),
        (lambda v: v.update(set=["run_dir=x"]), "set: run_dir is the same for all methods"),
        (lambda v: v["methods"]["ids"].update(confg="x"), "methods.ids.confg'; did you mean 'config'"),
        (lambda v: v["methods"]["ids"].update(config="no.yaml"), "methods.ids: no.yaml: no such config file"),
        (lambda v: v["methods"]["ids"].update(set=["task.rankr.name=din"]), "methods.ids: .*did you mean 'ranker'"),
        (lambda v: v["methods"]["ids"].update(table="factors"), "methods.ids: .*task.embedder.content"),
        (lambda v: v.update(data="nowhere", tables={}), "not among"),
        (lambda v: v.update(data="nowhere"), "data: no folder 'nowhere'"),
    ],
)
def test_a_bad_study_is_one_clear_error(toy_folder, tmp_path, change, message):
    path = write_study(tmp_path, toy_folder, change)
    launch = Launcher()
    with pytest.raises(ValueError, match=message):
        run_study(StudyConfig.load(path), tmp_path / "out", str(path), launch)
    assert not launch.calls
