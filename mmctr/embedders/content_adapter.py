"""What stands between content vectors and rankers: the adapter, and the gate that mixes content with IDs."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ContentAdapter(nn.Module):
    """Content vector -> the size the ranker uses; items without content read a learned "absent" vector instead.

    With `residual` it is W x + MLP(x), or x + MLP(x) where sizes agree, of the layer-normed vector x.
    """

    def __init__(self, in_dim: int, hidden: list[int], out_dim: int, dropout: float, residual: bool = False):
        super().__init__()
        self.absent = nn.Parameter(torch.randn(in_dim) * in_dim**-0.5)
        # unit-norm vectors have entries near 1/sqrt(dim): the norm brings them to the scale layers expect
        layers: list[nn.Module] = [nn.LayerNorm(in_dim)]
        self.skip = None
        if residual:
            self.skip = nn.Identity() if in_dim == out_dim else nn.Linear(in_dim, out_dim, bias=False)
        for width in hidden:
            layers += [nn.Linear(in_dim, width), nn.GELU(), nn.Dropout(dropout)]
            in_dim = width
        self.layers = nn.Sequential(*layers, nn.Linear(in_dim, out_dim))

    def forward(self, vectors: Tensor, has_content: Tensor) -> Tensor:
        """(U, in_dim), (U,) bool -> (U, out_dim)."""
        return self._adapted(torch.where(has_content[:, None], vectors.float(), self.absent))

    def nothing(self, num_items: int) -> Tensor:
        """(num_items, out_dim) what an item without content reads, for each."""
        return self._adapted(self.absent[None]).expand(num_items, -1)

    def _adapted(self, x: Tensor) -> Tensor:
        if self.skip is None:
            return self.layers(x)
        x = self.layers[0](x)
        return self.skip(x) + self.layers[1:](x)


class ClickGate(nn.Module):
    """g * ID + (1 - g) * content, by how well the ID can be known: g = sigmoid(slope log(1 + clicks) + bias) per
    dimension, both learned.

    That is n / (n + k) for n = 1 + clicks, the shrinkage of a mean that was estimated from so many draws, with a
    learned power. Without a click in training g is exactly 0, so a cold item reads its content alone. The ID row says
    the clicks: an item that ID dropout shows as unknown has none in that batch.

    Args:
        clicks: (num_ids,) training clicks of each row of the ID table; those of row 0, the unknown, do not count.
    """

    clicks: Tensor

    def __init__(self, dim: int, clicks: Tensor):
        super().__init__()
        # half and half at about 20 clicks; vectors, which no weight decay pulls towards "clicks do not matter"
        self.slope, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.full((dim,), -3.0))
        counts = clicks.float().clone()
        counts[0] = 0
        self.register_buffer("clicks", counts, persistent=False)  # the vocabulary keeps them

    def weight(self, ids: Tensor) -> Tensor:
        """(U, dim) what the ID counts for, of (U,) rows of the ID table."""
        clicks = self.clicks[ids][:, None]
        return torch.where(clicks > 0, torch.sigmoid(self.slope * clicks.log1p() + self.bias), 0.0)

    def forward(self, ids: Tensor, id_vectors: Tensor, content: Tensor) -> Tensor:
        """(U,), (U, dim), (U, dim) -> (U, dim)."""
        gate = self.weight(ids)
        return gate * id_vectors + (1 - gate) * content
