"""A memory bank of item vectors, so that an encoder can be trained inside a ranker at a fixed cost a step.

Of the distinct items of a step a budget is encoded with gradient; the others are read as they were when they were last
encoded (He et al. 2020, arXiv 1911.05722, kept vectors of pictures so; for items of a ranker: arXiv 2511.10962). What
is encoded replaces what was kept, so an item is renewed as often as it is drawn, and all of them are at every
evaluation. How old the vectors are that training reads, and how far they are from what the encoder says now, is
measured. With a budget that holds every item of a step, nothing is read and training is exact.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmctr.data.batches import BehaviorBatch
from mmctr.distributed import gather_rows, world_size


class MemoryBank(nn.Module):
    """Keeps the time of every vector of an `ItemEmbedder`, whose vectors and mask it writes to.

    Everything is in the state dict, so that a resumed run goes on exactly. All processes hold the same vectors and
    times; what was read is counted by each for itself, and that of the main one is logged.

    Args:
        num_items: rows of the catalog, N.
        capacity: items that a process encodes a step, at most.
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
        """All vectors are of now, and none was read."""
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
        """Note what a step reads, and write what it has encoded into `table` and `has_content`, in place.

        Args:
            table, has_content: (N, C) and (N,) of the whole catalog.
            rows: (U,) catalog rows of the items of the step.
            encode: (E,) positions in `rows` of those that were encoded; None: all.
            new, has: (E, C) and (E,) what the encoder made of them.
            shown: (U,) bool, the items whose content the ranker looks at; None: all.
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
        for at, vectors, mask in self._of_all_processes(written, new.to(table.dtype), has):
            table.index_copy_(0, at, vectors)
            has_content.index_copy_(0, at, mask)
            self.made_at[at] = self.now

    def _of_all_processes(self, rows: Tensor, vectors: Tensor, has: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """What each process has encoded, in rank order: where two encoded the same item, the later one stays."""
        if world_size() == 1:
            return [(rows, vectors.detach(), has)]
        # processes differ in how many they have: the first item stands in for those that lack
        fill = torch.arange(self.capacity, device=rows.device)
        fill = torch.where(fill < len(rows), fill, 0)
        parts = [gather_rows(part[fill]).split(self.capacity) for part in (rows, vectors.detach(), has)]
        return list(zip(*parts, strict=True))

    @torch.no_grad()
    def renew(self, old: Tensor, new: Tensor, has_content: Tensor) -> dict[str, float]:
        """Start anew with vectors that are all of now; says how stale the old ones were.

        Args:
            old, new: (N, C) vectors before and now; has_content: (N,) those to look at.

        Returns `bank_age`, the mean age in steps of the vectors that training has read since the last time, and
        `bank_cosine`, the mean cosine of old and new vectors over items that were read; nothing if none was.
        """
        numbers = {}
        if len(old) == len(new):  # else it is another catalog
            seen = self.was_read.bool() & has_content
            if bool(seen.any()):
                cosine = F.cosine_similarity(old[seen].float(), new[seen].float(), dim=1).mean()
                numbers = {"bank_age": float(self.age_sum / self.num_read), "bank_cosine": float(cosine)}
        self._forget(len(new))
        return numbers


def shown_items(batch: BehaviorBatch, role: Literal["both", "target", "history"]) -> Tensor:
    """(U,) bool: the items of a batch that stand in this role, negatives being behaviours too."""
    shown = torch.full((len(batch.items),), role == "both", device=batch.target.device)
    for places in (batch.target,) if role == "target" else (batch.history, batch.negatives):
        if places is not None:
            shown[places] = True
    return shown
