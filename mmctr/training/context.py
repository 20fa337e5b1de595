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
    """What the stages of a run share.

    Args:
        folder: the run folder; checkpoints and the log of a stage go there.
        accelerator: processes, device and precision.
        seed: of the run, see `mmctr.data.hashing.stream_seed` for how streams of random numbers follow from it.
        identity: a fingerprint of the config and dataset of the run. A checkpoint of another identity is refused.
        phase: name of a later stage of the same run: metric names in a tracker begin with it.
        steps_before: training steps of the stages before, because trackers drop a step behind the last one.
    """

    folder: RunFolder
    accelerator: Accelerator
    seed: int
    identity: str
    phase: str = ""
    steps_before: int = 0

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def is_main_process(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.accelerator.is_main_process

    def seed_torch(self, stream: str) -> None:
        """Let what torch draws next, such as initial weights, come from a stream of the run, by its name."""
        torch.manual_seed(stream_seed(self.seed, stream))

    def plan(self, num_rows: int, batch_size: int) -> BatchPlan:
        """Which of `num_rows` training rows this process takes at each step; `batch_size` is of all processes."""
        return BatchPlan(
            num_rows, batch_size, self.seed, self.accelerator.process_index, self.accelerator.num_processes
        )

    def next_phase(self, name: str, steps_before: int) -> RunContext:
        """The context of a later stage, whose checkpoints and log lie in the folder `name` of the run folder."""
        return replace(self, folder=RunFolder(self.folder.path / name), phase=name, steps_before=steps_before)
