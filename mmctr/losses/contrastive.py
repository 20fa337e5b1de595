"""Contrastive losses as functions of tensors, exact for any number of processes.

Losses are computed in float32, also within autocast.

A contrastive loss compares the B rows of this process with the candidates of all processes; B is equal in all
processes. After data-parallel training has averaged gradients over processes, the gradient equals the gradient of one
process with the whole batch. Rows that take no part are masked by `valid`, and a loss is the mean over the valid rows
of all processes.

False negatives: `keys` (B, K) identify rows with equal content. Two rows that agree in any of the K columns (the same
item, the same picture, the same text) are not negatives of each other. A key that shall match no other row must be
unique.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmctr.distributed import gather_rows, masked_mean_over_processes, own_columns, world_size
from mmctr.layers.precision import in_float32


def shares_key(rows: Tensor, columns: Tensor) -> Tensor:
    """Whether two rows agree in any key.

    Args:
        rows: (B, K) int keys.
        columns: (C, K) int keys.

    Returns:
        (B, C) bool.
    """
    same = rows[:, None, 0] == columns[None, :, 0]
    for k in range(1, rows.shape[1]):
        same |= rows[:, None, k] == columns[None, :, k]
    return same


@dataclass(frozen=True)
class QueuedCandidates:
    """M candidates of earlier steps, equal in every process and without gradient."""

    vectors: Tensor
    """(M, D) unit norm"""
    keys: Tensor
    """(M, K) int keys"""
    valid: Tensor
    """(M,) bool: whether the candidate takes part"""
    log_q: Tensor | None = None
    """(M,) log of the relative frequency with which the candidate is drawn; None: no correction"""


@dataclass(frozen=True)
class _Candidates:
    """The columns of a loss: the candidates of all processes, then the candidates of a queue. `own` (B,) holds the
    columns of the rows of this process."""

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
        """(B, C) scaled products, minus infinity for columns that are not negatives of a row."""
        logits = scale * rows @ self.vectors.T
        excluded = self.excluded(*row_keys)
        return logits if excluded is None else logits.masked_fill(excluded, -torch.inf)

    def excluded(self, *row_keys: Tensor | None) -> Tensor | None:
        """(B, C) bool: True for columns that are not negatives of a row; False for the column of the row itself."""
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


@in_float32
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

    The default objective. Large batches are needed; `siglip_loss` is less sensitive to the batch size.

    Args:
        image_features: (B, D) unit-norm features of the pictures.
        text_features: (B, D) unit-norm features of the texts; row i of both tensors is one item.
        logit_scale: the factor s, a scalar.
        keys: (B,) or (B, K) int keys; two rows that agree in any column are not negatives of each other.
        valid: (B,) bool: rows with a picture and a text; other rows are neither rows nor candidates. None: all rows.
        image_queue: pictures of earlier steps as further candidates.
        text_queue: texts of earlier steps as further candidates.

    Returns:
        The loss, a scalar.
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


@in_float32
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
    negatives get weight 0. Training from scratch starts at s = 10, b = -10.

    Args:
        image_features: (B, D) unit-norm features of the pictures.
        text_features: (B, D) unit-norm features of the texts; row i of both tensors is one item.
        logit_scale: the factor s, a scalar.
        logit_bias: the bias b, a scalar.
        keys: (B,) or (B, K) int keys; two rows that agree in any column are not negatives of each other.
        valid: (B,) bool: rows with a picture and a text; other rows are neither rows nor candidates. None: all rows.
        text_queue: texts of earlier steps as further candidates.

    Returns:
        The loss, a scalar.
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


@in_float32
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
    negative_keys: Tensor | None = None,
    queue: QueuedCandidates | None = None,
    symmetric: bool = True,
) -> Tensor:
    """InfoNCE over pairs (anchor, positive) from behaviour: co-clicked items, or a query and the item clicked for it.

    L_i = -log( e^(s a_i p_i - log q_i) / sum_j e^(s a_i p_j - log q_j) ), in fp32, where j runs over the positives of
    the whole batch. Positives are drawn in proportion to clicks, so without the correction log q popular items would be
    negatives too often (logQ correction: Yi et al. 2019, equation 3; the positive itself is corrected too).

    Args:
        anchors: (B, D) unit-norm vectors.
        positives: (B, D) unit-norm vectors; row i is the positive of anchor i.
        logit_scale: the factor s, a scalar.
        anchor_keys: (B,) or (B, K) int keys of the anchors.
        positive_keys: (B,) or (B, K) int keys of the positives. A candidate that shares a key with the anchor or the
            positive of a row is not a negative of the row.
        valid: (B,) bool: rows with a positive; None: all rows.
        log_q: (B,) log of the probability of drawing each positive, relative to uniform draws; None: no correction.
        negatives: (B, D) unit-norm hard negatives (shown, not clicked): row i is a negative of anchor i alone, without
            correction; None: no hard negatives.
        has_negative: (B,) bool: rows with a hard negative; None: all rows.
        negative_keys: (B,) or (B, K) int keys of the hard negatives. A hard negative that shares a key with the anchor
            or the positive of the row, as the positive itself does, does not count. None: all count.
        queue: positives of earlier steps as further candidates.
        symmetric: whether to return the mean of this loss and the loss with anchors and positives exchanged.

    Returns:
        The loss, a scalar.
    """
    anchors, positives = anchors.float(), positives.float()
    anchor_keys, positive_keys, scale = _keys(anchor_keys), _keys(positive_keys), logit_scale.float()
    candidates = _Candidates.gather(positives, positive_keys, valid, queue)
    logits = candidates.logits(anchors, scale, positive_keys, anchor_keys)
    if log_q is not None:
        correction = gather_rows(log_q.float())
        if queue is not None:
            assert queue.log_q is not None, "with log_q, the queue needs a log_q too"
            correction = torch.cat([correction, queue.log_q.float()])
        logits = logits - correction
    if negatives is not None:
        hard = scale * (anchors * negatives.float()).sum(1)
        if has_negative is not None:
            hard = hard.masked_fill(~has_negative, -torch.inf)
        hard_keys = _keys(negative_keys)
        for keys in (anchor_keys, positive_keys):
            if hard_keys is not None and keys is not None:
                hard = hard.masked_fill((hard_keys == keys).any(1), -torch.inf)
        logits = torch.cat([logits, hard[:, None]], dim=1)
    losses = F.cross_entropy(logits, candidates.own, reduction="none")
    if symmetric:
        candidates = _Candidates.gather(anchors, anchor_keys, valid, None)
        logits = candidates.logits(positives, scale, anchor_keys, positive_keys)
        losses = (losses + F.cross_entropy(logits, candidates.own, reduction="none")) / 2
    return masked_mean_over_processes(losses, valid)


@in_float32
def multi_positive_loss(
    vectors: Tensor, logit_scale: Tensor, groups: Tensor, keys: Tensor, valid: Tensor | None = None
) -> Tensor:
    """Supervised contrastive loss: all items of the same group are positives (Khosla et al. 2020, L_out, equation 2).

    L_i = -1/|P(i)| sum_{p in P(i)} log( e^(s v_i v_p) / sum_{a in A(i)} e^(s v_i v_a) ), in fp32, with the sum over
    positives outside the logarithm. A(i) are all other rows that share no key with row i, and P(i) are the rows of A(i)
    in the group of row i. Rows without a positive do not count.

    Args:
        vectors: (B, D) unit-norm vectors.
        logit_scale: the factor s, a scalar.
        groups: (B,) int group of each row, negative for a row without a group.
        keys: (B,) or (B, K) int keys.
        valid: (B,) bool: rows that take part; None: all rows.

    Returns:
        The loss, a scalar.
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


@in_float32
def similarity_distillation_loss(
    vectors: Tensor, teacher: Tensor, logit_scale: Tensor, teacher_scale: float, keys: Tensor, valid: Tensor
) -> Tensor:
    """Train the similarities within a batch towards the similarities of a teacher.

    L_i = KL( softmax_j(s' t_i t_j) || softmax_j(s v_i v_j) ) over the other rows j of all processes, in fp32: the
    distillation of similarity distributions of Fang et al. 2021 (SEED), within the batch instead of a queue.

    Args:
        vectors: (B, D) unit-norm vectors.
        teacher: (B, D') unit-norm vectors of the teacher, without gradient.
        logit_scale: the factor s, a scalar.
        teacher_scale: the factor s'.
        keys: (B,) or (B, K) int keys; rows j that share a key with row i are left out.
        valid: (B,) bool: rows with a teacher vector.

    Returns:
        The loss, a scalar.
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
