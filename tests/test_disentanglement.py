"""Figures of disentanglement: those that `disent` and InfoMEC's authors compute of the same numbers, and closed forms."""

import numpy as np
import pytest

from steerlib import errors
from steerlib.evaluation.disentanglement import (
    classes,
    concentrated,
    disentanglement,
    factor_vae,
    gap,
    infomec,
    information,
    mig,
)  # fmt: skip

MIXED = {
    "apart": [[1.0, 0.1, 0.0, 0.6], [0.0, 0.8, 0.2, 0.5], [0.3, 0.0, 1.5, 0.4]],
    "mixed": [[1.0, 0.9, 0.1, 0.5], [0.7, -0.8, 0.6, 0.2], [0.2, 0.1, 0.3, 0.2]],
}


def drawn(mix):
    """Three factors of 3, 4 and 2 values, in four latents with noise."""
    rng = np.random.default_rng(0)
    v = np.stack([rng.integers(k, size=600) for k in (3, 4, 2)], 1)
    return v @ np.array(mix) + 0.3 * rng.normal(size=(600, 4)), v


def by_name(v):
    return {f"factor {k}": column.tolist() for k, column in enumerate(v.T)}


DISENT = {
    "apart": {"dci": (0.79897, 0.76234, 0.92), "mig": 0.62342, "sap": 0.20667, "factor_vae": 1.0},
    "mixed": {"dci": (0.15893, 0.14958, 0.81444), "mig": 0.08338, "sap": 0.03667, "factor_vae": 0.76525},
}
"""What `disent` 0.8.0 gives for `drawn` (`_compute_dci`, `_compute_mig`, `_compute_sap` on every other row; FactorVAE: 4,000
votes on new draws)."""


@pytest.mark.parametrize("name", MIXED)
def test_figures_are_those_of_disent(name):
    z, v = drawn(MIXED[name])
    found, expected = disentanglement(z, by_name(v)), DISENT[name]
    assert found[:3] == pytest.approx(expected["dci"], abs=0.01)  # trees that tie are broken at random
    assert found.mig == pytest.approx(expected["mig"], abs=1e-5)
    assert found.sap == pytest.approx(expected["sap"], abs=0.01)
    assert found.factor_vae == pytest.approx(expected["factor_vae"], abs=0.08)  # 400 votes


INFOMEC = {"apart": (0.70053, 0.68409, 0.90243), "mixed": (0.56007, 0.22401, 0.67202)}
"""What the authors' code (`metrics/infomec.py` of kylehkhsu/latent_quantization) gives for `drawn`, less an argument that
logistic regression no longer has. Its explicitness is told of the rows that it was learned on."""


@pytest.mark.parametrize("name", MIXED)
def test_modularity_compactness_and_explicitness_are_those_of_their_authors(name):
    modular, compact, explicit = infomec(*drawn(MIXED[name]))
    assert modular == pytest.approx(INFOMEC[name][0], abs=0.01) and compact == pytest.approx(INFOMEC[name][1], abs=0.01)
    assert INFOMEC[name][2] - 0.07 < explicit < INFOMEC[name][2]


def test_one_latent_for_each_factor_is_perfect_and_shuffled_factors_are_not():
    v = np.stack(np.meshgrid(*[range(4)] * 3), -1).reshape(-1, 3).repeat(4, 0)
    v = v[np.random.default_rng(0).permutation(len(v))]
    z = v * np.array([1.0, 2.0, 0.5]) + 0.02 * np.random.default_rng(1).normal(size=v.shape)
    found = disentanglement(z, by_name(v))
    for name in ("dci_disentanglement", "dci_completeness", "dci_informativeness", "factor_vae", "infom", "infoc"):
        assert getattr(found, name) == pytest.approx(1, abs=0.05), name
    assert found.mig is not None and found.mig > 0.8 and found.infoe > 0.8
    control = disentanglement(z, by_name(v[np.random.default_rng(2).permutation(len(v))]))
    assert control.mig is not None and control.mig < 0.1 and control.infoe < 0.05 and control.dci_informativeness < 0.4


def test_a_rotation_lowers_what_is_said_of_single_latents_and_not_what_all_tell():
    rng = np.random.default_rng(3)
    v = rng.integers(4, size=(400, 2))
    z = v + 0.02 * rng.normal(size=v.shape)
    turned = z @ np.array([[1, 1], [1, -1]]) / np.sqrt(2)
    plain, mixed = infomec(z, v), infomec(turned, v)
    assert plain[0] is not None and mixed[0] is not None and plain[0] > 0.9 and mixed[0] < 0.4
    assert mixed[2] == pytest.approx(plain[2], abs=0.1)


def test_two_copies_of_each_factor_are_modular_and_not_compact():
    """By hand: each factor's information is in halves in two of four latents, `(1/2 - 1/4) / (1 - 1/4)`."""
    rng = np.random.default_rng(4)
    v = rng.integers(3, size=(500, 2))
    z = np.concatenate([v, v], 1) + 0.01 * rng.normal(size=(500, 4))
    modular, compact, _ = infomec(z, v)
    assert modular == pytest.approx(1, abs=0.05) and compact == pytest.approx(1 / 3, abs=0.05)
    assert mig(z, v) == pytest.approx(0, abs=0.01)


def test_parts_against_values_by_hand():
    importance = np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 0.0]])
    assert concentrated(importance) == pytest.approx(0.5)  # 1 and 0, equally heavy; the last row has no weight
    assert concentrated(importance[:, :1]) is None and concentrated(np.zeros((2, 2))) == 0
    assert gap(np.array([[0.9, 0.2], [0.4, 0.5]])) == pytest.approx(0.4) and gap(np.ones((1, 2))) is None
    one = np.array([0, 0, 1, 1])
    assert information(one, one) == pytest.approx(np.log(2)) and information(one, np.array([0, 1, 0, 1])) == pytest.approx(0)


def test_nothing_to_tell_is_no_error_and_a_factor_that_never_changes_is_one():
    v = np.random.default_rng(0).integers(2, size=(50, 2))
    assert factor_vae(np.zeros((50, 3)), v) == 0 and infomec(np.zeros((50, 3)), v) == (None, None, 0.0)
    with pytest.raises(errors.BadEdit, match="'still' never changes"):
        classes({"still": [1, 1, 1]})
    with pytest.raises(errors.BadEdit, match="as many rows"):
        disentanglement(np.zeros((4, 2)), {"a": [0, 1, 0]})


def test_continuous_factors_are_cut_into_parts_of_equal_size():
    cut = classes({"angle": np.random.default_rng(0).normal(size=100).tolist()})
    assert np.bincount(cut[:, 0]).tolist() == [10] * 10
