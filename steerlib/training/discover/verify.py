"""Edges put to the test by name, in one environment or several; and effects over two levels or more, over all paths.

a -> b  an edge     tau  its effect, s its standard error     E  environments     Q  Cochran's (1954), of how much they differ
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2

from ...errors import Unanswerable
from ...graph.causal_graph import CausalGraph, Edge
from .confirm import CONFIRMED, FDR, Pair, adjusted, confirmed
from .rows import Folder, observed
from .systems import Contexts, Outcomes, System, ablated, csr

Verdict = Literal["verified", "refused", "too few contexts"]
ERRORS = 3.92
"""Width of a 95 % interval, in standard errors."""
EXACT = 1e-4
"""Share of an effect below which its standard error is rounding."""


class Tested(NamedTuple):
    """An edge with what its test showed: `edge.tau`, its interval, `edge.n_verify`; as it was where contexts were too few."""

    edge: Edge
    verdict: Verdict


class Ends(NamedTuple):
    """Where an edge is looked for."""

    src: str
    parent: int
    dst: str
    child: int
    whole: bool
    """Whether its effect is a total one."""


class Found(NamedTuple):
    """An edge that could be tested."""

    facts: Mapping[str, Any]
    """What an `Edge` says of it, in the units of the readings."""
    holds: bool
    pair: Pair


def verify_edges(
    system: System,
    edges: Iterable[Edge | tuple[str, str]],
    *,
    environments: Sequence[Any] | None = None,
    folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> list[Tested]:
    """Test edges by name: each cause is ablated alone, in up to 64 contexts where it fires and no fewer than 16.

    Args:
        system: What to test them in; its contexts should be others than those that they were found in.
        edges: Edges, or pairs of cause and effect, by the names of `system`: for a bank those of its concepts, in whose units
            effects then are. Of relation `compute` levels in between keep their readings, of `total` they do not; a pair is
            `compute` from a level to the next, else `total`. The effect may be an outcome (`systems.Outcomes`).
        environments: What each context belongs to, for example its set of prompts. An edge that is there in all of them, with
            effects that do not differ, is marked `everywhere`; where they differ, that is False.
        folder: Keeps what was run; the same call goes on from there.

    Returns how each fared, in order. An edge holds if its 95 % interval excludes 0, its p-value is small among all that are
    tested together (5 % false among those that hold), and it matters: at its usual reading the cause moves the effect by 5 %
    of what that usually reads, or the effect needs it. Raises `UnknownConcept`, or `Unanswerable` for what no ablation tests.

    >>> found = verify_edges(system, [("layers.7/3", "layers.15/8")])  # doctest: +SKIP
    """
    given = [edge if isinstance(edge, Edge) else _of(system, *edge) for edge in edges]
    ends, contexts = [_ends(system, edge) for edge in given], np.arange(len(system))
    kept = Folder(None if folder is None else Path(folder), {"seed": seed})
    whole = _found(system, contexts, ends, kept.under("all", {"edges": sorted(ends)}), seed)
    agree = [None] * len(ends) if environments is None else _agree(system, contexts, ends, environments, kept, seed)
    same = _shares(system, whole, kept.under("same", {"edges": sorted(ends)}), seed)
    return [
        _told(system, edge, whole[own], everywhere, same.get(own)) if own in whole else Tested(edge, "too few contexts")
        for edge, own, everywhere in zip(given, ends, agree, strict=True)
    ]


def marked(
    system: System, graph: CausalGraph, environments: Sequence[Any], contexts: Contexts, folder: Folder, *, seed: int = 0
) -> CausalGraph:
    """The graph, whose verified edges say whether they are there in every environment of some contexts, with effects that do
    not differ (`Edge.everywhere`); `environments` says which one each context of the system belongs to."""
    kept = [edge for edge in graph.edges if edge.evidence == "verified"]
    agree = _agree(system, contexts, [_ends(system, edge) for edge in kept], environments, folder, seed)
    told = dict(zip(kept, agree, strict=True))
    return CausalGraph(replace(edge, everywhere=told.get(edge)) for edge in graph.edges)


def with_totals(system: System, graph: CausalGraph, **how: Any) -> CausalGraph:
    """The graph with the total effect of each concept on those that it moves over more than one path, or a longer one, as far
    as they can be measured: what forecasts beyond one level need. `how` as in `verify_edges`.

    Effects of edges multiply along a path only if the graph knows all paths; a total effect is measured over those too that it
    does not know.
    """
    sources = dict.fromkeys(edge.src for edge in graph.edges if edge.relation == "compute")
    made = []
    for src in sources:
        along = graph.forecast({src: 1.0}, unmeasured=True)
        made += [Edge(src=src, dst=dst, weight=along[dst], relation="total") for dst in along.unmeasured]
    tested = [found.edge for found in verify_edges(system, made, **how) if found.verdict != "too few contexts"]
    return CausalGraph([*graph.edges, *(replace(edge, evidence="verified") for edge in tested)])


def _of(system: System, src: str, dst: str) -> Edge:
    """A pair as an edge that claims nothing of its size."""
    names, (one, *_), (other, *_) = list(system.levels), system.place(src), system.place(dst)
    is_next = names.index(other) == names.index(one) + 1
    return Edge(src=src, dst=dst, weight=0.0, relation="compute" if is_next else "total")


def _ends(system: System, edge: Edge) -> Ends:
    names, (src, parent, _), (dst, child, _) = list(system.levels), system.place(edge.src), system.place(edge.dst)
    if edge.relation not in ("compute", "total"):
        raise Unanswerable(
            f"{edge.src!r} -> {edge.dst!r}: relation {edge.relation!r} is not causal; ablations test 'compute' and 'total'"
        )
    if names.index(src) >= names.index(dst):
        raise Unanswerable(
            f"{edge.src!r} -> {edge.dst!r}: {dst!r} is not after {src!r} in the order {', '.join(names)}, so nothing that is "
            "done to the one can reach the other"
        )
    return Ends(src, parent, dst, child, edge.relation == "total")


def _found(system: System, contexts: Contexts, ends: Sequence[Ends], folder: Folder, seed: int) -> dict[Ends, Found]:
    """What ablations show of edges in some contexts, without those that are too few to test."""
    seen, results = observed(system, contexts, folder), []
    for src, dst, whole in sorted({(own.src, own.dst, own.whole) for own in ends}):
        wanted = sorted({(own.parent, own.child) for own in ends if (own.src, own.dst, own.whole) == (src, dst, whole)})
        shape = system.levels[src], system.levels[dst]
        edges = csr((np.ones(len(wanted)), np.array(wanted).T), shape=shape)
        pair = Pair(system, contexts, seen, src, dst, edges, whole)
        results.append((pair, confirmed(pair, folder, seed=seed)))
    q, found, start = adjusted(np.concatenate([np.empty(0), *(own.p for _, own in results)])), {}, 0
    for pair, result in results:
        own = q[start : (start := start + len(result.p))]
        for i, (parent, child, holds) in enumerate(zip(result.parent, result.child, result.holds(own), strict=True)):
            place = Ends(pair.src, int(parent), pair.dst, int(child), pair.whole)
            found[place] = Found(result.facts(i, float(own[i])), bool(holds), pair)
    return found


def _agree(
    system: System, contexts: Contexts, ends: Sequence[Ends], environments: Sequence[Any], folder: Folder, seed: int
) -> list[bool | None]:
    """Whether edges are the same in each environment, tested in its contexts alone."""
    labels = np.asarray(environments)[contexts]
    settings = {"edges": sorted(ends), "environments": labels.tolist()}
    parts = [
        _found(system, contexts[labels == own], ends, folder.under(f"environment-{k}", settings), seed)
        for k, own in enumerate(np.unique(labels))
    ]
    return _agreeing([[part.get(own) for part in parts] for own in ends])


def _told(system: System, edge: Edge, found: Found, everywhere: bool | None, same: float | None) -> Tested:
    """The edge with what was found, in its own units."""
    (_, _, unit), (dst, _, other) = system.place(edge.src), system.place(edge.dst)
    facts = {name: value * unit / other if name.startswith("tau") else value for name, value in found.facts.items()}
    facts |= {"weight": edge.weight or facts["tau"], "everywhere": everywhere}
    if dst == Outcomes.LEVEL:  # one value a context, at a unit of no meaning
        facts |= {"necessity": None, "sufficiency": None}
    elif found.holds and len(system.routes) > 1:
        facts["same"] = same
    if not found.holds:
        facts["evidence"] = edge.evidence
    return Tested(replace(edge, **facts), "verified" if found.holds else "refused")


def _shares(system: System, found: Mapping[Ends, Found], folder: Folder, seed: int) -> dict[Ends, float]:
    """The share of each effect that falls on the unit where its cause is ablated, at one unit of each context; of edges that
    hold, where units of a context can be told apart. A cause is ablated once for all of its effects."""
    held = [own for own, one in found.items() if one.holds and own.dst != Outcomes.LEVEL and len(system.routes) > 1]
    causes = {(own.whole, own.src, own.dst, own.parent): found[own].pair for own in held}
    jobs = {
        f"{'total' if whole else 'compute'}-{src}-{dst}-{parent:07}": partial(_shared, pair, parent, seed)
        for (whole, src, dst, parent), pair in causes.items()
    }
    told = dict(zip(causes, folder.all(jobs, "telling tokens apart"), strict=True))
    shares = {own: dict(zip(*told[own.whole, own.src, own.dst, own.parent].values(), strict=True))[own.child] for own in held}
    return {own: float(share) for own, share in shares.items() if np.isfinite(share)}


def _shared(pair: Pair, parent: int, seed: int) -> dict[str, NDArray[Any]]:
    """These shares of one cause, by child; nan where nothing was moved."""
    random = np.random.default_rng([seed, 41, parent])
    places = np.sort(random.permutation(pair.firing(parent))[:CONFIRMED])
    (trial,) = pair.trials([parent], [places], ablated, once=random)
    d = trial.before - trial.after
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"children": pair.children(parent), "share": d[trial.z > 0].sum(0) / d.sum(0)}


def _agreeing(found: Sequence[Sequence[Found | None]]) -> list[bool | None]:
    """For each edge, by environment: False where effects differ by more than chance, among all edges; True where they do not
    and all intervals lie on one side of 0. None where that is not known, or it could not be tested in all."""
    told = [[own.facts for own in some if own] if some and None not in some else None for some in found]
    q = iter(adjusted(np.array([_alike(some) for some in told if some])).tolist())
    return [None if some is None else False if next(q) <= FDR else _one_sign(some) or None for some in told]


def _one_sign(facts: Sequence[Mapping[str, Any]]) -> bool:
    return all(own["tau_lo"] > 0 for own in facts) or all(own["tau_hi"] < 0 for own in facts)


def _alike(facts: Sequence[Mapping[str, Any]]) -> float:
    """The probability of effects that differ so much where all are one: `Q = sum (tau - mean)^2 / s^2`."""
    tau, low, high = (np.array([own[name] for own in facts]) for name in ("tau", "tau_lo", "tau_hi"))
    weight = 1 / np.square(np.maximum((high - low) / ERRORS, EXACT * np.abs(tau).max()))
    spread = float((weight * np.square(tau - (weight @ tau) / weight.sum())).sum())
    return float(chi2.sf(spread, len(tau) - 1)) if len(tau) > 1 else 1.0
