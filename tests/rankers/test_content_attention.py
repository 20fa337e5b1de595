"""SA-TA inside DIN against the paper's formula, an impression at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mmctr.export.padded_rankers import padded_logits
from mmctr.rankers.din import DIN, DINConfig
from tests.helpers.references import repeated

D, C, LENGTHS = 4, 3, [3, 0, 1, 5]
NAN = math.nan
SIMILARITY = [0.9, -0.3, 0.1, 1.0, 0.2, NAN, -0.7, 0.0, 0.4]


def din(content_attention=True, moved=True) -> DIN:
    torch.manual_seed(0)
    config = DINConfig(attention=[6], mlp=[7], weights="softmax", content_attention=content_attention)
    model = config.build(D, C).eval()
    if content_attention and moved:
        with torch.no_grad():
            model.content.gammas.copy_(torch.tensor([0.7, -1.3, 1.9]))
            model.content.log_tau.copy_(torch.tensor([math.log(0.3)]))
            model.content.unknown.fill_(0.25)
    return model


def inputs(similarity=SIMILARITY):
    return replace(repeated(LENGTHS, 6, D, C), similarity=torch.tensor(similarity))


def reference(model: DIN, x, gammas, tau, unknown) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha = softmax(g1 a + g2 R + g3 a R), R = cosine / tau."""
    rows, weights = [], []
    for b, (start, end) in enumerate(zip(x.history_offsets[:-1].tolist(), x.history_offsets[1:].tolist(), strict=True)):
        target, interest = x.items[x.target[b]], torch.zeros(D)
        if end > start:
            keys = x.items[x.history[start:end]]
            query = target.expand(end - start, -1)
            both = torch.cat([query, keys, query - keys, query * keys], 1)
            a = model.unit.rest(model.unit.act(model.unit.first(both))).squeeze(1)
            given = [unknown if math.isnan(c) else c for c in x.similarity[start:end].tolist()]
            r = torch.stack([torch.as_tensor(c) for c in given]) / tau
            alpha = torch.softmax(gammas[0] * a + gammas[1] * r + gammas[2] * a * r, 0)
            weights.append(alpha)
            interest = alpha @ keys
        rows.append(torch.cat([x.context[b], target, interest, interest * target]))
    return model.mlp(torch.stack(rows)).squeeze(1), torch.cat(weights)


def test_content_attention_is_the_formula_in_value_and_gradient():
    model, x = din(), inputs()
    output = model(x)
    numbers = [torch.tensor(v, requires_grad=True) for v in ([0.7, -1.3, 1.9], 0.3, 0.25)]
    logits, weights = reference(model, x, *numbers)
    torch.testing.assert_close(output.logits, logits)
    torch.testing.assert_close(output.history_weights, weights)
    ((output.logits * torch.arange(1.0, 5)).sum()).backward()
    expected = torch.autograd.grad((logits * torch.arange(1.0, 5)).sum(), numbers)
    torch.testing.assert_close(model.content.gammas.grad, expected[0])
    torch.testing.assert_close(model.content.log_tau.grad, 0.3 * expected[1][None])  # d / d log tau
    torch.testing.assert_close(model.content.unknown.grad, expected[2][None])


def test_what_is_learned_starts_as_in_the_paper():
    model, x = din(moved=False), inputs()
    expected = reference(model, x, torch.ones(3), torch.tensor(0.1), torch.tensor(0.0))
    torch.testing.assert_close(model(x).logits, expected[0])
    assert all(p.ndim == 1 for p in model.content.parameters())  # no weight decay


def test_without_anything_to_compare_it_is_softmax():
    """With the first gamma at 1 and an unknown cosine of 0, scores are those of the activation unit."""
    model, plain = din(moved=False), din(content_attention=False)
    plain.load_state_dict(model.state_dict(), strict=False)
    x = inputs([NAN] * 9)
    torch.testing.assert_close(model(x).logits, plain(x).logits)
    assert not torch.allclose(model(inputs()).logits, plain(inputs()).logits)
    assert not any("content" in name for name in plain.state_dict())


def test_missing_similarity_and_padded_histories_are_refused():
    model, x = din(), inputs()
    with pytest.raises(ValueError, match="needs the similarity"):
        model(replace(x, similarity=None))
    with pytest.raises(ValueError, match="content_attention has no padded form"):
        padded_logits(model, torch.zeros(1, D), torch.zeros(1, 2, D), torch.ones(1), torch.zeros(1, C))
