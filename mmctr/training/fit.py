"""fit(): the training loop of all tasks, with a learning rate schedule and checkpoints that resume exactly."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from pydantic import Field, field_validator
from torch import Tensor
from tqdm.auto import tqdm

from mmctr.config import Config
from mmctr.data.hashing import stream_seed
from mmctr.data.loaders import TrainBatches
from mmctr.training.checkpoints import Checkpoints
from mmctr.training.context import RunContext
from mmctr.training.grad_cache import chunked_backward
from mmctr.training.log import Log
from mmctr.training.optimizers import OptimizerConfig, RowAdamW, make_optimizer
from mmctr.training.part_schedule import PartSchedule
from mmctr.training.sharding import Sharding
from mmctr.training.task import ChunkedTask, Task


class FitConfig(Config):
    """The training loop: length, batches, learning rate, evaluations, checkpoints."""

    epochs: float = Field(default=1.0, ge=0)
    """passes over the training rows; 0 trains nothing, and the run folder then holds the model as it was loaded"""
    batch_size: int = Field(default=1024, ge=1)
    """rows of a step over all processes together"""
    chunk_size: int | None = Field(default=None, ge=1)
    """largest number of items that a process encodes at once; the gradient is still that of the whole batch, at the
    price of a second forward pass (`mmctr.training.grad_cache`). None: all items. For tasks with an encoder"""
    warmup: float = Field(default=0.05, ge=0, le=1)
    """fraction of the run in which the learning rate rises from 0"""
    decay: Literal["constant", "cosine", "linear"] = "cosine"
    """course of the learning rate after the warmup"""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW, and the training of large tables"""
    max_grad_norm: float | None = Field(default=5.0, gt=0)
    """gradients with a larger norm are scaled down to this norm; null: gradients are not scaled"""
    evaluations: float = Field(default=1.0, gt=0)
    """number of evaluations on the validation rows per epoch"""
    patience: int | None = Field(default=None, ge=1)
    """training stops after this many evaluations without an improvement; None: training runs to the end"""
    log_every: int = Field(default=20, ge=1)
    """steps between lines of log.jsonl"""
    checkpoint_every: int = Field(default=500, ge=1)
    """steps between checkpoints; there is also a checkpoint after every evaluation"""
    num_workers: int = Field(default=0, ge=0)
    """number of worker processes of each training process that prepare batches; 0: the training process does"""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """precision of training; None: the precision given to `accelerate launch`, else full precision"""
    tracker: str | None = None
    """an Accelerate tracker: tensorboard, wandb, trackio, mlflow, ..."""

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _word_no(cls, value: Any) -> Any:
        """YAML reads the word `no` as false."""
        return "no" if value is False else value


def lr_at(step: int, total: int, config: FitConfig) -> float:
    """The factor on every learning rate at a step, a pure function, so that a resumed run continues exactly.

    Args:
        step: the step, from 0.
        total: number of steps of the run.
        config: warmup and decay.

    Returns:
        A number in [0, 1].
    """
    warmup = max(1, round(total * config.warmup)) if config.warmup else 0
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if config.decay == "cosine":
        return 0.5 * (1 + float(torch.cos(torch.tensor(progress * torch.pi, dtype=torch.float64))))
    return 1.0 - progress if config.decay == "linear" else 1.0


@dataclass(frozen=True)
class FitResult:
    """The result of a training stage.

    Args:
        best_step: the step with the best evaluation, whose weights the task has; 0 for the untrained weights.
        best: the primary validation metric at that step.
        untrained: validation metrics before the first step; empty where `evaluate_first` was not set.
        steps: number of training steps.
    """

    best_step: int
    best: float
    untrained: dict[str, float]
    steps: int

    def to_json(self) -> dict[str, Any]:
        """The entry `training` of metrics.json."""
        return asdict(self)


class _LossLog:
    """Means of the loss terms over the steps since the last line of the log."""

    def __init__(self, log: Log, context: RunContext, batch_size: int, steps_per_epoch: int):
        self._log, self._accelerator = log, context.accelerator
        self._batch_size, self._steps_per_epoch = batch_size, steps_per_epoch
        self._sums: dict[str, Tensor] = {}
        self._num_steps, self._started = 0, time.perf_counter()

    def add(self, loss: Tensor, terms: dict[str, Tensor]) -> None:
        """Add the loss and the terms of a step, without waiting for the device."""
        for name, term in ({"loss": loss} | terms).items():
            self._sums[name] = self._sums.get(name, torch.zeros((), device=loss.device)) + term.detach().float()
        self._num_steps += 1

    def write(self, step: int, lr: float) -> dict[str, str]:
        """Write a line with the means over all processes, and begin anew; returns the numbers of the progress bar.

        Raises:
            ValueError: the loss is NaN.
        """
        means = cast(Tensor, self._accelerator.reduce(torch.stack(list(self._sums.values())) / self._num_steps, "mean"))
        values = dict(zip(self._sums, means.tolist(), strict=True))
        if values["loss"] != values["loss"]:
            raise ValueError(f"step {step}: the loss is NaN; lower fit.optimizer.lr or raise fit.warmup")
        rate = round(self._num_steps * self._batch_size / (time.perf_counter() - self._started))
        epoch = round(step / self._steps_per_epoch, 4)
        self._log.write({"step": step, "epoch": epoch, "lr": lr, **values, "rows_per_second": rate})
        self._sums, self._num_steps = {}, 0
        self.restart_clock()
        return {"loss": f"{values['loss']:.4f}", "rows_per_s": str(rate)}

    def restart_clock(self) -> None:
        """Measure the rate from now on, for example after an evaluation."""
        self._started = time.perf_counter()


def fit(
    task: Task,
    train: TrainBatches[Any],
    config: FitConfig,
    context: RunContext,
    *,
    evaluate: Callable[[], dict[str, float]],
    primary: str,
    evaluate_first: bool = False,
) -> FitResult:
    """Train `task`; at the end the task has the weights of the best evaluation.

    Called again with the same arguments after a crash, `fit` continues from the newest checkpoint and ends with the
    same bits as without the crash (CPU, fp32): batches, dropout and learning rate are functions of the step.

    Args:
        task: the task.
        train: the training batches.
        config: options of the training loop.
        context: run folder, processes and seed.
        evaluate: computes metrics on the validation rows.
        primary: the metric that chooses the best weights and stops early; higher is better.
        evaluate_first: evaluate the untrained task as well, whose weights can be the best.

    Raises:
        ValueError: a checkpoint of another run is in the folder; the config asks for what the task or the processes
            cannot do; the loss or the primary metric is NaN.

    Example:
        ```python
        context = RunContext(RunFolder(Path("runs/mine")), Accelerator(), seed=0, identity="mine")
        result = fit(task, batches, FitConfig(epochs=2), context, evaluate=lambda: {"auc": score(task)}, primary="auc")
        print(result.best_step, result.best)
        ```
    """
    accelerator, seed = context.accelerator, context.seed
    total = round(config.epochs * train.steps_per_epoch)
    eval_every = max(1, round(train.steps_per_epoch / config.evaluations))
    sharding = Sharding(task, accelerator, config.batch_size, config.chunk_size, config.max_grad_norm)
    optimizer = make_optimizer(task, config.optimizer, config.max_grad_norm)
    schedule = PartSchedule(task, optimizer, config.optimizer, train.steps_per_epoch, seed)
    chunked = task if isinstance(task, ChunkedTask) else None
    _check_processes(config, accelerator, optimizer, schedule, chunked)
    model, optimizer = sharding.prepare(optimizer)
    checkpoints = Checkpoints(context.folder.checkpoints, context.identity, sharding)
    state = checkpoints.load(task, optimizer)
    if state is None:
        state = {"step": 0, "best": None, "best_step": 0, "waited": 0, "stopped": False, "untrained": {}}
        if evaluate_first or not total:
            state["untrained"] = _evaluate_whole(task, sharding, evaluate)
            _require_number(state["untrained"], primary, 0)
            state["best"] = state["untrained"][primary]
            checkpoints.save_best(task)
    log = Log(context, state["step"])
    bar = tqdm(total=total, initial=state["step"], disable=not accelerator.is_main_process or None, unit="step")
    losses = _LossLog(log, context, config.batch_size, train.steps_per_epoch)

    task.train()
    for step, batch in train.iterate(state["step"], 0 if state["stopped"] else total):
        # single training step
        torch.manual_seed(stream_seed(seed, "step", step, accelerator.process_index))
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_at(step, total, config)
        schedule.before_step(step)
        batch = batch.to(accelerator.device, non_blocking=True)
        if config.chunk_size is None or chunked is None:
            with accelerator.autocast():
                terms: dict[str, Tensor] = model(batch)
            loss = torch.stack(list(terms.values())).sum()
            accelerator.backward(loss)
        else:
            seeds = functools.partial(stream_seed, seed, "chunk", step, accelerator.process_index)
            terms = chunked_backward(model, chunked, batch, config.chunk_size, accelerator, seeds)
            loss = torch.stack(list(terms.values())).sum()
        schedule.drop_gradients(step)
        if config.max_grad_norm is not None:
            accelerator.clip_grad_norm_(task.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        sharding.after_step()
        done = state["step"] = step + 1
        bar.update()

        # log (the only place where the loop waits for the device)
        losses.add(loss, terms)
        if done % config.log_every == 0 or done == total:
            bar.set_postfix(losses.write(done, optimizer.param_groups[0]["lr"]))

        # evaluate on the validation rows (all processes take part)
        if done % eval_every == 0 or done == total:
            numbers = _evaluate_whole(task, sharding, evaluate)
            task.train()
            log.write({"step": done, "epoch": round(done / train.steps_per_epoch, 4), "validation": numbers})
            bar.write(f"step {done}: " + "  ".join(f"{name} {value:.4f}" for name, value in numbers.items()))
            _require_number(numbers, primary, done)
            if state["best"] is None or numbers[primary] > state["best"]:
                state |= {"best": numbers[primary], "best_step": done, "waited": 0}
                checkpoints.save_best(task)
            else:
                state["waited"] += 1
            state["stopped"] = config.patience is not None and state["waited"] >= config.patience
            losses.restart_clock()
        if done % config.checkpoint_every == 0 or done % eval_every == 0 or done == total:
            checkpoints.save(task, optimizer, state)
        if state["stopped"]:
            break
    bar.close()
    accelerator.wait_for_everyone()
    sharding.make_whole()
    checkpoints.load_best(task)
    task.eval()
    return FitResult(state["best_step"], state["best"], state["untrained"], state["step"])


def _check_processes(
    config: FitConfig,
    accelerator: Accelerator,
    optimizer: RowAdamW,
    schedule: PartSchedule,
    chunked: ChunkedTask | None,
) -> None:
    """Raise ValueError where the config asks for what the task or the processes cannot do."""
    if accelerator.mixed_precision == "fp16" and optimizer.row_tables:
        raise ValueError(
            "fit.mixed_precision: fp16 scales the loss, which tables trained by rows do not undo; take bf16, or a "
            "fit.optimizer.rows_from above the size of the tables"
        )
    if schedule and accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError("fit.optimizer.groups: from_epoch, to_epoch and redraw are not for FSDP and DeepSpeed")
    if config.chunk_size is not None and chunked is None:
        raise ValueError("fit.chunk_size: this task encodes nothing in chunks; leave it out")


def _evaluate_whole(task: Task, sharding: Sharding, evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The metrics of the task in evaluation mode, with all weights in each process."""
    with sharding.whole():
        task.eval()
        return evaluate()


def _require_number(numbers: dict[str, float], primary: str, step: int) -> None:
    """Raise ValueError where the primary metric is missing or NaN."""
    value = numbers.get(primary)
    if value is None:
        raise ValueError(
            f"step {step}: {primary} is undefined on the validation rows (defined are {', '.join(numbers)}); the "
            f"predictions may be NaN, else choose another `primary` or split"
        )
    if value != value:
        raise ValueError(f"step {step}: {primary} is NaN; lower fit.optimizer.lr or raise fit.warmup")
