from __future__ import annotations

import math

import numpy as np
import pytest

from mmctr.concepts.disentanglement import (
    active_dimensions,
    all_scores,
    chance_scores,
    dci,
    dependency,
    disentanglement_and_completeness,
    entropy,
    equal_width_bins,
    factor_vae_score,
    information_matrix,
    mig,
    mig_sup,
    mutual_information,
    sap,
)

RNG = np.random.default_rng(0)
N = 3000
CODES = np.stack([RNG.integers(0, 4, N), RNG.integers(0, 3, N), RNG.integers(0, 2, N)], 1)
CENTRED = (CODES - CODES.mean(0)) / CODES.std(0)


def rotation(dim: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(1).normal(size=(dim, dim)))[0]


def test_information_by_hand():
    a, b = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    assert mutual_information(a, b) == pytest.approx(0, abs=1e-12)
    assert mutual_information(a, a) == pytest.approx(math.log(2)) == entropy(a)
    # 3 of 4 agree
    c = np.array([0, 0, 1, 0])
    joint = {(0, 0): 0.5, (1, 1): 0.25, (1, 0): 0.25}
    pa, pc = {0: 0.5, 1: 0.5}, {0: 0.75, 1: 0.25}
    expected = sum(p * math.log(p / pa[i] / pc[j]) for (i, j), p in joint.items())
    assert mutual_information(a, c) == pytest.approx(expected)
    missing = np.array([0, -1, 1, -1])
    assert mutual_information(a, missing) == pytest.approx(math.log(2))
    assert mutual_information(a, np.full(4, -1)) == 0 and entropy(np.full(4, -1)) == 0


def test_bins_are_of_equal_width():
    mu = np.array([[0.0, 5.0], [0.24, 5.0], [0.26, 5.0], [1.0, 5.0]])
    assert equal_width_bins(mu, 4).tolist() == [[0, 0], [0, 0], [1, 0], [3, 0]]


def test_a_perfect_code_scores_one():
    noise = np.random.default_rng(2).normal(size=(N, 3)) * 0.01
    found = all_scores(CENTRED[:, [2, 0, 1]] + noise, CODES)
    assert found["mig"] > 0.97 and found["mig_sup"] > 0.6  # bins of the noise add to the entropy of a latent
    assert mig_sup(CENTRED, CODES) == pytest.approx(1, abs=0.01)
    assert found["dci_disentanglement"] > 0.97 and found["dci_completeness"] > 0.97
    assert found["dci_informativeness"] == 1 and found["factor_vae"] == 1
    # of two values one, of three some, of four few are told by a latent that knows nothing
    assert found["sap"] == pytest.approx(1 - np.mean([1 / 4, 1 / 3, 1 / 2]), abs=0.06)


def test_a_rotated_code_knows_all_and_scores_low():
    mu = CENTRED @ rotation(3) + np.random.default_rng(2).normal(size=(N, 3)) * 0.01
    found = all_scores(mu, CODES)
    assert found["mig"] < 0.2 and found["mig_sup"] < 0.2 and found["sap"] < 0.5
    assert found["dci_disentanglement"] < 0.65 and found["dci_informativeness"] > 0.95


def test_shuffled_attributes_score_nothing():
    found = chance_scores(all_scores, CENTRED + np.random.default_rng(2).normal(size=(N, 3)) * 0.1, CODES)
    assert found["mig"] < 0.01 and found["mig_sup"] < 0.01 and found["sap"] < 0.05
    assert found["dci_disentanglement"] < 0.1 and found["dci_informativeness"] < 0.45


def test_one_attribute_over_two_latents_and_two_attributes_in_one():
    split = np.stack([CENTRED[:, 0], CENTRED[:, 0], CENTRED[:, 1], CENTRED[:, 2]], 1)
    assert mig(split, CODES) == pytest.approx(2 / 3, abs=0.01)  # the first attribute has no gap
    assert mig_sup(split, CODES) == pytest.approx(1, abs=0.01)
    mixed = np.stack([CODES[:, 0] + 4 * CODES[:, 1], CENTRED[:, 2]], 1).astype(float)
    assert mig(mixed, CODES) == pytest.approx(1, abs=0.01)
    h = [math.log(4), math.log(3)]
    assert mig_sup(mixed, CODES) == pytest.approx(((h[0] - h[1]) / (h[0] + h[1]) + 1) / 2, abs=0.02)


def test_dci_of_importances_by_hand():
    found = disentanglement_and_completeness(np.array([[3.0, 1.0], [0.0, 4.0]]))
    h = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert found["disentanglement"] == pytest.approx(0.5 * (1 - h) + 0.5)
    h = -(0.2 * math.log(0.2) + 0.8 * math.log(0.8)) / math.log(2)
    assert found["completeness"] == pytest.approx(3 / 8 + 5 / 8 * (1 - h))
    assert disentanglement_and_completeness(np.zeros((2, 2)))["disentanglement"] == 0


def test_dimensions_that_do_not_vary_count_for_nothing():
    mu = np.concatenate([CENTRED, np.full((N, 2), 0.3)], 1)
    assert active_dimensions(mu).tolist() == [True] * 3 + [False] * 2
    assert mig_sup(mu, CODES) == pytest.approx(1, abs=0.01) and factor_vae_score(mu, CODES) == 1
    nothing = np.full((N, 4), 0.3)
    found = all_scores(nothing, CODES)
    assert found["mig"] == found["mig_sup"] == found["sap"] == found["factor_vae"] == 0


@pytest.mark.parametrize("inactive", [0, 1, 5])
def test_sap_of_one_active_dimension_counts_from_guessing(inactive):
    """One useless dimension, alone or beside dimensions that do not vary, is worth nothing; a perfect one the rest."""
    still = np.full((N, inactive), 0.3)
    useless = np.concatenate([np.random.default_rng(2).normal(size=(N, 1)), still], 1)
    assert sap(useless, CODES) < 0.03  # .36 = mean of 1/4, 1/3 and 1/2 before
    binary = CODES[:, 2:]
    assert sap(np.concatenate([CENTRED[:, 2:], still], 1), binary) == pytest.approx(0.5)
    assert sap(np.full((N, 1 + inactive), 0.3), CODES) == 0


def test_items_without_a_value_are_left_out():
    codes = CODES.copy()
    codes[:1000, 0] = -1
    mu = CENTRED.copy()
    mu[:1000, 0] = np.random.default_rng(3).normal(size=1000)
    assert information_matrix(mu, codes)[0, 0] > 0.8 * math.log(4)
    assert factor_vae_score(mu, codes) > 0.95 and dci(mu, codes)["informativeness"] == 1 and sap(mu, codes) > 0.5


def test_dependency_of_attributes():
    codes = np.stack([CODES[:, 0], CODES[:, 0] // 2, CODES[:, 1]], 1)
    found = dependency(codes)
    assert found[0, 1] == pytest.approx(1) and found[0, 2] < 0.01
    np.testing.assert_allclose(found, found.T)
    np.testing.assert_allclose(found.diagonal(), 1)
