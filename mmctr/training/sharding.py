"""Tasks that are spread over processes: weights, gradients and optimizer state (FSDP2), or all but the weights
(ZeRO-1 and ZeRO-2 of DeepSpeed)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from mmctr.distributed import whole_tensor
from mmctr.layers.row_table import RowTable
from mmctr.training.task import Task


def set_up_sharding(accelerator: Accelerator) -> None:
    """Set the options that an Accelerate config leaves open, and check the other options.

    Raises:
        ValueError: an option of the Accelerate config is not supported.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin: Any = accelerator.state.fsdp_plugin
        wrong = {
            "fsdp_version: 2": plugin.fsdp_version != 2,
            "fsdp_cpu_ram_efficient_loading: false": plugin.cpu_ram_efficient_loading,
            "fsdp_offload_params: false": type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy",
            "fsdp_activation_checkpointing: false": plugin.activation_checkpointing,
        }
        path = "configs/accelerate/fsdp2.yaml"
    elif accelerator.distributed_type == DistributedType.DEEPSPEED:
        config = _deepspeed_config(accelerator)
        zero = config["zero_optimization"]
        wrong = {
            "zero_stage: 2": zero.get("stage") not in (1, 2),
            "offload_optimizer_device: none": zero.get("offload_optimizer", {}).get("device", "none") != "none",
            "gradient_accumulation_steps: 1": config["gradient_accumulation_steps"] not in (1, "auto"),
            "no optimizer and no scheduler": "optimizer" in config or "scheduler" in config,
        }
        path = "configs/accelerate/deepspeed.yaml"
    else:
        return
    for setting, is_wrong in wrong.items():
        if is_wrong:
            raise ValueError(f"the Accelerate config needs {setting}, as in {path}")
    if accelerator.mixed_precision == "fp16":
        raise ValueError("mixed_precision: fp16 scales the loss, which is not for FSDP and DeepSpeed here; take bf16")
    # bf16 is the autocast of torch over fp32 weights, as without sharding. Accelerate would round the weights, the
    # temperature included, and the sums of gradients
    if accelerator.distributed_type == DistributedType.FSDP:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        plugin.mixed_precision_policy = MixedPrecisionPolicy()
    elif accelerator.mixed_precision == "bf16":
        config["bf16"] = {"enabled": False}
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}


def _deepspeed_config(accelerator: Accelerator) -> dict[str, Any]:
    """The config that Accelerate gives to DeepSpeed."""
    plugin: Any = accelerator.state.deepspeed_plugin
    return plugin.deepspeed_config


class Sharding:
    """Spreads a task over processes as the Accelerate config asks, and makes the task whole where that is needed.

    Without FSDP and DeepSpeed the task is not changed. A Sharding is made before the optimizer of the task.

    Args:
        task: the task.
        accelerator: processes.
        batch_size: rows of a step over all processes together.
        chunk_size: `fit.chunk_size`.
        max_grad_norm: `fit.max_grad_norm`.

    Raises:
        ValueError: the task cannot be spread.
    """

    def __init__(
        self,
        task: Task,
        accelerator: Accelerator,
        batch_size: int,
        chunk_size: int | None = None,
        max_grad_norm: float | None = None,
    ):
        self.task, self.accelerator = task, accelerator
        self._module: nn.Module | None = None
        self._twin: nn.Module | None = None
        self._zero: ZeroOptimizer | None = None
        if accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            return
        assert isinstance(task, nn.Module)
        self._module = task
        _require_spreadable(task, chunk_size)
        self._shapes = {name: p.shape for name, p in task.named_parameters()}
        self._twin = _without_weights(task)
        for p in task.parameters():  # FSDP and DeepSpeed accept neither scalars nor other layouts in memory
            p.data = p.data.reshape(1) if p.ndim == 0 else p.data.contiguous()
        if accelerator.distributed_type == DistributedType.FSDP:
            # Accelerate gathers the weights of one layer of these classes at a time
            module: Any = task
            module._no_split_modules = repeated_layers(task)
        else:
            config = _deepspeed_config(accelerator)
            config["train_micro_batch_size_per_gpu"] = batch_size // accelerator.num_processes
            config["gradient_accumulation_steps"] = 1
            config["gradient_clipping"] = max_grad_norm or 0.0  # DeepSpeed clips by itself

    def prepare(self, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Wrap task and optimizer.

        Args:
            optimizer: the optimizer of the task.

        Returns:
            The module to call in place of the task, and the optimizer to use in place of `optimizer`.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        model, optimizer = self.accelerator.prepare(self.task, optimizer)
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            self._zero = ZeroOptimizer(optimizer, parameters)
            return model, self._zero
        return model, optimizer

    def after_step(self) -> None:
        """Call `after_step` of the task, and give the scalars that the task has changed to DeepSpeed."""
        self.task.after_step()
        if self._zero is not None:
            self._zero.take_scalars()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within the context the task has all weights in each process, and each process can call any method of the
        task. All processes enter the context."""
        self.make_whole()
        try:
            yield
        finally:
            if self._module is not None and self._twin is not None:
                _swap(self._module, self._twin)
                for p in self._twin.parameters():
                    p.data = p.data.new_empty(0)

    @contextmanager
    def writing(self) -> Iterator[bool]:
        """As `whole`; the value of the context is True in the process that writes files."""
        with self.whole():
            yield self.accelerator.is_main_process

    def make_whole(self) -> None:
        """Give the task all weights in each process for good. All processes call this."""
        if self._module is None or self._twin is None:
            return
        weights = dict(self._twin.named_parameters())
        for name, p in self._module.named_parameters():
            weights[name].data = whole_tensor(p.detach()).reshape(self._shapes[name])
        self._twin.train(self._module.training)
        _swap(self._module, self._twin)


class ZeroOptimizer:
    """The optimizer of DeepSpeed, with state dictionaries in the format of torch: whole tensors by parameter.

    Args:
        wrapped: the optimizer that `accelerator.prepare` returned.
        parameters: the parameters in the order of the groups, before DeepSpeed replaced the parameters of the groups by
            pieces of one long vector.
    """

    def __init__(self, wrapped: Any, parameters: list[nn.Parameter]):
        self._zero, self.parameters = wrapped.optimizer, parameters
        for piece in (piece for group in self.param_groups for piece in group["params"]):
            self.state[piece] = {name: torch.zeros_like(piece) for name in _MOMENTS}
            self.state[piece]["step"] = torch.zeros((), device=piece.device)
        # DeepSpeed does this at the first step of the first group, when the other groups have no state yet
        self._zero._lazy_init_hp_params_optimizer_state()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of the inner optimizer."""
        return self._zero.optimizer.param_groups

    @property
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        """The state of the inner optimizer, by pieces of parameters."""
        return self._zero.optimizer.state

    def step(self) -> None:
        """Do nothing: the backward pass of DeepSpeed updates the parameters."""

    def zero_grad(self) -> None:
        """Do nothing: the backward pass of DeepSpeed drops the gradients."""

    def take_scalars(self) -> None:
        """Copy temperatures and biases from the task into DeepSpeed, which would undo changes at the next step."""
        from deepspeed.utils import safe_set_full_fp32_param  # type: ignore[import-not-found]

        for p in self.parameters:
            if p.numel() == 1:
                safe_set_full_fp32_param(p, p.data)

    def state_dict(self) -> dict[str, Any]:
        """The state as whole tensors, by the number of the parameter. All processes call this."""
        from deepspeed.utils import safe_get_full_optimizer_state  # type: ignore[import-not-found]

        state = {}
        step = next(iter(self.state.values()))["step"]  # all pieces have the same number of steps
        for number, p in enumerate(self.parameters):
            state[number] = {"step": step}
            state[number] |= {name: safe_get_full_optimizer_state(p, name) for name in _MOMENTS}
        return {"state": state}

    def load_state_dict(self, whole: dict[str, Any]) -> None:
        """Load the state of `state_dict`; the weights are those of the task, which is loaded before."""
        from deepspeed.utils import (  # type: ignore[import-not-found]
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
        )

        for p in self.parameters:
            safe_set_full_fp32_param(p, p.data)
        for piece in self.state.values():
            piece["step"].copy_(next(iter(whole["state"].values()))["step"])
        for number, entry in whole["state"].items():
            for name in _MOMENTS:
                p = self.parameters[number]
                safe_set_full_optimizer_state(p, entry[name].to(p.device), name)


_MOMENTS = ("exp_avg", "exp_avg_sq")


def _require_spreadable(task: nn.Module, chunk_size: int | None) -> None:
    """Raise ValueError for a task that cannot be spread over processes."""
    instead = "launch with configs/accelerate/multi_gpu.yaml"
    if any(isinstance(module, RowTable) for module in task.modules()):
        raise ValueError(
            f"FSDP and DeepSpeed are for pretrain.train: a ranker's tables are trained by the rows of a batch, which "
            f"every process has whole; {instead}"
        )
    if chunk_size is not None:
        raise ValueError(
            f"fit.chunk_size: FSDP and DeepSpeed would add up the gradient of each chunk by itself; leave it out, or "
            f"{instead}"
        )
    if any(module._compiled_call_impl is not None for module in task.modules()):
        raise ValueError(f"encoder.compile: not under FSDP and DeepSpeed; leave it out, or {instead}")


def repeated_layers(task: nn.Module) -> list[str]:
    """Class names of the repeated layers of the towers of a task."""
    names: dict[str, None] = {}
    for module in task.modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            kinds = {type(child) for child in module}
            if len(kinds) == 1 and not (kind := kinds.pop()).__module__.startswith("torch.nn."):
                names[kind.__name__] = None
    return list(names)


def _without_weights(task: nn.Module) -> nn.Module:
    """A copy of a task with the same buffers and empty parameters."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.data.new_empty(0), p.requires_grad) for p in task.parameters()}
    memo |= {id(buffer): buffer for buffer in task.buffers()}
    return copy.deepcopy(task, memo)


def _swap(one: nn.Module, other: nn.Module) -> None:
    """Exchange class and attributes of two modules, so that all references to the task get the other module."""
    one.__dict__, other.__dict__ = other.__dict__, one.__dict__
    one.__class__, other.__class__ = other.__class__, one.__class__
