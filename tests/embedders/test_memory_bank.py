"""The memory bank against dictionaries, and joint training with a budget against joint training without one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmctr.data.content import ItemContent
from mmctr.embedders.item_embedder import ContentEncoder
from mmctr.embedders.memory_bank import MemoryBank
from mmctr.encoders.augment import AugmentConfig
from mmctr.features.ranking_data import RankingData
from tests.tasks.test_ranking import ranking_task, world  # noqa: F401  (a fixture)

N, C = 12, 3


def test_what_is_read_and_written_is_what_dictionaries_say():
    rng = np.random.default_rng(0)
    bank, table, has = MemoryBank(N, 4), torch.randn(N, C), torch.rand(N) < 0.7
    vectors, made_at, masks = dict(enumerate(table.tolist())), dict.fromkeys(range(N), 0), dict(enumerate(has.tolist()))
    ages, was_read, first = [], set(), table.clone()
    for now in range(20):
        rows = rng.permutation(N)[: rng.integers(4, N)]
        encoded = np.sort(rng.permutation(len(rows))[: rng.integers(1, 5)])
        new, new_has = torch.randn(len(encoded), C), torch.rand(len(encoded)) < 0.5
        bank.step(table, has, torch.from_numpy(rows), torch.from_numpy(encoded), new, new_has)
        for place, row in enumerate(rows):
            if place not in encoded:
                ages.append(now - made_at[row])
                was_read.add(int(row))
        for place, vector, mask in zip(encoded, new.tolist(), new_has.tolist(), strict=True):
            vectors[rows[place]], made_at[rows[place]], masks[rows[place]] = vector, now + 1, mask
        torch.testing.assert_close(table, torch.tensor([vectors[i] for i in range(N)]))
        assert has.tolist() == [masks[i] for i in range(N)]
    renewed, everywhere = torch.randn(N, C), torch.arange(N) != 5
    numbers = bank.renew(table, renewed, everywhere)
    assert numbers["bank_age"] == pytest.approx(np.mean(ages)) and np.mean(ages) > 2
    looked_at = sorted(was_read - {5})
    expected = F.cosine_similarity(table[looked_at], renewed[looked_at]).mean().item()
    assert numbers["bank_cosine"] == pytest.approx(expected, abs=1e-6)
    assert not torch.equal(table, first)
    assert bank.renew(renewed, renewed, everywhere) == {}  # nothing was read since
    bank.step(renewed, has, torch.tensor([0, 1]), torch.tensor([0]), torch.zeros(1, C), torch.ones(1, dtype=torch.bool))
    # vectors that are as old as the last renewal have the age 0
    assert bank.renew(renewed, renewed, everywhere) == {"bank_age": 0.0, "bank_cosine": pytest.approx(1.0)}
    assert bank.renew(renewed, torch.zeros(2, C), torch.ones(2, dtype=torch.bool)) == {}  # another catalog
    assert len(bank.made_at) == 2


def trained(world, max_encoded: int | None, steps: int = 4) -> dict[str, torch.Tensor]:  # noqa: F811
    _, splits, _, data, content, _ = world
    assert isinstance(data, RankingData) and isinstance(content, ItemContent)
    task = ranking_task(world, ContentEncoder(run="x", max_encoded=max_encoded, dim=6, hidden=[5])).train()
    collator = data.collator(splits.train, content=content, max_encoded=max_encoded)
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.5)
    for step in range(steps):
        batch = collator(np.arange(32 * step, 32 * step + 32), step)
        assert max_encoded is None or max_encoded > N * 10 or len(batch.items.image) == max_encoded
        task(batch)["log_loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.clone() for name, value in task.state_dict().items()}


def test_an_endless_budget_is_exact_joint_training(world):  # noqa: F811
    """Bit for bit, in all weights of encoder, adapter, ID table and ranker; a small budget is something else."""
    exact, endless, small = (trained(world, budget) for budget in (None, 10**6, 6))
    names = [name for name, value in exact.items() if value.is_floating_point() and "content_table" not in name]
    assert any(name.startswith("embedder.encoder.") for name in names) and len(names) > 20
    assert all(torch.equal(exact[name], endless[name]) for name in names)
    assert not all(torch.equal(exact[name], small[name]) for name in names)
    assert endless["embedder.bank.num_read"] == 0 and small["embedder.bank.num_read"] > 50
    start = ranking_task(world, ContentEncoder(run="x", max_encoded=6, dim=6, hidden=[5])).embedder.content_table
    # rows of the bank move when they are encoded, and only then
    moved = (small["embedder.content_table"] != start).any(1)
    assert moved.equal(small["embedder.bank.made_at"] > 0) and 6 <= moved.sum() <= 24


@pytest.mark.parametrize("role", ["target", "history"])
def test_what_is_hidden_is_not_read(world, role):  # noqa: F811
    """With content in targets alone, the vectors of behaviours are nothing that training reads; and the reverse."""
    _, splits, _, data, content, _ = world
    task = ranking_task(world, ContentEncoder(run="x", max_encoded=4, shown_in=role, dim=6, hidden=[5])).train()
    collator = data.collator(splits.train, content=content, encode_history=role == "history", max_encoded=4)
    read, expected = 0, set()
    for step in range(4):
        batch = collator(np.arange(32 * step, 32 * step + 32), step)
        task(batch)
        places = (batch.target if role == "target" else batch.history).unique()
        left = places[~torch.isin(places, batch.items.encode)]
        read, expected = read + len(left), expected | set(batch.items.row[left].tolist())
    bank = task.embedder.bank
    assert 20 < read == bank.num_read and set(bank.was_read.nonzero()[:, 0].tolist()) == expected


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_an_encoder_in_evaluation_mode_sees_in_training_what_the_bank_holds(world, mode):  # noqa: F811
    """Pictures are augmented in mode `train` alone; the encoder learns in both."""
    _, splits, _, data, content, _ = world
    task = ranking_task(world, ContentEncoder(run="x", max_encoded=16, mode=mode, dim=6, hidden=[5]))
    task.embedder.encoder.encoder.augment = AugmentConfig(crop=0.5, flip=0.5, brightness=0.4)
    before = task.embedder.content_table.clone()
    batch = data.collator(splits.train, content=content, max_encoded=16)(np.arange(64), 0)
    task.eval().train()
    task(batch)["log_loss"].backward()
    assert any(weight.grad is not None and weight.grad.any() for weight in task.embedder.encoder.parameters())
    written = batch.items.row[batch.items.encode]
    assert len(written) == 16 and task.embedder.bank.made_at[written].eq(1).all()
    same = torch.isclose(task.embedder.content_table[written], before[written], atol=1e-5).all(1)
    assert same.all() if mode == "eval" else not same.any()
