"""Disentanglement scores: how far latent dimensions and attributes of items correspond one to one.

All functions take `mu` (n, Z), the latents of n items, and attributes as `codes` (n, K): small integers, -1 where an
item has no value. Scores are between 0 and 1, higher is better. A score is to be compared with `chance_scores`, and
where attributes depend on each other (`dependency`) no score can reach 1.

All but `factor_vae_score` and `active_dimensions` need scikit-learn and SciPy: extra `concepts`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import numpy as np

from mmctr.losses.variational import ACTIVE_VARIANCE

BINS = 20
"""bins of a latent dimension for mutual information"""


def equal_width_bins(mu: np.ndarray, num_bins: int = BINS) -> np.ndarray:
    """(n, Z) bin numbers: each dimension in bins of equal width from its least to its greatest value (Locatello et al.
    2019). A dimension that does not vary is one bin."""
    low, high = mu.min(0), mu.max(0)
    width = np.where(high > low, high - low, 1.0)
    return np.minimum((mu - low) / width * num_bins, num_bins - 1).astype(np.int64)


def entropy(codes: np.ndarray) -> float:
    """The entropy in nats of the (n,) codes that are not -1, 0 where there are none."""
    _check_sklearn()
    from scipy import stats

    counts = np.bincount(codes[codes >= 0])
    return float(stats.entropy(counts)) if counts.any() else 0.0


def mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """The mutual information in nats of two (n,) codes, over the items where neither is -1; 0 where there are none."""
    _check_sklearn()
    from sklearn.metrics import mutual_info_score

    both = (a >= 0) & (b >= 0)
    return float(mutual_info_score(a[both], b[both])) if both.any() else 0.0


def information_matrix(mu: np.ndarray, codes: np.ndarray, num_bins: int = BINS) -> np.ndarray:
    """(Z, K) mutual information of each latent dimension, in bins, and each attribute."""
    binned = equal_width_bins(mu, num_bins)
    return np.array(
        [[mutual_information(binned[:, j], codes[:, k]) for k in range(codes.shape[1])] for j in range(mu.shape[1])]
    )


def _gap(values: np.ndarray) -> np.ndarray:
    """The greatest value of each row minus the second greatest, which counts as 0 in rows of one value."""
    ordered = np.sort(values, axis=1)[:, ::-1]
    return ordered[:, 0] - (ordered[:, 1] if ordered.shape[1] > 1 else 0.0)


def mig(mu: np.ndarray, codes: np.ndarray, num_bins: int = BINS) -> float:
    """Mutual information gap (Chen et al. 2018), low where several latents tell of one attribute.

    The gap of an attribute lies between the two latents with the highest mutual information, as a fraction of the
    attribute's entropy; the score is the mean over attributes.
    """
    gaps = _gap(information_matrix(mu, codes, num_bins).T)
    return float(np.mean([gap / max(entropy(codes[:, k]), 1e-12) for k, gap in enumerate(gaps)]))


def mig_sup(mu: np.ndarray, codes: np.ndarray, num_bins: int = BINS) -> float:
    """MIG-sup (Li et al. 2020), low where a latent mixes several attributes.

    The gap of an active latent lies between the two attributes with the highest mutual information, as a fraction of
    the latent's entropy; the score is the mean over active latents.
    """
    active = active_dimensions(mu)
    if not active.any():
        return 0.0
    gaps = _gap(information_matrix(mu[:, active], codes, num_bins))
    binned = equal_width_bins(mu[:, active], num_bins)
    return float(np.mean([gap / max(entropy(binned[:, j]), 1e-12) for j, gap in enumerate(gaps)]))


def active_dimensions(mu: np.ndarray) -> np.ndarray:
    """(Z,) bool: whether a latent dimension varies over items (variance above `ACTIVE_VARIANCE`)."""
    return mu.var(0) > ACTIVE_VARIANCE


def sap(mu: np.ndarray, codes: np.ndarray, seed: int = 0) -> float:
    """Separated attribute predictability (Kumar et al. 2018).

    A linear classifier predicts an attribute from one latent. The gap of an attribute lies between the accuracies of
    the two best latents on test items; the score is the mean over attributes. The second accuracy is at least
    1 / number of values, the accuracy of a classifier of balanced classes that knows nothing: a single latent that
    varies is not credited with what guessing gives.
    """
    _check_sklearn()
    from sklearn.linear_model import LogisticRegression

    # the last column is that of guessing, and so is a latent that does not vary
    num_values = np.array([[len(np.unique(column[column >= 0]))] for column in codes.T])
    scores = np.repeat(1 / num_values.clip(min=1), mu.shape[1] + 1, axis=1)
    standard = (mu - mu.mean(0)) / mu.std(0).clip(min=1e-12)
    for k in range(codes.shape[1]):
        train, test = _split_rows(codes[:, k], seed)
        for j in np.flatnonzero(active_dimensions(mu)):
            model = LogisticRegression(class_weight="balanced").fit(standard[train, j : j + 1], codes[train, k])
            scores[k, j] = (model.predict(standard[test, j : j + 1]) == codes[test, k]).mean()
    best = scores.max(1)
    # a best latent below guessing predicts nothing
    return float(np.where(best > scores[:, -1], _gap(scores), 0.0).mean())


def dci(mu: np.ndarray, codes: np.ndarray, seed: int = 0) -> dict[str, float]:
    """{"disentanglement", "completeness", "informativeness"} (Eastwood & Williams 2018).

    Random forests, as in the paper, predict each attribute from all latents; other learners give other numbers.
    Disentanglement is high where each latent matters to one attribute, completeness where one latent matters to each
    attribute, both by the importances of the forests; informativeness is the accuracy on test items.
    """
    _check_sklearn()
    from sklearn.ensemble import RandomForestClassifier

    importance = np.zeros((mu.shape[1], codes.shape[1]))
    accuracy = np.zeros(codes.shape[1])
    for k in range(codes.shape[1]):
        train, test = _split_rows(codes[:, k], seed)
        forest = RandomForestClassifier(50, max_depth=12, min_samples_leaf=3, max_features=1.0, random_state=seed)  # type: ignore[arg-type]
        forest.fit(mu[train], codes[train, k])
        importance[:, k] = forest.feature_importances_
        accuracy[k] = (forest.predict(mu[test]) == codes[test, k]).mean()
    return {**disentanglement_and_completeness(importance), "informativeness": float(accuracy.mean())}


def disentanglement_and_completeness(importance: np.ndarray) -> dict[str, float]:
    """{"disentanglement", "completeness"} of a (Z, K) matrix of importances.

    Disentanglement is the mean over rows of 1 minus the row's entropy to the base K, weighted by the row's share of all
    importance; completeness is the same over columns.
    """
    _check_sklearn()
    from scipy import stats

    total = max(importance.sum(), 1e-12)

    def score(rows: np.ndarray) -> float:
        if rows.shape[1] < 2:
            return 1.0
        weights = rows.sum(1)
        row_entropy = stats.entropy(rows[weights > 0], axis=1, base=rows.shape[1])
        return float(((1 - row_entropy) * weights[weights > 0] / total).sum())

    return {"disentanglement": score(importance), "completeness": score(importance.T)}


def factor_vae_score(mu: np.ndarray, codes: np.ndarray, seed: int = 0, votes: int = 2000, size: int = 64) -> float:
    """FactorVAE score (Kim & Mnih 2018).

    A vote draws `size` items that share the value of one attribute, and the latent that varies least among them votes
    for that attribute. The score is the accuracy of each latent's majority attribute on as many further votes.
    """
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
    tally = np.zeros((2, len(active), codes.shape[1]))
    for vote in range(2 * votes):
        k = int(rng.integers(codes.shape[1]))
        starts, ends = bounds[k]
        value = int(rng.integers(len(starts)))
        rows = order[rng.integers(starts[value], ends[value], size), k]
        tally[vote % 2, np.argmin(scaled[rows].var(0)), k] += 1
    majority = tally[0].argmax(1)
    return float(tally[1][np.arange(len(active)), majority].sum() / votes)


def dependency(codes: np.ndarray) -> np.ndarray:
    """(K, K) mutual information of attributes over the lesser entropy: 1 where one attribute determines the other."""
    count = codes.shape[1]
    entropies = np.array([entropy(codes[:, k]) for k in range(count)])
    shared = np.array([[mutual_information(codes[:, i], codes[:, k]) for k in range(count)] for i in range(count)])
    return shared / np.minimum(entropies[:, None], entropies[None]).clip(min=1e-12)


def all_scores(mu: np.ndarray, codes: np.ndarray, seed: int = 0) -> dict[str, float]:
    """All scores of latents against attributes, by name."""
    parts = dci(mu, codes, seed)
    return {
        "mig": mig(mu, codes),
        "mig_sup": mig_sup(mu, codes),
        "sap": sap(mu, codes, seed),
        **{f"dci_{name}": value for name, value in parts.items()},
        "factor_vae": factor_vae_score(mu, codes, seed),
    }


def chance_scores(
    scores: Callable[[np.ndarray, np.ndarray], dict[str, float]], mu: np.ndarray, codes: np.ndarray, rounds: int = 3
) -> dict[str, float]:
    """The scores by chance: the mean over `rounds` random permutations of the items' latents."""
    rng = np.random.default_rng(0)
    all_rounds = [scores(mu[rng.permutation(len(mu))], codes) for _ in range(rounds)]
    return {name: float(np.mean([one[name] for one in all_rounds])) for name in all_rounds[0]}


def udr(runs: Sequence[np.ndarray]) -> list[float]:
    """Unsupervised disentanglement ranking (Duan et al. 2020) of two or more runs, (n, Z) latents of the same items.

    A pair of runs scores high when each active latent of one run has a high rank correlation with a single latent of
    the other run. The score of a run is the median over pairs with the other runs. ValueError for a single run.
    """
    if len(runs) < 2:
        raise ValueError("udr compares runs: give two or more")
    _check_sklearn()
    scores = np.full((len(runs), len(runs)), np.nan)
    for i, a in enumerate(runs):
        for j, b in enumerate(runs):
            if i != j:
                scores[i, j] = _pair_udr(a, b)
    return [float(np.nanmedian(row)) for row in scores]


def _pair_udr(a: np.ndarray, b: np.ndarray) -> float:
    """The UDR of two runs, 0 where one of the runs has no active latent."""
    from scipy import stats

    active_a, active_b = active_dimensions(a), active_dimensions(b)
    if not active_a.any() or not active_b.any():
        return 0.0
    # Spearman's correlation; scipy.stats.spearmanr would correlate the latents of one run with each other as well
    x, y = (stats.zscore(stats.rankdata(run, axis=0)) for run in (a[:, active_a], b[:, active_b]))
    r = np.abs(x.T @ y) / len(a)
    # square of the highest correlation over the sum of correlations: 1 for a latent with a single perfect partner
    best_b, best_a = r.max(0), r.max(1)
    by_b = best_b**2 / r.sum(0).clip(min=1e-12)
    by_a = best_a**2 / r.sum(1).clip(min=1e-12)
    return float((by_b.sum() + by_a.sum()) / (r.shape[0] + r.shape[1]))


def _split_rows(codes: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training rows, test rows): the rows with a value in two halves, with every value in both."""
    rng = np.random.default_rng(seed)
    rows = rng.permutation(np.flatnonzero(codes >= 0))
    rows = rows[np.argsort(codes[rows], kind="stable")]
    return rows[::2], rows[1::2]


def _check_sklearn() -> None:
    """ValueError where scikit-learn, which brings SciPy, is not installed."""
    if find_spec("sklearn") is None:
        raise ValueError("disentanglement scores need scikit-learn and SciPy: pip install 'mmctr[concepts]'")
