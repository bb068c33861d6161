"""How far single latents stand for single known factors: DCI, MIG, SAP, the FactorVAE score, InfoMEC.

Formulas and settings are those of the papers, or of `disent` and of InfoMEC's authors' code where they leave them open. A
figure that cannot be said, such as a gap between the best two of one latent, is None.

z  latents [B, n]     v  factors as whole numbers [B, F]
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import BadEdit, MissingExtra

BINS, PARTS = 20, 10
"""Into how many values MIG cuts a latent; and a factor of more than `BINS` different values."""
VOTES, BATCH = 400, 64
"""Of the FactorVAE score, as often for learning as for testing, and rows that a vote looks at."""
INACTIVE, NEIGHBOURS = 0.05, 10
"""Share of the largest range below which InfoMEC leaves a latent out; and neighbours by which it tells mutual information: with
fewer, that of a factor of which latents say little is all in one of them by chance, and compactness too high."""
Latents, Factors = NDArray[np.float64], NDArray[np.int64]


class Disentanglement(NamedTuple):
    """All figures, each 1 at best.

    dci_*: a latent is important for one factor, a factor has one important latent, trees tell factors (Eastwood &
    Williams 2018). mig: mutual information of a factor with its best latent less its second best, over the factor's entropy
    (Chen et al. 2018). sap: the same of accuracies by one latent (Kumar et al. 2018). factor_vae: which factor was held fixed,
    told by the latent that varies least (Kim & Mnih 2018). info*: modularity, compactness, explicitness (Hsu et al. 2023).
    """

    dci_disentanglement: float | None
    dci_completeness: float | None
    dci_informativeness: float
    mig: float | None
    sap: float | None
    factor_vae: float
    infom: float | None
    infoc: float | None
    infoe: float


def disentanglement(z: Any, factors: Mapping[str, Sequence[Any]], *, boosted: bool = True, seed: int = 0) -> Disentanglement:
    """Every figure of latents `[B, n]` on known factors by name. Every other row is for learning, the rest for testing.

    DCI is told by boosted trees, or by random forests, which take a thirtieth of the time (`boosted=False`): compare figures
    of one kind. Factors of more than 20 different values are cut into 10 parts of equal size. Raises `BadEdit` for a factor
    that never changes.
    """
    z, v = np.asarray(z, np.float64), classes(factors)
    if len(z) != len(v) or z.ndim != 2:
        raise BadEdit(f"expected latents [B, n] of as many rows as factors have values, got {z.shape} and {len(v)}")
    learn, test = slice(0, None, 2), slice(1, None, 2)
    d, c, i = dci(z[learn], v[learn], z[test], v[test], boosted=boosted, seed=seed)
    m, k, e = infomec(z, v, seed=seed)
    gap = sap(z[learn], v[learn], z[test], v[test], seed=seed)
    return Disentanglement(d, c, i, mig(z, v), gap, factor_vae(z, v, seed=seed), m, k, e)


def classes(factors: Mapping[str, Sequence[Any]]) -> Factors:
    """Factors as whole numbers from 0."""
    columns = []
    for name, values in factors.items():
        kinds, column = torch.unique(torch.as_tensor(values), return_inverse=True)
        if len(kinds) < 2:
            raise BadEdit(f"the factor {name!r} never changes in this data; leave it out")
        if len(kinds) > BINS:
            column = torch.as_tensor(values).double().argsort().argsort() * PARTS // len(column)
        columns.append(column.numpy())
    return np.stack(columns, 1)


def sklearn() -> Any:
    """The package; raises `MissingExtra`."""
    try:
        import sklearn.ensemble
        import sklearn.feature_selection
        import sklearn.linear_model
        import sklearn.svm
    except ImportError:
        raise MissingExtra("measuring disentanglement needs scikit-learn: pip install 'steerlib[eval]'") from None
    return sklearn


def concentrated(importance: NDArray[np.float64]) -> float | None:
    """1 less the entropy of each row over that of a uniform one, rows weighted by their sums; None for a single column."""
    if importance.shape[1] < 2:
        return None
    total = importance.sum(1)
    if not total.sum():
        return 0.0
    share = importance[total > 0] / total[total > 0, None]
    entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(1) / np.log(importance.shape[1])
    return float(((1 - entropy) * total[total > 0]).sum() / total.sum())


def dci(
    z: Latents, v: Factors, z_test: Latents, v_test: Factors, *, boosted: bool = True, seed: int = 0
) -> tuple[float | None, float | None, float]:
    """Disentanglement, completeness, informativeness: by importance in trees, the last as accuracy on other rows."""
    importance, right = np.zeros((z.shape[1], v.shape[1])), []
    kind = sklearn().ensemble.GradientBoostingClassifier if boosted else sklearn().ensemble.RandomForestClassifier
    for k in range(v.shape[1]):
        trees = kind(random_state=seed).fit(z, v[:, k])
        importance[:, k] = trees.feature_importances_
        right.append(trees.score(z_test, v_test[:, k]))
    return concentrated(importance), concentrated(importance.T), float(np.mean(right))


def gap(scores: NDArray[np.float64]) -> float | None:
    """The best score of each column less the second best, on average; None for a single row."""
    ranked = np.sort(scores, 0)
    return None if len(scores) < 2 else float((ranked[-1] - ranked[-2]).mean())


def information(one: Factors, other: Factors) -> float:
    """Mutual information of two columns of whole numbers, in nats."""
    joint = np.zeros((one.max() + 1, other.max() + 1))
    np.add.at(joint, (one, other), 1 / len(one))
    apart = joint.sum(1, keepdims=True) * joint.sum(0)
    return float((joint[joint > 0] * np.log(joint[joint > 0] / apart[joint > 0])).sum())


def mig(z: Latents, v: Factors) -> float | None:
    """Mutual information gap, of latents cut into 20 parts of equal width."""
    cut = [np.digitize(column, np.histogram(column, BINS)[1][1:-1]) for column in z.T]
    return gap(np.array([[information(a, b) / information(b, b) for b in v.T] for a in cut]))


def sap(z: Latents, v: Factors, z_test: Latents, v_test: Factors, *, seed: int = 0) -> float | None:
    """Separated attribute predictability: accuracy on other rows of a linear support vector machine on one latent."""

    def right(i: int, k: int) -> float:
        machine = sklearn().svm.LinearSVC(C=0.01, class_weight="balanced", random_state=seed)
        return machine.fit(z[:, [i]], v[:, k]).score(z_test[:, [i]], v_test[:, k])

    return gap(np.array([[right(i, k) for k in range(v.shape[1])] for i in range(z.shape[1])]))


def factor_vae(z: Latents, v: Factors, *, seed: int = 0) -> float:
    """Share of votes for the factor that most votes of their latent were for. A vote: rows that agree in one factor are drawn,
    and the latent that varies least among them, beside all rows, is taken."""
    rng, spread = np.random.default_rng(seed), z.var(0, ddof=1)
    active = np.flatnonzero(spread > 0)
    if not len(active):
        return 0.0

    def votes() -> NDArray[np.int64]:
        found = np.zeros((v.shape[1], z.shape[1]), np.int64)
        for _ in range(VOTES):
            k = rng.integers(v.shape[1])
            alike = np.flatnonzero(v[:, k] == v[rng.integers(len(v)), k])
            few = z[rng.choice(alike, BATCH)].var(0, ddof=1)
            found[k, active[np.argmin(few[active] / spread[active])]] += 1
        return found

    learned, tested = votes().argmax(0), votes()
    return float(tested[learned, np.arange(z.shape[1])].sum() / tested.sum())


def infomec(z: Latents, v: Factors, *, seed: int = 0) -> tuple[float | None, float | None, float]:
    """Modularity and compactness from normalised mutual information (nearest neighbours, Ross 2014) of active latents, and
    explicitness: the share of a factor's entropy that logistic regression takes away on other rows."""
    reach = np.ptp(z, axis=0)
    z = z[:, reach > INACTIVE * reach.max()] if reach.max() else z[:, :0]
    n, count = z.shape[1], v.shape[1]
    if not n:
        return None, None, 0.0
    table = sklearn().feature_selection.mutual_info_classif
    entropy = np.array([information(column, column) for column in v.T])
    how: dict[str, Any] = {"discrete_features": False, "n_neighbors": NEIGHBOURS, "random_state": seed}
    share = np.stack([table(z, column, **how) for column in v.T]) / entropy[:, None]

    def peaked(axis: int, parts: int) -> float | None:
        if parts < 2:
            return None
        sums = share.sum(axis)
        best = np.where(sums > 0, share.max(axis) / np.where(sums > 0, sums, 1), 1 / parts)
        return float((best.mean() - 1 / parts) / (1 - 1 / parts))

    return peaked(0, count), peaked(1, n), float(np.mean([explicit(z, column) for column in v.T]))


def explicit(z: Latents, v: Factors) -> float:
    """`(H(v) - H(v | z)) / H(v)` by logistic regression, learned on every other row, on the rest; 0 at least. It is hardly
    penalised (C = 100; not at all, it would never end where factors can be told apart)."""
    z = (z - z.mean(0)) / z.std(0)
    told = sklearn().linear_model.LogisticRegression(C=100, max_iter=2000).fit(z[::2], v[::2])
    row, known = np.arange(len(z[1::2])), np.searchsorted(told.classes_, v[1::2]).clip(max=len(told.classes_) - 1)
    loss = -np.log(np.clip(told.predict_proba(z[1::2])[row, known], 1e-12, None)).mean()
    return max(0.0, 1 - float(loss) / information(v, v))
