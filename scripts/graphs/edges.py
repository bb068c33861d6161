"""How well edges were found where they are known, and what simple measures of association find.

E  edges found     E*  true edges
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from steerlib.evaluation.representation import Match
from steerlib.graph.causal_graph import CausalGraph
from steerlib.training.discover.systems import Codes, Contexts, Reading, System, ablated, csr, matrix


class EdgeScores(NamedTuple):
    """Directed edges between latents that stand for the same truths."""

    precision: float
    recall: float
    f1: float
    distance: int
    """Structural Hamming distance: edges to add and to take away (orders are given, so none is to be turned)."""


def edge_scores(found: Codes, truth: Codes) -> EdgeScores:
    """`P = |E & E*| / |E|`, `R = |E & E*| / |E*|`, `F1 = 2PR / (P + R)`."""
    e, t = (z != 0 for z in (found, truth))
    both, n, m = int(e.multiply(t).sum()), int(e.sum()), int(t.sum())
    return EdgeScores(both / max(n, 1), both / max(m, 1), 2 * both / max(n + m, 1), n + m - 2 * both)


def renamed(effects: Codes, rows: Match, columns: Match) -> Codes:
    """Edges between learned latents as edges between the truths that these are matched to; the others are no edges of any."""
    sides = [
        csr((np.ones(len(m.truths)), (m.truths.numpy(), m.latents.numpy())), shape=(len(m.truths), size))
        for m, size in zip((rows, columns), effects.shape, strict=True)
    ]
    return csr(sides[0] @ effects @ sides[1].T)


class Calibration(NamedTuple):
    """Measured effects of true edges beside their true effects."""

    slope: float
    """Least squares through the origin."""
    rank: float
    """Spearman's correlation."""
    coverage: float
    """Share of the 95 % intervals that hold the true effect."""
    edges: int


def calibration(graph: CausalGraph, src: str, dst: str, truth: Codes) -> Calibration:
    """Of the verified edges between two levels that are true."""
    measured = [matrix(graph, src, dst, truth.shape, name) for name in ("tau", "tau_lo", "tau_hi")]
    known = np.nonzero((measured[0] != 0).multiply(truth != 0).toarray())
    true, tau, low, high = (z.toarray()[known] for z in (truth, *measured))
    a, b = (np.argsort(np.argsort(z)) - (len(z) - 1) / 2 for z in (true, tau))  # ranks around their mean
    near = 1e-4 * np.abs(true)  # readings are float32
    covered = (low - near <= true) & (true <= high + near)
    return Calibration(float(tau @ true / (true @ true)), float(a @ b / (a @ a)), float(covered.mean()), len(true))


def forecast_r2(graph: CausalGraph, system: System, contexts: Contexts, causes: Sequence[str]) -> float:
    """`1 - sum (d - f)^2 / sum d^2` over causes and all that follows: `d` the mean change that ablating a cause makes, `f` what
    the graph says of it."""
    plain, wrong, whole = _means(system.run(contexts)), 0.0, 0.0
    for cause in causes:
        level, latent = cause.rsplit("/", 1)
        run = system.run(contexts, {level: ablated(np.full(len(system.owners(contexts)), int(latent)))})
        moved = {name: mean - plain[name] for name, mean in _means(run).items()}
        said = {name: np.zeros_like(mean) for name, mean in moved.items()}
        for name, change in graph.forecast({cause: -plain[level][int(latent)]}, unmeasured=True).items():
            said[name.rpartition("/")[0]][int(name.rpartition("/")[2])] = change
        later = [name for name in moved if name != level]
        wrong += sum(float(np.square(moved[name] - said[name]).sum()) for name in later)
        whole += sum(float(np.square(moved[name]).sum()) for name in later)
    return 1 - wrong / max(whole, 1e-12)


def _means(readings: Mapping[str, Reading]) -> dict[str, NDArray[Any]]:
    return {name: np.asarray(reading.natural.mean(0), np.float64).ravel() for name, reading in readings.items()}


def associated(parents: Codes, children: Codes, measure: str, edges: int) -> Codes:
    """The `edges` pairs of latents that are most associated, by `correlation`, `conditional` (`n_pc / n_p`) or `lift`.

    Dense: for a few thousand latents.
    """
    n = parents.shape[0]
    if measure != "correlation":
        parents, children = ((z != 0).astype(np.float32) for z in (parents, children))
    both = (parents.T @ children).toarray().astype(np.float64)
    sums = [np.asarray(z.sum(0), np.float64).ravel() for z in (parents, children)]
    expected = np.outer(*sums) / n
    if measure == "correlation":
        power = [
            np.asarray(z.multiply(z).sum(0), np.float64).ravel() - s**2 / n
            for z, s in zip((parents, children), sums, strict=True)
        ]
        value = (both - expected) / np.sqrt(np.outer(*power) + 1e-12)
    elif measure == "conditional":
        value = both / np.maximum(sums[0], 1)[:, None]
    else:
        value = both / np.maximum(expected, 1e-12) * (both >= 5)
    best = np.argpartition(-value.ravel(), edges)[:edges]
    made = np.zeros(value.size, np.float32)
    made[best] = 1
    return csr(made.reshape(value.shape))
