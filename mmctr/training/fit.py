"""fit(): the one training loop; the learning rate of a step; checkpoints that resume exactly."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from accelerate.utils import DistributedType
from pydantic import Field
from torch import Tensor
from tqdm.auto import tqdm

from mmctr.config import Config
from mmctr.data.hashing import stream_seed
from mmctr.data.loaders import TrainBatches
from mmctr.training.checkpoints import Checkpoints
from mmctr.training.context import RunContext
from mmctr.training.grad_cache import chunked_backward
from mmctr.training.log import Log
from mmctr.training.optimizers import OptimizerConfig, make_optimizer
from mmctr.training.part_schedule import PartSchedule
from mmctr.training.sharding import Sharding
from mmctr.training.task import ChunkedTask, Task


class FitConfig(Config):
    """The training loop: length, batches, learning rate, evaluations, checkpoints."""

    epochs: float = Field(default=1.0, ge=0)
    """0 trains nothing: the run folder then holds the model as it was loaded"""
    batch_size: int = Field(default=1024, ge=1)
    """rows of a step over all processes together"""
    chunk_size: int | None = Field(default=None, ge=1)
    """items of a process that are encoded at a time; the gradient stays that of the whole batch, for a second forward
    pass (`mmctr.training.grad_cache`). None: all of them. For tasks with an encoder"""
    warmup: float = Field(default=0.05, ge=0, le=1)
    """fraction of the run in which the learning rate rises from 0"""
    decay: Literal["constant", "cosine", "linear"] = "cosine"
    """what the learning rate does after that"""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW, and how large tables are trained"""
    max_grad_norm: float | None = Field(default=5.0, gt=0)
    """gradients are scaled down to this norm; null: never"""
    evaluations: float = Field(default=1.0, gt=0)
    """evaluations on the validation rows an epoch"""
    patience: int | None = Field(default=None, ge=1)
    """stop after this many evaluations without a better one; None: run to the end"""
    log_every: int = Field(default=20, ge=1)
    """steps between lines of log.jsonl"""
    checkpoint_every: int = Field(default=500, ge=1)
    """steps; every evaluation is followed by a checkpoint as well"""
    num_workers: int = Field(default=0, ge=0)
    """processes of a process that prepare batches; 0: the training process does"""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """None: what `accelerate launch` was told, else full precision"""
    tracker: str | None = None
    """an Accelerate tracker: tensorboard, wandb, trackio, mlflow, ..."""


def lr_at(step: int, total: int, config: FitConfig) -> float:
    """The factor on every learning rate at a step: a pure function, so a resumed run goes on exactly."""
    warmup = max(1, round(total * config.warmup)) if config.warmup else 0
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if config.decay == "cosine":
        return 0.5 * (1 + float(torch.cos(torch.tensor(progress * torch.pi, dtype=torch.float64))))
    return 1.0 - progress if config.decay == "linear" else 1.0


@dataclass(frozen=True)
class FitResult:
    """How a training stage went.

    Args:
        best_step: the step whose weights are kept, 0 for the untrained ones.
        best: the primary validation metric at that step.
        untrained: validation metrics before the first step; empty where `evaluate_first` was not set.
        steps: training steps made.
    """

    best_step: int
    best: float
    untrained: dict[str, float]
    steps: int

    def to_json(self) -> dict[str, Any]:
        """The entry `training` of metrics.json."""
        return asdict(self)


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
    """Train `task`, keep the weights of the best evaluation, and put them back at the end.

    Started again with the same arguments after a crash, training goes on from the newest checkpoint and ends bit for
    bit where it would have ended (CPU, fp32): batches, dropout and learning rate are functions of the step.

    Args:
        evaluate: gives metrics on the validation rows; the higher the better for `primary`.
        primary: the metric that chooses the best weights and stops early.
        evaluate_first: evaluate the untrained task too; it can be the best one.

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
    if accelerator.mixed_precision == "fp16" and optimizer.row_tables:
        raise ValueError(
            "fit.mixed_precision: fp16 scales the loss, which tables trained by rows do not undo; take bf16, or a "
            "fit.optimizer.rows_from above the size of the tables"
        )
    schedule = PartSchedule(task, optimizer, config.optimizer, train.steps_per_epoch, seed)
    if schedule and accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError("fit.optimizer.groups: from_epoch, to_epoch and redraw are not for FSDP and DeepSpeed")
    chunked = task if isinstance(task, ChunkedTask) else None
    if config.chunk_size is not None and chunked is None:
        raise ValueError("fit.chunk_size: this task encodes nothing in chunks; leave it out")
    model, optimizer = sharding.prepare(optimizer)
    checkpoints = Checkpoints(context.folder.checkpoints, context.identity, sharding)
    state = checkpoints.load(task, optimizer)
    if state is None:
        state = {"step": 0, "best": None, "best_step": 0, "waited": 0, "stopped": False, "untrained": {}}
        if evaluate_first or not total:
            with sharding.whole():
                task.eval()
                state["untrained"] = evaluate()
            _require_number(state["untrained"], primary, 0)
            state["best"] = state["untrained"][primary]
            checkpoints.save_best(task)
    log = Log(context, state["step"])
    bar = tqdm(total=total, initial=state["step"], disable=not accelerator.is_main_process or None, unit="step")
    sums: dict[str, Tensor] = {}
    num_logged, started = 0, time.perf_counter()

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
        schedule.hold(step)
        if config.max_grad_norm is not None:
            accelerator.clip_grad_norm_(task.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        sharding.after_step()
        done = state["step"] = step + 1
        bar.update()

        # once in a while: log (the only place where the loop waits for the device)
        for name, term in ({"loss": loss} | terms).items():
            sums[name] = sums.get(name, torch.zeros((), device=loss.device)) + term.detach().float()
        num_logged += 1
        if done % config.log_every == 0 or done == total:
            means = accelerator.reduce(torch.stack(list(sums.values())) / num_logged, "mean").tolist()  # type: ignore[union-attr]
            values = dict(zip(sums, means, strict=True))
            if values["loss"] != values["loss"]:
                raise ValueError(f"step {done}: the loss is NaN; lower fit.optimizer.lr or raise fit.warmup")
            rate = num_logged * config.batch_size / (time.perf_counter() - started)
            epoch = done / train.steps_per_epoch
            lr = optimizer.param_groups[0]["lr"]
            log.write({"step": done, "epoch": round(epoch, 4), "lr": lr, **values, "rows_per_second": round(rate)})
            bar.set_postfix(loss=f"{values['loss']:.4f}", rows_per_s=round(rate))
            sums, num_logged, started = {}, 0, time.perf_counter()

        # once in a while: evaluate on the validation rows (all processes take part)
        if done % eval_every == 0 or done == total:
            with sharding.whole():
                task.eval()
                numbers = evaluate()
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
            started = time.perf_counter()
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


def _require_number(numbers: dict[str, float], primary: str, step: int) -> None:
    value = numbers.get(primary)
    if value is None:
        raise ValueError(
            f"step {step}: {primary} is undefined on the validation rows (there are {', '.join(numbers)}); the "
            f"predictions may be NaN, else choose another `primary` or split"
        )
    if value != value:
        raise ValueError(f"step {step}: {primary} is NaN; lower fit.optimizer.lr or raise fit.warmup")
