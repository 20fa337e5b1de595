"""How well latent dimensions and attributes of items go together, one to one.

All functions read `mu` (n, Z), the latents of n items, and attributes as `codes` (n, K): small integers, -1 where an
item has no value. Numbers are between 0 and 1, higher is better. They say something only beside those of shuffled
attributes, and where attributes depend on each other (`dependency`) none of them can be perfect.

Needs scikit-learn for `sap` and `dci`: extra `concepts`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import numpy as np

from mmctr.losses.variational import ACTIVE_VARIANCE

BINS = 20


def bins_of(mu: np.ndarray, num_bins: int = BINS) -> np.ndarray:
    """(n, Z) int: each dimension in bins of equal width between its least and its greatest value (Locatello et al.
    2019). A dimension that does not vary is one bin."""
    low, high = mu.min(0), mu.max(0)
    width = np.where(high > low, high - low, 1.0)
    return np.minimum((mu - low) / width * num_bins, num_bins - 1).astype(np.int64)


def entropy(codes: np.ndarray) -> float:
    """In nats, of (n,) codes that are not -1."""
    counts = np.bincount(codes[codes >= 0])
    p = counts[counts > 0] / counts.sum() if counts.sum() else np.ones(1)
    return float(-(p * np.log(p)).sum())


def mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """In nats, of two (n,) codes, over the items where neither is -1."""
    both = (a >= 0) & (b >= 0)
    if not both.any():
        return 0.0
    a, b = a[both], b[both]
    joint = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(joint, (a, b), 1 / len(a))
    outer = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float(max((joint[seen] * np.log(joint[seen] / outer[seen])).sum(), 0.0))


def information(mu: np.ndarray, codes: np.ndarray, num_bins: int = BINS) -> np.ndarray:
    """(Z, K) mutual information of each latent, in bins, and each attribute."""
    binned = bins_of(mu, num_bins)
    return np.array(
        [[mutual_information(binned[:, j], codes[:, k]) for k in range(codes.shape[1])] for j in range(mu.shape[1])]
    )


def _gap(values: np.ndarray) -> np.ndarray:
    """The greatest value of each row less the second greatest, which is 0 where there is one alone."""
    ordered = np.sort(values, axis=1)[:, ::-1]
    return ordered[:, 0] - (ordered[:, 1] if ordered.shape[1] > 1 else 0.0)


def mig(mu: np.ndarray, codes: np.ndarray, num_bins: int = BINS) -> float:
    """Mutual information gap (Chen et al. 2018): by how much the latent that knows most of an attribute knows more than
    the next, as a fraction of the attribute's entropy; the mean over attributes. Falls when two latents share one."""
    gaps = _gap(information(mu, codes, num_bins).T)
    return float(np.mean([gap / max(entropy(codes[:, k]), 1e-12) for k, gap in enumerate(gaps)]))


def mig_sup(mu: np.ndarray, codes: np.ndarray, num_bins: int = BINS) -> float:
    """The same the other way (Li et al. 2020): of each active latent, the attribute it knows most of and the next, as a
    fraction of the latent's entropy. Falls when a latent mixes two attributes."""
    active = active_dimensions(mu)
    if not active.any():
        return 0.0
    gaps = _gap(information(mu[:, active], codes, num_bins))
    binned = bins_of(mu[:, active], num_bins)
    return float(np.mean([gap / max(entropy(binned[:, j]), 1e-12) for j, gap in enumerate(gaps)]))


def active_dimensions(mu: np.ndarray) -> np.ndarray:
    """(Z,) bool: whether a latent varies over items."""
    return mu.var(0) > ACTIVE_VARIANCE


def sap(mu: np.ndarray, codes: np.ndarray, seed: int = 0) -> float:
    """Separated attribute predictability (Kumar et al. 2018): the accuracy on held-out items of telling an attribute
    from one latent by a linear classifier, of the best latent less the next; the mean over attributes."""
    _require_sklearn()
    from sklearn.linear_model import LogisticRegression

    scores = np.zeros((codes.shape[1], mu.shape[1]))
    standard = (mu - mu.mean(0)) / mu.std(0).clip(min=1e-12)
    for k in range(codes.shape[1]):
        train, test = _halves(codes[:, k], seed)
        for j in np.flatnonzero(active_dimensions(mu)):
            model = LogisticRegression(class_weight="balanced").fit(standard[train, j : j + 1], codes[train, k])
            scores[k, j] = (model.predict(standard[test, j : j + 1]) == codes[test, k]).mean()
    return float(_gap(scores).mean())


def dci(mu: np.ndarray, codes: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Disentanglement, completeness, informativeness (Eastwood & Williams 2018), from the importances of random forests
    that tell each attribute from all latents, as in the paper. Other learners give other numbers.

    D: a latent matters to one attribute alone; C: one latent alone matters to an attribute; I: the accuracy on held-out
    items.
    """
    _require_sklearn()
    from sklearn.ensemble import RandomForestClassifier

    importance = np.zeros((mu.shape[1], codes.shape[1]))
    right = np.zeros(codes.shape[1])
    for k in range(codes.shape[1]):
        train, test = _halves(codes[:, k], seed)
        forest = RandomForestClassifier(50, max_depth=12, min_samples_leaf=3, max_features=1.0, random_state=seed)  # type: ignore[arg-type]
        forest.fit(mu[train], codes[train, k])
        importance[:, k] = forest.feature_importances_
        right[k] = (forest.predict(mu[test]) == codes[test, k]).mean()
    return {**disentanglement_and_completeness(importance), "informativeness": float(right.mean())}


def disentanglement_and_completeness(importance: np.ndarray) -> dict[str, float]:
    """D and C of a (Z, K) matrix of importances: 1 less the entropy of a row (column), to the base of its length,
    weighted by the row's (column's) share of the whole."""
    total = max(importance.sum(), 1e-12)

    def score(rows: np.ndarray) -> float:
        p = rows / rows.sum(1, keepdims=True).clip(min=1e-12)
        if rows.shape[1] < 2:
            return 1.0
        spread = -(p * np.log(p.clip(min=1e-12))).sum(1) / np.log(rows.shape[1])
        return float(((1 - spread) * rows.sum(1) / total).sum())

    return {"disentanglement": score(importance), "completeness": score(importance.T)}


def factor_vae_score(mu: np.ndarray, codes: np.ndarray, seed: int = 0, votes: int = 2000, size: int = 64) -> float:
    """Of items that share one attribute's value, the latent that varies least should say which attribute that was (Kim
    & Mnih 2018): the accuracy of the majority vote on as many votes again."""
    active = np.flatnonzero(active_dimensions(mu))
    if not len(active):
        return 0.0
    rng = np.random.default_rng(seed)
    scaled = mu[:, active] / mu[:, active].std(0)
    order = np.argsort(codes, axis=0, kind="stable")
    bounds = []
    for k in range(codes.shape[1]):
        values = np.flatnonzero(np.bincount(codes[codes[:, k] >= 0, k]))
        ordered = codes[order[:, k], k]
        bounds.append((np.searchsorted(ordered, values), np.searchsorted(ordered, values, side="right")))
    found = np.zeros((2, len(active), codes.shape[1]))
    for vote in range(2 * votes):
        k = int(rng.integers(codes.shape[1]))
        starts, ends = bounds[k]
        value = int(rng.integers(len(starts)))
        rows = order[rng.integers(starts[value], ends[value], size), k]
        found[vote % 2, np.argmin(scaled[rows].var(0)), k] += 1
    guess = found[0].argmax(1)
    return float(found[1][np.arange(len(active)), guess].sum() / votes)


def dependency(codes: np.ndarray) -> np.ndarray:
    """(K, K) mutual information of attributes over the lesser of their entropies: 1 where one gives away the other."""
    count = codes.shape[1]
    entropies = np.array([entropy(codes[:, k]) for k in range(count)])
    shared = np.array([[mutual_information(codes[:, i], codes[:, k]) for k in range(count)] for i in range(count)])
    return shared / np.minimum(entropies[:, None], entropies[None]).clip(min=1e-12)


def all_scores(mu: np.ndarray, codes: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Every score of this module."""
    parts = dci(mu, codes, seed)
    return {
        "mig": mig(mu, codes),
        "mig_sup": mig_sup(mu, codes),
        "sap": sap(mu, codes, seed),
        **{f"dci_{name}": value for name, value in parts.items()},
        "factor_vae": factor_vae_score(mu, codes, seed),
    }


def shuffled(
    scores: Callable[[np.ndarray, np.ndarray], dict[str, float]], mu: np.ndarray, codes: np.ndarray, rounds: int = 3
) -> dict[str, float]:
    """What the scores are when the latents of items are dealt out anew: what chance gives, on average."""
    rng = np.random.default_rng(0)
    found = [scores(mu[rng.permutation(len(mu))], codes) for _ in range(rounds)]
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def udr(runs: Sequence[np.ndarray]) -> list[float]:
    """How far each of several runs, (n, Z) latents of the same items, found what the others found: unsupervised
    disentanglement ranking (Duan et al. 2020), by rank correlation; the median over the other runs.

    A pair scores high when each active latent of the one goes with a single latent of the other.
    """
    if len(runs) < 2:
        raise ValueError("udr compares runs: give two or more")
    scores = np.full((len(runs), len(runs)), np.nan)
    for i, a in enumerate(runs):
        for j, b in enumerate(runs):
            if i != j:
                scores[i, j] = _alike(a, b)
    return [float(np.nanmedian(row)) for row in scores]


def _alike(a: np.ndarray, b: np.ndarray) -> float:
    active_a, active_b = active_dimensions(a), active_dimensions(b)
    if not active_a.any() or not active_b.any():
        return 0.0
    x, y = (_ranks(values) for values in (a[:, active_a], b[:, active_b]))
    r = np.abs(x.T @ y) / len(x)
    # the best partner's square over all: 1 where a latent has one partner alone
    best_b, best_a = r.max(0), r.max(1)
    by_b = best_b**2 / r.sum(0).clip(min=1e-12)
    by_a = best_a**2 / r.sum(1).clip(min=1e-12)
    return float((by_b.sum() + by_a.sum()) / (r.shape[0] + r.shape[1]))


def _ranks(values: np.ndarray) -> np.ndarray:
    """(n, Z) ranks of each column, standardised."""
    ranks = values.argsort(0).argsort(0).astype(np.float64)
    return (ranks - ranks.mean(0)) / ranks.std(0).clip(min=1e-12)


def _halves(codes: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows that have a value, half to learn from and half to judge by, each value in both."""
    rng = np.random.default_rng(seed)
    rows = rng.permutation(np.flatnonzero(codes >= 0))
    rows = rows[np.argsort(codes[rows], kind="stable")]
    return rows[::2], rows[1::2]


def _require_sklearn() -> None:
    if find_spec("sklearn") is None:
        raise ValueError("SAP and DCI need scikit-learn: pip install 'mmctr[concepts]'")
