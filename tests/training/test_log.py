"""The log of a run: lines after a crash, and steps for a tracker."""

from __future__ import annotations

from accelerate import Accelerator

from mmctr.run_folder import RunFolder
from mmctr.training.context import RunContext
from mmctr.training.log import Log
from tests.helpers.training import Slope, read_log, run_fit


def test_a_log_line_cut_off_by_a_crash_is_taken_back(tmp_path):
    run_fit(Slope(), tmp_path, lambda task: task.level, epochs=1)
    with open(tmp_path / "log.jsonl", "a") as handle:
        handle.write('{"step": 3, "loss": 9}\n{"step": 4, "lo')
    run_fit(Slope(), tmp_path, lambda task: task.level, epochs=1)
    assert {line["step"] for line in read_log(tmp_path)} == {1, 2}


def test_a_tracker_counts_the_steps_of_a_second_fit_on(tmp_path):
    """The log of each fit begins at 1, and says nothing of phases."""

    class Tracked(Accelerator):
        def log(self, values, step=None, log_kwargs=None):
            seen.append((step, values))

    seen: list[tuple[int, dict]] = []
    first = RunContext(RunFolder(tmp_path), Tracked(cpu=True), 0, "")
    for context in (first, first.next_phase("cold_ids", 2)):
        lines, folder = Log(context, 0), context.folder.path
        lines.write({"step": 1, "loss": 0.5})
        lines.write({"step": 2, "epoch": 1.0, "validation": {"auc": 0.7}})
        assert read_log(folder) == [
            {"step": 1, "loss": 0.5},
            {"step": 2, "epoch": 1.0, "validation": {"auc": 0.7}},
        ]
    assert seen == [
        (1, {"loss": 0.5}),
        (2, {"validation/auc": 0.7}),
        (3, {"cold_ids/loss": 0.5}),
        (4, {"cold_ids/validation/auc": 0.7}),
    ]
