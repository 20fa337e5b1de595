"""Groups of AdamW, and tables trained by the rows of a batch: equal to torch's optimisers where those can do it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mmctr.layers.row_table import RowTable
from mmctr.training.optimizers import (
    OptimizerConfig,
    ParameterGroupConfig,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    proximal_weights,
)
from tests.helpers.training import Slope

ROWS, D = 12, 3


def test_groups_by_part():
    config = OptimizerConfig(
        lr=0.1, weight_decay=0.2, groups={"second": ParameterGroupConfig(lr=0.3, weight_decay=0.9)}
    )
    task = Slope()
    groups = make_optimizer(task, config).param_groups
    found = {id(group["params"][0]): (group["lr"], group["base_lr"], group["weight_decay"]) for group in groups}
    # vectors are never decayed
    assert found == {id(task.weight): (0.1, 0.1, 0.2), id(task.bias): (0.3, 0.3, 0.0)}
    zero = make_optimizer(task, OptimizerConfig(groups={"first": ParameterGroupConfig(lr=0.0, weight_decay=0.0)}))
    assert zero.param_groups[0]["lr"] == 0.0
    task.weight.requires_grad_(False)
    assert len(make_optimizer(task, config).param_groups) == 1
    with pytest.raises(ValueError, match=r"no part 'frist'; this task has first, second"):
        make_optimizer(task, OptimizerConfig(groups={"frist": ParameterGroupConfig()}))


def test_optimizer_tensors_round_trip():
    def trained(steps, state=None):
        torch.manual_seed(0)
        task = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(task.parameters(), lr=0.1)
        if state:
            task.load_state_dict(state[0])
            load_optimizer_tensors(optimizer, state[1])
        for x in steps:
            task(torch.tensor(x)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return task, optimizer

    steps = np.random.default_rng(0).normal(size=(6, 4, 3)).astype(np.float32)
    whole, _ = trained(steps)
    half, optimizer = trained(steps[:3])
    tensors = optimizer_tensors(optimizer)
    assert sorted(tensors) == sorted(f"{i}.{n}" for i in (0, 1) for n in ("step", "exp_avg", "exp_avg_sq"))
    rest, _ = trained(steps[3:], (half.state_dict(), tensors))
    assert torch.equal(rest.weight, whole.weight) and torch.equal(rest.bias, whole.bias)
    forgotten, _ = trained(steps[3:], (half.state_dict(), {}))
    assert not torch.equal(forgotten.weight, whole.weight)


class Scaled(nn.Module):
    """A part of a task that trains some of its parameters more slowly."""

    def __init__(self, scales: list[float]):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in scales)
        self.scales = scales

    def lr_scales(self):
        pairs = zip(self.layers, self.scales, strict=True)
        return {p: scale for layer, scale in pairs for p in layer.parameters() if scale != 1}

    def parameter_parts(self):
        return {"layers": list(self.parameters())}


def test_groups_by_scale_of_the_learning_rate():
    """The whole rate first, the order of parameters within a group kept; frozen ones are in none."""
    task = nn.ModuleDict({"inner": Scaled([0.25, 1, 0.5, 0.25])})
    task.parameter_parts = task["inner"].parameter_parts
    layers = task["inner"].layers
    layers[2].weight.requires_grad_(False)
    config = OptimizerConfig(lr=0.1, weight_decay=0.2, groups={"layers": ParameterGroupConfig(lr=0.4)})
    groups = make_optimizer(task, config).param_groups
    found = [(group["params"], group["base_lr"], group["lr"], group["weight_decay"]) for group in groups]
    assert found == [
        ([layers[1].weight], 0.4, 0.4, 0.2),
        ([layers[1].bias], 0.4, 0.4, 0.0),
        ([layers[2].bias], 0.2, 0.2, 0.0),
        ([layers[0].weight, layers[3].weight], 0.1, 0.1, 0.2),
        ([layers[0].bias, layers[3].bias], 0.1, 0.1, 0.0),
    ]


def test_the_state_of_an_optimiser_keeps_the_layout_of_its_parameters(tmp_path):
    """Fused AdamW reads memory in order: a state in another layout would go to other weights."""

    def trained(steps, state=None):
        torch.manual_seed(0)
        task = nn.Conv2d(3, 4, 3, bias=False).to(memory_format=torch.channels_last)
        task.parameter_parts = lambda: {"all": list(task.parameters())}
        optimizer = make_optimizer(task, OptimizerConfig(lr=0.1))
        if state:
            task.load_state_dict(state[0])
            save_file(state[1], tmp_path / "optimizer")
            load_optimizer_tensors(optimizer, load_file(tmp_path / "optimizer"))
        for x in steps:
            task(x.contiguous(memory_format=torch.channels_last)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return task.state_dict(), optimizer_tensors(optimizer)

    steps = torch.randn(6, 2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    whole, _ = trained(steps)
    rest, _ = trained(steps[3:], trained(steps[:3]))
    assert torch.equal(rest["weight"], whole["weight"])


class Tables(nn.Module):
    """Two tables and a layer over their sum; one of them is looked up twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.layer = RowTable(ROWS, D, 0.5), RowTable(ROWS, D, 0.5), nn.Linear(D, 1)

    def forward(self, ids):
        return self.layer(self.one(ids[:, 0]) + self.one(ids[:, 1]) * self.two(ids[:, 1]).tanh()).squeeze(1)

    def parameter_parts(self):
        return {"id": [self.one.weight, self.two.weight], "ranker": list(self.layer.parameters())}


def batches(count: int, highest: int = ROWS) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randint(highest, (7, 2), generator=g), torch.randn(7, generator=g)) for _ in range(count)]


def train(task: Tables, optimizers: list, steps) -> None:
    for ids, y in steps:
        (task(ids) - y).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_row_adam_is_the_sparse_adam_of_torch():
    """Up to eps, which Adam adds to the corrected root of the second moment and SparseAdam to the raw one."""
    ours = Tables()
    optimizer = make_optimizer(ours, OptimizerConfig(lr=0.05, rows_from=0))
    for group in optimizer.param_groups:
        group["eps"] = 1e-15
    train(ours, [optimizer], batches(20))

    class Sparse(Tables):
        def forward(self, ids):
            one, two = (lambda i, t=t: nn.functional.embedding(i, t.weight, sparse=True) for t in (self.one, self.two))
            return self.layer(one(ids[:, 0]) + one(ids[:, 1]) * two(ids[:, 1]).tanh()).squeeze(1)

    theirs = Sparse()
    sparse = torch.optim.SparseAdam([theirs.one.weight, theirs.two.weight], lr=0.05, eps=1e-15)
    train(
        theirs, [sparse, torch.optim.AdamW(theirs.layer.parameters(), lr=0.05, eps=1e-15, weight_decay=0)], batches(20)
    )
    for got, expected in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_rows_that_are_in_every_batch_are_trained_as_by_dense_adamw():
    """With all rows in each batch there is nothing lazy about it, decay included."""
    results = []
    every = torch.stack([torch.arange(ROWS), torch.arange(ROWS).flip(0)], 1)
    for rows_from in (0, ROWS + 1):
        task = Tables()
        optimizer = make_optimizer(task, OptimizerConfig(lr=0.05, weight_decay=0.1, rows_from=rows_from))
        train(
            task,
            [optimizer],
            [(every, torch.randn(ROWS, generator=torch.Generator().manual_seed(s))) for s in range(9)],
        )
        results.append(task.state_dict().values())
        assert task.one.by_rows == (rows_from == 0)
    for by_rows, dense in zip(*results, strict=True):
        torch.testing.assert_close(by_rows, dense, rtol=1e-4, atol=1e-5)


def test_row_adagrad_by_hand():
    table = RowTable(ROWS, D, 0.5)
    task = nn.ModuleDict({"one": table})
    task.parameter_parts = lambda: {"id": [table.weight]}
    optimizer = make_optimizer(task, OptimizerConfig(lr=0.1, rows="adagrad", rows_from=0))
    expected, total = table.weight.detach().clone(), torch.zeros(ROWS)
    factor = torch.tensor([1.0, -2.0, 3.0])
    for ids in (torch.tensor([1, 1, 4]), torch.tensor([4, 5, 5])):
        (table(ids) * factor).sum().backward()
        optimizer.step()
        for row, times in zip(*ids.unique(return_counts=True), strict=True):
            grad = factor * times
            total[row] += grad.square().mean()
            expected[row] -= 0.1 * grad / total[row].sqrt()
    torch.testing.assert_close(table.weight.detach(), expected)


@pytest.mark.parametrize(
    ("l1", "l21", "l2"), [(0, 0, 0), (0.7, 0, 0), (0, 0.7, 0), (0.4, 0.5, 0.3), (5, 0, 0), (0.1, 9, 0)]
)
def test_the_proximal_step_against_a_brute_force_minimiser(l1, l21, l2):
    g = torch.Generator().manual_seed(0)
    z, scale = (
        torch.randn(6, 2, generator=g, dtype=torch.float64),
        torch.rand(6, generator=g, dtype=torch.float64) + 0.5,
    )
    found = proximal_weights(z, scale, l1, l21, l2)
    axis = torch.arange(-800, 801, dtype=torch.float64) / 200  # holds 0
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)

    def objective(w, z, scale):
        penalty = l1 * w.abs().sum(1) + l21 * w.norm(dim=1) + l2 * w.square().sum(1) / 2
        return w @ z + scale * w.square().sum(1) / 2 + penalty

    for row in range(6):
        best = grid[objective(grid, z[row], scale[row]).argmin()]
        torch.testing.assert_close(found[row], best, rtol=0, atol=0.006)
        assert ((found[row] == 0) == (best == 0)).all()
        assert objective(found[row : row + 1], z[row], scale[row]) <= objective(best[None], z[row], scale[row]) + 1e-12


def test_ftrl_is_that_of_its_paper():
    """McMahan et al. 2013, algorithm 1, for single weights, with beta = 0."""
    table = RowTable(ROWS, 1, 0.0)
    task = nn.ModuleDict({"one": table})
    task.parameter_parts = lambda: {"id": [table.weight]}
    lr, l1, l2 = 0.3, 0.4, 0.2
    optimizer = make_optimizer(task, OptimizerConfig(lr=lr, rows="ftrl", rows_from=0, l1=l1, l2=l2))
    w, z, n = (np.zeros(ROWS) for _ in range(3))
    rng = np.random.default_rng(0)
    for _ in range(30):
        ids, factor = rng.integers(0, ROWS, 4), rng.normal(size=4).astype(np.float32)
        (table(torch.from_numpy(ids)).squeeze(1) * torch.from_numpy(factor)).sum().backward()
        optimizer.step()
        for i in np.unique(ids):
            g = factor[ids == i].sum(dtype=np.float64)
            sigma = (np.sqrt(n[i] + g * g) - np.sqrt(n[i])) / lr
            z[i] += g - sigma * w[i]
            n[i] += g * g
            w[i] = 0 if abs(z[i]) <= l1 else -(z[i] - np.sign(z[i]) * l1) / (np.sqrt(n[i]) / lr + l2)
    np.testing.assert_allclose(table.weight.detach().numpy()[:, 0], w, rtol=1e-4, atol=1e-5)
    assert 0 < (w == 0).sum() < ROWS


def test_penalties_belong_to_ftrl():
    with pytest.raises(ValueError, match="l1, l21 and l2 belong to rows: ftrl"):
        OptimizerConfig(l21=0.1)
    with pytest.raises(ValueError, match="set rows_from: 0"):
        OptimizerConfig(rows="ftrl")


@pytest.mark.parametrize("rows", ["adam", "adagrad", "ftrl"])
def test_only_rows_of_the_batch_are_touched(rows):
    task = Tables()
    optimizer = make_optimizer(task, OptimizerConfig(lr=0.05, weight_decay=0.5, rows=rows, rows_from=0))
    before = task.one.weight.clone()
    train(task, [optimizer], batches(5, highest=6))
    assert torch.equal(task.one.weight[6:], before[6:]) and not (task.one.weight[:6] == before[:6]).any()
    for name, state in optimizer.state[task.one.weight].items():
        assert name == "step" or not state[6:].any()


def test_gradients_of_rows_are_clipped_together():
    results = []
    for norm in (None, 1e-3):
        task = Tables()
        optimizer = make_optimizer(task, OptimizerConfig(lr=0.05, rows="adagrad", rows_from=0), norm)
        train(task, [optimizer], batches(1))
        results.append(
            {
                weight: optimizer.state[weight]["sum"].sum().item() * D
                for weight in task.parameters()
                if weight.shape[0] == ROWS
            }
        )
    free, clipped = (sum(values.values()) for values in results)
    assert free > 1e-3 and clipped == pytest.approx(1e-6, rel=1e-2)  # accumulators hold mean squares of the gradient


@pytest.mark.parametrize("rows", ["adam", "adagrad", "ftrl"])
def test_state_of_rows_goes_through_a_checkpoint(rows):
    def trained(steps, state=None):
        task = Tables()
        optimizer = make_optimizer(task, OptimizerConfig(lr=0.05, rows=rows, rows_from=0))
        if state:
            task.load_state_dict(state[0])
            load_optimizer_tensors(optimizer, state[1])
        train(task, [optimizer], steps)
        return task.state_dict(), optimizer_tensors(optimizer)

    whole, tensors = trained(batches(6))
    half = trained(batches(6)[:3])
    rest, again = trained(batches(6)[3:], half)
    assert all(torch.equal(rest[name], whole[name]) for name in whole)
    assert tensors.keys() == again.keys() and all(torch.equal(tensors[name], again[name]) for name in tensors)
