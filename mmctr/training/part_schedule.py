"""What a part of a task does in which epoch: ID tables that train for some epochs only, or start anew in each.

Tables of IDs begin to know the training rows by heart when they see them a second time, while layers and content gain
by further epochs ("one-epoch overfitting", Zhang et al. 2022, arXiv 2209.06053). So either the tables stop, or begin
late, or are drawn anew at the start of every epoch: the layers then see several embedding spaces and cannot lean on
single rows (MEDA: Fan et al. 2024, arXiv 2407.01607).
"""

from __future__ import annotations

import torch

from mmctr.data.hashing import stream_seed
from mmctr.layers.row_table import RowTable
from mmctr.training.optimizers import OptimizerConfig, ParameterGroupConfig, RowAdamW
from mmctr.training.task import Task


class PartSchedule:
    """Applies `redraw`, `from_epoch` and `to_epoch` of an optimiser's groups: a function of seed and step alone, so the
    same in every process and after a resume.

    Args:
        optimizer: of `make_optimizer`, before anything is wrapped around it.

    Raises ValueError for a part that cannot be drawn anew.
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
        """Whether there is anything to do."""
        default = ParameterGroupConfig()
        return bool(self.tables) or any(
            (group.from_epoch, group.to_epoch) != (default.from_epoch, default.to_epoch)
            for group in self._groups.values()
        )

    def before_step(self, step: int) -> None:
        """At the start of every epoch but the first: new tables, and no moments of the old ones."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if place or not epoch:
            return
        for number, table in enumerate(self.tables):
            table.draw(torch.Generator().manual_seed(stream_seed(self.seed, "redrawn table", epoch, number)))
            self.optimizer.state.pop(table.weight, None)

    def hold(self, step: int) -> None:
        """Between backward pass and update: forget the gradients of the parts that do not train now. Without a gradient
        neither weights nor moments move, and nothing decays."""
        for group in self.optimizer.param_groups:
            if not self.trains(group["part"], step):
                for p in group["params"]:
                    p.grad = None
                    if p in self.optimizer.row_tables:
                        self.optimizer.row_tables[p].drop_gradient()

    def trains(self, part: str, step: int) -> bool:
        own = self._groups.get(part, ParameterGroupConfig())
        first = round(own.from_epoch * self.steps_per_epoch)
        return step >= first and (own.to_epoch is None or step < round(own.to_epoch * self.steps_per_epoch))
