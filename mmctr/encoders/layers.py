"""The layers of a tower: which modules they are, what stands before and behind them, and checkpoints between them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def find_layers(roots: Iterable[nn.Module]) -> list[nn.Module]:
    """The repeated blocks of a network: what stands in a list of modules of one class that have parts themselves.

    These are transformer blocks in open_clip, timm and transformers; residual blocks of open_clip's ResNets and
    EfficientNet; stages of hierarchical networks of timm and transformers. Empty when there are none.
    """
    found: list[nn.Module] = []
    for root in roots:
        names, children = zip(*root.named_children(), strict=True) if len(root._modules) else ((), ())
        numbered = isinstance(root, (nn.ModuleList, nn.Sequential)) and all(name.isdigit() for name in names)
        alike = len({type(child) for child in children}) == 1
        if numbered and alike and all(len(child._modules) for child in children):
            found += children
        else:
            found += find_layers(children)
    return found


@dataclass(frozen=True)
class Trace:
    """What one forward pass through a tower shows."""

    called: set[nn.Module]
    """the modules whose forward ran; others lend their weights to functions at most"""
    depth: dict[nn.Parameter, int]
    """for each parameter the features depend on: 0 before the first layer, l in the l-th one that ran, `num_layers` + 1
    behind the last; of what stands between two layers, the number of the one before"""
    num_layers: int


def trace(roots: Sequence[nn.Module], forward: Callable[[], Tensor]) -> Trace:
    """Follow `forward`, which runs the tower made of `roots`, along modules and along the graph of its gradient.

    Names and the order of registration say neither what runs before the first layer nor what runs at all; the graph
    does, for any library. Parameters without `requires_grad` are not in it.
    """
    layers = set(find_layers(roots))
    order: list[nn.Module] = []
    called: set[nn.Module] = set()
    depth: dict[nn.Parameter, int] = {}
    seen: set[Any] = set()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        called.add(module)
        if module in layers and module not in order:
            for parameter in _new_parameters([*args, *kwargs.values()], seen):
                depth.setdefault(parameter, len(order))
            order.append(module)

    modules = {module for root in roots for module in root.modules()}
    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules]
    try:
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            features = forward()
        for parameter in _new_parameters([features], seen):
            depth.setdefault(parameter, len(order) + 1)
    finally:
        for handle in handles:
            handle.remove()
    for number, layer in enumerate(order, start=1):
        depth |= {parameter: number for parameter in layer.parameters() if parameter in depth}
    return Trace(called, depth, len(order))


def _new_parameters(values: list[Any], seen: set[Any]) -> Iterator[nn.Parameter]:
    """The parameters that tensors among `values` depend on, without going where `seen` has been."""
    nodes = [value.grad_fn for value in values if isinstance(value, Tensor)]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if isinstance(getattr(node, "variable", None), nn.Parameter):
                yield node.variable  # type: ignore[union-attr]
            nodes += [following for following, _ in node.next_functions]


def checkpointing(name: str, roots: Sequence[nn.Module]) -> Callable[[], None]:
    """What turns gradient checkpointing of a tower on. Raises ValueError when the tower has none."""
    modules = [module for root in roots for module in root.modules()]
    kind = type(roots[0]).__name__
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules):
        raise ValueError(
            f"encoder.gradient_checkpointing: the {name} tower ({kind}) has batch normalisation, whose running "
            f"statistics would count each batch twice; leave it out, or freeze that tower"
        )
    ours = [module for module in modules if hasattr(module, "grad_checkpointing")]  # open_clip and timm
    theirs = [module for module in modules if hasattr(module, "gradient_checkpointing")]  # transformers
    if not (ours or theirs):
        raise ValueError(f"encoder.gradient_checkpointing: the {name} tower ({kind}) knows none; leave it out")

    def enable() -> None:
        for module in ours:
            module.grad_checkpointing = True  # type: ignore[assignment]
        for module in theirs:
            module.gradient_checkpointing = True  # type: ignore[assignment]
            # the reentrant kind gives no gradient behind frozen embeddings
            module._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]

    return enable
