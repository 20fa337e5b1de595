"""Encoders in lower precision, which embed catalogs faster: for inference only, because the weights are rounded."""

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
"""smallest cosine between the vectors of a precision that `choose` accepts and the fp32 vectors"""


@dataclass(frozen=True)
class Measured:
    """The result of `choose`."""

    precision: Precision
    """the chosen precision"""
    rates: dict[str, float]
    """items per second by precision"""
    min_cosine: dict[str, float]
    """smallest cosine between the vectors of the measured items and the fp32 vectors, by precision"""

    def __str__(self) -> str:
        """One line for the log."""
        rates = ", ".join(
            f"{name} {rate:.3g} items/s (cosine to fp32 at least {self.min_cosine[name]:.5f})"
            for name, rate in self.rates.items()
        )
        return f"precision {self.precision}: {rates}"

    def facts(self) -> dict[str, Any]:
        """The measured numbers for the manifest of an embedding folder."""
        return {"items_per_s": self.rates, "min_cosine": self.min_cosine}


def lower(task: PretrainTask, precision: Precision) -> None:
    """Convert the towers of a task to a lower precision, in place; projections and heads stay in fp32.

    `bf16` rounds the weights, so that nothing is cast between layers: on a CPU the casts of autocast cost more time
    than they save. `int8` gives linear layers int8 weights, with a scale of the inputs computed at each call; the
    projections of `nn.MultiheadAttention` stay in fp32.

    Args:
        task: the task, which is changed.
        precision: the precision of the towers.

    Raises:
        ValueError: int8 for towers that are not on a CPU, or with a torch without dynamic quantisation.
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
    """A forward pre-hook that casts floating point inputs to bf16."""

    def cast(x: Any) -> Any:
        return x.to(torch.bfloat16) if isinstance(x, Tensor) and x.is_floating_point() else x

    return tuple(map(cast, args)), {key: cast(x) for key, x in kwargs.items()}


def _quantise(root: nn.Module) -> None:
    """Give the linear layers below a module int8 weights, in place."""
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
    layers: list[Any] = [module for module in root.modules() if isinstance(module, Linear)]
    for layer in layers:
        # open_clip asks the first layer for the dtype of the activations
        layer.int8_original_dtype = torch.float32


def choose(
    task: PretrainTask,
    batches: Sequence[Any],
    embed: Callable[[PretrainTask, Any], tuple[Tensor, Tensor]],
    rounds: int = 3,
) -> Measured:
    """The fastest precision for a task whose vectors have at least the cosine `MIN_COSINE` to the fp32 vectors.

    Args:
        task: the task in fp32.
        batches: a few batches of the catalog, on the device of the task.
        embed: function from a task and a batch to vectors (n, D) and the (n,) mask of items with content.
        rounds: number of measurements of each precision, of which the fastest counts.
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
            outputs = [tuple(part.cpu() for part in embed(tasks[name], batch)) for batch in batches]
            seconds[name] = min(time.perf_counter() - began, seconds.get(name, np.inf))
            if name not in cosine:
                vectors = [part[has].double() for part, has in outputs]
                exact = exact or vectors
                cosines = torch.cosine_similarity(torch.cat(vectors), torch.cat(exact))
                cosine[name] = float(cosines.min()) if len(cosines) else 1.0
    count = sum(len(batch) for batch in batches)
    accurate: list[Precision] = [name for name in names if cosine[name] >= MIN_COSINE or name == "fp32"]
    best = min(accurate, key=lambda name: seconds[name])
    rates = {name: round(count / seconds[name], 2) for name in names}
    return Measured(best, rates, {name: round(value, 6) for name, value in cosine.items()})
