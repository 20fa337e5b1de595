"""What every benchmarked process measures: steps, evaluation, memory, and how busy others kept the machine."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


class Stopwatch:
    """Training is timed between the ends of optimiser steps, whatever loop makes them, so start-up does not count.

    Args:
        skipped: first steps not counted: they touch memory for the first time and compile.
    """

    def __init__(self, batch_size: int, skipped: int = 3):
        self.batch_size, self.skipped = batch_size, skipped
        self.ends: list[float] = []
        self._hook = register_optimizer_step_post_hook(lambda *_: self.ends.append(time.perf_counter()))
        self.started, self.foreign = time.perf_counter(), _cpu_seconds() - _own_seconds()

    def report(self, num_eval: int, evaluate: Callable[[], float], **more: Any) -> None:
        """Time `evaluate`, which gives an AUC, and print all as one line of JSON."""
        steps = self.ends[self.skipped :]
        began = time.perf_counter()
        auc = evaluate()
        seconds = time.perf_counter() - began
        foreign = _cpu_seconds() - _own_seconds() - self.foreign
        numbers = {
            **more,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "train_rows_per_s": round((len(steps) - 1) * self.batch_size / (steps[-1] - steps[0])),
            "steps": len(steps) - 1,
            "eval_rows_per_s": round(num_eval / seconds),
            "auc": round(float(auc), 5),
            "peak_rss_mb": round(_peak_rss_mb()),
            # cores that other processes kept busy: numbers of a run where this is above 0.1 compare to nothing
            "busy_elsewhere": round(max(0.0, foreign / (time.perf_counter() - self.started)), 2),
        }
        print(json.dumps(numbers), flush=True)


def _cpu_seconds() -> float:
    """CPU seconds of the whole machine since it was started (Linux)."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """CPU seconds of this process, its ended children and its living ones (loader workers)."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    total = sum(u.ru_utime + u.ru_stime for u in usage)
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def _peak_rss_mb() -> float:
    """Of this process and of its largest child together."""
    return sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024
