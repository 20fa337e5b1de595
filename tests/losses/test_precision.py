"""Losses are float32 within autocast, for float32 and for bfloat16 vectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmctr.embedders.id_generators import squared_error, wasserstein2
from mmctr.losses import contrastive, variational
from mmctr.losses.contrastive import QueuedCandidates

SCALE = torch.tensor(100.0)
KEYS = torch.arange(16)
GROUPS = torch.arange(16) % 5
HAS = torch.arange(16) % 7 > 0


def unit(seed: int) -> Tensor:
    return F.normalize(torch.randn(16, 24, generator=torch.Generator().manual_seed(seed)), dim=1)


A, B, C = unit(0), unit(1), unit(2)
QUEUE = QueuedCandidates(unit(3), KEYS[:, None] + 100, HAS, torch.zeros(16))
LOSSES: dict[str, Any] = {
    "clip": (lambda a, b, c: contrastive.clip_loss(a, b, SCALE, KEYS, HAS, QUEUE, QUEUE)),
    "siglip": (lambda a, b, c: contrastive.siglip_loss(a, b, SCALE, -SCALE / 10, KEYS, HAS, QUEUE)),
    "pairs": (lambda a, b, c: contrastive.pair_loss(a, b, SCALE, log_q=HAS.float(), negatives=c, queue=QUEUE)),
    "groups": (lambda a, b, c: contrastive.multi_positive_loss(a, SCALE, GROUPS, KEYS)),
    "distillation": (lambda a, b, c: contrastive.similarity_distillation_loss(a, b, SCALE, 10.0, KEYS, HAS)),
    "log normal": variational.log_normal,
    "kl": (lambda a, b, c: variational.kl_to_prior(a, b)),
    "nll": (lambda a, b, c: variational.gaussian_nll(a, b, c[0, 0])),
    "product": (
        lambda a, b, c: variational.product_of_experts(torch.stack([a, b]), torch.stack([c, c]), HAS.expand(2, 16))
    ),
    "kl parts": (lambda a, b, c: tuple(vars(variational.kl_parts(a, b, c, 100)).values())),
    "aggregate": (lambda a, b, c: variational.aggregate_log_densities(a, b, c, 100)),
    "covariance": (lambda a, b, c: variational.dip_penalties(a, b)),
    "discriminator": (lambda a, b, c: variational.discriminator_loss(a[:, :2], b[:, :2])),
    "wasserstein": (lambda a, b, c: wasserstein2((a, b), (b, c))),
    "squared error": (lambda a, b, c: squared_error(a, b)),
}


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_within_autocast_are_those_in_float32(name, kind):
    vectors = [vector.to(kind) for vector in (A, B, C)]
    inputs = [[vector.clone().requires_grad_() for vector in vectors] for _ in range(2)]
    expected = LOSSES[name](*(vector.float() for vector in inputs[0]))
    with torch.autocast("cpu", torch.bfloat16):
        found = LOSSES[name](*inputs[1])
        assert (A @ B.T).dtype == torch.bfloat16  # autocast is on again
    results = [value if isinstance(value, tuple) else (value,) for value in (expected, found)]
    for one, other in zip(*results, strict=True):
        assert other.dtype == torch.float32 and torch.equal(one, other)
    for result in results:
        torch.stack([value.sum() for value in result]).sum().backward()
    for one, other in zip(*inputs, strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None and other.grad is not None:
            # a bfloat16 vector that is read twice gets the sum of two rounded gradients
            rtol, atol = (0.0, 0.0) if kind is torch.float32 else (0.02, 1e-4)
            torch.testing.assert_close(other.grad, one.grad, rtol=rtol, atol=atol)
