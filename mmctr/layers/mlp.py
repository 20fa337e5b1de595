"""Activation functions by name, and the multi-layer perceptron of the rankers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mmctr.layers.dice import Dice

Activation = Literal["relu", "prelu", "dice", "sigmoid"]


def activation(name: Activation, num_channels: int) -> nn.Module:
    """Build an activation module.

    Args:
        name: name of the activation.
        num_channels: size of the last dimension of the inputs, which only Dice depends on.
    """
    if name == "dice":
        return Dice(num_channels)
    return {"relu": nn.ReLU, "prelu": nn.PReLU, "sigmoid": nn.Sigmoid}[name]()


class MLP(nn.Sequential):
    """A linear layer, an activation and dropout for each hidden size, then a linear layer to `out_dim`.

    Args:
        in_dim: size of the inputs.
        hidden: sizes of the hidden layers.
        out_dim: size of the outputs.
        act: name of the activation.
        dropout: probability of dropping a hidden unit.
        beside: sizes of the vectors that `through` concatenates to the outputs of the last `len(beside)` hidden layers.
    """

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
        """The outputs together with the outputs of the hidden layers.

        Args:
            x: (n, in_dim) inputs.
            beside: vectors (n, size) to concatenate to the outputs of the last hidden layers, as many as the argument
                `beside` of the constructor has sizes.

        Returns:
            (n, out_dim) outputs, and the outputs (n, width) of every hidden layer before the concatenation.
        """
        positions = [position for position, layer in enumerate(self) if isinstance(layer, nn.Linear)][1:]
        added = dict(zip(positions[len(positions) - len(beside) :], beside, strict=True))
        hidden = []
        for position, layer in enumerate(self):
            if position in positions:
                hidden.append(x)
            x = layer(torch.cat([x, added[position]], dim=1) if position in added else x)
        return x, hidden
