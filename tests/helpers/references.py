"""The formulae of papers, written as slowly as they read."""

from __future__ import annotations

import torch

from mmctr.layers.activation_unit import ActivationUnit
from mmctr.layers.recurrence import Recurrence
from mmctr.rankers.base import RankerInput


def separate(target, history, offsets, context, negatives=None) -> RankerInput:
    """The input in which no item appears twice: from vectors of targets (B, D), behaviours and negatives (H, D)."""
    parts = [target, history] if negatives is None else [target, history, negatives]
    ends = torch.tensor([len(part) for part in parts]).cumsum(0).tolist()
    return RankerInput(
        items=torch.cat(parts),
        target=torch.arange(ends[0]),
        history=torch.arange(ends[0], ends[1]),
        history_offsets=offsets,
        context=context,
        negatives=None if negatives is None else torch.arange(ends[1], ends[2]),
    )


def repeated(lengths, num_items, dim, context_dim, seed=0) -> RankerInput:
    """Impressions of few items, most of which appear again and again; everything real is a leaf with a gradient."""
    g = torch.Generator().manual_seed(seed)
    b, h = len(lengths), sum(lengths)
    draw = [torch.randint(0, num_items, (n,), generator=g) for n in (b, h, h)]
    return RankerInput(
        items=torch.randn(num_items, dim, generator=g).requires_grad_(),
        target=draw[0],
        history=draw[1],
        history_offsets=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]),
        context=torch.randn(b, context_dim, generator=g).requires_grad_(),
        negatives=draw[2],
    )


def one_by_one(model: Recurrence, values, attention, offsets) -> torch.Tensor:
    """A history at a time, a step at a time, as the formulae stand: (H, D) in jagged order."""
    w = model.input.weight.chunk(3), model.input.bias.chunk(3)
    v = model.hidden.weight.chunk(3), model.hidden.bias.chunk(3)
    states, dim = [], model.hidden.weight.shape[1]
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        h = torch.zeros(dim)
        for i in range(start, end):
            x, a = values[i], attention[i]
            u = torch.sigmoid(w[0][0] @ x + w[1][0] + v[0][0] @ h + v[1][0])
            r = torch.sigmoid(w[0][1] @ x + w[1][1] + v[0][1] @ h + v[1][1])
            c = torch.tanh(w[0][2] @ x + w[1][2] + r * (v[0][2] @ h + v[1][2]))
            if model.gate == "gru":
                h = (1 - u) * h + u * c
            elif model.gate == "agru":
                h = (1 - a) * h + a * c
            elif model.gate == "augru":
                h = (1 - a * u) * h + a * u * c
            else:  # the authors' code, whose gate z = 1 - u keeps
                z = (1 - a) * (1 - u)
                h = z * h + (1 - z) * c
            states.append(h)
    return torch.stack(states) if states else torch.zeros(0, dim)


def explicit_unit(unit: ActivationUnit, query, keys):
    return unit.rest(unit.act(unit.first(torch.cat([query, keys, query - keys, query * keys], 1)))).squeeze(1)
