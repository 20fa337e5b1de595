"""Low-rank adapters of `nn.MultiheadAttention`, in place of the class of peft 0.21, which is not suited to training."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import MultiheadAttention
from torch import Tensor


class LoraAttention(MultiheadAttention):
    """Adapters of an attention: on the joint projection into queries, keys and values, and on the output projection.

    The forward pass is that of `nn.MultiheadAttention`, fast path included, on the adapted weights. The class of peft
    instead adds the adapters to the weights and subtracts the adapters again at every call, which counts the adapter of
    `out_proj` twice, lets the weights drift by rounding, evaluation included, and makes new parameters at every call,
    `state_dict()` included.
    """

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Attend with the adapted weights; arguments, shapes and return values are those of `nn.MultiheadAttention`."""
        in_weight, out_weight = self._adapted()
        weights = {"in_proj_weight": in_weight, "out_proj.base_layer.weight": out_weight}
        return torch.func.functional_call(self.get_base_layer(), weights, (query, *args), kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the weights for good: `get_base_layer()` is then an attention without adapters."""
        base: Any = self.get_base_layer()
        in_weight, out_weight = self._adapted()
        with torch.no_grad():
            base.out_proj = base.out_proj.get_base_layer()
            base.in_proj_weight.copy_(in_weight)
            base.out_proj.weight.copy_(out_weight)

    def _adapted(self) -> tuple[Tensor, Tensor]:
        """The adapted weights of the input projection, (3 E, E), and of the output projection, (E, E)."""
        base: Any = self.get_base_layer()
        return _adapted(base.in_proj_weight, self), _adapted(base.out_proj.weight, base.out_proj)

    def _restore_weights(self) -> None:
        """Do nothing: the weights of the attention are never changed by a forward pass."""


def _adapted(weight: Tensor, adapter: Any) -> Tensor:
    """The weight plus the scaled product of the two matrices of the one active adapter, in the shape of the weight."""
    (name,) = adapter.active_adapters
    low, high = adapter.lora_A[name].weight, adapter.lora_B[name].weight
    return weight + (adapter.scaling[name] * (high @ low)).to(weight.dtype)
