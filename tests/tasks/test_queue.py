from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.tasks.test_pretrain import pair_batch, pretrain_task


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_bank_adds_the_items_of_earlier_steps_as_candidates(momentum):
    """Step 2 with a queue: the loss of its rows against its own columns and those of step 1."""
    task = pretrain_task(objectives={"clip": {}}, queue={"size": 8, "momentum": momentum}).train()
    task.start_training(num_keys=2, num_items=8)
    first, second = pair_batch(task), pair_batch(task, first=20)
    alone = pretrain_task().train()
    torch.testing.assert_close(task(first), alone(first))  # nothing is kept yet
    with torch.no_grad():
        kept = task.encode(first.items)
    task.after_step()
    with torch.no_grad():  # the encoder moves on
        for p in task.encoder.parameters():
            p.add_(0.01)
    image, text = task.image_features(second.items), task.text_features(second.items)
    now = task(second)["clip"]
    has = second.items.has_image & second.items.has_text
    rows = [row for row in second.anchor.tolist() if has[row]]
    terms = []
    past_image, past_text = (F.normalize(x.float(), dim=1) for x in (kept.image, kept.text))
    past = first.anchor.tolist()
    for a, b, old, mask in (
        (image, text, past_text, first.items.has_text),
        (text, image, past_image, first.items.has_image),
    ):
        columns = torch.cat([b[rows], old[[row for row in past if mask[row]]]])
        logits = (1 / 0.07) * a[rows] @ columns.T
        terms.append(F.cross_entropy(logits, torch.arange(len(rows))))
    torch.testing.assert_close(now, (terms[0] + terms[1]) / 2)
    task.after_step()
    assert task.queue.place.item() == 0 and sorted(task.queue.keys[:, 0].tolist()) == [0, 2, 4, 6, 20, 22, 24, 26]


def test_the_second_encoder_of_a_bank_follows_the_first_one():
    task = pretrain_task(queue={"size": 4, "momentum": 0.75}).train()
    task.start_training(num_keys=1, num_items=8)
    slow, fast = task.queue.momentum_towers["encoder"].model.visual.conv1.weight, task.encoder.model.visual.conv1.weight
    before = slow.clone()
    with torch.no_grad():
        fast.add_(1.0)
    task.after_step()
    torch.testing.assert_close(slow, before + 0.25)
    assert not any(p.requires_grad for p in task.queue.parameters())
    assert {id(p) for p in task.queue.parameters()}.isdisjoint(
        id(p) for part in task.parameter_parts().values() for p in part
    )
