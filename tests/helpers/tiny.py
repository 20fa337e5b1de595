"""Recipes and commands on tiny models in processes of their own, which can be killed at a chosen moment.

Importing torch and the recipes takes seconds, so a server imports them once and forks a process for each run.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import sys
import warnings
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from mmctr import files

CLONE = Path(__file__).resolve().parents[2]
ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    ["pretrain.train", "finetune.train", "mmctr.runs.finished", "mmctr.cli.main", "tests.helpers.tiny"]
)


def pretrain_values(data: Path, **task: Any) -> dict[str, Any]:
    """A pretraining config: 5 steps an epoch on the tests' toy folder."""
    return {
        "data": {"path": str(data)},
        "task": {"encoder": {"name": "openclip", "architecture": ARCHITECTURE}, **task},
        "fit": {"epochs": 3, "batch_size": 20, "optimizer": {"lr": 3e-3}, "log_every": 1, "checkpoint_every": 3},
        "validation": 0.15,
        "attributes": ["factor_shape"],
        "run_dir": "unset",
    }


def finetune_values(data: Path, content: dict[str, Any] | None = None, **fit: Any) -> dict[str, Any]:
    """A DIN config; ID dropout, user dropout and Dice are on, MLP dropout is off."""
    return {
        "data": {"path": str(data)},
        "split": {"name": "cold_items", "cold": 0.2, "test": 0.2},
        "task": {
            "embedder": {"id_dim": 8, "id_dropout": 0.2, "init_std": 0.1, "content": content or {"name": "none"}},
            "ranker": {"name": "din", "attention": [8], "mlp": [16], "activation": "dice"},
            "user_dim": 4,
            "user_dropout": 0.1,
            "max_history": 10,
        },
        "fit": {
            "epochs": 2,
            "batch_size": 96,
            "optimizer": {"lr": 1e-2},
            "log_every": 1,
            "checkpoint_every": 4,
            **fit,
        },
        "run_dir": "unset",
    }


def write_config(path: Path, values: dict[str, Any]) -> Path:
    """JSON is YAML."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


@dataclass
class Run:
    """One command in one or several processes."""

    processes: list[BaseProcess]
    outputs: list[Path]

    def wait(self, timeout: float = 120) -> int:
        """The exit code of the first process that failed, 0 when none did; -9 for a killed one."""
        for process in self.processes:
            process.join(timeout)
            if process.exitcode is None:
                self.kill()
                raise AssertionError(f"still running after {timeout} s:\n{self.text}")
        return next((p.exitcode for p in self.processes if p.exitcode), 0)  # type: ignore[return-value]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    @property
    def text(self) -> str:
        """What all processes printed to stdout and stderr."""
        both = [Path(f"{path}{end}") for path in self.outputs for end in ("", ".err")]
        return "\n".join(path.read_text(encoding="utf-8") for path in both if path.is_file())

    @property
    def errors(self) -> list[str]:
        """The lines on stderr."""
        return [line for path in self.outputs for line in Path(f"{path}.err").read_text(encoding="utf-8").splitlines()]

    def ok(self) -> str:
        code = self.wait()
        assert code == 0, self.text
        return self.text


def all_ok(runs: list[Run]) -> None:
    """Wait for runs that go on at the same time."""
    for run in runs:
        run.ok()


def start(
    folder: Path,
    module: str,
    *arguments: Any,
    processes: int = 1,
    kill_at_rename: int | None = None,
    file_limit: int | None = None,
) -> Run:
    """Start `python -m module arguments` in forked processes; what they print goes to files in `folder`.

    Args:
        kill_at_rename: SIGKILL the process just before it renames its n-th finished file or folder into place.
        file_limit: no file may grow beyond so many bytes: writing more fails as a full disk does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "MMCTR_CACHE": os.environ["MMCTR_CACHE"]}
    port, number = free_port(), len(list(folder.glob("output-*.err")))
    children, outputs = [], []
    for rank in range(processes):
        own = dict(environment)
        if processes > 1:
            own |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            own |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        output = folder / f"output-{number}-{rank}"
        Path(f"{output}.err").touch()  # the next run has another number, however soon it starts
        command = [module, *map(str, arguments)]
        child = _server.Process(target=_run, args=(command, own, str(output), kill_at_rename, file_limit))
        child.start()
        children.append(child)
        outputs.append(output)
    return Run(children, outputs)


def _run(command: list[str], environment: dict[str, str], output: str, kill_at: int | None, limit: int | None) -> None:
    for number, name in ((1, output), (2, output + ".err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    # a fork server leaves no standard streams of a terminal behind
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    os.environ.update(environment)
    os.chdir(CLONE)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if kill_at is not None:
        rename, count = os.replace, iter(range(1, 10**9))

        def replace(*args: Any, **kwargs: Any) -> None:
            if next(count) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(*args, **kwargs)

        os.replace = replace
        exchange = files._exchanged  # an existing folder is put in place by another call

        def exchanged(*args: Any) -> bool:
            if next(count) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return exchange(*args)

        files._exchanged = exchanged
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.argv = command
    try:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    finally:
        sys.stdout.flush()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def log_lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in log_lines(run_dir) if "loss" in line]
