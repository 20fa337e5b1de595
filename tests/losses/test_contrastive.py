from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmctr.distributed import gather_rows
from mmctr.losses.contrastive import (
    QueuedCandidates,
    clip_loss,
    multi_positive_loss,
    pair_loss,
    siglip_loss,
    similarity_distillation_loss,
)


def features(n: int, dim: int = 5, seed: int = 0, count: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    made = (F.normalize(torch.randn(n, dim, generator=generator, dtype=torch.float64), dim=1) for _ in range(count))
    return tuple(x.float() for x in made)


def same(a, b) -> bool:
    """Whether two rows of keys agree in any place."""
    return bool((torch.as_tensor(a) == torch.as_tensor(b)).any())


def simple_clip(image, text, scale, keys, valid=None):
    n, terms = len(keys), []
    valid = [True] * n if valid is None else valid
    for a, b in ((image, text), (text, image)):
        for i in range(n):
            if valid[i]:
                others = [scale * a[i] @ b[j] for j in range(n) if valid[j] and (j == i or not same(keys[j], keys[i]))]
                terms.append(torch.logsumexp(torch.stack(others), 0) - scale * a[i] @ b[i])
    return torch.stack(terms).mean()


def simple_siglip(image, text, scale, bias, keys, valid=None):
    n, total, rows = len(keys), 0, 0
    valid = [True] * n if valid is None else valid
    for i in range(n):
        rows += valid[i]
        for j in range(n):
            if valid[i] and valid[j] and (i == j or not same(keys[i], keys[j])):
                z = 1 if i == j else -1
                total = total + torch.log1p(torch.exp(-z * (scale * image[i] @ text[j] + bias)))
    return total / rows


KEYS = {
    "distinct": [[3], [1], [4], [15], [9], [2]],
    "copies": [[3], [1], [3], [3], [9], [1]],
    "two columns": [[3, -1], [1, 7], [4, 7], [5, -4], [9, -5], [3, -6]],
}


@pytest.mark.parametrize("valid", [None, [True, False, True, True, False, True]], ids=["all", "some"])
@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS.keys())
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_values_and_gradients_equal_the_formula(name, keys, valid):
    results = []
    for simple in (False, True):
        image, text = (x.clone().requires_grad_() for x in features(6))
        scale, bias = torch.tensor(4.0, requires_grad=True), torch.tensor(-1.5, requires_grad=True)
        mask = None if valid is None else torch.tensor(valid)
        if name == "clip":
            loss = (simple_clip if simple else clip_loss)(image, text, scale, torch.tensor(keys), mask)
        else:
            loss = (simple_siglip if simple else siglip_loss)(image, text, scale, bias, torch.tensor(keys), mask)
        loss.backward()
        results.append([loss, image.grad, text.grad, scale.grad, bias.grad if name == "siglip" else torch.zeros(())])
    for fast, simple_one in zip(*results, strict=True):
        torch.testing.assert_close(fast, simple_one, rtol=1e-5, atol=1e-6)
    assert results[0][3].abs() > 1e-4


def test_rows_that_do_not_take_part_may_hold_anything():
    image, text = features(6)
    valid = torch.tensor([True, True, False, True, True, False])
    keys = torch.arange(6)
    other_image, other_text = image.clone(), text.clone()
    other_image[~valid], other_text[~valid] = 0.0, 7.0
    scale, bias = torch.tensor(4.0), torch.tensor(-1.0)
    assert clip_loss(image, text, scale, keys, valid) == clip_loss(other_image, other_text, scale, keys, valid)
    torch.testing.assert_close(
        siglip_loss(image, text, scale, bias, keys, valid),
        siglip_loss(other_image, other_text, scale, bias, keys, valid),
    )
    nothing = torch.zeros(6, dtype=torch.bool)
    x = image.clone().requires_grad_()
    loss = clip_loss(x, text, scale, keys, nothing)
    loss.backward()
    assert loss == 0 and x.grad.eq(0).all()


def test_without_keys_every_other_row_is_a_negative():
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
    """Four copies of each of three items; without keys the same encoder pays log 4."""
    vectors, keys = torch.eye(3).repeat(4, 1), torch.arange(3).repeat(4)
    scale = torch.tensor(100.0)
    assert clip_loss(vectors, vectors, scale, keys).item() == pytest.approx(0, abs=1e-6)
    assert clip_loss(vectors, vectors, scale).item() == pytest.approx(1.3862944)
    bias = torch.tensor(-50.0)
    assert siglip_loss(vectors, vectors, scale, bias, keys).item() == pytest.approx(0, abs=1e-6)
    assert siglip_loss(vectors, vectors, scale, bias).item() > 100


def test_a_batch_of_copies_alone_has_no_loss_and_finite_gradients():
    image, text = (x.clone().requires_grad_() for x in features(4))
    loss = clip_loss(image, text, torch.tensor(10.0), torch.zeros(4, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0 and torch.equal(image.grad, torch.zeros_like(image))


def test_losses_are_fp32_for_half_precision_features():
    image, text = (x.bfloat16() for x in features(6))
    rows, valid = torch.arange(6), torch.ones(6, dtype=torch.bool)
    scale, bias = torch.tensor(50.0), torch.tensor(-10.0)

    def losses(image, text):
        return (
            clip_loss(image, text, scale),
            siglip_loss(image, text, scale, bias),
            pair_loss(image, text, scale),
            multi_positive_loss(image, scale, rows // 2, rows),
            similarity_distillation_loss(image, text, scale, 10.0, rows, valid),
        )

    for loss, exact in zip(losses(image, text), losses(image.float(), text.float()), strict=True):
        assert loss.dtype == torch.float32 and loss == exact


def test_gather_of_one_process_is_the_input():
    x = torch.randn(3, 2)
    assert gather_rows(x) is x


ANCHOR_KEYS, POSITIVE_KEYS = torch.tensor([0, 1, 2, 3, 4, 5]), torch.tensor([3, 9, 9, 7, 1, 8])
LOG_Q = torch.tensor([0.3, 1.2, 1.2, -0.5, 0.0, -1.0])


def simple_pairs(anchors, positives, scale, valid, log_q, negatives, has_negative, queue, symmetric):
    """Row by row, over the columns that are neither the row's positive nor its anchor."""
    terms = []
    for i in range(6):
        if not valid[i]:
            continue
        left_out = {int(ANCHOR_KEYS[i]), int(POSITIVE_KEYS[i])}
        logits = []
        for j in range(6):
            if j == i or (valid[j] and int(POSITIVE_KEYS[j]) not in left_out):
                logits.append(scale * anchors[i] @ positives[j] - log_q[j])
        if queue is not None:
            for m in range(len(queue.keys)):
                if queue.valid[m] and int(queue.keys[m, 0]) not in left_out:
                    logits.append(scale * anchors[i] @ queue.vectors[m] - queue.log_q[m])
        if negatives is not None and has_negative[i]:
            logits.append(scale * anchors[i] @ negatives[i])
        own = scale * anchors[i] @ positives[i]
        term = torch.logsumexp(torch.stack(logits), 0) - (own - log_q[i])
        if symmetric:
            back = [
                scale * positives[i] @ anchors[j]
                for j in range(6)
                if j == i or (valid[j] and int(ANCHOR_KEYS[j]) not in left_out)
            ]
            term = (term + torch.logsumexp(torch.stack(back), 0) - own) / 2
        terms.append(term)
    return torch.stack(terms).mean()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("more", [False, True], ids=["plain", "with queue, hard negatives and logQ"])
def test_pairs_equal_the_formula(more, symmetric):
    valid = torch.tensor([True, True, True, False, True, True])
    results = []
    for simple in (False, True):
        anchors, positives, negatives = (x.clone().requires_grad_() for x in features(6, count=3))
        scale = torch.tensor(3.0, requires_grad=True)
        queue = has_negative = None
        log_q = torch.zeros(6)
        if more:
            log_q, has_negative = LOG_Q, torch.tensor([True, False, True, True, True, False])
            keys = torch.tensor([[20], [9], [0], [21]])
            kept = torch.tensor([True, True, True, False])
            queue = QueuedCandidates(features(4, seed=5)[0], keys, kept, torch.tensor([0.1, 0.0, 0.7, 0.0]))
        if simple:
            hard = negatives if more else None
            loss = simple_pairs(anchors, positives, scale, valid, log_q, hard, has_negative, queue, symmetric)
        else:
            loss = pair_loss(
                anchors,
                positives,
                scale,
                anchor_keys=ANCHOR_KEYS,
                positive_keys=POSITIVE_KEYS,
                valid=valid,
                log_q=log_q if more else None,
                negatives=negatives if more else None,
                has_negative=has_negative,
                queue=queue,
                symmetric=symmetric,
            )
        loss.backward()
        results.append([loss, anchors.grad, positives.grad, scale.grad, *([negatives.grad] if more else [])])
    for fast, simple_one in zip(*results, strict=True):
        torch.testing.assert_close(fast, simple_one, rtol=1e-5, atol=1e-6)


def test_log_q_frees_popular_items():
    """What a popular positive is worse off for being drawn often is given back: with e^(log q) copies of it among the
    candidates, the corrected loss of the others is that of a batch in which it stands once."""
    anchors, positives = features(4)
    scale = torch.tensor(5.0)
    rows = torch.tensor([0, 1, 2, 3, 3, 3])  # the last pair three times
    keys = torch.arange(6)  # not masked: the correction alone
    log_q = torch.tensor([0.0, 0.0, 0.0, 1.0986123, 1.0986123, 1.0986123])
    many = pair_loss(
        anchors[rows],
        positives[rows],
        scale,
        anchor_keys=keys,
        positive_keys=keys + 10,
        valid=None,
        log_q=log_q,
        symmetric=False,
    )
    logits = scale * anchors @ positives.T
    once = F.cross_entropy(logits, torch.arange(4), reduction="none")
    # a row of the popular pair sees its own column corrected as well: one third of it
    expected = (once[:3].sum() + 3 * (once[3] + 1.0986123)) / 6
    torch.testing.assert_close(many, expected)


GROUPS = torch.tensor([0, 0, 1, 1, 1, -1, 2])


@pytest.mark.parametrize("copies", [False, True])
def test_multiple_positives_equal_the_formula(copies):
    keys = torch.tensor([0, 1, 2, 3, 2, 5, 6]) if copies else torch.arange(7)
    results = []
    for simple in (False, True):
        vectors = features(7)[0].clone().requires_grad_()
        scale = torch.tensor(3.0, requires_grad=True)
        if simple:
            terms = []
            for i in range(7):
                others = [j for j in range(7) if j != i and keys[j] != keys[i]]
                positives = [j for j in others if GROUPS[i] >= 0 and GROUPS[j] == GROUPS[i]]
                if positives:
                    normaliser = torch.logsumexp(torch.stack([scale * vectors[i] @ vectors[j] for j in others]), 0)
                    own = [normaliser - scale * vectors[i] @ vectors[j] for j in positives]
                    terms.append(torch.stack(own).mean())
            loss = torch.stack(terms).mean()
        else:
            loss = multi_positive_loss(vectors, scale, GROUPS, keys)
        loss.backward()
        results.append([loss, vectors.grad, scale.grad])
    for fast, simple_one in zip(*results, strict=True):
        torch.testing.assert_close(fast, simple_one, rtol=1e-5, atol=1e-6)


def test_without_a_positive_there_is_no_loss():
    vectors = features(4)[0].clone().requires_grad_()
    for groups, keys in ((torch.arange(4), torch.arange(4)), (torch.zeros(4), torch.zeros(4, dtype=torch.int64))):
        loss = multi_positive_loss(vectors, torch.tensor(9.0), groups.long(), keys)
        loss.backward()
        assert loss == 0 and vectors.grad.isfinite().all() and vectors.grad.eq(0).all()


@pytest.mark.parametrize("copies", [False, True])
def test_distillation_equals_the_formula(copies):
    keys = torch.tensor([0, 1, 0, 3, 4]) if copies else torch.arange(5)
    valid = torch.tensor([True, True, True, False, True])
    teacher = features(5, dim=3, seed=3)[0]
    results = []
    for simple in (False, True):
        vectors = features(5)[0].clone().requires_grad_()
        scale = torch.tensor(6.0, requires_grad=True)
        if simple:
            terms = []
            for i in range(5):
                others = [j for j in range(5) if j != i and valid[j] and keys[j] != keys[i]]
                if valid[i]:
                    wanted = F.log_softmax(torch.stack([8.0 * teacher[i] @ teacher[j] for j in others]), 0)
                    given = F.log_softmax(torch.stack([scale * vectors[i] @ vectors[j] for j in others]), 0)
                    terms.append((wanted.exp() * (wanted - given)).sum())
            loss = torch.stack(terms).mean()
        else:
            loss = similarity_distillation_loss(vectors, teacher, scale, 8.0, keys, valid)
        loss.backward()
        results.append([loss, vectors.grad, scale.grad])
    for fast, simple_one in zip(*results, strict=True):
        torch.testing.assert_close(fast, simple_one, rtol=1e-5, atol=1e-6)
    same_vectors = similarity_distillation_loss(teacher, teacher, torch.tensor(8.0), 8.0, keys, valid)
    assert same_vectors.item() == pytest.approx(0, abs=1e-6)


def test_a_hard_negative_is_never_the_positive_nor_the_anchor():
    """Rows whose hard negative is, or looks like, the positive or the anchor have none."""
    anchors, positives, negatives = features(6, count=3)
    anchor_keys = torch.tensor([[0, 50], [1, 51], [2, 52], [3, 53], [4, 54], [5, 55]])
    positive_keys = anchor_keys + 10
    negative_keys = torch.tensor([[10, 60], [91, 61], [2, 52], [93, 53], [94, 90], [95, 91]])
    keys = {"anchor_keys": anchor_keys, "positive_keys": positive_keys}
    scale = torch.tensor(9.0)
    counted = torch.tensor([False, False, False, False, True, True])
    expected = pair_loss(anchors, positives, scale, negatives=negatives, has_negative=counted, **keys)
    found = pair_loss(anchors, positives, scale, negatives=negatives, negative_keys=negative_keys, **keys)
    every = pair_loss(anchors, positives, scale, negatives=negatives, **keys)
    assert torch.equal(found, expected) and found < every
