"""The layers of a tower: the modules that are layers, the layer of each parameter, and gradient checkpointing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def find_layers(roots: Iterable[nn.Module]) -> list[nn.Module]:
    """The repeated blocks of a network: the children of module lists whose children are of one class and have children.

    These are transformer blocks in open_clip, timm and transformers; residual blocks of EfficientNet and of the ResNets
    of open_clip; stages of hierarchical networks of timm and transformers.

    Returns:
        The blocks in the order of registration; an empty list for a network without repeated blocks.
    """
    layers: list[nn.Module] = []
    for root in roots:
        names, children = zip(*root.named_children(), strict=True) if len(root._modules) else ((), ())
        numbered = isinstance(root, (nn.ModuleList, nn.Sequential)) and all(name.isdigit() for name in names)
        alike = len({type(child) for child in children}) == 1
        if numbered and alike and all(len(child._modules) for child in children):
            layers += children
        else:
            layers += find_layers(children)
    return layers


@dataclass(frozen=True)
class Trace:
    """The modules and parameters that one forward pass of a tower used."""

    called: set[nn.Module]
    """the modules whose `forward` ran; the weights of other modules are read by functions at most"""
    depth: dict[nn.Parameter, int]
    """the layer of each parameter the features depend on: 0 before the first layer, l in the l-th layer that ran and
    between that layer and the next, `num_layers` + 1 behind the last layer"""
    num_layers: int
    """number of layers that ran"""


def trace(roots: Sequence[nn.Module], forward: Callable[[], Tensor]) -> Trace:
    """Find the modules and parameters a forward pass uses, from the calls of modules and from the autograd graph.

    Names and the order of registration tell neither which parameters act before the first layer nor which parameters
    act at all; the autograd graph does, for models of any library. Parameters without `requires_grad` are not found.

    Args:
        roots: the modules of a tower.
        forward: runs the tower and returns the features.
    """
    layers = set(find_layers(roots))
    order: list[nn.Module] = []
    called: set[nn.Module] = set()
    depth: dict[nn.Parameter, int] = {}
    visited: set[Any] = set()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        called.add(module)
        if module in layers and module not in order:
            for parameter in _new_parameters([*args, *kwargs.values()], visited):
                depth.setdefault(parameter, len(order))
            order.append(module)

    modules = {module for root in roots for module in root.modules()}
    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules]
    try:
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            features = forward()
        for parameter in _new_parameters([features], visited):
            depth.setdefault(parameter, len(order) + 1)
    finally:
        for handle in handles:
            handle.remove()
    for number, layer in enumerate(order, start=1):
        depth |= {parameter: number for parameter in layer.parameters() if parameter in depth}
    return Trace(called, depth, len(order))


def _new_parameters(values: list[Any], visited: set[Any]) -> Iterator[nn.Parameter]:
    """The parameters that tensors among `values` depend on, except by the graph nodes in `visited`, which grows."""
    nodes = [value.grad_fn for value in values if isinstance(value, Tensor)]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in visited:
            visited.add(node)
            variable = getattr(node, "variable", None)
            if isinstance(variable, nn.Parameter):
                yield variable
            nodes += [following for following, _ in node.next_functions]


def checkpointing(name: str, roots: Sequence[nn.Module]) -> Callable[[], None]:
    """A function that switches gradient checkpointing of a tower on.

    Args:
        name: "image" or "text", for the error.
        roots: the modules of the tower.

    Raises:
        ValueError: the tower has no gradient checkpointing, or has batch normalisation.
    """
    modules = [module for root in roots for module in root.modules()]
    kind = type(roots[0]).__name__
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules):
        raise ValueError(
            f"encoder.gradient_checkpointing: the {name} tower ({kind}) has batch normalisation, whose running "
            f"statistics would count each batch twice; leave it out, or freeze that tower"
        )
    of_open_clip: list[Any] = [module for module in modules if hasattr(module, "grad_checkpointing")]  # and of timm
    of_transformers: list[Any] = [module for module in modules if hasattr(module, "gradient_checkpointing")]
    if not (of_open_clip or of_transformers):
        raise ValueError(f"encoder.gradient_checkpointing: the {name} tower ({kind}) has none; leave it out")

    def enable() -> None:
        for module in of_open_clip:
            module.grad_checkpointing = True
        for module in of_transformers:
            module.gradient_checkpointing = True
            # the reentrant kind gives no gradient behind frozen embeddings
            module._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)

    return enable
