from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from mmctr.data.batches import Batch
from mmctr.data.loaders import BatchPlan, TrainBatches
from mmctr.run_folder import RunFolder
from mmctr.training.checkpoints import Checkpoints
from mmctr.training.context import RunContext
from mmctr.training.fit import FitConfig, FitResult, fit, lr_at
from mmctr.training.log import Log
from mmctr.training.optimizers import OptimizerConfig, make_optimizer


class Numbers(Batch):
    """A batch of plain rows."""

    def __init__(self, rows):
        self.rows = rows

    def to(self, device, non_blocking=False):
        return self


class Slope(nn.Module):
    """One weight that rises by a fixed amount a step: loss = -weight, plain and predictable."""

    def __init__(self, nan_at: int | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 2))
        self.bias = nn.Parameter(torch.zeros(2))
        self.nan_at, self.calls, self.seen, self.after = nan_at, 0, [], 0

    def forward(self, batch):
        self.calls += 1
        self.seen.append(batch.rows.tolist())
        factor = float("nan") if self.calls == self.nan_at else 1.0
        return {"up": -self.weight.sum() * factor, "still": 0 * self.bias.sum()}

    def parameter_parts(self):
        return {"first": [self.weight], "second": [self.bias]}

    def after_step(self):
        self.after += 1

    @property
    def level(self) -> float:
        return self.weight[0, 0].item()


def run(task, tmp_path: Path, score, primary="score", evaluate_first=False, identity="a", **config):
    values = {"epochs": 10, "batch_size": 10, "decay": "constant", "warmup": 0, "max_grad_norm": None, "log_every": 1}
    values |= {"optimizer": {"lr": 1.0}} | config
    train = TrainBatches(BatchPlan(20, values["batch_size"], 0), lambda rows, step: Numbers(rows))
    return fit(
        task,
        train,
        FitConfig.parse(values),
        RunContext(RunFolder(tmp_path), Accelerator(cpu=True), 0, identity),
        evaluate=lambda: {"score": score(task)},
        primary=primary,
        evaluate_first=evaluate_first,
    )


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# Learning rate ------------------------------------------------------------------------------------


def test_learning_rate_by_hand():
    cosine = FitConfig(warmup=0.2, decay="cosine")
    rates = [lr_at(step, 10, cosine) for step in range(10)]
    expected = [0.5, 1.0] + [0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert rates == pytest.approx(expected)
    linear = [lr_at(step, 10, FitConfig(warmup=0.2, decay="linear")) for step in range(10)]
    assert linear == pytest.approx([0.5, 1.0, *(1 - k / 8 for k in range(8))])
    assert [lr_at(step, 4, FitConfig(warmup=0, decay="constant")) for step in range(4)] == [1, 1, 1, 1]
    assert [lr_at(step, 4, FitConfig(warmup=1.0)) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    # a warm-up shorter than a step is one step at full rate
    assert lr_at(0, 5, FitConfig(warmup=0.01, decay="linear")) == 1.0


def test_the_optimizer_gets_the_rate_of_each_step(tmp_path):
    run(Slope(), tmp_path, lambda task: 0.0, epochs=2, warmup=0.5, decay="linear", optimizer={"lr": 0.1})
    lrs = [line["lr"] for line in log(tmp_path) if "lr" in line]
    assert lrs == pytest.approx([0.05, 0.1, 0.1, 0.05])


# fit ----------------------------------------------------------------------------------------------


def test_fit_takes_every_batch_and_logs(tmp_path):
    task = Slope()
    result = run(task, tmp_path, lambda task: task.level, epochs=3)
    assert task.calls == task.after == 6 and result == FitResult(6, task.level, {}, 6)
    plan = BatchPlan(20, 10, 0)
    assert task.seen == [plan.rows(step, plan.order(step // 2)).tolist() for step in range(6)]
    lines = log(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "validation" in line] == [2, 4, 6]
    # Adam with lr 1 on a constant gradient moves by 1 a step: the loss of step k is -4 (k - 1)
    assert [line["loss"] for line in lines if "loss" in line] == pytest.approx([0, -4, -8, -12, -16, -20], abs=1e-4)
    assert not task.training


def test_stops_early_and_restores_the_best_weights(tmp_path):
    """The score peaks at level 6, after 6 steps (evaluation 3); with patience 2 it stops after evaluation 5."""
    task = Slope()
    result = run(task, tmp_path, lambda task: -abs(task.level - 6), epochs=10, patience=2)
    assert result.best_step == 6 and result.steps == 10 and task.calls == 10
    assert task.level == pytest.approx(6, abs=1e-4) and result.best == pytest.approx(0, abs=1e-4)
    # started again, it is finished
    again = Slope()
    assert run(again, tmp_path, lambda task: -abs(task.level - 6), epochs=10, patience=2) == result
    assert again.calls == 0 and again.level == task.level


def test_without_patience_it_runs_to_the_end_and_still_restores_the_best(tmp_path):
    task = Slope()
    result = run(task, tmp_path, lambda task: -abs(task.level - 4), epochs=5)
    assert (result.best_step, result.steps) == (4, 10) and task.level == pytest.approx(4, abs=1e-4)


def test_the_untrained_task_can_be_the_best(tmp_path):
    task = Slope()
    result = run(task, tmp_path, lambda task: -task.level, epochs=2, evaluate_first=True)
    assert result.best_step == 0 and task.level == 0 and result.untrained == {"score": 0.0}


def test_evaluations_an_epoch(tmp_path):
    for evaluations, steps in ((2.0, [1, 2, 3, 4]), (0.5, [4]), (1.0, [2, 4])):
        folder = tmp_path / str(evaluations)
        run(Slope(), folder, lambda task: task.level, epochs=2, evaluations=evaluations)
        assert [line["step"] for line in log(folder) if "validation" in line] == steps


def test_no_epochs_train_nothing(tmp_path):
    task = Slope()
    result = run(task, tmp_path, lambda task: 0.7, epochs=0)
    assert task.calls == 0 and task.level == 0 and not task.training
    assert result == FitResult(0, 0.7, {"score": 0.7}, 0)


@pytest.mark.parametrize("log_every", [1, 5])
def test_a_loss_that_is_nan_is_a_clear_error(tmp_path, log_every):
    with pytest.raises(ValueError, match=r"the loss is NaN; lower fit\.optimizer\.lr"):
        run(Slope(nan_at=4), tmp_path, lambda task: 0.5, log_every=log_every, evaluations=0.1)


def test_a_primary_metric_that_is_undefined_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="gauc_cold is undefined on the validation rows"):
        run(Slope(), tmp_path / "a", lambda task: 0.5, primary="gauc_cold")
    with pytest.raises(ValueError, match="score is NaN"):
        run(Slope(), tmp_path / "b", lambda task: float("nan"))


def test_gradients_are_clipped(tmp_path):
    """The gradient is four times -1, of norm 2; Adam's first moment after a step is a tenth of what is left of it."""
    for limit, moment in ((None, -0.1), (1.0, -0.05)):
        folder = tmp_path / str(limit)
        run(Slope(), folder, lambda task: 0.5, epochs=0.5, max_grad_norm=limit)
        saved = load_file(next(folder.glob("checkpoints/step-*")) / "optimizer.safetensors")
        assert saved["0.exp_avg"][0, 0].item() == pytest.approx(moment, rel=1e-4)


def test_a_checkpoint_of_another_identity_is_refused(tmp_path):
    run(Slope(), tmp_path, lambda task: 0.5, epochs=1)
    with pytest.raises(ValueError, match="belongs to another config or dataset"):
        run(Slope(), tmp_path, lambda task: 0.5, epochs=1, identity="b")


def test_one_checkpoint_is_kept_and_leftovers_are_removed(tmp_path):
    folder = tmp_path / "checkpoints"
    (folder / ".step-000000001.99999.tmp").mkdir(parents=True)
    (folder / ".best.safetensors.99999.tmp").write_text("half")
    run(Slope(), tmp_path, lambda task: task.level, epochs=3, checkpoint_every=1)
    assert sorted(path.name for path in folder.iterdir()) == ["best.safetensors", "step-000000006"]
    checkpoints = Checkpoints(folder, "a")
    task, optimizer = Slope(), make_optimizer(Slope(), OptimizerConfig())
    state = checkpoints.load(task, optimizer)
    assert state["step"] == 6 and task.level == pytest.approx(6, abs=1e-4)


def test_a_log_line_cut_off_by_a_crash_is_taken_back(tmp_path):
    run(Slope(), tmp_path, lambda task: task.level, epochs=1)
    with open(tmp_path / "log.jsonl", "a") as handle:
        handle.write('{"step": 3, "loss": 9}\n{"step": 4, "lo')
    run(Slope(), tmp_path, lambda task: task.level, epochs=1)
    assert {line["step"] for line in log(tmp_path)} == {1, 2}


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
        assert log(folder) == [
            {"step": 1, "loss": 0.5},
            {"step": 2, "epoch": 1.0, "validation": {"auc": 0.7}},
        ]
    assert seen == [
        (1, {"loss": 0.5}),
        (2, {"validation/auc": 0.7}),
        (3, {"cold_ids/loss": 0.5}),
        (4, {"cold_ids/validation/auc": 0.7}),
    ]
