"""Low-rank adapters (LoRA: Hu et al. 2021) in the layers of a tower, by peft."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from importlib.util import find_spec

import torch
from pydantic import Field
from torch import nn

from mmctr.config import Config
from mmctr.encoders.layers import Trace


class LoraConfig(Config):
    """Adapters W + alpha / rank B A of towers whose mode is `lora`. B starts at zero: so does what they change."""

    rank: int = Field(default=8, ge=1)
    """rank of the matrices A and B"""
    alpha: float = Field(default=16.0, gt=0)
    """the change B A is scaled by alpha / rank"""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """of what an adapter reads. Not for the fused attention of open_clip, which takes weights, not inputs"""
    targets: list[str] | None = Field(default=None, min_length=1)
    """ends of the names of the modules that get one, for example [attn, c_fc, c_proj] or [q_proj, v_proj]. None: every
    linear layer and attention of the tower's layers. Convolutions can be named too"""


def require_peft() -> None:
    if find_spec("peft") is None:
        raise ValueError("encoder: the tower mode 'lora' needs peft: pip install 'mmctr[lora]'")


def adaptable(root: nn.Module, trace: Trace) -> dict[str, nn.Module]:
    """Modules below `root`, by name, that can have an adapter and whose features would depend on it.

    Left out is what only lends its weights to a function, as the projections inside an attention do: an adapter would
    never run there.
    """
    found = {}
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
            found[name] = module
    return found


def choose(
    towers: Mapping[str, Mapping[str, nn.Module]], inside: Set[nn.Module], config: LoraConfig
) -> dict[str, list[str]]:
    """For each tower the names of the modules that get an adapter.

    Args:
        towers: by tower, `adaptable` modules by name.
        inside: the modules within layers, where they are looked for when no targets are given.

    Raises ValueError for a target that names nothing, and for a tower without any.
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
    there = "; ".join(f"in the {tower} tower there is {_listing(modules)}" for tower, modules in towers.items())
    for target in config.targets or ():
        if not any(_names(target, name) for names in chosen.values() for name in names):
            raise ValueError(f"encoder.lora.targets: {target!r} is nothing that can be adapted; {there}")
    for tower, names in chosen.items():
        if not names:
            raise ValueError(f"encoder.lora.targets: none of them is in the {tower} tower; {there}")
        fused = [name for name in names if isinstance(towers[tower][name], nn.MultiheadAttention)]
        if config.dropout and fused:
            raise ValueError(
                f"encoder.lora.dropout: {_short(fused[0])!r} of the {tower} tower is a fused attention, which takes "
                f"none; set it to 0, or lora.targets to other modules; {there}"
            )
    return chosen


def _names(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _short(name: str) -> str:
    """The last part of a name that says something: `layers.0.mlp.fc1` -> `fc1`, `downsample.0` as it is."""
    parts = name.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])


def _listing(modules: Mapping[str, nn.Module]) -> str:
    return ", ".join(dict.fromkeys(_short(name) for name in modules)) or "nothing"


def add_adapters(root: nn.Module, names: Sequence[str], config: LoraConfig) -> None:
    """Put adapters on the modules `names` below `root`; nothing else of `root` is trained from then on."""
    import peft  # slow to import, and most runs do without

    from mmctr.encoders.attention import LoraAttention

    pattern = "|".join(re.escape(name) for name in names)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft only divides by the rank
        lora_dropout=config.dropout,
        target_modules=f"(?:{pattern})",
    )
    settings._register_custom_module({nn.MultiheadAttention: LoraAttention})
    peft.inject_adapter_in_model(settings, root)
    del root.peft_config  # transformers would take it for adapters of its own


@torch.no_grad()
def merge_adapters(root: nn.Module) -> None:
    """Add what the adapters below `root` say to the weights they adapt, and take the adapters out."""
    from peft.tuners.lora import LoraLayer

    for name, child in list(root.named_children()):
        if isinstance(child, LoraLayer):
            child.merge()
            setattr(root, name, child.get_base_layer())
        else:
            merge_adapters(child)
