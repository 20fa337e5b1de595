"""The adapter of `nn.MultiheadAttention`, which peft 0.21 has too, but not one to train with."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import MultiheadAttention
from torch import Tensor


class LoraAttention(MultiheadAttention):
    """Adapters on the projections into queries, keys and values together, and on the one out of the attention.

    The attention runs its own forward, fast path included, on the adapted weights. peft's class instead adds the
    adapters to the weights and subtracts them again at every call, which counts the one of `out_proj` twice, lets the
    weights drift by rounding, evaluation included, and makes new parameters each time, by `state_dict()` as well.
    """

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`."""
        into, out = self._adapted()
        weights = {"in_proj_weight": into, "out_proj.base_layer.weight": out}
        return torch.func.functional_call(self.get_base_layer(), weights, (query, *args), kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Into the attention for good: `get_base_layer()` is one without adapters then."""
        base: Any = self.get_base_layer()
        into, out = self._adapted()
        with torch.no_grad():
            base.out_proj = base.out_proj.get_base_layer()
            base.in_proj_weight.copy_(into)
            base.out_proj.weight.copy_(out)

    def _adapted(self) -> tuple[Tensor, Tensor]:
        """The weights (3 E, E) into the attention and (E, E) out of it."""
        base: Any = self.get_base_layer()
        return _adapted(base.in_proj_weight, self), _adapted(base.out_proj.weight, base.out_proj)

    def _restore_weights(self) -> None:
        """They never leave."""


def _adapted(weight: Tensor, adapter: Any) -> Tensor:
    (name,) = adapter.active_adapters
    low, high = adapter.lora_A[name].weight, adapter.lora_B[name].weight
    return weight + (adapter.scaling[name] * (high @ low)).to(weight.dtype)
