"""Activations by name, and the multi-layer perceptron of the rankers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mmctr.layers.dice import Dice

Activation = Literal["relu", "prelu", "dice", "sigmoid"]


def activation(name: Activation, num_channels: int) -> nn.Module:
    if name == "dice":
        return Dice(num_channels)
    return {"relu": nn.ReLU, "prelu": nn.PReLU, "sigmoid": nn.Sigmoid}[name]()


class MLP(nn.Sequential):
    """Linear, activation, dropout for each hidden size, then a linear layer to `out_dim`; with `beside`, the sizes of
    what is concatenated to the last hidden layers (as many, or fewer), it is called by `through`."""

    def __init__(
        self,
        in_dim: int,
        hidden: Sequence[int],
        out_dim: int,
        act: Activation,
        dropout: float = 0.0,
        beside: Sequence[int] = (),
    ):
        layers: list[nn.Module] = []
        added = [0] * (len(hidden) - len(beside)) + list(beside)
        for width, more in zip(hidden, added, strict=True):
            layers += [nn.Linear(in_dim, width), activation(act, width)]
            if dropout:
                layers.append(nn.Dropout(dropout))
            in_dim = width + more
        super().__init__(*layers, nn.Linear(in_dim, out_dim))

    def through(self, x: Tensor, beside: Sequence[Tensor] = ()) -> tuple[Tensor, list[Tensor]]:
        """(n, out_dim) and the hidden layers (n, width), first to last, as they are before what stands beside them."""
        places = [place for place, layer in enumerate(self) if isinstance(layer, nn.Linear)][1:]
        added = dict(zip(places[len(places) - len(beside) :], beside, strict=True))
        hidden = []
        for place, layer in enumerate(self):
            if place in places:
                hidden.append(x)
            x = layer(torch.cat([x, added[place]], dim=1) if place in added else x)
        return x, hidden
