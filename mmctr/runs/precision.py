"""Encoders in fewer bits, to embed catalogs faster. Their weights change, so this is for reading, not for training."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mmctr.tasks import PretrainTask

Precision = Literal["fp32", "bf16", "int8"]
MIN_COSINE = 0.999
"""vectors of `auto` are at least so near to those of fp32"""


@dataclass(frozen=True)
class Measured:
    """What `choose` found."""

    precision: Precision
    rates: dict[str, float]
    """items a second by precision"""
    min_cosine: dict[str, float]
    """of the measured items, to their fp32 vectors"""

    def __str__(self) -> str:
        rates = ", ".join(
            f"{name} {rate:.3g} items/s (cosine to fp32 at least {self.min_cosine[name]:.5f})"
            for name, rate in self.rates.items()
        )
        return f"precision {self.precision}: {rates}"

    def facts(self) -> dict[str, Any]:
        return {"items_per_s": self.rates, "min_cosine": self.min_cosine}


def lower(task: PretrainTask, precision: Precision) -> None:
    """Turn the towers of a task into another precision, in place; projections and heads stay in fp32.

    `bf16`: the weights themselves, so that nothing is cast from layer to layer as autocast does, which on a CPU costs
    more than it saves. `int8`: linear layers with int8 weights, the scale of their input found at each call; what
    `nn.MultiheadAttention` projects with stays as it is.

    Raises ValueError for int8 where the towers are not on a CPU, or torch has no such layers any more.
    """
    if precision == "fp32":
        return
    encoder: Any = task.encoder
    for name in ("image", "text"):
        if precision == "bf16":
            for p in encoder.tower_parameters(name):
                p.data = p.data.to(torch.bfloat16) if p.is_floating_point() else p.data
            for root in encoder.tower(name):
                root.to(torch.bfloat16)  # buffers too
                root.register_forward_pre_hook(_cast_pixels, with_kwargs=True)
        else:
            for root in encoder.tower(name):
                _quantise(root)
    for projection in (task.image_projection, task.text_projection):
        projection.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))


def _cast_pixels(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    def cast(x: Any) -> Any:
        return x.to(torch.bfloat16) if isinstance(x, Tensor) and x.is_floating_point() else x

    return tuple(map(cast, args)), {key: cast(x) for key, x in kwargs.items()}


def _quantise(root: nn.Module) -> None:
    try:
        from torch.ao.nn.quantized.dynamic import Linear
        from torch.ao.quantization import quantize_dynamic
    except ImportError:
        raise ValueError("precision int8: this torch has no dynamic quantisation any more; take bf16") from None
    if any(p.device.type != "cpu" for p in root.parameters()):
        raise ValueError("precision int8 is for CPUs; take bf16 here")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that this moves to another package
        quantize_dynamic(root, {nn.Linear}, dtype=torch.qint8, inplace=True)
    for module in root.modules():
        if isinstance(module, Linear):
            # open_clip asks the first layer in which dtype to go on
            module.int8_original_dtype = torch.float32  # type: ignore[assignment]


def choose(
    task: PretrainTask,
    batches: Sequence[Any],
    embed: Callable[[PretrainTask, Any], tuple[Tensor, Tensor]],
    rounds: int = 3,
) -> Measured:
    """The fastest precision for a task, among those whose vectors keep a cosine of `MIN_COSINE` to fp32.

    Args:
        batches: a few batches of the catalog, on the device of the task.
        embed: (task, batch) -> vectors (n, D) and the (n,) mask of items that have some.
        rounds: each precision is measured once a round, by turns, and its fastest round counts.
    """
    on_cpu = next(task.parameters()).device.type == "cpu"
    names: list[Precision] = ["fp32", "bf16", "int8"] if on_cpu else ["fp32", "bf16"]
    tasks: dict[str, PretrainTask] = {}
    for name in names:
        tasks[name] = copy.deepcopy(task) if name != "fp32" else task
        lower(tasks[name], name)
    seconds: dict[str, float] = {}
    cosine: dict[str, float] = {}
    exact: list[Tensor] = []
    for _ in range(rounds):
        for name in names:
            began = time.perf_counter()
            found = [tuple(part.cpu() for part in embed(tasks[name], batch)) for batch in batches]
            seconds[name] = min(time.perf_counter() - began, seconds.get(name, np.inf))
            if name not in cosine:
                vectors = [part[has].double() for part, has in found]
                exact = exact or vectors
                near = torch.cosine_similarity(torch.cat(vectors), torch.cat(exact))
                cosine[name] = float(near.min()) if len(near) else 1.0
    count = sum(len(batch) for batch in batches)
    fit: list[Precision] = [name for name in names if cosine[name] >= MIN_COSINE or name == "fp32"]
    best = min(fit, key=lambda name: seconds[name])
    rates = {name: round(count / seconds[name], 2) for name in names}
    return Measured(best, rates, {name: round(value, 6) for name, value in cosine.items()})
