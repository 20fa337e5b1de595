"""AdamW over the parts of a task, and embedding tables that are trained by the rows of a batch.

A dense optimizer reads and writes every row of a table at every step. This is fastest for small tables (one fused
kernel) and impossible for large tables, so tables of at least `rows_from` rows are trained by rows: a step touches only
the rows of the batch, whatever the size of the vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol, runtime_checkable

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmctr.config import Config
from mmctr.distributed import spread_like, whole_tensor
from mmctr.layers.row_table import RowTable
from mmctr.training.task import Task


class ParameterGroupConfig(Config):
    """Optimizer settings of one part of a task; None takes the common setting."""

    lr: float | None = Field(default=None, ge=0)
    """learning rate of the part; null: the common learning rate"""
    weight_decay: float | None = Field(default=None, ge=0)
    """weight decay of the part; null: the common weight decay"""
    from_epoch: float = Field(default=0.0, ge=0)
    """number of epochs before the part begins to train; until then the part does not change"""
    to_epoch: float | None = Field(default=None, gt=0)
    """number of epochs after which the part stops training and no longer changes. None: the part trains to the end"""
    redraw: bool = False
    """draw the ID tables of the part anew at the start of every epoch but the first (MEDA,
    `mmctr.training.part_schedule`)"""

    @model_validator(mode="after")
    def _epochs_in_order(self) -> ParameterGroupConfig:
        if self.to_epoch is not None and self.to_epoch <= self.from_epoch:
            raise ValueError(
                f"to_epoch {self.to_epoch} is not after from_epoch {self.from_epoch}; the part never trains"
            )
        if self.to_epoch is not None and self.redraw:
            raise ValueError("redraw makes new tables each epoch, which to_epoch would leave untrained; keep one")
        return self


class OptimizerConfig(Config):
    """AdamW, with common settings for all parameters and exceptions by part."""

    lr: float = Field(default=1e-3, gt=0)
    """largest learning rate of the schedule"""
    weight_decay: float = Field(default=0.0, ge=0)
    """weight decay; not applied to biases, norms and other vectors. In tables trained by rows only the rows of a batch
    decay"""
    betas: tuple[float, float] = (0.9, 0.999)
    """decay rates of the two moments of Adam"""
    groups: dict[str, ParameterGroupConfig] = {}
    """settings by part, by the names of `parameter_parts()` of the task: `encoder`, `projection`, `head` and more in
    pretraining; `id`, `content`, `encoder`, `expert`, `ranker` in ranking"""
    rows: Literal["adam", "adagrad", "ftrl"] = "adam"
    """how tables are trained by rows. `adam`: the moments of a row advance when the row is in a batch, as in SparseAdam
    of torch. `adagrad`: one accumulator for each row, at most half the memory of the weights; needs a higher lr, near
    0.05. `ftrl`: FTRL-Proximal (McMahan et al. 2013) with one learning rate for each row and exact zeros, for linear
    rankers"""
    rows_from: int = Field(default=300_000, ge=0)
    """smallest number of rows of a table that is trained by rows; 0: all tables are"""
    l1: float = Field(default=0.0, ge=0)
    """L1 penalty of `ftrl`, which sets single weights to zero. As in the paper, the penalty is compared with the sum of
    all gradients so far: with the mean loss of a batch over T steps, l1 is T times the weight of an L1 term added to
    that loss. The same holds for l21 and l2"""
    l21: float = Field(default=0.0, ge=0)
    """L2,1 penalty of `ftrl`, which sets whole rows to zero and so drops features (Gai et al. 2017, equation 4)"""
    l2: float = Field(default=0.0, ge=0)
    """L2 penalty of `ftrl`, which shrinks weights towards zero"""

    @model_validator(mode="after")
    def _penalties_need_ftrl(self) -> OptimizerConfig:
        if (self.l1 or self.l21 or self.l2) and self.rows != "ftrl":
            raise ValueError("l1, l21 and l2 belong to rows: ftrl; AdamW has weight_decay")
        if self.rows == "ftrl" and self.rows_from:
            raise ValueError("rows: ftrl is meant for all tables; set rows_from: 0")
        return self


class RowAdamW(torch.optim.AdamW):
    """Fused AdamW for parameters with a gradient, and row-wise steps for tables that are trained by rows.

    Args:
        groups: parameter groups of torch, with `lr` and `weight_decay`.
        config: options of the optimizer.
        tables: the tables that are trained by rows.
        max_norm: the gradient of the rows of all tables is scaled down to this norm; None: not scaled.
    """

    def __init__(
        self, groups: list[dict[str, Any]], config: OptimizerConfig, tables: list[RowTable], max_norm: float | None
    ):
        super().__init__(groups, betas=config.betas, fused=True)
        self._config, self._max_norm = config, max_norm
        self.row_tables = {table.weight: table for table in tables}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters; returns the loss of the closure, if there is a closure."""
        result = super().step(closure)  # skips parameters without a gradient
        gradients = {
            weight: (group, *self.row_tables[weight].pop_gradient())
            for group in self.param_groups
            for weight in group["params"]
            if weight in self.row_tables
        }
        scale = 1.0
        if gradients and self._max_norm is not None:
            norm = torch.stack([grad.square().sum() for _, _, grad in gradients.values()]).sum().sqrt()
            scale = (self._max_norm / (norm + 1e-6)).clamp(max=1.0)
        for weight, (group, rows, grad) in gradients.items():
            if len(rows):
                self._step_rows(group, weight, rows, grad * scale)
        return result

    def _step_rows(self, group: dict[str, Any], weight: Tensor, rows: Tensor, grad: Tensor) -> None:
        """Update rows (R,) of a table with gradients (R, D)."""
        state = self.state[weight]
        lr = group["lr"]
        values = weight.index_select(0, rows) * (1 - lr * group["weight_decay"])
        if not state:
            state["step"] = torch.zeros(())
            if self._config.rows != "adam":
                state["sum"] = torch.zeros(len(weight), device=weight.device)
            if self._config.rows == "ftrl":
                state["z"], state["scale"] = torch.zeros_like(weight), torch.zeros_like(state["sum"])
            elif self._config.rows == "adam":
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        state["step"] += 1
        if self._config.rows == "adagrad":
            total = state["sum"].index_select(0, rows) + grad.square().mean(1)
            state["sum"].index_copy_(0, rows, total)
            values -= lr * grad / (total.sqrt() + 1e-10)[:, None]
        elif self._config.rows == "ftrl":
            before = state["sum"].index_select(0, rows)
            total = before + grad.square().mean(1)
            # the curvature that a step adds at the current weights; the sum over steps is sqrt(total) / lr for one lr
            added = (total.sqrt() - before.sqrt()) / max(lr, 1e-12)
            scale = state["scale"].index_select(0, rows) + added
            z = state["z"].index_select(0, rows) + grad - added[:, None] * weight.index_select(0, rows)
            for name, value in (("sum", total), ("scale", scale), ("z", z)):
                state[name].index_copy_(0, rows, value)
            values = proximal_weights(z, scale, self._config.l1, self._config.l21, self._config.l2)
        else:
            beta1, beta2 = group["betas"]
            mean = state["exp_avg"].index_select(0, rows).lerp_(grad, 1 - beta1)
            square = state["exp_avg_sq"].index_select(0, rows).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            state["exp_avg"].index_copy_(0, rows, mean)
            state["exp_avg_sq"].index_copy_(0, rows, square)
            step = state["step"]
            scale = (1 - beta2**step).sqrt()
            values -= lr / (1 - beta1**step) * mean / (square.sqrt() / scale + group["eps"])
        weight.index_copy_(0, rows, values)


def proximal_weights(z: Tensor, scale: Tensor, l1: float, l21: float, l2: float) -> Tensor:
    """The weights w of each row that minimise z w + scale |w|^2 / 2 + l1 |w|_1 + l21 |w|_2 + l2 |w|^2 / 2.

    The two thresholds are applied one after the other, to single weights and then to rows (Gai et al. 2017 apply both
    at once); the result is exact because the shrinkage of a row keeps signs and zeros.

    Args:
        z: (R, D).
        scale: (R,).
        l1: weight of the L1 norm.
        l21: weight of the norm of a row.
        l2: weight of the squared norm.

    Returns:
        (R, D).
    """
    soft = z.sign() * (z.abs() - l1).clamp(min=0)
    norm = soft.norm(dim=1, keepdim=True)
    shrunk = soft * (1 - l21 / norm.clamp(min=1e-30)).clamp(min=0)
    return -shrunk / (scale[:, None] + l2).clamp(min=1e-30)


@runtime_checkable
class HasLrScales(Protocol):
    """A module with factors on the learning rates of parameters."""

    def lr_scales(self) -> dict[nn.Parameter, float]:
        """Factors on the learning rate by parameter; a missing parameter has the factor 1."""
        ...


def make_optimizer(task: Task, config: OptimizerConfig, max_grad_norm: float | None = None) -> RowAdamW:
    """The optimizer of a task, whose large tables are trained by rows from then on.

    Modules of the task with a method `lr_scales()` give factors on the learning rates of single parameters.

    Args:
        task: the task.
        config: options of the optimizer.
        max_grad_norm: the gradient of the rows of a step, all tables together, is scaled down to this norm; the caller
            clips the other gradients.

    Raises:
        ValueError: a group of the config is no part of the task.
    """
    parts = task.parameter_parts()
    unknown = set(config.groups) - set(parts)
    if unknown:
        raise ValueError(f"optimizer.groups: no part {sorted(unknown)[0]!r}; this task has {', '.join(parts)}")
    tables = [
        module
        for module in task.modules()
        if isinstance(module, RowTable) and module.weight.requires_grad and len(module.weight) >= config.rows_from
    ]
    scales: dict[nn.Parameter, float] = {}
    for module in task.modules():
        if isinstance(module, HasLrScales):
            scales |= module.lr_scales()
    groups = []
    by_rows = {id(table.weight) for table in tables}
    for name, parameters in parts.items():
        settings = config.groups.get(name, ParameterGroupConfig())
        lr = config.lr if settings.lr is None else settings.lr
        decay = config.weight_decay if settings.weight_decay is None else settings.weight_decay
        # the largest rate first, because the log shows the rate of the first group
        for scale in sorted({scales.get(p, 1.0) for p in parameters}, reverse=True):
            trained = [p for p in parameters if p.requires_grad and scales.get(p, 1.0) == scale]
            matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
            dense, rows = [p for p in matrices if id(p) not in by_rows], [p for p in matrices if id(p) in by_rows]
            groups += [
                {"params": dense, "part": name, "lr": lr * scale, "weight_decay": decay},
                {"params": vectors, "part": name, "lr": lr * scale, "weight_decay": 0.0},
                {"params": rows, "part": name, "lr": lr * scale, "weight_decay": decay},
            ]
    groups = [group | {"base_lr": group["lr"]} for group in groups if group["params"]]
    for table in tables:
        table.train_by_rows()
    return RowAdamW(groups, config, tables, max_grad_norm)


def optimizer_tensors(optimizer: torch.optim.Optimizer, keep: bool = True) -> dict[str, Tensor]:
    """The state of an optimizer as tensors on the CPU, by the names `<parameter number>.<state name>`.

    Args:
        optimizer: the optimizer; the state may be spread over processes, which then all call this function.
        keep: whether this process needs the tensors; False gives an empty dictionary.
    """
    tensors = {}
    for i, entry in optimizer.state_dict()["state"].items():
        for name, value in entry.items():
            whole = whole_tensor(value.detach())
            if keep:
                tensors[f"{i}.{name}"] = whole.to("cpu", copy=True).contiguous()
    return tensors


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Load the state of an optimizer from the tensors of `optimizer_tensors`."""
    whole = optimizer.state_dict()
    whole["state"] = {}
    parameters = getattr(optimizer, "parameters", None) or [
        p for group in optimizer.param_groups for p in group["params"]
    ]
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        value = tensor if name == "step" else spread_like(tensor, parameters[int(number)])
        whole["state"].setdefault(int(number), {})[name] = value
    optimizer.load_state_dict(whole)
    for parameter, state in optimizer.state.items():
        for name, tensor in state.items():
            if tensor.shape == parameter.shape and tensor.stride() != parameter.stride():
                # fused AdamW ignores strides, and the strides of parameters in channels_last are different
                state[name] = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
