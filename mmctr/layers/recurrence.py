"""Gated recurrences over jagged histories, with a hand-written backward pass.

Histories are processed in time-major order: all first behaviours, then all second behaviours, and so on, with the
longest histories first. Step t therefore works on the first `sizes[t]` rows of a matrix, and no padding exists. The
weight gradients, which autograd would compute in every step, are computed once after the last step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Gate = Literal["gru", "agru", "augru", "augru_official"]


@dataclass(frozen=True)
class TimeMajor:
    """The time-major order of the H values of B jagged histories."""

    order: Tensor
    """(H,) position in the jagged values of each value in time-major order"""
    segments: Tensor
    """(H,) impression of each value in time-major order"""
    sizes: list[int]
    """number of histories that reach each step, descending, with the sum H"""
    previous: Tensor
    """(H - sizes[0],) for each value from the second step on: position in time-major order of the preceding value of
    the same history"""
    last: Tensor
    """(B,) position in time-major order of the last value of each impression; H for an empty history"""

    @classmethod
    def of(cls, offsets: Tensor, total: int) -> TimeMajor:
        """The time-major order of jagged histories.

        Args:
            offsets: (B + 1,) offsets of the impressions.
            total: H, number of history values.
        """
        device, lengths = offsets.device, offsets.diff()
        rows = torch.argsort(lengths, descending=True, stable=True)
        ordered = lengths[rows]
        # histories that reach step t are those longer than t
        reach = len(lengths) - torch.cumsum(torch.bincount(lengths), 0)[:-1]
        sizes: list[int] = reach.tolist()
        begins = torch.cumsum(reach, 0) - reach
        step = torch.repeat_interleave(torch.arange(len(sizes), device=device), reach, output_size=total)
        position = torch.arange(total, device=device)
        segments = rows[position - begins[step]]
        first = sizes[0] if sizes else 0
        last = torch.full_like(lengths, total)
        some = ordered > 0
        last[rows[some]] = begins[ordered[some] - 1] + torch.arange(first, device=device)
        return cls(
            order=offsets[segments] + step,
            segments=segments,
            sizes=sizes,
            previous=position[first:] - reach[step[first:] - 1],
            last=last,
        )


class Recurrence(nn.Module):
    """A GRU whose update may depend on one attention weight a per value. With candidate h~ and update gate u,

        h_t = (1 - e) * h_{t-1} + e * h~        h~ = tanh(W i_t + r * (U h_{t-1} + b))

    | gate | e | |
    |---|---|---|
    | `gru` | u | Cho et al. 2014 |
    | `agru` | a | DIEN (Zhou et al. 2019), equation 10: attention instead of the update gate |
    | `augru` | a u | DIEN, equation 14: a = 0 leaves the state unchanged |
    | `augru_official` | 1 - (1 - a)(1 - u) | code of the authors: a = 0 is a GRU step, a = 1 overwrites the state |

    Args:
        in_dim: size of the history values.
        dim: size of the state.
        gate: name of the gate.
    """

    def __init__(self, in_dim: int, dim: int, gate: Gate = "gru"):
        super().__init__()
        self.gate: Gate = gate
        self.input = nn.Linear(in_dim, 3 * dim)  # update, reset, candidate
        self.hidden = nn.Linear(dim, 3 * dim)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(dim**-0.5), dim**-0.5)

    def forward(self, projected: Tensor, layout: TimeMajor, attention: Tensor | None = None) -> Tensor:
        """The states after each value. All tensors are in time-major order.

        Args:
            projected: (H, 3 dim) output of the layer `input` for the history values.
            layout: the time-major order.
            attention: (H,) attention weights; None for the gate `gru`.

        Returns:
            (H, dim).
        """
        with torch.autocast(projected.device.type, enabled=False):
            return _Recur.apply(
                projected.float(),
                self.hidden.weight.float(),
                self.hidden.bias.float(),
                None if attention is None else attention.float(),
                layout,
                self.gate,
            )


class _Recur(torch.autograd.Function):
    @staticmethod
    def forward(ctx, projected, weight, bias, attention, layout, gate):
        sizes, total, dim = layout.sizes, len(projected), weight.shape[1]
        states, hidden_candidate = (projected.new_empty((total, dim)) for _ in range(2))
        gates = projected.new_empty((total, 3 * dim))  # update, reset and candidate
        state = projected.new_zeros((sizes[0] if sizes else 0, dim))
        begin = 0
        for size in sizes:
            now, state = slice(begin, begin + size), state[:size]
            hidden = torch.addmm(bias, state, weight.T)
            torch.add(projected[now, : 2 * dim], hidden[:, : 2 * dim], out=gates[now, : 2 * dim]).sigmoid_()
            update, reset, _ = gates[now].chunk(3, 1)
            hidden_candidate[now] = hidden[:, 2 * dim :]
            # computed contiguously and then copied: tanh of every third part of a row is ten times slower
            candidate = torch.addcmul(projected[now, 2 * dim :], reset, hidden[:, 2 * dim :]).tanh_()
            gates[now, 2 * dim :] = candidate
            a = None if attention is None else attention[now, None]
            state = torch.lerp(state, candidate, step_size(update, a, gate).expand_as(state), out=states[now])
            begin += size
        ctx.save_for_backward(weight, attention, states)
        # not tensors of the graph: the backward pass overwrites the buffers, which saves half the memory of a step
        ctx.buffers = [gates, hidden_candidate]
        ctx.layout, ctx.gate = layout, gate
        return states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_states):
        weight, attention, states = ctx.saved_tensors
        if not ctx.buffers:
            raise RuntimeError("a recurrence can be differentiated once: its buffers are used up")
        gates, hidden_candidate = ctx.buffers.pop(0), ctx.buffers.pop(0)
        sizes, gate, dim = ctx.layout.sizes, ctx.gate, weight.shape[1]
        first = sizes[0] if sizes else 0
        d_attention = None if attention is None else torch.zeros_like(attention)
        carry = gates.new_zeros((sizes[-1] if sizes else 0, dim))
        zero = gates.new_zeros((first, dim))
        end = len(states)
        for step in reversed(range(len(sizes))):
            size = sizes[step]
            now = slice(end - size, end)
            before = end - size - sizes[step - 1]
            previous = states[before : before + size] if step else zero
            d_state = grad_states[now].clone()
            d_state[: len(carry)] += carry  # shorter histories ended here
            update, reset, c = gates[now].chunk(3, 1)
            a = None if attention is None else attention[now, None]
            d_effective = d_state * (c - previous)
            effective = step_size(update, a, gate)
            d_c = (d_state * effective).mul_(1 - c * c)  # of the argument of tanh
            if gate == "gru" or a is None or d_attention is None:
                d_update = d_effective
            elif gate == "agru":
                d_attention[now] = d_effective.sum(1)
                d_update = torch.zeros_like(d_effective)
            elif gate == "augru":
                d_attention[now] = (d_effective * update).sum(1)
                d_update = d_effective * a
            else:
                d_attention[now] = (d_effective * (1 - update)).sum(1)
                d_update = d_effective * (1 - a)
            d_state.mul_(1 - effective)
            d_gates = torch.cat([d_update, d_c * hidden_candidate[now]], 1)
            d_gates.mul_(gates[now, : 2 * dim]).mul_(1 - gates[now, : 2 * dim])
            torch.mul(d_c, reset, out=hidden_candidate[now])
            gates[now] = torch.cat([d_gates, d_c], 1)
            carry = torch.addmm(d_state, torch.cat([d_gates, hidden_candidate[now]], 1), weight)
            end -= size
        d_projected, d_candidate = gates, hidden_candidate
        # first steps have the zero state before them, which adds nothing
        previous = states.index_select(0, ctx.layout.previous)
        d_weight = torch.cat([d_projected[first:, : 2 * dim].T @ previous, d_candidate[first:].T @ previous])
        d_bias = torch.cat([d_projected[:, : 2 * dim].sum(0), d_candidate.sum(0)])
        return d_projected, d_weight, d_bias, d_attention, None, None


def step_size(update: Tensor, attention: Tensor | None, gate: Gate) -> Tensor:
    """The factor e by which a step moves the state towards the candidate, in the formula of `Recurrence`.

    Args:
        update: (n, dim) update gate u.
        attention: (n, 1) attention weights a; None for the gate `gru`.
        gate: name of the gate.

    Returns:
        (n, dim) or (n, 1).
    """
    if gate == "gru":
        return update
    assert attention is not None, f"{gate} needs attention"
    if gate == "agru":
        return attention
    return attention * update if gate == "augru" else 1 - (1 - attention) * (1 - update)
