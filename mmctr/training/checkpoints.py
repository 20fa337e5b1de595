"""Checkpoints of a training run: weights, optimizer state and progress, from which a run continues exactly."""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from mmctr.distributed import spread_like
from mmctr.files import remedy_of, replace_folder
from mmctr.manifests import read_manifest, write_manifest
from mmctr.tasks.folder import save_weights
from mmctr.training.optimizers import load_optimizer_tensors, optimizer_tensors
from mmctr.training.sharding import Sharding
from mmctr.training.task import Task

STATE = "state.json"
"""manifest of a checkpoint, with the progress of the run"""
CHECKPOINT = ("task.safetensors", "optimizer.safetensors")
"""files of a checkpoint"""
BEST = "best"
"""folder of the weights of the best evaluation"""


def save_weights_folder(task: Task, folder: Path) -> None:
    """Write the weights of a task into a folder with digests, completely or not at all.

    Raises:
        OSError: the folder cannot be written.
    """

    def write(temporary: Path) -> None:
        save_weights(task, temporary / CHECKPOINT[0])
        write_manifest(temporary / STATE, {}, CHECKPOINT[:1])

    replace_folder(folder, write)


def load_weights_folder(folder: Path) -> dict[str, Tensor]:
    """The weights that `save_weights_folder` wrote, by name.

    Raises:
        ValueError: a file is missing or damaged.
    """
    read_manifest(folder / STATE, _remedy(folder.parent)).check(*CHECKPOINT[:1])
    return load_file(folder / CHECKPOINT[0])


def _remedy(folder: Path) -> str:
    return f"copy the run folder again, or delete {folder} to train from the beginning"


class Checkpoints:
    """The folders `step-N` (weights, optimizer, progress) and `best` (weights) of a run, without pickle.

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
            write_manifest(folder / STATE, state | {"identity": self.identity}, CHECKPOINT)

        path = self.folder / f"step-{state['step']:09d}"
        try:
            replace_folder(path, write)
        except Exception as error:
            raise OSError(
                f"cannot save the checkpoint {path}: {error}. {remedy_of(error)}, then start the same command again: "
                f"it goes on from the checkpoint before"
            ) from error
        # older checkpoints, and unfinished folders of a killed process
        for old in [*self._finished()[:-1], *self.folder.glob(".step-*"), *self.folder.glob(".best.*")]:
            shutil.rmtree(old, ignore_errors=True)

    def load(self, task: Task, optimizer: Any) -> dict[str, Any] | None:
        """Load the newest checkpoint into task and optimizer.

        Args:
            task: the task.
            optimizer: the optimizer of the task.

        Returns:
            The progress that was saved; None where the run has no checkpoint.

        Raises:
            ValueError: the checkpoint is damaged, or belongs to another config or dataset.
        """
        finished = self._finished()
        if not finished:
            return None
        manifest = read_manifest(finished[-1] / STATE, _remedy(self.folder))
        manifest.check(*CHECKPOINT)
        state = manifest.values
        if state.pop("identity", None) != self.identity:
            raise ValueError(
                f"{finished[-1]}: this checkpoint belongs to another config or dataset; choose another run_dir, or "
                f"delete {self.folder.parent} to start anew"
            )
        current = task.state_dict()
        weights = load_file(finished[-1] / "task.safetensors").items()
        task.load_state_dict({name: spread_like(x, current[name]) if name in current else x for name, x in weights})
        load_optimizer_tensors(optimizer, load_file(finished[-1] / "optimizer.safetensors"))
        return state

    def save_best(self, task: Task) -> None:
        """Write the weights of the best evaluation so far."""
        with self._writing() as writes:
            if writes:
                save_weights_folder(task, self.folder / BEST)

    def load_best(self, task: Task) -> None:
        """Load the weights of the best evaluation into the task.

        Raises:
            ValueError: the weights are damaged.
        """
        task.load_state_dict(load_weights_folder(self.folder / BEST))

    def _writing(self) -> AbstractContextManager[bool]:
        """Within the context the task is whole; the value says whether this process writes."""
        return nullcontext(True) if self.sharding is None else self.sharding.writing()

    def _finished(self) -> list[Path]:
        """The folders of complete checkpoints, oldest first."""
        return sorted(self.folder.glob("step-*"))
