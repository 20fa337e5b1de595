from __future__ import annotations

import torch

from mmctr.layers.mlp import MLP


def test_an_mlp_is_linear_activation_dropout():
    kinds = [type(layer).__name__ for layer in MLP(3, [4, 5], 1, "prelu", 0.1)]
    assert kinds == ["Linear", "PReLU", "Dropout", "Linear", "PReLU", "Dropout", "Linear"]
    assert MLP(3, [], 2, "relu")(torch.zeros(7, 3)).shape == (7, 2)
