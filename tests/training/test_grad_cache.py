from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from mmctr.training.grad_cache import chunked_backward
from tests.tasks.test_pretrain import OBJECTIVES, pair_batch, pretrain_task


def gradients(task, batch, size: int | None, seed=lambda number: number) -> tuple[dict, dict]:
    accelerator = Accelerator(cpu=True)
    task.zero_grad(set_to_none=True)
    if size is None:
        terms = task(batch)
        torch.stack(list(terms.values())).sum().backward()
    else:
        terms = chunked_backward(task, task, batch, size, accelerator, seed)
    found = {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}
    return {name: term.detach() for name, term in terms.items()}, found


@pytest.mark.parametrize("size", [1, 3, 8, 100])
def test_gradients_and_terms_are_those_of_the_whole_batch(size):
    values = {"objectives": OBJECTIVES, "item_vector": "concat", "matryoshka": [8], "projection": {"dim": 12}}
    task = pretrain_task(**values).train()
    batch = pair_batch(task)
    terms, whole = gradients(task, batch, None)
    chunked_terms, chunked = gradients(task, batch, size)
    assert whole.keys() == chunked.keys() and any(name.startswith("encoder.model.visual") for name in whole)
    assert any(name.startswith("objectives.") for name in whole)
    for name in terms:
        torch.testing.assert_close(chunked_terms[name], terms[name], rtol=1e-5, atol=1e-6, msg=name)
    for name in whole:
        torch.testing.assert_close(chunked[name], whole[name], rtol=1e-3, atol=1e-4, msg=name)


class Noisy(nn.Module):
    """Features with dropout and batch normalisation; the loss reads all of them against each other."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
        self.forwards = 0

    def chunks(self, batch, size):
        return batch.split(size)

    def encode_chunk(self, chunk):
        self.forwards += 1
        return {"x": self.layers(chunk)}

    def terms_of(self, features, batch):
        return {"spread": (features["x"] @ features["x"].T).square().mean()}


def test_both_passes_see_the_same_random_numbers_and_statistics_move_once():
    task, batch = Noisy().train(), torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    plain = Noisy().train()
    parts = []
    for number, chunk in enumerate(batch.split(4)):  # the same masks and chunk statistics, in one graph
        torch.manual_seed(number + 7)
        parts.append(plain.encode_chunk(chunk)["x"])
    plain.terms_of({"x": torch.cat(parts)}, batch)["spread"].backward()
    chunked_backward(task, task, batch, 4, Accelerator(cpu=True), lambda number: number + 7)
    for (name, p), q in zip(task.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    norm, other = task.layers[1], plain.layers[1]
    assert torch.equal(norm.running_mean, other.running_mean) and norm.running_mean.abs().sum() > 0
    assert norm.num_batches_tracked.item() == 2 and norm.momentum == 0.1
    assert task.forwards == 4


def test_memory_is_that_of_a_chunk():
    """The largest tensor that a chunk keeps for its backward pass does not grow with the batch."""
    largest = []
    for rows in (8, 64):
        task, kept = Noisy().train(), [0]

        def pack(tensor, kept=kept):
            kept[0] = max(kept[0], tensor.numel()) if tensor.dim() == 2 and tensor.shape[1] == 6 else kept[0]
            return tensor

        encode = task.encode_chunk

        def encoding(chunk, encode=encode, pack=pack):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                return encode(chunk)

        task.encode_chunk = encoding
        chunked_backward(task, task, torch.randn(rows, 4), 4, Accelerator(cpu=True), lambda number: number)
        largest.append(kept[0])
    assert largest == [24, 24]
