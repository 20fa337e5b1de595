"""Schedules of the parts of a task by epoch: parts that train in some epochs only, and ID tables drawn anew.

ID tables memorise the training rows in the second epoch, while layers and content improve over several epochs
("one-epoch overfitting", Zhang et al. 2022, arXiv 2209.06053). So ID tables can stop training early, begin late, or be
drawn anew at the start of every epoch: the layers are then trained with several embedding spaces and cannot rely on
single rows (MEDA: Fan et al. 2024, arXiv 2407.01607).
"""

from __future__ import annotations

import torch

from mmctr.data.hashing import stream_seed
from mmctr.layers.row_table import RowTable
from mmctr.training.optimizers import OptimizerConfig, ParameterGroupConfig, RowAdamW
from mmctr.training.task import Task


class PartSchedule:
    """Applies `redraw`, `from_epoch` and `to_epoch` of the groups of an optimizer.

    The schedule is a function of seed and step alone, and so the same in every process and after a resume.

    Args:
        task: the task.
        optimizer: the result of `make_optimizer`, before Accelerate wraps the optimizer.
        config: options of the optimizer.
        steps_per_epoch: steps of an epoch.
        seed: seed of the tables that are drawn anew.

    Raises:
        ValueError: a part with `redraw` has other parameters than ID tables, or none.
    """

    def __init__(self, task: Task, optimizer: RowAdamW, config: OptimizerConfig, steps_per_epoch: int, seed: int):
        self.optimizer, self.steps_per_epoch, self.seed = optimizer, steps_per_epoch, seed
        self._groups = config.groups
        parts = task.parameter_parts()
        all_tables = {module.weight: module for module in task.modules() if isinstance(module, RowTable)}
        self.tables: list[RowTable] = []
        for name, group in config.groups.items():
            if group.redraw and not (parts[name] and all(p in all_tables for p in parts[name])):
                raise ValueError(
                    f"fit.optimizer.groups.{name}.redraw: only ID tables can be drawn anew, and this part "
                    f"{'has other parameters' if parts[name] else 'has none'}; leave it out"
                )
            self.tables += [all_tables[p] for p in parts[name] if group.redraw]

    def __bool__(self) -> bool:
        """Whether any part has a schedule."""
        default = ParameterGroupConfig()
        return bool(self.tables) or any(
            (group.from_epoch, group.to_epoch) != (default.from_epoch, default.to_epoch)
            for group in self._groups.values()
        )

    def before_step(self, step: int) -> None:
        """Draw tables anew, and drop the moments of the old tables, at the first step of every epoch but the first.

        Args:
            step: the step, from 0.
        """
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        if step_of_epoch or not epoch:
            return
        for number, table in enumerate(self.tables):
            table.draw(torch.Generator().manual_seed(stream_seed(self.seed, "redrawn table", epoch, number)))
            self.optimizer.state.pop(table.weight, None)

    def drop_gradients(self, step: int) -> None:
        """Drop the gradients of the parts that do not train at a step, between backward pass and update.

        Without a gradient weights and moments do not change, and nothing decays.

        Args:
            step: the step, from 0.
        """
        for group in self.optimizer.param_groups:
            if not self.trains(group["part"], step):
                for p in group["params"]:
                    p.grad = None
                    if p in self.optimizer.row_tables:
                        self.optimizer.row_tables[p].drop_gradient()

    def trains(self, part: str, step: int) -> bool:
        """Whether a part trains at a step."""
        group = self._groups.get(part, ParameterGroupConfig())
        first = round(group.from_epoch * self.steps_per_epoch)
        return step >= first and (group.to_epoch is None or step < round(group.to_epoch * self.steps_per_epoch))
