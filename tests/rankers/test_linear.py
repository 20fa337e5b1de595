from __future__ import annotations

import pytest
import torch

from mmctr.rankers.base import RankerInput
from mmctr.rankers.linear import LRConfig, LSPLMConfig
from tests.helpers.references import separate


def inputs(dim: int, parts: int = 3, scale: float = 1.0) -> RankerInput:
    g = torch.Generator().manual_seed(0)
    target, context = torch.randn(5, dim, generator=g) * scale, torch.randn(5, parts * dim, generator=g) * scale
    return separate(target, target[:0], torch.zeros(6, dtype=torch.int64), context)


def test_lr_adds_up_one_weight_a_feature():
    model, x = LRConfig().build(1, 3), inputs(1)
    with torch.no_grad():
        model.bias.fill_(0.5)
    torch.testing.assert_close(model(x).logits, x.items[:, 0] + x.context.sum(1) + 0.5)
    assert LRConfig().build(1, 0)(inputs(1, parts=0)).logits.shape == (5,)


@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_ls_plm_is_the_formula(pieces):
    model, x = LSPLMConfig(pieces=pieces).build(2 * pieces, 6 * pieces), inputs(2 * pieces)
    with torch.no_grad():
        model.bias.normal_()
    total = x.items + x.context.view(5, 3, -1).sum(1) + model.bias
    gate, piece = torch.softmax(total[:, :pieces], 1), torch.sigmoid(total[:, pieces:])
    p = (gate * piece).sum(1)
    torch.testing.assert_close(torch.sigmoid(model(x).logits), p)
    if pieces == 1:  # logistic regression
        torch.testing.assert_close(model(x).logits, total[:, 1])


def test_ls_plm_is_finite_where_p_is_zero_or_one():
    model, x = LSPLMConfig(pieces=3).build(6, 18), inputs(6, scale=300.0)
    x.items.requires_grad_()
    logits = model(x).logits
    assert logits.isfinite().all() and logits.abs().max() > 100
    torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor([0.0, 1, 0, 1, 0])).backward()
    assert x.items.grad.isfinite().all()
