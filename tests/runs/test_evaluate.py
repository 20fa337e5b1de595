"""What `mmctr evaluate` refuses to compute."""

from __future__ import annotations

import pytest

from mmctr.runs.evaluate import evaluate_run
from mmctr.tasks import PretrainTask

pytestmark = pytest.mark.slow


def test_towers_without_a_common_space_are_not_compared_on_another_dataset(runs, toy_folder, monkeypatch):
    run = str(runs / "pretrain")
    assert "mean_recall" in evaluate_run(run, str(toy_folder))["validation"]
    monkeypatch.setattr(PretrainTask, "shares_space", False)
    assert "mean_recall" not in evaluate_run(run, None)["validation"]
    with pytest.raises(ValueError, match="not in one space, and cannot be compared"):
        evaluate_run(run, str(toy_folder))
