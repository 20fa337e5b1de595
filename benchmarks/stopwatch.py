"""What every benchmarked process measures: steps, evaluation, memory, and how busy others kept the machine."""

from __future__ import annotations

import json
import os
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

_TICKS = os.sysconf("SC_CLK_TCK")


class Stopwatch:
    """Training is timed between the ends of optimiser steps, whatever loop makes them, so start-up does not count.

    Args:
        skipped: first steps not counted: they touch memory for the first time and compile.
    """

    def __init__(self, batch_size: int, skipped: int = 3):
        self.batch_size, self.skipped = batch_size, skipped
        self.ends: list[float] = []
        self._hook = register_optimizer_step_post_hook(lambda *_: self.ends.append(time.perf_counter()))
        self._memory = Memory()
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
            "peak_memory_mb": round(self._memory.peak_mb),
            # cores that other processes kept busy: numbers of a run where this is above 0.1 compare to nothing
            "busy_elsewhere": round(max(0.0, foreign / (time.perf_counter() - self.started)), 2),
        }
        print(json.dumps(numbers), flush=True)


def _cpu_seconds() -> float:
    """CPU seconds of the whole machine since it was started (Linux)."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / _TICKS


def _own_seconds() -> float:
    """CPU seconds of this process, its ended children and its living ones (loader workers)."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    total = sum(u.ru_utime + u.ru_stime for u in usage)
    return total + sum(float(ticks) for fields in _children().values() for ticks in fields[11:13]) / _TICKS


def _children() -> dict[str, list[str]]:
    """Fields of /proc/PID/stat of the living children, by PID."""
    found = {}
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            found[process] = fields
    return found


class Memory(threading.Thread):
    """Largest memory of this process and its living children seen, a few times a second; pages they share count once
    (PSS)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_mb = 0.0
        self.start()

    def run(self) -> None:
        while True:
            self.peak_mb = max(self.peak_mb, sum(_pss_mb(pid) for pid in ["self", *_children()]))
            time.sleep(0.2)


def _pss_mb(pid: str) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")), 0.0)
