"""In one process and in evaluation mode a layer with shared statistics is the layer it was made of.

`tests/test_distributed.py` compares two processes with one.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from mmctr.layers import batch_norm
from mmctr.layers.batch_norm import separate_statistics, share_statistics


class WithActivation(nn.BatchNorm2d):
    """As the layers of timm, which activate inside the layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(super().forward(x))


LAYERS = {
    "1d": lambda: nn.BatchNorm1d(3),
    "2d": lambda: nn.BatchNorm2d(3),
    "activation": lambda: WithActivation(3),
    "cumulative": lambda: nn.BatchNorm2d(3, momentum=None),
    "not affine": lambda: nn.BatchNorm2d(3, affine=False),
    "not tracked": lambda: nn.BatchNorm2d(3, track_running_stats=False),
}


@pytest.mark.parametrize("pretend", [False, True], ids=["one process", "the path of several processes"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_what_it_did_before(name, pretend, monkeypatch):
    """With the sums of one process, the path of several processes must give values and gradients of torch."""
    plain = nn.Sequential(LAYERS[name]())
    shared = copy.deepcopy(plain)
    share_statistics(shared)
    assert isinstance(shared[0], type(plain[0])) and shared.state_dict().keys() == plain.state_dict().keys()
    if pretend:
        monkeypatch.setattr(batch_norm, "world_size", lambda: 2)
    generator = torch.Generator().manual_seed(0)
    shape = (8, 3) if name == "1d" else (8, 3, 5, 4)
    for step in range(3):
        x = torch.randn(shape, generator=generator) * 3 + 1
        weight = torch.randn(shape, generator=generator)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [layers(one) for layers, one in zip((plain, shared), inputs, strict=True)]
        for out in outputs:
            (out * weight).sum().backward()
        torch.testing.assert_close(outputs[1], outputs[0], msg=f"step {step}")
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-4, atol=1e-5)
        for key, value in plain.state_dict().items():
            torch.testing.assert_close(shared.state_dict()[key], value, msg=key)
    for one, other in zip(plain.parameters(), shared.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-4)
    assert shared.training and shared[0].training
    x = torch.randn(shape, generator=generator)
    torch.testing.assert_close(shared.eval()(x), plain.eval()(x))


def test_separate_statistics_end_with_the_context():
    layers = nn.Sequential(nn.BatchNorm1d(2))
    share_statistics(layers)
    layer: Any = layers[0]
    with separate_statistics(layers.modules()):
        assert layer.is_separate
    assert not layer.is_separate
