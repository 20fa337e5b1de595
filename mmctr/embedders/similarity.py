"""Content similarity of behaviours and targets: cosines of stored vectors, and the histogram of cosines of SimTier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mmctr.config import Config
from mmctr.layers.jagged import row_dots, segment_ids


class SimTierConfig(Config):
    """SimTier (Sheng et al. 2024, arXiv 2407.19467): numbers of behaviours by the similarity to the target."""

    tiers: int = Field(default=20, ge=1)
    """number of equal intervals of the cosines from -1 to 1; one more tier counts the behaviours without a cosine"""
    log: bool = True
    """whether the ranker reads log(1 + count), as in the code of MUSE (arXiv 2512.07216); false: the counts, as in the
    paper"""

    @property
    def dim(self) -> int:
        """Number of tiers, the tier of behaviours without a cosine included."""
        return self.tiers + 1


def tier_of(similarity: Tensor, tiers: int) -> Tensor:
    """The tier of each cosine.

    Tier t is the interval from -1 + 2 t / tiers, included, to -1 + 2 (t + 1) / tiers, excluded; the last tier includes
    the cosine 1.

    Args:
        similarity: cosines in [-1, 1] or NaN, of any shape.
        tiers: number of intervals.

    Returns:
        int64 in the shape of `similarity`: 0 to tiers - 1, and `tiers` for NaN.
    """
    known = ~similarity.isnan()
    tier = torch.floor((torch.where(known, similarity, 0.0) + 1) * (tiers / 2)).long().clamp(0, tiers - 1)
    return torch.where(known, tier, tiers)


def tier_counts(similarity: Tensor, offsets: Tensor, config: SimTierConfig) -> Tensor:
    """The counts of behaviours by tier, which a ranker reads as part of the context.

    Args:
        similarity: (H,) cosines of behaviours and targets, NaN where an item has no content.
        offsets: (B + 1,) offsets of the histories.
        config: number of tiers, and whether the counts are logarithms.

    Returns:
        (B, config.dim).
    """
    cells = segment_ids(offsets, len(similarity)) * config.dim + tier_of(similarity, config.tiers)
    zeros = torch.zeros((len(offsets) - 1) * config.dim, device=similarity.device)
    counts = zeros.index_add(0, cells, torch.ones_like(cells, dtype=zeros.dtype)).view(-1, config.dim)
    return counts.log1p() if config.log else counts


class PairCosines:
    """Cosines of pairs of rows of one table.

    There are many pairs (every behaviour of every impression), but a small catalog has few distinct pairs: the cosines
    of all pairs of a small table are computed once and looked up. The cosines are computed again for another table, and
    after a write to the table.

    Args:
        max_kept: rows of the largest table whose cosines are stored.
    """

    MAX_KEPT = 4096
    """rows of the largest table whose cosines are stored, 64 MB"""

    def __init__(self, max_kept: int = MAX_KEPT) -> None:
        self.max_kept = max_kept
        self._table: Tensor | None = None
        self._version = 0
        self._kept: Tensor | None = None

    @torch.no_grad()
    def __call__(self, table: Tensor, rows: Tensor, i: Tensor, j: Tensor, keep: bool = True) -> Tensor:
        """The cosines of n pairs of rows, without gradient.

        Args:
            table: (N, C); a row of zeros has the cosine 0 with every row.
            rows: (U,) rows of the table.
            i: (n,) positions in `rows`.
            j: (n,) positions in `rows`.
            keep: whether to store the cosines of all pairs, because the table does not change at every call.

        Returns:
            (n,) fp32 cosines of table[rows[i]] and table[rows[j]].
        """
        with torch.inference_mode(False), torch.autocast(table.device.type, enabled=False):
            if keep and len(table) <= self.max_kept:
                return self._all(table)[rows[i], rows[j]].clamp(-1, 1)
            unit = F.normalize(table[rows].float(), dim=1)
            return row_dots(unit, i, unit, j).clamp(-1, 1)

    def _all(self, table: Tensor) -> Tensor:
        """The cosines (N, N) of all pairs of rows, from the store where the table has not changed."""
        version = 0 if table.is_inference() else table._version  # inference tensors cannot be written to
        if self._kept is None or self._table is not table or self._version != version:
            unit = F.normalize(table.float(), dim=1)
            self._table, self._version, self._kept = table, version, unit @ unit.T
        return self._kept
