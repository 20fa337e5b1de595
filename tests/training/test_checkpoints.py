"""Checkpoints: one is kept, and one of another run is refused."""

from __future__ import annotations

import pytest

from mmctr.training.checkpoints import Checkpoints
from mmctr.training.optimizers import OptimizerConfig, make_optimizer
from tests.helpers.training import Slope, run_fit


def test_a_checkpoint_of_another_identity_is_refused(tmp_path):
    run_fit(Slope(), tmp_path, lambda task: 0.5, epochs=1)
    with pytest.raises(ValueError, match="belongs to another config or dataset"):
        run_fit(Slope(), tmp_path, lambda task: 0.5, epochs=1, identity="b")


def test_one_checkpoint_is_kept_and_leftovers_are_removed(tmp_path):
    folder = tmp_path / "checkpoints"
    (folder / ".step-000000001.99999.tmp").mkdir(parents=True)
    (folder / ".best.99999.tmp").mkdir()
    run_fit(Slope(), tmp_path, lambda task: task.level, epochs=3, checkpoint_every=1)
    assert sorted(path.name for path in folder.iterdir()) == ["best", "step-000000006"]
    checkpoints = Checkpoints(folder, "a")
    task, optimizer = Slope(), make_optimizer(Slope(), OptimizerConfig())
    state = checkpoints.load(task, optimizer)
    assert state["step"] == 6 and task.level == pytest.approx(6, abs=1e-4)


@pytest.mark.parametrize("name", ["step-*/task.safetensors", "step-*/optimizer.safetensors", "best/task.safetensors"])
@pytest.mark.parametrize("size", [0, 5, 60, None])
def test_a_file_that_was_cut_short_is_named_with_the_remedy(tmp_path, name, size):
    """As by an interrupted copy of the run folder; None: the file is missing."""
    run_fit(Slope(), tmp_path, lambda task: task.level, epochs=1)
    (file,) = (tmp_path / "checkpoints").glob(name)
    if size is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=rf"{file.name}: (missing|damaged).* or delete .*checkpoints to train from"):
        run_fit(Slope(), tmp_path, lambda task: task.level, epochs=1)
