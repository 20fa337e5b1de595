"""Rankers over padded histories, for graphs that run outside of Python.

Training keeps histories jagged and differentiates by hand; neither can leave torch. Here are the same formulae, on the
parameters of the same rankers, over `history (B, L, D)` with lengths (B,), in operations that `torch.export` knows. It
is evaluation alone: no dropout, no auxiliary losses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmctr.layers.recurrence import Recurrence, step_size
from mmctr.rankers.dien import DIEN
from mmctr.rankers.din import DIN, some_columns
from mmctr.rankers.embedding_mlp import EmbeddingMLP
from mmctr.rankers.linear import LR, LSPLM

Padded = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor], Tensor]


def padded_logits(ranker: nn.Module, target: Tensor, history: Tensor, length: Tensor, context: Tensor) -> Tensor:
    """(B,) logits, equal to those of the ranker itself in evaluation mode.

    Args:
        target: (B, D)
        history: (B, L, D), oldest first; what stands behind the first `length` behaviours of a row is not read.
        length: (B,) int, 0 to L.
        context: (B, C)

    Raises ValueError for a ranker that has no padded form.
    """
    padded = PADDED.get(type(ranker))
    if padded is None:
        raise ValueError(f"{type(ranker).__name__} has no padded form; add one to mmctr/export/padded_rankers.py")
    # one place more than there are: sums, maxima and loops over no behaviour at all are then over one that does not
    # count, also where L is 0
    history = F.pad(history, (0, 0, 0, 1))
    there = torch.arange(history.shape[1], device=length.device)[None] < length[:, None]
    history = torch.where(there[..., None], history, 0.0)
    return padded(ranker, target, history, there, context)


def _linear(ranker: LR | LSPLM, target: Tensor, history: Tensor, there: Tensor, context: Tensor) -> Tensor:
    vectors = context.unflatten(1, (-1, target.shape[1])).sum(1) if context.shape[1] else 0.0
    return ranker.logits(target + vectors)


def _embedding_mlp(ranker: EmbeddingMLP, target: Tensor, history: Tensor, there: Tensor, context: Tensor) -> Tensor:
    pooled = history.sum(1)
    if ranker.config.pooling == "mean":
        pooled = pooled / there.sum(1, keepdim=True).clamp(min=1)
    return ranker.mlp(torch.cat([context, target, pooled], dim=1)).squeeze(1)


def _din(ranker: DIN, target: Tensor, history: Tensor, there: Tensor, context: Tensor) -> Tensor:
    if ranker.content is not None:
        raise ValueError(
            "DIN with content_attention has no padded form: it reads cosines of contents, not item vectors"
        )
    interests = []
    for unit, own in ranker.channels:
        query, keys = some_columns(target, own), some_columns(history, own)
        wq, wk, wd, wp = unit.first.weight.chunk(4, dim=1)
        hidden = F.linear(query, wq + wd, unit.first.bias)[:, None] + F.linear(keys, wk - wd)
        hidden = hidden + F.linear(query[:, None] * keys, wp)
        weights = unit.rest(unit.act(hidden.flatten(0, 1))).view(there.shape)
        weights = _softmax(weights, there) if ranker.config.weights == "softmax" else torch.where(there, weights, 0.0)
        interests.append((weights[..., None] * history).sum(1))
    products = [interest * target for interest in interests]
    return ranker.mlp(torch.cat([context, target, *interests, *products], dim=1)).squeeze(1)


def _dien(ranker: DIEN, target: Tensor, history: Tensor, there: Tensor, context: Tensor) -> Tensor:
    _, interests = _run(ranker.extractor, ranker.extractor.input(history), there)
    attention = _softmax((interests * ranker.query(target)[:, None]).sum(2), there)
    read = interests * attention[..., None] if ranker.config.gate == "aigru" else interests
    state, _ = _run(ranker.evolver, ranker.evolver.input(read), there, attention)
    total = history.sum(1)
    return ranker.mlp(torch.cat([context, target, total, total * target, state], dim=1)).squeeze(1)


def _softmax(scores: Tensor, there: Tensor) -> Tensor:
    """Over the behaviours there are (B, L): all zeros where there are none."""
    low = torch.finfo(scores.dtype).min
    top = torch.where(there, scores, low).amax(1, keepdim=True)
    powers = torch.where(there, torch.exp(torch.where(there, scores - top, 0.0)), 0.0)
    return powers / powers.sum(1, keepdim=True).clamp(min=1e-30)


def _run(model: Recurrence, projected: Tensor, there: Tensor, attention: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The state (B, dim) after the last behaviour and those after each (B, L, dim).

    Args:
        projected: (B, L, 3 dim) what `model.input` makes of the values.
        attention: (B, L)
    """
    weight, bias, gate = model.hidden.weight, model.hidden.bias, model.gate
    dim = weight.shape[1]

    def step(state: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        values, a, is_there = now
        hidden = F.linear(state, weight, bias)
        gates = torch.sigmoid(values[:, : 2 * dim] + hidden[:, : 2 * dim])
        candidate = torch.tanh(values[:, 2 * dim :] + gates[:, dim:] * hidden[:, 2 * dim :])
        moved = state + step_size(gates[:, :dim], a, gate) * (candidate - state)
        state = torch.where(is_there, moved, state)
        return state, state.clone()  # the two results of a scan may not be one tensor

    if attention is None:
        attention = torch.ones_like(there, dtype=projected.dtype)
    steps = tuple(x.transpose(0, 1).contiguous() for x in (projected, attention[..., None], there[..., None]))
    state = projected.new_zeros((projected.shape[0], dim))
    if torch.compiler.is_compiling():
        from torch._higher_order_ops.scan import scan  # the loop of an exported graph, whose length is an input

        state, states = scan(step, state, steps)
    else:
        found = []
        for now in zip(*steps, strict=True):
            state, _ = step(state, now)
            found.append(state)
        states = torch.stack(found)
    return state, states.transpose(0, 1)


PADDED: dict[type, Padded] = {
    LR: _linear,
    LSPLM: _linear,
    EmbeddingMLP: _embedding_mlp,
    DIN: _din,
    DIEN: _dien,
}  # type: ignore[assignment]
