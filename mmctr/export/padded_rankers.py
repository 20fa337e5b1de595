"""Rankers over padded histories, for graphs that run outside of Python.

Training uses jagged histories and hand-written gradients, which cannot be exported. This module computes the same
formulae with the parameters of the same rankers, over histories (B, L, D) with lengths (B,), in operations that
`torch.export` supports; in evaluation mode only, without dropout and auxiliary losses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmctr.layers.recurrence import Recurrence, step_size
from mmctr.rankers.dien import DIEN
from mmctr.rankers.din import DIN, some_columns
from mmctr.rankers.embedding_mlp import EmbeddingMLP
from mmctr.rankers.linear import LR, LSPLM

Padded = Callable[[Any, Tensor, Tensor, Tensor, Tensor], Tensor]
"""function from ranker, target, history, mask and context to logits"""


def padded_logits(ranker: nn.Module, target: Tensor, history: Tensor, length: Tensor, context: Tensor) -> Tensor:
    """Logits (B,), equal to the logits of the ranker in evaluation mode.

    Args:
        ranker: the ranker.
        target: (B, D) vectors of the targets.
        history: (B, L, D) vectors of the behaviours, oldest first; entries from `length` on are ignored.
        length: (B,) int, 0 to L.
        context: (B, C) vectors of users and impressions.

    Raises:
        ValueError: the ranker has no padded form.
    """
    padded = PADDED.get(type(ranker))
    if padded is None:
        raise ValueError(f"{type(ranker).__name__} has no padded form; add one to mmctr/export/padded_rankers.py")
    # one masked behaviour more, so that sums, maxima and loops are never over zero behaviours, also where L is 0
    history = F.pad(history, (0, 0, 0, 1))
    mask = torch.arange(history.shape[1], device=length.device)[None] < length[:, None]
    history = torch.where(mask[..., None], history, 0.0)
    return padded(ranker, target, history, mask, context)


def _linear(ranker: LR | LSPLM, target: Tensor, history: Tensor, mask: Tensor, context: Tensor) -> Tensor:
    """Logits (B,) of linear rankers."""
    vectors = context.unflatten(1, (-1, target.shape[1])).sum(1) if context.shape[1] else 0.0
    return ranker.logits(target + vectors)


def _embedding_mlp(ranker: EmbeddingMLP, target: Tensor, history: Tensor, mask: Tensor, context: Tensor) -> Tensor:
    """Logits (B,) of Embedding&MLP."""
    pooled = history.sum(1)
    if ranker.config.pooling == "mean":
        pooled = pooled / mask.sum(1, keepdim=True).clamp(min=1)
    return ranker.mlp(torch.cat([context, target, pooled], dim=1)).squeeze(1)


def _din(ranker: DIN, target: Tensor, history: Tensor, mask: Tensor, context: Tensor) -> Tensor:
    """Logits (B,) of DIN."""
    if ranker.content is not None:
        raise ValueError(
            "DIN with content_attention has no padded form: it reads cosines of contents, not item vectors"
        )
    interests = []
    for unit, columns in ranker.channels:
        query, keys = some_columns(target, columns), some_columns(history, columns)
        wq, wk, wd, wp = unit.first.weight.chunk(4, dim=1)
        hidden = F.linear(query, wq + wd, unit.first.bias)[:, None] + F.linear(keys, wk - wd)
        hidden = hidden + F.linear(query[:, None] * keys, wp)
        weights = unit.rest(unit.act(hidden.flatten(0, 1))).view(mask.shape)
        weights = _softmax(weights, mask) if ranker.config.weights == "softmax" else torch.where(mask, weights, 0.0)
        interests.append((weights[..., None] * history).sum(1))
    products = [interest * target for interest in interests]
    return ranker.mlp(torch.cat([context, target, *interests, *products], dim=1)).squeeze(1)


def _dien(ranker: DIEN, target: Tensor, history: Tensor, mask: Tensor, context: Tensor) -> Tensor:
    """Logits (B,) of DIEN."""
    _, interests = _run(ranker.extractor, ranker.extractor.input(history), mask)
    attention = _softmax((interests * ranker.query(target)[:, None]).sum(2), mask)
    inputs = interests * attention[..., None] if ranker.config.gate == "aigru" else interests
    state, _ = _run(ranker.evolver, ranker.evolver.input(inputs), mask, attention)
    total = history.sum(1)
    return ranker.mlp(torch.cat([context, target, total, total * target, state], dim=1)).squeeze(1)


def _softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax (B, L) over the behaviours of each row; zeros in a row without behaviours."""
    low = torch.finfo(scores.dtype).min
    top = torch.where(mask, scores, low).amax(1, keepdim=True)
    powers = torch.where(mask, torch.exp(torch.where(mask, scores - top, 0.0)), 0.0)
    return powers / powers.sum(1, keepdim=True).clamp(min=1e-30)


def _run(model: Recurrence, projected: Tensor, mask: Tensor, attention: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The state (B, dim) after the last behaviour, and the states (B, L, dim) after each behaviour.

    Args:
        model: the recurrence.
        projected: (B, L, 3 dim) outputs of `model.input`.
        mask: (B, L) bool, the behaviours.
        attention: (B, L) attention weights for the gate; None: all 1.
    """
    weight, bias, gate = model.hidden.weight, model.hidden.bias, model.gate
    dim = weight.shape[1]

    def step(state: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        values, a, is_behaviour = now
        hidden = F.linear(state, weight, bias)
        gates = torch.sigmoid(values[:, : 2 * dim] + hidden[:, : 2 * dim])
        candidate = torch.tanh(values[:, 2 * dim :] + gates[:, dim:] * hidden[:, 2 * dim :])
        moved = state + step_size(gates[:, :dim], a, gate) * (candidate - state)
        state = torch.where(is_behaviour, moved, state)
        return state, state.clone()  # the two results of a scan may not be one tensor

    if attention is None:
        attention = torch.ones_like(mask, dtype=projected.dtype)
    steps = tuple(x.transpose(0, 1).contiguous() for x in (projected, attention[..., None], mask[..., None]))
    state = projected.new_zeros((projected.shape[0], dim))
    if torch.compiler.is_compiling():
        from torch._higher_order_ops.scan import scan  # the loop of an exported graph, whose length is an input

        state, states = scan(step, state, steps)
    else:
        all_states = []
        for now in zip(*steps, strict=True):
            state, _ = step(state, now)
            all_states.append(state)
        states = torch.stack(all_states)
    return state, states.transpose(0, 1)


PADDED: dict[type, Padded] = {
    LR: _linear,
    LSPLM: _linear,
    EmbeddingMLP: _embedding_mlp,
    DIN: _din,
    DIEN: _dien,
}
"""the padded form of each class of rankers"""
