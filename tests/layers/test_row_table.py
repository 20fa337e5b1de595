from __future__ import annotations

import torch

from mmctr.layers.row_table import RowTable

ROWS, D = 12, 3


def test_evaluation_reads_the_table_itself():
    table = RowTable(ROWS, D, 0.5)
    table.train_by_rows()
    with torch.no_grad():
        assert table.pick(torch.tensor([3, 3]))[0] is table.weight and not table._picked
    weight, positions = table.pick(torch.tensor([[5, 2], [5, 5]]))
    assert weight.shape == (2, D) and positions.tolist() == [[1, 0], [1, 1]]
    assert table(torch.tensor([4])).shape == (1, D) and len(table._picked) == 2
