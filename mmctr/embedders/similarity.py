"""How alike the contents of behaviours and target are: cosines of kept vectors, and SimTier's histogram of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mmctr.config import Config
from mmctr.layers.jagged import row_dots, segment_ids


class SimTierConfig(Config):
    """SimTier (Sheng et al. 2024, arXiv 2407.19467): how many behaviours are how like the target."""

    tiers: int = Field(default=20, ge=1)
    """equal parts of the cosines from -1 to 1; one more counts the behaviours that cannot be compared"""
    log: bool = True
    """read log(1 + count), as the code of MUSE (arXiv 2512.07216) does, instead of the counts of the paper"""

    @property
    def dim(self) -> int:
        return self.tiers + 1


def tier_of(similarity: Tensor, tiers: int) -> Tensor:
    """Tier 0 ... tiers - 1 of each cosine, `tiers` for NaN: int64, of any shape.

    Tier t holds -1 + 2 t / tiers up to, and without, -1 + 2 (t + 1) / tiers; the last one holds 1 as well.
    """
    known = ~similarity.isnan()
    place = torch.floor((torch.where(known, similarity, 0.0) + 1) * (tiers / 2)).long().clamp(0, tiers - 1)
    return torch.where(known, place, tiers)


def tier_counts(similarity: Tensor, offsets: Tensor, config: SimTierConfig) -> Tensor:
    """(B, config.dim) what a ranker reads of (H,) cosines, NaN where there is none, jagged by (B + 1,) offsets."""
    cells = segment_ids(offsets, len(similarity)) * config.dim + tier_of(similarity, config.tiers)
    zeros = torch.zeros((len(offsets) - 1) * config.dim, device=similarity.device)
    counts = zeros.index_add(0, cells, torch.ones_like(cells, dtype=zeros.dtype)).view(-1, config.dim)
    return counts.log1p() if config.log else counts


class PairCosines:
    """Cosines of pairs of rows of one table.

    Vectors are long and pairs many (every behaviour of every impression), while a small catalog has few pairs that
    differ: for these all cosines are made once and looked up. They are made anew when the table is another one or was
    written to.
    """

    MAX_KEPT = 4096
    """rows of the largest table whose cosines are kept: 64 MB"""

    def __init__(self, max_kept: int = MAX_KEPT) -> None:
        self.max_kept = max_kept
        self._table: Tensor | None = None
        self._version = 0
        self._kept: Tensor | None = None

    @torch.no_grad()
    def __call__(self, table: Tensor, rows: Tensor, i: Tensor, j: Tensor, keep: bool = True) -> Tensor:
        """(n,) fp32 cosines of table[rows[i]] and table[rows[j]], without gradient.

        Args:
            table: (N, C); a row of zeros has the cosine 0 with everything.
            rows: (U,)
            i, j: (n,) positions in `rows`.
            keep: whether the table stays as it is for a while.
        """
        with torch.inference_mode(False), torch.autocast(table.device.type, enabled=False):
            if keep and len(table) <= self.max_kept:
                return self._all(table)[rows[i], rows[j]].clamp(-1, 1)
            unit = F.normalize(table[rows].float(), dim=1)
            return row_dots(unit, i, unit, j).clamp(-1, 1)

    def _all(self, table: Tensor) -> Tensor:
        version = 0 if table.is_inference() else table._version  # those cannot be written to
        if self._kept is None or self._table is not table or self._version != version:
            unit = F.normalize(table.float(), dim=1)
            self._table, self._version, self._kept = table, version, unit @ unit.T
        return self._kept
