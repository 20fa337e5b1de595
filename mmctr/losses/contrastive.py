"""Losses as functions of tensors, exact over many processes.

Contrastive losses compare this process's rows with the candidates of all processes. The gradient is that of one process
holding the whole batch, once data-parallel training has averaged over processes. B, the rows of a process, is the same
in all of them; rows that do not take part are masked by `valid`, and the mean is over the valid rows of all processes.

False negatives. `keys` (B, K) say which rows are the same thing: two rows that agree in any column are no negatives of
each other (the same item, the same picture, the same text, ...). A value that shall match nothing must be unique.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmctr.distributed import gather_rows, masked_mean_over_processes, own_columns, world_size


def shares_key(rows: Tensor, columns: Tensor) -> Tensor:
    """(B, K) and (C, K) keys -> (B, C) bool: whether they agree in any of the K."""
    same = rows[:, None, 0] == columns[None, :, 0]
    for k in range(1, rows.shape[1]):
        same |= rows[:, None, k] == columns[None, :, k]
    return same


@dataclass(frozen=True)
class QueuedCandidates:
    """M candidates of earlier steps, the same in every process; they get no gradient."""

    vectors: Tensor
    """(M, D) unit norm"""
    keys: Tensor
    """(M, K)"""
    valid: Tensor
    """(M,) bool"""
    log_q: Tensor | None = None
    """(M,)"""


@dataclass(frozen=True)
class _Candidates:
    """The columns of a loss: those of all processes, then those of a queue."""

    vectors: Tensor
    keys: Tensor | None
    valid: Tensor | None
    own: Tensor

    @classmethod
    def gather(
        cls, vectors: Tensor, keys: Tensor | None, valid: Tensor | None, queue: QueuedCandidates | None
    ) -> _Candidates:
        own = own_columns(len(vectors), vectors.device)
        num_rows = len(vectors)
        vectors = gather_rows(vectors.float())
        keys = None if keys is None else gather_rows(keys)
        valid = None if valid is None else gather_rows(valid)
        if queue is not None:
            if valid is None:
                valid = torch.ones(num_rows * world_size(), dtype=torch.bool, device=vectors.device)
            vectors, valid = torch.cat([vectors, queue.vectors.float()]), torch.cat([valid, queue.valid])
            keys = None if keys is None else torch.cat([keys, queue.keys])
        return cls(vectors, keys, valid, own)

    def logits(self, rows: Tensor, scale: Tensor, *row_keys: Tensor | None) -> Tensor:
        """(B, C) scaled products, minus infinity for columns that are no negatives of a row."""
        logits = scale * rows @ self.vectors.T
        excluded = self.excluded(*row_keys)
        return logits if excluded is None else logits.masked_fill(excluded, -torch.inf)

    def excluded(self, *row_keys: Tensor | None) -> Tensor | None:
        """(B, C) True for columns that are no negatives of a row; a row's own column never is."""
        mask = None if self.valid is None else ~self.valid[None, :].expand(len(self.own), -1)
        for keys in row_keys:
            if keys is not None and self.keys is not None:
                same = shares_key(keys, self.keys)
                mask = same if mask is None else mask | same
        if mask is None:
            return None
        mask = mask.clone()
        mask[torch.arange(len(self.own), device=mask.device), self.own] = False
        return mask


def _keys(keys: Tensor | None) -> Tensor | None:
    """(B,) or (B, K) -> (B, K)."""
    return keys[:, None] if keys is not None and keys.dim() == 1 else keys


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    keys: Tensor | None = None,
    valid: Tensor | None = None,
    image_queue: QueuedCandidates | None = None,
    text_queue: QueuedCandidates | None = None,
) -> Tensor:
    """Symmetric InfoNCE between pictures and texts (Radford et al. 2021).

    L = 1/2 [CE(s I T', diagonal) + CE(s T I', diagonal)], in fp32.

    Args:
        image_features, text_features: (B, D) unit norm; row i of both is one item.
        logit_scale: the factor s itself, a scalar.
        keys: (B,) or (B, K) what tells items apart, see above.
        valid: (B,) rows that have both; the others are neither rows nor candidates.
        image_queue, text_queue: further candidates.

    When to choose it: the default. It needs large batches; `siglip_loss` is milder on small ones.
    """
    image_features, text_features, keys = image_features.float(), text_features.float(), _keys(keys)
    losses = []
    for rows, columns, queue in (
        (image_features, text_features, text_queue),
        (text_features, image_features, image_queue),
    ):
        candidates = _Candidates.gather(columns, keys, valid, queue)
        logits = candidates.logits(rows, logit_scale.float(), keys)
        losses.append(F.cross_entropy(logits, candidates.own, reduction="none"))
    return masked_mean_over_processes((losses[0] + losses[1]) / 2, valid)


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    keys: Tensor | None = None,
    valid: Tensor | None = None,
    text_queue: QueuedCandidates | None = None,
) -> Tensor:
    """Pairwise sigmoid loss between pictures and texts (Zhai et al. 2023, arXiv 2303.15343).

    L = -1/B sum_ij log sigmoid(z_ij (s x_i . y_j + b)), z = 1 on the diagonal and -1 elsewhere, in fp32. False
    negatives get weight 0. From scratch start at s = 10, b = -10.

    Args: as `clip_loss`, and logit_bias: the bias b, a scalar.
    """
    image_features, text_features, keys = image_features.float(), text_features.float(), _keys(keys)
    candidates = _Candidates.gather(text_features, keys, valid, text_queue)
    logits = logit_scale.float() * image_features @ candidates.vectors.T + logit_bias.float()
    sign = -torch.ones_like(logits)
    sign[torch.arange(len(logits), device=logits.device), candidates.own] = 1
    terms = F.logsigmoid(sign * logits)
    excluded = candidates.excluded(keys)
    if excluded is not None:
        terms = terms.masked_fill(excluded, 0)
    return -masked_mean_over_processes(terms.sum(1), valid)


def pair_loss(
    anchors: Tensor,
    positives: Tensor,
    logit_scale: Tensor,
    *,
    anchor_keys: Tensor | None = None,
    positive_keys: Tensor | None = None,
    valid: Tensor | None = None,
    log_q: Tensor | None = None,
    negatives: Tensor | None = None,
    has_negative: Tensor | None = None,
    queue: QueuedCandidates | None = None,
    symmetric: bool = True,
) -> Tensor:
    """InfoNCE over pairs (anchor, positive) from behaviour: co-clicked items, or a query and the item clicked for it.

    L_i = -log( e^(s a_i p_i - log q_i) / sum_j e^(s a_i p_j - log q_j) ), in fp32, over the positives of the whole
    batch: those are drawn as often as they are clicked, so without the correction a popular item would be a negative
    far too often and be pushed away from everything (logQ: Yi et al. 2019, eq. 3; the own column is corrected too).
    With `symmetric` the mean of that and of the loss of positives against anchors.

    Args:
        anchors, positives: (B, D) unit norm.
        logit_scale: the factor s, a scalar.
        anchor_keys, positive_keys: (B,) or (B, K). A column is left out when it is the row's positive or anchor.
        valid: (B,) rows that have a positive.
        log_q: (B,) log of how often each positive is drawn, over how often it would be were all drawn alike; None: no
            correction.
        negatives, has_negative: (B, D) and (B,), a hard negative for each row (shown, not clicked): a column that
            only its own row sees, not corrected.
        queue: further positives of earlier steps.
    """
    anchors, positives = anchors.float(), positives.float()
    anchor_keys, positive_keys, scale = _keys(anchor_keys), _keys(positive_keys), logit_scale.float()
    candidates = _Candidates.gather(positives, positive_keys, valid, queue)
    logits = candidates.logits(anchors, scale, positive_keys, anchor_keys)
    if log_q is not None:
        correction = gather_rows(log_q.float())
        if queue is not None:
            assert queue.log_q is not None, "a queue beside log_q needs its own"
            correction = torch.cat([correction, queue.log_q.float()])
        logits = logits - correction
    if negatives is not None:
        hard = scale * (anchors * negatives.float()).sum(1)
        if has_negative is not None:
            hard = hard.masked_fill(~has_negative, -torch.inf)
        logits = torch.cat([logits, hard[:, None]], dim=1)
    losses = F.cross_entropy(logits, candidates.own, reduction="none")
    if symmetric:
        candidates = _Candidates.gather(anchors, anchor_keys, valid, None)
        logits = candidates.logits(positives, scale, anchor_keys, positive_keys)
        losses = (losses + F.cross_entropy(logits, candidates.own, reduction="none")) / 2
    return masked_mean_over_processes(losses, valid)


def multi_positive_loss(
    vectors: Tensor, logit_scale: Tensor, groups: Tensor, keys: Tensor, valid: Tensor | None = None
) -> Tensor:
    """Supervised contrastive loss: all items of a row's group are its positives (Khosla et al. 2020, L_out, eq. 2).

    L_i = -1/|P(i)| sum_{p in P(i)} log( e^(s v_i v_p) / sum_{a in A(i)} e^(s v_i v_a) ), in fp32: the sum over
    positives stands outside the logarithm. A(i) is every other row, copies of row i itself (same key) left out; P(i)
    those of A(i) in its group. Rows without a positive do not count.

    Args:
        vectors: (B, D) unit norm.
        groups: (B,) group of each row, negative for none.
        keys: (B,) or (B, K).
    """
    vectors, row_keys = vectors.float(), _keys(keys)
    candidates = _Candidates.gather(vectors, row_keys, valid, None)
    logits = logit_scale.float() * vectors @ candidates.vectors.T
    excluded = candidates.excluded(row_keys)
    assert excluded is not None
    excluded[torch.arange(len(vectors), device=vectors.device), candidates.own] = True
    positive = (groups[:, None] == gather_rows(groups)[None, :]) & (groups >= 0)[:, None] & ~excluded
    num_positives = positive.sum(1)
    has_positive = num_positives > 0
    # a row whose candidates are all left out has no softmax: keep it finite, it does not count
    logits = logits.masked_fill(excluded & has_positive[:, None], -torch.inf)
    log_softmax = logits - torch.logsumexp(logits, 1, keepdim=True)
    losses = -torch.where(positive, log_softmax, 0.0).sum(1) / num_positives.clamp(min=1)
    return masked_mean_over_processes(losses, has_positive if valid is None else has_positive & valid)


def similarity_distillation_loss(
    vectors: Tensor, teacher: Tensor, logit_scale: Tensor, teacher_scale: float, keys: Tensor, valid: Tensor
) -> Tensor:
    """Make similarities within a batch those of a teacher, whose vectors may have another size.

    L_i = KL( softmax_j(s' t_i t_j) || softmax_j(s v_i v_j) ) over the other rows j of all processes, in fp32 (the
    similarity-distribution distillation of Fang et al. 2021, SEED, within the batch instead of a queue).

    Args:
        vectors: (B, D), teacher: (B, D'), both unit norm; only `vectors` gets a gradient.
        keys: (B,) or (B, K); copies of a row are left out.
        valid: (B,) rows with a teacher.
    """
    row_keys = _keys(keys)
    students = _Candidates.gather(vectors.float(), row_keys, valid, None)
    excluded = students.excluded(row_keys)
    assert excluded is not None
    excluded[torch.arange(len(vectors), device=vectors.device), students.own] = True
    alone = excluded.all(1, keepdim=True)
    excluded = excluded & ~alone  # no softmax over nothing: such rows do not count
    teacher = teacher.detach().float()
    wanted = (teacher_scale * teacher @ gather_rows(teacher).T).masked_fill(excluded, -torch.inf)
    given = (logit_scale.float() * vectors.float() @ students.vectors.T).masked_fill(excluded, -torch.inf)
    # zero where left out, before the product: infinity minus infinity has no gradient
    wanted, given = (F.log_softmax(logits, 1).masked_fill(excluded, 0.0) for logits in (wanted, given))
    losses = (wanted.exp() * (wanted - given)).sum(1)
    return masked_mean_over_processes(losses, valid & ~alone[:, 0])
