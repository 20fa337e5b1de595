"""ID tables that are drawn anew each epoch, or train in some epochs alone: against a loop of one's own, and resumed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from mmctr.data.hashing import stream_seed
from mmctr.data.loaders import BatchPlan, TrainBatches
from mmctr.run_folder import RunFolder
from mmctr.training.context import RunContext
from mmctr.training.fit import FitConfig, fit
from mmctr.training.optimizers import OptimizerConfig, ParameterGroupConfig, make_optimizer, optimizer_tensors
from mmctr.training.part_schedule import PartSchedule
from tests.helpers.serving import make_task, make_world
from tests.helpers.training import Numbers
from tests.training.test_optimizers import ROWS, D, Tables, batches

STEPS, EPOCHS = 4, 3
RISING = itertools.count()


class Drawn(Tables):
    """`Tables` that learns fixed batches, one for each step of an epoch."""

    def __init__(self, stop_at: int | None = None):
        super().__init__()
        self.stop_at, self.calls = stop_at, 0
        self.data = batches(STEPS)

    def forward(self, batch) -> dict:
        self.calls += 1
        if self.calls == self.stop_at:
            raise InterruptedError
        ids, y = self.data[int(batch.rows[0]) % STEPS]
        return {"loss": (super().forward(ids) - y).square().mean()}

    def after_step(self) -> None:
        pass


def config_of(rows_from: int, **group) -> dict:
    return {"lr": 0.05, "weight_decay": 0.1, "rows_from": rows_from, "groups": {"id": group}}


def run(task: Drawn, folder: Path, optimizer: dict, after: Callable[[], object] = lambda: None, seed: int = 5) -> Drawn:
    """`after` is called after each step."""
    task.after_step = after
    config = {"epochs": EPOCHS, "batch_size": 1, "warmup": 0, "decay": "constant", "checkpoint_every": 1}
    fit(
        task,
        TrainBatches(BatchPlan(STEPS, 1, 0), lambda rows, step: Numbers(rows)),
        FitConfig.parse(config | {"max_grad_norm": None, "optimizer": optimizer}),
        RunContext(RunFolder(folder), Accelerator(cpu=True), seed, "a"),
        evaluate=lambda: {"better": float(next(RISING))},  # the last weights are the best
        primary="better",
    )
    return task


def test_redrawn_tables_equal_a_loop_with_new_tables_and_a_new_optimiser(tmp_path):
    task = run(Drawn(), tmp_path, config_of(10**6, redraw=True))
    plain = Tables()
    rest = torch.optim.AdamW([{"params": plain.layer.weight}, {"params": plain.layer.bias, "weight_decay": 0}], lr=0.05)
    for group in rest.param_groups:
        group["weight_decay"] = 0.1 if group["params"][0].ndim > 1 else 0.0
    plan, data = BatchPlan(STEPS, 1, 0), batches(STEPS)
    for epoch in range(EPOCHS):
        tables = [plain.one.weight, plain.two.weight]
        if epoch:
            with torch.no_grad():
                for number, table in enumerate(tables):
                    drawn = torch.Generator().manual_seed(stream_seed(5, "redrawn table", epoch, number))
                    table.copy_(torch.randn(ROWS, D, generator=drawn) * 0.5)
                    table[0] = 0
        of_tables = torch.optim.AdamW(tables, lr=0.05, weight_decay=0.1)
        for row in plan.order(epoch):
            ids, y = data[row]
            (plain(ids) - y).square().mean().backward()
            for optimizer in (rest, of_tables):
                optimizer.step()
                optimizer.zero_grad()
    for (name, found), expected in zip(task.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=name)
    kept = run(Drawn(), tmp_path / "kept", config_of(10**6))
    assert not torch.allclose(kept.one.weight, task.one.weight)


@pytest.mark.parametrize("rows_from", [0, 10**6], ids=["rows", "dense"])
@pytest.mark.parametrize("group", [{"redraw": True}, {"to_epoch": 1}, {"from_epoch": 1.5}], ids=str)
@pytest.mark.parametrize("stop_at", [STEPS, STEPS + 1, STEPS + 2, 2 * STEPS + 1])
def test_a_resumed_run_ends_where_it_would_have_ended(tmp_path, rows_from, group, stop_at):
    """Also when it stopped on either side of the moment at which tables are drawn anew, or stop."""
    optimizer = config_of(rows_from, **group)
    whole = run(Drawn(), tmp_path / "whole", optimizer)
    with pytest.raises(InterruptedError):
        run(Drawn(stop_at), tmp_path / "half", optimizer)
    again = run(Drawn(), tmp_path / "half", optimizer)
    assert again.calls == whole.calls - stop_at + 1
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_what_is_drawn_follows_seed_and_epoch_alone(tmp_path):
    def after_epochs(folder: str, seed: int, rows_from: int) -> list[torch.Tensor]:
        """The tables right after they were drawn."""
        task, seen = Drawn(), []
        optimizer = make_optimizer(task, OptimizerConfig.parse(config_of(rows_from, redraw=True)))
        schedule = PartSchedule(task, optimizer, OptimizerConfig.parse(config_of(0, redraw=True)), STEPS, seed)
        for step in range(2 * STEPS + 1):
            before = task.one.weight.clone()
            schedule.before_step(step)
            moved = not torch.equal(before, task.one.weight)
            assert moved == (step in (STEPS, 2 * STEPS))
            if moved:
                seen += [task.one.weight.clone(), task.two.weight.clone()]
        return seen

    one, two = after_epochs("a", 0, 0), after_epochs("b", 0, 10**6)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True)) and len(one) == 4
    everything = [*one, *after_epochs("c", 1, 0)]
    assert len({tuple(table.flatten().tolist()) for table in everything}) == 8
    assert all(table[0].eq(0).all() and 0.3 < table[1:].std() < 0.7 for table in everything)


@pytest.mark.parametrize("rows_from", [0, 10**6], ids=["rows", "dense"])
def test_a_part_trains_in_its_epochs_alone(tmp_path, rows_from):
    def trained(folder: str, **group) -> list[list[bool]]:
        task, moved = Drawn(), []
        before = [p.detach().clone() for p in task.parameters()]

        def after() -> None:
            nonlocal before
            moved.append([not torch.equal(p, old) for p, old in zip(task.parameters(), before, strict=True)])
            before = [p.detach().clone() for p in task.parameters()]

        run(task, tmp_path / folder, config_of(rows_from, **group), after)
        assert all(one == two for one, two, *_ in moved)  # both tables
        assert all(all(layer) for _, _, *layer in moved)  # the rest always
        return [tables for tables, *_ in moved]

    assert trained("first", to_epoch=1) == [True] * 4 + [False] * 8
    assert trained("half", to_epoch=1.5) == [True] * 6 + [False] * 6
    assert trained("last", from_epoch=2) == [False] * 8 + [True] * 4
    assert trained("middle", from_epoch=0.5, to_epoch=1) == [False] * 2 + [True] * 2 + [False] * 8
    assert trained("always") == [True] * 12


def test_moments_of_a_held_part_stay(tmp_path):
    task = Drawn()
    config = OptimizerConfig.parse(config_of(10**6, to_epoch=1))
    optimizer = make_optimizer(task, config)
    schedule = PartSchedule(task, optimizer, config, STEPS, 0)
    assert schedule and not PartSchedule(task, optimizer, OptimizerConfig(), STEPS, 0)
    seen = []
    for step in range(STEPS + 2):
        ids, y = task.data[step % STEPS]
        (Tables.forward(task, ids) - y).square().mean().backward()
        schedule.drop_gradients(step)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(optimizer_tensors(optimizer))
    last, first = seen[-1], seen[STEPS - 1]
    assert all(torch.equal(last[f"{i}.exp_avg"], first[f"{i}.exp_avg"]) for i in (0, 1))
    assert not torch.equal(last["2.exp_avg"], first["2.exp_avg"])


def test_what_cannot_be_is_refused(tmp_path):
    for group, message in (
        ({"from_epoch": 2, "to_epoch": 1}, "to_epoch 1.0 is not after from_epoch 2.0"),
        ({"to_epoch": 1, "redraw": True}, "keep one"),
    ):
        with pytest.raises(ValueError, match=message):
            ParameterGroupConfig.parse(group)
    layers = {"groups": {"ranker": {"redraw": True}}}
    with pytest.raises(ValueError, match=r"groups\.ranker\.redraw: only ID tables .* has other parameters"):
        run(Drawn(), tmp_path, layers)
    task = Drawn()
    task.parameter_parts = lambda: {"id": [], "ranker": list(task.parameters())}
    with pytest.raises(ValueError, match=r"groups\.id\.redraw: only ID tables .* has none"):
        run(task, tmp_path, config_of(0, redraw=True))


def test_the_tables_of_a_ranker_that_are_drawn_anew_are_of_items_and_users(tmp_path):
    """Not those of side features, nor the table of content."""
    task = make_task(make_world(tmp_path / "data"), {"name": "din", "attention": [4], "mlp": [5]})
    config = OptimizerConfig.parse({"groups": {"id": {"redraw": True}}})
    before = {name: value.clone() for name, value in task.state_dict().items()}
    PartSchedule(task, make_optimizer(task, config), config, STEPS, 0).before_step(STEPS)
    moved = {name for name, value in task.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"embedder.ids.weight", "users.weight"}
