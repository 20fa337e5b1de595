"""A task of one weight, and a short training run of it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from mmctr.data.batches import Batch
from mmctr.data.loaders import BatchPlan, TrainBatches
from mmctr.run_folder import RunFolder
from mmctr.training.context import RunContext
from mmctr.training.fit import FitConfig, fit


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


def run_fit(task, tmp_path: Path, score, primary="score", evaluate_first=False, identity="a", **config):
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


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
