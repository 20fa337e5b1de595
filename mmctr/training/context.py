"""RunContext: the folder, processes, seed and identity that every stage of one training run shares."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator

from mmctr.data.hashing import stream_seed
from mmctr.data.loaders import BatchPlan
from mmctr.run_folder import RunFolder


@dataclass(frozen=True)
class RunContext:
    """The folder, processes and seed of one training run.

    Args:
        folder: the run folder, which gets the checkpoints and the log.
        accelerator: processes, device and precision.
        seed: seed of the run; `mmctr.data.hashing.stream_seed` derives a seed for each stream of random numbers.
        identity: a fingerprint of the config and dataset of the run. A checkpoint of another identity is refused.
        phase: name of a later stage of the same run, the prefix of metric names in a tracker; empty for the first.
        steps_before: training steps of earlier stages, which a tracker counts on from.
    """

    folder: RunFolder
    accelerator: Accelerator
    seed: int
    identity: str
    phase: str = ""
    steps_before: int = 0

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.accelerator.device

    @property
    def is_main_process(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.accelerator.is_main_process

    def seed_torch(self, stream: str) -> None:
        """Seed the generator of torch, for example for initial weights.

        Args:
            stream: name of the stream of random numbers; two streams of a run are independent.
        """
        torch.manual_seed(stream_seed(self.seed, stream))

    def plan(self, num_rows: int, batch_size: int) -> BatchPlan:
        """The training rows of each step of this process.

        Args:
            num_rows: number of training rows.
            batch_size: rows of a step over all processes together.
        """
        return BatchPlan(
            num_rows, batch_size, self.seed, self.accelerator.process_index, self.accelerator.num_processes
        )

    def next_phase(self, name: str, steps_before: int) -> RunContext:
        """The context of a later stage of the run.

        Args:
            name: name of the stage, and of the folder in the run folder that gets checkpoints and log of the stage.
            steps_before: training steps of the earlier stages.
        """
        return replace(self, folder=RunFolder(self.folder.path / name), phase=name, steps_before=steps_before)
