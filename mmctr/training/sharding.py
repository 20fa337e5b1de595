"""Tasks that are spread over processes: weights, gradients and optimiser state (FSDP2), or all but the weights
(DeepSpeed's ZeRO-1 and 2)."""

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
    """Choose what an Accelerate config leaves open, and refuse with a ValueError what it must not say."""
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
            raise ValueError(f"the Accelerate config needs {setting}, see {path}")
    if accelerator.mixed_precision == "fp16":
        raise ValueError("mixed_precision: fp16 scales the loss, which is not for FSDP and DeepSpeed here; take bf16")
    # bf16 is autocast's, over fp32 weights, as without sharding. Accelerate's choice would be to round the weights, the
    # temperature among them, and the sums of gradients
    if accelerator.distributed_type == DistributedType.FSDP:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        plugin.mixed_precision_policy = MixedPrecisionPolicy()
    elif accelerator.mixed_precision == "bf16":
        config["bf16"] = {"enabled": False}
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}


def _deepspeed_config(accelerator: Accelerator) -> dict[str, Any]:
    plugin: Any = accelerator.state.deepspeed_plugin
    return plugin.deepspeed_config


class Sharding:
    """Spreads a task as Accelerate is told to, and makes it whole for a while. A task that is not to be spread is left
    as it is.

    It is made before the optimiser. Raises ValueError for a task that cannot be spread.

    Args:
        batch_size: of all processes together.
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
        for p in task.parameters():  # neither takes scalars, nor other layouts in memory
            p.data = p.data.reshape(1) if p.ndim == 0 else p.data.contiguous()
        if accelerator.distributed_type == DistributedType.FSDP:
            # Accelerate gathers the weights of one of these at a time
            task._no_split_modules = repeated_layers(task)  # type: ignore[assignment]
        else:
            config = _deepspeed_config(accelerator)
            config["train_micro_batch_size_per_gpu"] = batch_size // accelerator.num_processes
            config["gradient_accumulation_steps"] = 1
            config["gradient_clipping"] = max_grad_norm or 0.0  # DeepSpeed clips by itself

    def prepare(self, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """What to call in place of the task, and its optimiser."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        model, optimizer = self.accelerator.prepare(self.task, optimizer)
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            self._zero = ZeroOptimizer(optimizer, parameters)
            return model, self._zero
        return model, optimizer

    def after_step(self) -> None:
        """Call `after_step` of the task, and tell DeepSpeed of the scalars that it has changed."""
        self.task.after_step()
        if self._zero is not None:
            self._zero.take_scalars()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within, the task has all of its weights in each process: any of its methods can be called, and as often as
        each process likes. All processes enter."""
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
        """As `whole`; True for the one process that writes files."""
        with self.whole():
            yield self.accelerator.is_main_process

    def make_whole(self) -> None:
        """As `whole`, for good."""
        if self._module is None or self._twin is None:
            return
        weights = dict(self._twin.named_parameters())
        for name, p in self._module.named_parameters():
            weights[name].data = whole_tensor(p.detach()).reshape(self._shapes[name])
        self._twin.train(self._module.training)
        _swap(self._module, self._twin)


class ZeroOptimizer:
    """DeepSpeed's optimiser, whose state goes in and out as torch has it: by parameter, whole.

    Args:
        parameters: in the order of the groups, before DeepSpeed replaced them by pieces of one long vector.
    """

    def __init__(self, wrapped: Any, parameters: list[nn.Parameter]):
        self._zero, self.parameters = wrapped.optimizer, parameters
        for piece in (piece for group in self.param_groups for piece in group["params"]):
            self.state[piece] = {name: torch.zeros_like(piece) for name in _MOMENTS}
            self.state[piece]["step"] = torch.zeros((), device=piece.device)
        # DeepSpeed does so at the first step of the first group, when the other groups have no state to find
        self._zero._lazy_init_hp_params_optimizer_state()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._zero.optimizer.param_groups

    @property
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        return self._zero.optimizer.state

    def step(self) -> None:
        """DeepSpeed's backward pass did it."""

    def zero_grad(self) -> None:
        """DeepSpeed's backward pass did it."""

    def take_scalars(self) -> None:
        """Temperatures and biases as they are in the task now, which DeepSpeed would put back at the next step."""
        from deepspeed.utils import safe_set_full_fp32_param  # type: ignore[import-not-found]

        for p in self.parameters:
            if p.numel() == 1:
                safe_set_full_fp32_param(p, p.data)

    def state_dict(self) -> dict[str, Any]:
        """All processes take part."""
        from deepspeed.utils import safe_get_full_optimizer_state  # type: ignore[import-not-found]

        state = {}
        step = next(iter(self.state.values()))["step"]  # all pieces have had as many
        for number, p in enumerate(self.parameters):
            state[number] = {"step": step}
            state[number] |= {name: safe_get_full_optimizer_state(p, name) for name in _MOMENTS}
        return {"state": state}

    def load_state_dict(self, whole: dict[str, Any]) -> None:
        """The weights are taken from the task, which has been loaded before."""
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
    """Class names of the layers that stand one behind another in a task's towers."""
    names: dict[str, None] = {}
    for module in task.modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            kinds = {type(child) for child in module}
            if len(kinds) == 1 and not (kind := kinds.pop()).__module__.startswith("torch.nn."):
                names[kind.__name__] = None
    return list(names)


def _without_weights(task: nn.Module) -> nn.Module:
    """A copy that shares the buffers and has empty parameters."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.data.new_empty(0), p.requires_grad) for p in task.parameters()}
    memo |= {id(buffer): buffer for buffer in task.buffers()}
    return copy.deepcopy(task, memo)


def _swap(one: nn.Module, other: nn.Module) -> None:
    """Each object becomes the other, so that whoever holds the task sees it."""
    one.__dict__, other.__dict__ = other.__dict__, one.__dict__
    one.__class__, other.__class__ = other.__class__, one.__class__
