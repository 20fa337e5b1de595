"""RowTable: an embedding table of which a training step reads and updates only the rows of the batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmctr.distributed import gather_parts


class RowTable(nn.Embedding):
    """An embedding table that can be trained by rows.

    Row 0, of unknown values, starts at zero, so that the row has no influence before training changes the row.

    Args:
        num_rows: number of rows, row 0 included.
        dim: D, embedding size.
        init_std: standard deviation of the initial values.
    """

    def __init__(self, num_rows: int, dim: int, init_std: float):
        super().__init__(num_rows, dim)
        self.init_std = init_std
        self.draw()
        self.by_rows = False
        self._picked: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def draw(self, generator: torch.Generator | None = None) -> None:
        """Draw new initial values.

        Args:
            generator: generator on the CPU, so that every device gets the same numbers; None: the global generator.
        """
        if generator is None:
            self.weight.normal_(0, self.init_std)
        else:
            self.weight.copy_(torch.empty(self.weight.shape).normal_(0, self.init_std, generator=generator))
        self.weight[0] = 0

    def train_by_rows(self) -> None:
        """Collect gradients of the rows that a batch reads, instead of a gradient of the whole weight."""
        self.by_rows = True
        self.weight.requires_grad_(False)

    def pick(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The rows that hold the vectors of some ids.

        Args:
            ids: (...) int row numbers.

        Returns:
            (R, D) rows, and (...) positions of the ids among the rows.
        """
        if not self.by_rows or not torch.is_grad_enabled():
            return self.weight, ids
        rows, positions = torch.unique(ids, return_inverse=True)
        picked = self.weight.index_select(0, rows).requires_grad_()
        self._picked.append((rows, picked))
        return picked, positions

    def forward(self, input: Tensor) -> Tensor:
        """The vectors (..., D) of the row numbers `input` (...)."""
        weight, positions = self.pick(input)
        return F.embedding(positions, weight)

    def drop_gradient(self) -> None:
        """Discard the gradients collected since the last step."""
        self._picked = []

    def pop_gradient(self) -> tuple[Tensor, Tensor]:
        """The gradients collected since the last call, averaged over processes.

        Returns:
            (R,) distinct row numbers, and the (R, D) gradient of the rows.
        """
        dim = self.weight.shape[1]
        rows = [self.weight.new_empty(0, dtype=torch.int64), *(rows for rows, _ in self._picked)]
        grads = [self.weight.new_empty((0, dim))]
        grads += [torch.zeros_like(picked) if picked.grad is None else picked.grad for _, picked in self._picked]
        picked_once, self._picked = len(self._picked) == 1, []
        all_rows, all_grads = gather_parts(torch.cat([part.long() for part in rows]), torch.cat(grads))
        if picked_once and len(all_rows) == len(rows[1]):  # one process: the rows are distinct and sorted already
            return all_rows, all_grads
        distinct, positions = torch.unique(all_rows, return_inverse=True)
        return distinct, torch.zeros(len(distinct), dim, device=all_grads.device).index_add_(0, positions, all_grads)
