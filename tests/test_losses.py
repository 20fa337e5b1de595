from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmctr.losses import clip_loss, gather_rows, siglip_loss


def features(n: int, dim: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pair = (F.normalize(torch.randn(n, dim, generator=generator, dtype=torch.float64), dim=1) for _ in range(2))
    return tuple(x.float() for x in pair)  # type: ignore[return-value]


def simple_clip(image, text, scale, ids):
    n, terms = len(ids), []
    for a, b in ((image, text), (text, image)):
        for i in range(n):
            others = [scale * a[i] @ b[j] for j in range(n) if j == i or ids[j] != ids[i]]
            terms.append(torch.logsumexp(torch.stack(others), 0) - scale * a[i] @ b[i])
    return torch.stack(terms).mean()


def simple_siglip(image, text, scale, bias, ids):
    n, total = len(ids), 0
    for i in range(n):
        for j in range(n):
            if i == j or ids[i] != ids[j]:
                z = 1 if i == j else -1
                total = total + torch.log1p(torch.exp(-z * (scale * image[i] @ text[j] + bias)))
    return total / n


IDS = {"distinct": [3, 1, 4, 15, 9, 2], "copies": [3, 1, 3, 3, 9, 1]}


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_values_and_gradients_equal_the_formula(name, ids):
    results = []
    for simple in (False, True):
        image, text = (x.clone().requires_grad_() for x in features(6))
        scale, bias = torch.tensor(4.0, requires_grad=True), torch.tensor(-1.5, requires_grad=True)
        if name == "clip":
            loss = (simple_clip if simple else clip_loss)(image, text, scale, torch.tensor(ids))
        else:
            loss = (simple_siglip if simple else siglip_loss)(image, text, scale, bias, torch.tensor(ids))
        loss.backward()
        results.append([loss, image.grad, text.grad, scale.grad, bias.grad if name == "siglip" else torch.zeros(())])
    for fast, simple_one in zip(*results, strict=True):
        torch.testing.assert_close(fast, simple_one, rtol=1e-5, atol=1e-6)
    assert results[0][3].abs() > 1e-4


def test_without_ids_every_other_row_is_a_negative():
    image, text = features(6)
    scale, bias = torch.tensor(4.0), torch.tensor(-1.5)
    rows = torch.arange(6)
    assert clip_loss(image, text, scale) == clip_loss(image, text, scale, rows)
    assert siglip_loss(image, text, scale, bias) == siglip_loss(image, text, scale, bias, rows)


def test_by_hand():
    """Two orthogonal pairs, s = 1: -log(e / (e + 1)) for clip; 2 positives at b + 1, 2 negatives at b for siglip."""
    image = text = torch.eye(2)
    assert clip_loss(image, text, torch.tensor(1.0)).item() == pytest.approx(0.3132617)
    expected = 0.3132617 + 0.6931472  # softplus(-1) + softplus(0), b = 0
    assert siglip_loss(image, text, torch.tensor(1.0), torch.tensor(0.0)).item() == pytest.approx(expected)


def test_a_perfect_encoder_pays_nothing_for_copies():
    """Four copies of each of three items; without ids the same encoder pays log 4."""
    vectors, ids = torch.eye(3).repeat(4, 1), torch.arange(3).repeat(4)
    scale = torch.tensor(100.0)
    assert clip_loss(vectors, vectors, scale, ids).item() == pytest.approx(0, abs=1e-6)
    assert clip_loss(vectors, vectors, scale).item() == pytest.approx(1.3862944)
    bias = torch.tensor(-50.0)
    assert siglip_loss(vectors, vectors, scale, bias, ids).item() == pytest.approx(0, abs=1e-6)
    assert siglip_loss(vectors, vectors, scale, bias).item() > 100


def test_a_batch_of_copies_alone_has_no_loss_and_finite_gradients():
    image, text = (x.clone().requires_grad_() for x in features(4))
    loss = clip_loss(image, text, torch.tensor(10.0), torch.zeros(4, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0 and torch.equal(image.grad, torch.zeros_like(image))


def test_losses_are_fp32_for_half_precision_features():
    image, text = (x.bfloat16() for x in features(6))
    for loss, exact in (
        (clip_loss(image, text, torch.tensor(50.0)), clip_loss(image.float(), text.float(), torch.tensor(50.0))),
        (
            siglip_loss(image, text, torch.tensor(50.0).bfloat16(), torch.tensor(-10.0)),
            siglip_loss(image.float(), text.float(), torch.tensor(50.0), torch.tensor(-10.0)),
        ),
    ):
        assert loss.dtype == torch.float32 and loss == exact


def test_gather_of_one_process_is_the_input():
    x = torch.randn(3, 2)
    assert gather_rows(x) is x
