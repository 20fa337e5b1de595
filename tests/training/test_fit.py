from __future__ import annotations

import math

import pytest
from safetensors.torch import load_file

from mmctr.data.loaders import BatchPlan
from mmctr.training.fit import FitConfig, FitResult, lr_at
from tests.helpers.training import Slope, read_log, run_fit

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


def test_the_word_no_is_a_precision(tmp_path):
    """YAML reads `no` as false, on the command line and in a file."""
    path = tmp_path / "fit.yaml"
    path.write_text("mixed_precision: no\n")
    config = FitConfig.load(path)
    assert config == FitConfig.load(path, ["mixed_precision=no"]) == FitConfig(mixed_precision="no")
    config.save(tmp_path / "again.yaml")
    assert FitConfig.load(tmp_path / "again.yaml") == config
    with pytest.raises(ValueError, match="mixed_precision"):
        FitConfig.parse({"mixed_precision": True})


def test_the_optimizer_gets_the_rate_of_each_step(tmp_path):
    run_fit(Slope(), tmp_path, lambda task: 0.0, epochs=2, warmup=0.5, decay="linear", optimizer={"lr": 0.1})
    lrs = [line["lr"] for line in read_log(tmp_path) if "lr" in line]
    assert lrs == pytest.approx([0.05, 0.1, 0.1, 0.05])


# fit ----------------------------------------------------------------------------------------------


def test_fit_takes_every_batch_and_logs(tmp_path):
    task = Slope()
    result = run_fit(task, tmp_path, lambda task: task.level, epochs=3)
    assert task.calls == task.after == 6 and result == FitResult(6, task.level, {}, 6)
    plan = BatchPlan(20, 10, 0)
    assert task.seen == [plan.rows(step, plan.order(step // 2)).tolist() for step in range(6)]
    lines = read_log(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "validation" in line] == [2, 4, 6]
    # Adam with lr 1 on a constant gradient moves by 1 a step: the loss of step k is -4 (k - 1)
    assert [line["loss"] for line in lines if "loss" in line] == pytest.approx([0, -4, -8, -12, -16, -20], abs=1e-4)
    assert not task.training


def test_stops_early_and_restores_the_best_weights(tmp_path):
    """The score peaks at level 6, after 6 steps (evaluation 3); with patience 2 it stops after evaluation 5."""
    task = Slope()
    result = run_fit(task, tmp_path, lambda task: -abs(task.level - 6), epochs=10, patience=2)
    assert result.best_step == 6 and result.steps == 10 and task.calls == 10
    assert task.level == pytest.approx(6, abs=1e-4) and result.best == pytest.approx(0, abs=1e-4)
    # started again, it is finished
    again = Slope()
    assert run_fit(again, tmp_path, lambda task: -abs(task.level - 6), epochs=10, patience=2) == result
    assert again.calls == 0 and again.level == task.level


def test_without_patience_it_runs_to_the_end_and_still_restores_the_best(tmp_path):
    task = Slope()
    result = run_fit(task, tmp_path, lambda task: -abs(task.level - 4), epochs=5)
    assert (result.best_step, result.steps) == (4, 10) and task.level == pytest.approx(4, abs=1e-4)


def test_the_untrained_task_can_be_the_best(tmp_path):
    task = Slope()
    result = run_fit(task, tmp_path, lambda task: -task.level, epochs=2, evaluate_first=True)
    assert result.best_step == 0 and task.level == 0 and result.untrained == {"score": 0.0}


def test_evaluations_an_epoch(tmp_path):
    for evaluations, steps in ((2.0, [1, 2, 3, 4]), (0.5, [4]), (1.0, [2, 4])):
        folder = tmp_path / str(evaluations)
        run_fit(Slope(), folder, lambda task: task.level, epochs=2, evaluations=evaluations)
        assert [line["step"] for line in read_log(folder) if "validation" in line] == steps


def test_no_epochs_train_nothing(tmp_path):
    task = Slope()
    result = run_fit(task, tmp_path, lambda task: 0.7, epochs=0)
    assert task.calls == 0 and task.level == 0 and not task.training
    assert result == FitResult(0, 0.7, {"score": 0.7}, 0)


@pytest.mark.parametrize("log_every", [1, 5])
def test_a_loss_that_is_nan_is_a_clear_error(tmp_path, log_every):
    with pytest.raises(ValueError, match=r"the loss is NaN; lower fit\.optimizer\.lr"):
        run_fit(Slope(nan_at=4), tmp_path, lambda task: 0.5, log_every=log_every, evaluations=0.1)


def test_a_primary_metric_that_is_undefined_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="gauc_cold is undefined on the validation rows"):
        run_fit(Slope(), tmp_path / "a", lambda task: 0.5, primary="gauc_cold")
    with pytest.raises(ValueError, match="score is NaN"):
        run_fit(Slope(), tmp_path / "b", lambda task: float("nan"))


def test_gradients_are_clipped(tmp_path):
    """The gradient is four times -1, of norm 2; Adam's first moment after a step is a tenth of what is left of it."""
    for limit, moment in ((None, -0.1), (1.0, -0.05)):
        folder = tmp_path / str(limit)
        run_fit(Slope(), folder, lambda task: 0.5, epochs=0.5, max_grad_norm=limit)
        saved = load_file(next(folder.glob("checkpoints/step-*")) / "optimizer.safetensors")
        assert saved["0.exp_avg"][0, 0].item() == pytest.approx(moment, rel=1e-4)
