"""What every ranker keeps to. A new one is a line in `RANKERS`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmctr.rankers import DIENConfig, DINConfig, EmbeddingMLPConfig, GBDTLRConfig, LRConfig, LSPLMConfig
from mmctr.rankers.base import RankerInput
from tests.helpers.references import separate

RANKERS = {
    "lr": LRConfig(),
    "ls_plm": LSPLMConfig(pieces=3),
    "gbdt_lr": GBDTLRConfig(),
    "embedding_mlp": EmbeddingMLPConfig(mlp=[5]),
    "embedding_mlp sum": EmbeddingMLPConfig(mlp=[5], pooling="sum", activation="dice"),
    "dien": DIENConfig(mlp=[5]),
    "dien other size": DIENConfig(mlp=[5], hidden_dim=6, activation="relu"),
    "dien augru_official": DIENConfig(mlp=[5], gate="augru_official"),
    "dien agru": DIENConfig(mlp=[5], gate="agru", auxiliary_weight=0.0),
    "dien aigru": DIENConfig(mlp=[5], gate="aigru"),
    "din": DINConfig(attention=[6], mlp=[5]),
    "din softmax": DINConfig(attention=[6, 4], mlp=[], weights="softmax", activation="prelu"),
    "din content": DINConfig(attention=[6], mlp=[5], weights="softmax", content_attention=True),
}
D, C, LENGTHS = 4, 3, [2, 0, 4]


def inputs(dim: int, context_dim: int) -> RankerInput:
    g = torch.Generator().manual_seed(0)
    target, history, negatives = (torch.randn(n, dim, generator=g) for n in (3, 6, 6))
    context = torch.randn(3, context_dim, generator=g)
    similarity = torch.tensor([0.5, -0.2, 1.0, torch.nan, 0.0, 0.7])
    return replace(separate(target, history, torch.tensor([0, 2, 2, 6]), context, negatives), similarity=similarity)


@pytest.mark.parametrize("name", RANKERS)
def test_ranker(name):
    torch.manual_seed(0)
    linear = RANKERS[name].weight_dim  # what these read are weights, whose size they say
    dim, context_dim = (linear, 2 * linear) if linear else (D, C)
    ranker, x = RANKERS[name].build(dim, context_dim), inputs(dim, context_dim)

    # training: finite logits and losses; everything trained gets a gradient, and so do the vectors
    leaves = replace(x, items=x.items.clone().requires_grad_())
    output = ranker.train()(leaves)
    assert output.logits.shape == (3,) and output.logits.isfinite().all()
    (output.logits.sum() + sum(output.losses.values(), torch.zeros(()))).backward()
    assert [n for n, p in ranker.named_parameters() if p.grad is None] == []
    assert leaves.items.grad.isfinite().all()
    read = leaves.items.grad.abs().sum(1) > 0
    assert read[:3].all() and read[3:9].any() == (linear is None)  # targets; histories

    # evaluation: impressions do not see each other; equal inputs give equal logits
    ranker.eval()
    with torch.no_grad():
        logits = ranker(x).logits
        assert torch.equal(logits, ranker(x).logits)
        for b in range(3):
            start, end = x.history_offsets[b : b + 2].tolist()
            one = RankerInput(
                items=x.items,
                target=x.target[b : b + 1],
                history=x.history[start:end],
                history_offsets=torch.tensor([0, end - start]),
                context=x.context[b : b + 1],
                negatives=x.negatives[start:end],
                similarity=x.similarity[start:end],
            )
            torch.testing.assert_close(ranker(one).logits, logits[b : b + 1], rtol=1e-4, atol=1e-5)

    # no histories at all, no context at all
    none = {name: getattr(x, name)[:0] for name in ("history", "negatives", "similarity")}
    nobody = replace(x, history_offsets=torch.zeros(4, dtype=torch.int64), **none)
    assert ranker(nobody).logits.isfinite().all()
    bare = RANKERS[name].build(dim, 0)
    assert bare(replace(x, context=torch.zeros(3, 0))).logits.isfinite().all()
