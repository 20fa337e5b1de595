"""The activation unit of DIN (Zhou et al. 2018, section 4.3): a weight for each behaviour, given the target item."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmctr.layers import native
from mmctr.layers.jagged import by_row, chunks, segment_ids
from mmctr.layers.mlp import MLP, Activation, activation


class ActivationUnit(nn.Module):
    """The weight a(k, q) = MLP([q, k, q - k, q * k]) of every history value, computed without the concatenation.

    The first layer is W [q, k, q - k, q * k] = (Wq + Wd) q + (Wk - Wd) k + Wp (q * k). The term of q is computed once
    per impression and the term of k once per distinct item, so no input of width 4D is built.

    Args:
        dim: D, size of queries and keys.
        hidden: sizes of the hidden layers.
        act: name of the activation.
    """

    def __init__(self, dim: int, hidden: list[int], act: Activation):
        super().__init__()
        self.first = nn.Linear(4 * dim, hidden[0])
        self.act = activation(act, hidden[0])
        self.rest = MLP(hidden[0], hidden[1:], 1, act)

    def forward(self, query: Tensor, items: Tensor, history: Tensor, offsets: Tensor) -> Tensor:
        """The weights of the keys `items[history]`.

        Args:
            query: (B, D) queries.
            items: (U, D) vectors of distinct items.
            history: (H,) positions in `items`.
            offsets: (B + 1,) offsets of the queries in `history`.

        Returns:
            (H,) weights.
        """
        wq, wk, wd, wp = self.first.weight.chunk(4, dim=1)
        query_part = F.linear(query, wq + wd, self.first.bias)
        hidden: Tensor = Interaction.apply(query.float(), items.float(), wp, query_part, wk - wd, history, offsets)
        with torch.autocast(query.device.type, enabled=False):
            # a tenth of the work; in bf16 the narrow matrices, of another height in each step, cost oneDNN 20 ms
            return self.rest(self.act(hidden)).squeeze(1)


class Interaction(torch.autograd.Function):
    """query_part[b] + Wk k + W (q_b * k) with k = items[history[h]] for each history value h, in fp32: (H, hidden).

    The products are computed in chunks of a few thousand values, which fit into the cache, and are computed again in
    the backward pass instead of being stored. In fp32 on a CPU a compiled function computes the same values with one
    matrix product instead of two.
    """

    @staticmethod
    def forward(ctx, query, items, weight, query_part, key_weight, history, offsets):
        """The (H, hidden) sums for query (B, D), items (U, D), weight (hidden, D), query_part (B, hidden), key_weight
        (hidden, D), history (H,) and offsets (B + 1,)."""
        device = query.device.type
        ctx.low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        ctx.save_for_backward(query, items, weight, key_weight, history, offsets)
        ctx.part_dtype, query_part = query_part.dtype, query_part.float()
        fits = ctx.low == torch.float32 and len(weight) <= native.MAX_HIDDEN
        ctx.native = fits and native.usable(query, items, weight, key_weight)
        if ctx.native:
            return native.unit_forward(query, items, weight, query_part, key_weight, history, offsets)
        segments = segment_ids(offsets, len(history))
        out = query.new_empty((len(history), len(weight)))
        with torch.autocast(device, enabled=False):
            key_part, by = (items.to(ctx.low) @ key_weight.T.to(ctx.low)).float(), weight.T.to(ctx.low)
            for part in chunks(len(history), query.device):
                product = query.index_select(0, segments[part]).mul_(items.index_select(0, history[part]))
                out_part = out[part].copy_(product.to(ctx.low) @ by)
                out_part += query_part.index_select(0, segments[part])
                out_part += key_part.index_select(0, history[part])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        """The gradients of the seven arguments of `forward`, given the gradient (H, hidden) of the result."""
        query, items, weight, key_weight, history, offsets = ctx.saved_tensors
        grad = grad.contiguous()
        order, begins = by_row(history, len(items))
        if ctx.native:
            d_query, d_query_part, d_keys, d_weight, d_key_weight = native.unit_backward(
                query, items, weight, key_weight, history, offsets, grad
            )
            d_items = F.embedding_bag(order, d_keys.contiguous(), begins, mode="sum")
            return d_query, d_items, d_weight, d_query_part.to(ctx.part_dtype), d_key_weight, None, None
        segments = segment_ids(offsets, len(history))
        weight_low = weight.to(ctx.low)
        d_weight, d_query = torch.zeros_like(weight), torch.zeros_like(query)
        d_keys = items.new_empty((len(history), items.shape[1]))
        for part in chunks(len(history), grad.device):
            low = grad[part].to(ctx.low)
            q = query.index_select(0, segments[part])
            k = items.index_select(0, history[part])
            d_product = (low @ weight_low).float()
            torch.mul(d_product, q, out=d_keys[part])
            d_weight += low.T @ q.mul_(k).to(ctx.low)
            # the impressions with behaviours in this chunk; the first impression may begin before the chunk
            rows = slice(int(segments[part.start]), int(segments[part.stop - 1]) + 1)
            d_query[rows] += sums(d_product.mul_(k), (offsets[:-1][rows] - part.start).clamp(min=0))
        d_key_part = F.embedding_bag(order, grad, begins, mode="sum").to(ctx.low)
        d_key_weight = (d_key_part.T @ items.to(ctx.low)).float()
        d_items = F.embedding_bag(order, d_keys, begins, mode="sum")
        d_items += d_key_part @ key_weight.to(ctx.low)
        return d_query, d_items, d_weight, sums(grad, offsets[:-1]).to(ctx.part_dtype), d_key_weight, None, None


def sums(values: Tensor, begins: Tensor) -> Tensor:
    """Sums of consecutive rows.

    Args:
        values: (n, D) rows.
        begins: (m,) first row of each sum, ascending; the last sum ends at row n.

    Returns:
        (m, D) sums.
    """
    return F.embedding_bag(torch.arange(len(values), device=values.device), values, begins, mode="sum")
