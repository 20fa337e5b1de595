"""RowTable: an embedding table of which a step reads, and an optimiser updates, the rows of the batch alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmctr.distributed import gather_parts


class RowTable(nn.Embedding):
    """An embedding table that can be trained by rows.

    Row 0, "unknown", starts at zero: until training moves it, it says nothing rather than something random.
    """

    def __init__(self, num_rows: int, dim: int, init_std: float):
        super().__init__(num_rows, dim)
        self.init_std = init_std
        self.draw()
        self.by_rows = False
        self._picked: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def draw(self, generator: torch.Generator | None = None) -> None:
        """Start anew; a generator is one of the CPU, so that every device gets the same numbers."""
        if generator is None:
            self.weight.normal_(0, self.init_std)
        else:
            self.weight.copy_(torch.empty(self.weight.shape).normal_(0, self.init_std, generator=generator))
        self.weight[0] = 0

    def train_by_rows(self) -> None:
        """From now on gradients are of the picked rows; the weight itself has none, in any process."""
        self.by_rows = True
        self.weight.requires_grad_(False)

    def pick(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (R, D) and the positions of `ids` in them, of the shape of `ids`."""
        if not self.by_rows or not torch.is_grad_enabled():
            return self.weight, ids
        rows, positions = torch.unique(ids, return_inverse=True)
        picked = self.weight.index_select(0, rows).requires_grad_()
        self._picked.append((rows, picked))
        return picked, positions

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) from ids (...)."""
        weight, positions = self.pick(input)
        return F.embedding(positions, weight)

    def drop_gradient(self) -> None:
        """Forget what has been picked since the last step."""
        self._picked = []

    def pop_gradient(self) -> tuple[Tensor, Tensor]:
        """Distinct rows (R,) since the last call and their gradient (R, D), averaged over processes."""
        dim = self.weight.shape[1]
        rows = [self.weight.new_empty(0, dtype=torch.int64), *(rows for rows, _ in self._picked)]
        grads = [self.weight.new_empty((0, dim))]
        grads += [torch.zeros_like(picked) if picked.grad is None else picked.grad for _, picked in self._picked]
        picked_once, self._picked = len(self._picked) == 1, []
        all_rows, all_grads = gather_parts(torch.cat([part.long() for part in rows]), torch.cat(grads))
        if picked_once and len(all_rows) == len(rows[1]):  # one process: distinct and in order as they are
            return all_rows, all_grads
        distinct, positions = torch.unique(all_rows, return_inverse=True)
        return distinct, torch.zeros(len(distinct), dim, device=all_grads.device).index_add_(0, positions, all_grads)
