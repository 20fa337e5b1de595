"""A memory bank of item vectors, with which an encoder can be trained inside a ranker at a fixed cost per step.

A limited number of the distinct items of a step is encoded with gradient; the other items are read from the bank, where
each item has the vector of the last time it was encoded (for pictures: He et al. 2020, arXiv 1911.05722; for items of a
ranker: arXiv 2511.10962). A newly encoded vector replaces the stored vector, and every evaluation encodes all items
again. The bank measures the age of the vectors that training reads, and the distance of old vectors from new vectors.
Where every item of a step is encoded, nothing is read from the bank and training is exact.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmctr.data.batches import BehaviorBatch
from mmctr.distributed import gather_rows, world_size


class MemoryBank(nn.Module):
    """The age of every stored vector of an `ItemEmbedder`; each step writes new vectors into the embedder.

    All state is in the state dict, so that a resumed run continues exactly. All processes hold the same vectors and
    ages; each process counts the vectors read by that process, and the counts of the main process are logged.

    Args:
        num_items: number of items N of the catalog.
        capacity: largest number of items that a process encodes in a step.
    """

    now: Tensor
    made_at: Tensor
    was_read: Tensor
    age_sum: Tensor
    num_read: Tensor

    def __init__(self, num_items: int, capacity: int):
        super().__init__()
        self.capacity = min(capacity, num_items)
        self.register_buffer("now", torch.zeros((), dtype=torch.int32))  # steps taken
        self._forget(num_items)

    def _forget(self, num_items: int) -> None:
        """Set the age of all N vectors to zero, and the counts of vectors that were read to zero."""
        device = self.now.device
        self.register_buffer("made_at", self.now.repeat(num_items))
        self.register_buffer("was_read", torch.zeros(num_items, dtype=torch.uint8, device=device))
        self.register_buffer("age_sum", torch.zeros((), device=device))
        self.register_buffer("num_read", torch.zeros((), device=device))

    @torch.no_grad()
    def step(
        self,
        table: Tensor,
        has_content: Tensor,
        rows: Tensor,
        encode: Tensor | None,
        new: Tensor,
        has: Tensor,
        shown: Tensor | None = None,
    ) -> None:
        """Count the vectors that a step reads, and write the newly encoded vectors into the table, in place.

        Args:
            table: (N, C) stored vectors of the whole catalog; changed in place.
            has_content: (N,) bool, the items of the catalog with content; changed in place.
            rows: (U,) catalog rows of the items of the step.
            encode: (E,) positions in `rows` of the encoded items; None: all items are encoded.
            new: (E, C) vectors of the encoded items.
            has: (E,) bool, the encoded items with content.
            shown: (U,) bool, the items whose content the ranker reads; None: all.
        """
        if encode is None:
            encode = torch.arange(len(rows), device=rows.device)
        reads = torch.ones(len(rows), dtype=torch.bool, device=rows.device) if shown is None else shown
        reads = reads.index_fill(0, encode, False)
        self.age_sum += ((self.now - self.made_at[rows]) * reads).sum()
        self.num_read += reads.sum()
        self.was_read.scatter_reduce_(0, rows, reads.to(torch.uint8), "amax")
        self.now += 1
        written = rows[encode]
        for positions, vectors, mask in self._gather_encoded(written, new.to(table.dtype), has):
            table.index_copy_(0, positions, vectors)
            has_content.index_copy_(0, positions, mask)
            self.made_at[positions] = self.now

    def _gather_encoded(self, rows: Tensor, vectors: Tensor, has: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Rows (E,), vectors (E, C) and masks (E,) that each process has encoded, in the order of the processes: where
        two processes encoded the same item, the vector of the later process is stored."""
        if world_size() == 1:
            return [(rows, vectors.detach(), has)]
        # processes encode different numbers of items: a shorter list is filled up with the first item
        fill = torch.arange(self.capacity, device=rows.device)
        fill = torch.where(fill < len(rows), fill, 0)
        parts = [gather_rows(part[fill]).split(self.capacity) for part in (rows, vectors.detach(), has)]
        return list(zip(*parts, strict=True))

    @torch.no_grad()
    def renew(self, old: Tensor, new: Tensor, has_content: Tensor) -> dict[str, float]:
        """Begin again with new vectors of the whole catalog, and measure how stale the old vectors were.

        Args:
            old: (N, C) stored vectors.
            new: (N, C) vectors that the encoder gives now.
            has_content: (N,) bool, the items to compare.

        Returns:
            `bank_age`, the mean age in steps of the vectors that training has read since the last call, and
            `bank_cosine`, the mean cosine of old and new vectors over the items that were read; empty where no vector
            was read, or where the new vectors are of another catalog.
        """
        numbers = {}
        if len(old) == len(new):
            compared = self.was_read.bool() & has_content
            if bool(compared.any()):
                cosine = F.cosine_similarity(old[compared].float(), new[compared].float(), dim=1).mean()
                numbers = {"bank_age": float(self.age_sum / self.num_read), "bank_cosine": float(cosine)}
        self._forget(len(new))
        return numbers


def shown_items(batch: BehaviorBatch, role: Literal["both", "target", "history"]) -> Tensor:
    """The items of a batch that appear in a role.

    Args:
        batch: B impressions with U distinct items.
        role: "target": targets; "history": behaviours and negatives; "both": all items.

    Returns:
        (U,) bool.
    """
    shown = torch.full((len(batch.items),), role == "both", device=batch.target.device)
    for positions in (batch.target,) if role == "target" else (batch.history, batch.negatives):
        if positions is not None:
            shown[positions] = True
    return shown
