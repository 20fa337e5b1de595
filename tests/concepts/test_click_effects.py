"""Targets with other content vectors: `moved_targets` against the same change made in the table itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mmctr.concepts.click_effects import moved_targets
from tests.embedders.test_similarity import SATA, batch_of, explicit
from tests.helpers.serving import make_task, make_world
from tests.tasks.test_expert import DIN, TABLE, expert_of, student_values, task_of
from tests.tasks.test_ranking import CONTENTS, ranking_task, world  # noqa: F401  (a fixture)


def test_moved_targets_leave_histories(world):  # noqa: F811
    """As with another content vector of the target alone, one impression at a time."""
    _, splits, _, data, _, _ = world
    task = ranking_task(world, CONTENTS["table"]).eval()
    collator = data.collator(splits.test)
    shift = torch.linspace(-0.5, 0.5, task.embedder.content_table.shape[1])
    batch = collator(np.arange(40))
    with torch.no_grad():
        plain = task.logits(batch)[0]
        with moved_targets(task, batch, shift) as changed:
            moved = task.logits(changed)[0]
        with moved_targets(task, batch, 0 * shift) as changed:
            torch.testing.assert_close(task.logits(changed)[0], plain)
        assert (moved - plain).abs().max() > 1e-3 and torch.equal(task.logits(batch)[0], plain)
        checked = 0
        for row in range(40):
            one = collator(np.array([row]))
            target = one.items.row[one.target]
            if (one.history == one.target).any():
                continue  # its history would move too
            kept = task.embedder.content_table.clone()
            task.embedder.content_table[target] += shift
            torch.testing.assert_close(task.logits(one)[0], moved[row : row + 1], rtol=1e-4, atol=1e-5)
            task.embedder.content_table = kept
            checked += 1
    assert checked > 20


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("moved") / "data")


def test_moved_targets_are_compared_with_histories_as_moved(shop):
    task = make_task(shop, SATA)
    batch, change = batch_of(shop, task), torch.linspace(-1, 1, 6)
    expected = torch.tensor(explicit(shop, batch, change))
    with moved_targets(task, batch, change) as moved:
        torch.testing.assert_close(task.embedder.similarity(moved), expected, equal_nan=True)
    torch.testing.assert_close(
        task.embedder.similarity(batch), torch.tensor(explicit(shop, batch)), equal_nan=True
    )  # the table is as before


def test_a_change_reaches_an_expert_on_the_same_content_alone(shop):
    """Another table has dimensions of its own, of which the change says nothing."""
    change, reached = torch.linspace(-1, 1, shop.content[0].shape[1]), []
    for vectors in (shop.content[0], torch.randn(len(shop.content[0]), 11)):
        other = replace(shop, content=(vectors, shop.content[1]))
        task = task_of(shop, expert_of(other), **student_values(DIN, TABLE | {"dim": 5}))
        batch, expert_logits = batch_of(shop, task), []
        task.expert.register_forward_hook(lambda module, given, output, to=expert_logits: to.append(output[2]))
        with torch.no_grad():
            plain = task.logits(batch)[0]
            with moved_targets(task, batch, change) as moved:
                assert not torch.allclose(task.logits(moved)[0], plain)
        reached.append(not torch.allclose(*expert_logits))
    assert reached == [True, False]
