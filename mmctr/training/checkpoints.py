"""Checkpoints of a training run: weights, optimizer state and progress, from which a run continues exactly."""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmctr.distributed import spread_like
from mmctr.files import read_json, remedy_of, replace_file, replace_folder, write_json
from mmctr.tasks.folder import save_weights
from mmctr.training.optimizers import load_optimizer_tensors, optimizer_tensors
from mmctr.training.sharding import Sharding
from mmctr.training.task import Task


class Checkpoints:
    """The folders `step-N` (weights, optimizer, progress) and the file `best.safetensors` of a run, without pickle.

    All processes call the methods; the main process writes.

    Args:
        folder: the folder `checkpoints` of the run.
        identity: fingerprint of config and dataset; a checkpoint of another identity is refused.
        sharding: makes a task that is spread over processes whole; None: the task is whole in each process.
    """

    def __init__(self, folder: Path, identity: str, sharding: Sharding | None = None):
        self.folder, self.identity, self.sharding = folder, identity, sharding

    def save(self, task: Task, optimizer: Any, state: dict[str, Any]) -> None:
        """Write a checkpoint, and remove older checkpoints.

        Args:
            task: the task.
            optimizer: the optimizer of the task.
            state: progress of the run, with the number of steps under "step".

        Raises:
            OSError: the checkpoint cannot be written.
        """
        with self._writing() as writes:
            moments = optimizer_tensors(optimizer, keep=writes)
            if writes:
                self._write(task, moments, state)

    def _write(self, task: Task, moments: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write the checkpoint of a step, then remove older checkpoints and unfinished files."""

        def write(folder: Path) -> None:
            save_weights(task, folder / "task.safetensors")
            save_file(moments, folder / "optimizer.safetensors")
            write_json(folder / "state.json", state | {"identity": self.identity})

        path = self.folder / f"step-{state['step']:09d}"
        try:
            replace_folder(path, write)
        except Exception as error:
            raise OSError(
                f"cannot save the checkpoint {path}: {error}. {remedy_of(error)}, then start the same command again: "
                f"it goes on from the checkpoint before"
            ) from error
        # older checkpoints, and unfinished files of a killed process
        for old in [*self._finished()[:-1], *self.folder.glob(".step-*")]:
            shutil.rmtree(old, ignore_errors=True)
        for old in self.folder.glob(".best.*"):
            old.unlink(missing_ok=True)

    def load(self, task: Task, optimizer: Any) -> dict[str, Any] | None:
        """Load the newest checkpoint into task and optimizer.

        Args:
            task: the task.
            optimizer: the optimizer of the task.

        Returns:
            The progress that was saved; None where the run has no checkpoint.

        Raises:
            ValueError: the checkpoint belongs to another config or dataset, or a file is cut short or damaged.
        """
        finished = self._finished()
        if not finished:
            return None
        state = read_json(finished[-1] / "state.json")
        if state.pop("identity") != self.identity:
            raise ValueError(
                f"{finished[-1]}: this checkpoint belongs to another config or dataset; choose another run_dir, or "
                f"delete {self.folder.parent} to start anew"
            )
        current = task.state_dict()
        weights = self._read(finished[-1] / "task.safetensors").items()
        task.load_state_dict({name: spread_like(x, current[name]) if name in current else x for name, x in weights})
        load_optimizer_tensors(optimizer, self._read(finished[-1] / "optimizer.safetensors"))
        return state

    def save_best(self, task: Task) -> None:
        """Write the weights of the best evaluation so far."""
        with self._writing() as writes:
            if writes:
                replace_file(self.folder / "best.safetensors", lambda path: save_weights(task, path))

    def load_best(self, task: Task) -> None:
        """Load the weights of the best evaluation into the task."""
        task.load_state_dict(self._read(self.folder / "best.safetensors"))

    def _read(self, file: Path) -> dict[str, Tensor]:
        """The tensors of a file; ValueError where the file is missing, cut short or damaged."""
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file}: not a whole file ({error}); copy the run folder again, or delete {self.folder} to train from "
                f"the beginning"
            ) from None

    def _writing(self) -> AbstractContextManager[bool]:
        """Within the context the task is whole; the value says whether this process writes."""
        return nullcontext(True) if self.sharding is None else self.sharding.writing()

    def _finished(self) -> list[Path]:
        """The folders of complete checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if (path / "state.json").is_file())
