"""Low-rank adapters (LoRA: Hu et al. 2021, arXiv 2106.09685) in the layers of a tower, made by peft."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from importlib.util import find_spec
from typing import cast

import torch
from pydantic import Field
from torch import nn

from mmctr.config import Config
from mmctr.encoders.layers import Trace


class LoraConfig(Config):
    """Adapters W + (alpha / rank) B A of towers whose mode is `lora`. B starts at zero, so an untrained adapter changes
    nothing."""

    rank: int = Field(default=8, ge=1)
    """rank of the matrices A and B"""
    alpha: float = Field(default=16.0, gt=0)
    """the change B A is scaled by alpha / rank"""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """dropout of the inputs of adapters. The fused attention of open_clip cannot drop inputs"""
    targets: list[str] | None = Field(default=None, min_length=1)
    """ends of the names of the modules that get an adapter, for example [attn, c_fc, c_proj] or [q_proj, v_proj]. None:
    every linear layer and attention in the layers of the tower. Convolutions can be named too"""


def require_peft() -> None:
    """Raise ValueError where peft is not installed."""
    if find_spec("peft") is None:
        raise ValueError("encoder: the tower mode 'lora' needs peft: pip install 'mmctr[lora]'")


def adaptable(root: nn.Module, trace: Trace) -> dict[str, nn.Module]:
    """The modules below `root` that can have an adapter on which the features would depend, by name.

    Modules whose weights are only read by a function, such as the projections inside an attention, are left out: the
    forward pass of an adapter of such a module would never run.

    Args:
        root: a module of a tower.
        trace: the trace of a forward pass of the tower.
    """
    modules = {}
    for name, module in root.named_modules():
        if module is root or module not in trace.called:
            continue
        if isinstance(module, nn.MultiheadAttention):
            weight = module.in_proj_weight  # None where keys have another size
        elif isinstance(module, nn.Linear) or (type(module) is nn.Conv2d and module.groups == 1):
            weight = module.weight
        else:
            continue
        if weight is not None and weight in trace.depth:
            modules[name] = module
    return modules


def choose(
    towers: Mapping[str, Mapping[str, nn.Module]], inside: Set[nn.Module], config: LoraConfig
) -> dict[str, list[str]]:
    """The names of the modules that get an adapter, by tower.

    Args:
        towers: by tower, the `adaptable` modules by name.
        inside: the modules inside layers; without `targets` only modules inside layers get an adapter.
        config: the targets and the dropout.

    Raises:
        ValueError: a target names no module, a tower has no module to adapt, or a fused attention would need dropout.
    """
    chosen: dict[str, list[str]] = {}
    for tower, modules in towers.items():
        if config.targets is not None:
            chosen[tower] = [name for name in modules if any(_names(target, name) for target in config.targets)]
            continue
        linear = [name for name, module in modules.items() if not isinstance(module, nn.Conv2d)]
        chosen[tower] = [name for name in linear if modules[name] in inside]
        if not chosen[tower]:
            raise ValueError(
                f"encoder.lora: the layers of the {tower} tower hold nothing linear to adapt; lora.targets can name "
                f"{_listing(modules)}"
            )
    available = "; ".join(f"the {tower} tower has {_listing(modules)}" for tower, modules in towers.items())
    for target in config.targets or ():
        if not any(_names(target, name) for names in chosen.values() for name in names):
            raise ValueError(f"encoder.lora.targets: {target!r} names no module that can be adapted; {available}")
    for tower, names in chosen.items():
        if not names:
            raise ValueError(f"encoder.lora.targets: none of the targets is in the {tower} tower; {available}")
        fused = [name for name in names if isinstance(towers[tower][name], nn.MultiheadAttention)]
        if config.dropout and fused:
            raise ValueError(
                f"encoder.lora.dropout: {_short(fused[0])!r} of the {tower} tower is a fused attention, which takes "
                f"none; set it to 0, or lora.targets to other modules; {available}"
            )
    return chosen


def _names(target: str, name: str) -> bool:
    """Whether a target names a module: as a whole, or as the last parts of the dotted name."""
    return name == target or name.endswith(f".{target}")


def _short(name: str) -> str:
    """The last part of a dotted name, with the part before a number: `layers.0.mlp.fc1` -> `fc1`, `downsample.0`."""
    parts = name.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])


def _listing(modules: Mapping[str, nn.Module]) -> str:
    """The distinct short names of modules, for an error message."""
    return ", ".join(dict.fromkeys(_short(name) for name in modules)) or "nothing"


def add_adapters(root: nn.Module, names: Sequence[str], config: LoraConfig) -> None:
    """Put adapters on modules; only adapters are trained from then on.

    Args:
        root: a module of a tower.
        names: names of the modules below `root` that get an adapter.
        config: rank, scale and dropout of the adapters.
    """
    import peft  # slow to import, and most runs do without

    from mmctr.encoders.attention import LoraAttention

    pattern = "|".join(re.escape(name) for name in names)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=cast(int, config.alpha),  # peft only divides by the rank
        lora_dropout=config.dropout,
        target_modules=f"(?:{pattern})",
    )
    settings._register_custom_module({nn.MultiheadAttention: LoraAttention})
    peft.inject_adapter_in_model(settings, root)
    del root.peft_config  # transformers would take the attribute for an adapter of transformers


@torch.no_grad()
def merge_adapters(root: nn.Module) -> None:
    """Add the adapters below `root` to the adapted weights, and replace each adapted module by the plain module."""
    from peft.tuners.lora import LoraLayer

    for name, child in list(root.named_children()):
        if isinstance(child, LoraLayer):
            child.merge()
            setattr(root, name, child.get_base_layer())
        else:
            merge_adapters(child)
