"""The adapter from content vectors to the vectors rankers read, and the gate that mixes content with IDs."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ContentAdapter(nn.Module):
    """Map a content vector to the size the ranker reads; an item without content gets a learned "absent" vector.

    Args:
        in_dim: size of content vectors.
        hidden: hidden sizes of the MLP.
        out_dim: size of the vectors the ranker reads.
        dropout: dropout of the hidden layers.
        residual: compute W x + MLP(x) of the layer-normed vector x, or x + MLP(x) where both sizes are equal, in place
            of MLP(x).
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
        """The adapted content vectors of U items.

        Args:
            vectors: (U, in_dim) content vectors.
            has_content: (U,) bool; items without content get the adapted "absent" vector.

        Returns:
            (U, out_dim).
        """
        return self._adapted(torch.where(has_content[:, None], vectors.float(), self.absent))

    def absent_vectors(self, num_items: int) -> Tensor:
        """(num_items, out_dim): the adapted "absent" vector, once for each item."""
        return self._adapted(self.absent[None]).expand(num_items, -1)

    def _adapted(self, x: Tensor) -> Tensor:
        """(n, out_dim) outputs of the layers for content vectors x (n, in_dim)."""
        if self.skip is None:
            return self.layers(x)
        x = self.layers[0](x)
        return self.skip(x) + self.layers[1:](x)


class ClickGate(nn.Module):
    """Mix ID and content by the training clicks of an item: g * ID + (1 - g) * content.

    For each dimension g = sigmoid(slope log(1 + clicks) + bias), with learned slope and bias. With n = 1 + clicks and
    the slope 1 this is n / (n + k), the shrinkage of a mean estimated from n draws. Without a click in training g is
    exactly 0, so a cold item is represented by content alone. The clicks are looked up by the ID row: an item that ID
    dropout turns into the unknown item has no clicks in that batch.

    Args:
        dim: size of ID vectors and content vectors.
        clicks: (num_ids,) training clicks of each row of the ID table; the clicks of row 0, the unknown item, are
            ignored.
    """

    clicks: Tensor

    def __init__(self, dim: int, clicks: Tensor):
        super().__init__()
        # half and half at about 20 clicks; vectors, which no weight decay pulls towards "clicks do not matter"
        self.slope, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.full((dim,), -3.0))
        counts = clicks.float().clone()
        counts[0] = 0
        self.register_buffer("clicks", counts, persistent=False)  # the vocabulary saves the clicks

    def weight(self, ids: Tensor) -> Tensor:
        """The weights g (U, dim) of the ID vectors, for rows `ids` (U,) of the ID table."""
        clicks = self.clicks[ids][:, None]
        return torch.where(clicks > 0, torch.sigmoid(self.slope * clicks.log1p() + self.bias), 0.0)

    def forward(self, ids: Tensor, id_vectors: Tensor, content: Tensor) -> Tensor:
        """The mixed vectors of U items.

        Args:
            ids: (U,) rows of the ID table.
            id_vectors: (U, dim).
            content: (U, dim) adapted content vectors.

        Returns:
            (U, dim).
        """
        gate = self.weight(ids)
        return gate * id_vectors + (1 - gate) * content
