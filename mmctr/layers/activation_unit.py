"""The activation unit of DIN (Zhou et al. 2018, section 4.3): a weight for each behaviour, given the target."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmctr.layers import native
from mmctr.layers.jagged import by_row, chunks, segment_ids
from mmctr.layers.mlp import MLP, Activation, activation


class ActivationUnit(nn.Module):
    """a(k, q) = MLP([q, k, q - k, q * k]) for every history value, without ever building the concatenation.

    The first layer is W [q, k, q - k, q * k] = (Wq + Wd) q + (Wk - Wd) k + Wp (q * k): the part of q is computed once
    an impression, the part of k once a distinct item, and the 4D-wide input does not exist.
    """

    def __init__(self, dim: int, hidden: list[int], act: Activation):
        super().__init__()
        self.first = nn.Linear(4 * dim, hidden[0])
        self.act = activation(act, hidden[0])
        self.rest = MLP(hidden[0], hidden[1:], 1, act)

    def forward(self, query: Tensor, items: Tensor, history: Tensor, offsets: Tensor) -> Tensor:
        """Weights (H,) of the keys items[history] for queries (B, D).

        Args:
            items, history: (U, D) distinct item vectors and (H,) positions in them.
            offsets: (B + 1,) where the keys of each query begin.
        """
        wq, wk, wd, wp = self.first.weight.chunk(4, dim=1)
        query_part = F.linear(query, wq + wd, self.first.bias)
        hidden: Tensor = Interaction.apply(query.float(), items.float(), wp, query_part, wk - wd, history, offsets)
        with torch.autocast(query.device.type, enabled=False):
            # a tenth of the work; in bf16 its narrow matrices, of another height each step, cost oneDNN 20 ms
            return self.rest(self.act(hidden)).squeeze(1)


class Interaction(torch.autograd.Function):
    """query_part[b] + Wk k + W (q_b * k) with k = items[history[h]], for each history value h, fp32: (H, hidden).

    Products are made a few thousand values at a time, so that they stay in the cache, and made again in the backward
    pass instead of being kept. In fp32 on a CPU a compiled function does the same with one matrix product for two.
    """

    @staticmethod
    def forward(ctx, query, items, weight, query_part, key_weight, history, offsets):
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
                own = out[part].copy_(product.to(ctx.low) @ by)
                own += query_part.index_select(0, segments[part])
                own += key_part.index_select(0, history[part])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
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
            # the impressions with behaviours in this chunk, the first of which may have begun before it
            own = slice(int(segments[part.start]), int(segments[part.stop - 1]) + 1)
            d_query[own] += sums(d_product.mul_(k), (offsets[:-1][own] - part.start).clamp(min=0))
        d_key_part = F.embedding_bag(order, grad, begins, mode="sum").to(ctx.low)
        d_key_weight = (d_key_part.T @ items.to(ctx.low)).float()
        d_items = F.embedding_bag(order, d_keys, begins, mode="sum")
        d_items += d_key_part @ key_weight.to(ctx.low)
        return d_query, d_items, d_weight, sums(grad, offsets[:-1]).to(ctx.part_dtype), d_key_weight, None, None


def sums(values: Tensor, begins: Tensor) -> Tensor:
    """Sums of rows (n, D) between one begin and the next: (len(begins), D)."""
    return F.embedding_bag(torch.arange(len(values), device=values.device), values, begins, mode="sum")
