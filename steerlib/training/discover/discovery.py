"""Which latent moves which: proposals from random ablations, or from readings alone.

z  readings [units, latents]     x  of the parents     y  of the children

Every latent of a level is regressed on its candidates in the levels before. *Randomised*: `x` and `y` are what ablations at
random changed, so that effects are causal whatever else moves both. *Observational*: they are readings, and effects positive.
*Independence*: readings too, but candidates are tested, not fitted; for some hundreds of latents.
"""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import diags, hstack

from ...bank.concept_bank import ConceptBank
from ...bank.concepts import Concept
from ...graph.causal_graph import CausalGraph, Edge
from .confirm import Confirmation, Pair, adjusted, confirmed
from .conjunctions import parts_of_wholes
from .independence import Test, by_independence, fisher_z
from .minimality import without_echoes
from .regress import Fit, Rows, fitted
from .rows import ABLATED, Folder, Level, ablated_at_random, observed
from .screen import firing_together, pointing
from .systems import Codes, Contexts, System, csr, entries
from .verify import marked

Method = Literal["randomised", "observational", "independence"]
CHANGED = 0.05
"""Share of what a latent usually reads by which it has to change to count as changed."""


def eligible(z: Codes, rates: tuple[float, float]) -> NDArray[Any]:
    """Latents that fire neither too rarely to be tested nor all the time. Others are passive: no edge is looked for at them."""
    rate = np.bincount(z.indices, minlength=z.shape[1]) / z.shape[0]
    return (rate >= rates[0]) & (rate <= rates[1])


def proposed(
    system: System,
    seen: Mapping[str, Level],
    contexts: Contexts,
    *,
    method: Method = "randomised",
    skips: bool = False,
    test: Test | None = None,
    environments: Sequence[Any] | None = None,
) -> dict[tuple[str, str], Fit]:
    """A fit for every level but the first, and the levels it was fitted to; with `skips` also the ones two levels before."""
    names, found = list(system.levels), {}
    for k in range(1, len(names)):
        sources = names[max(0, k - 1 - skips) : k]
        rows = rows_of(system, seen, sources, names[k], contexts, method)
        if method == "independence":
            places = None if environments is None else np.asarray(environments)[contexts][system.owners(contexts)].tolist()
            fit = by_independence(rows, test or fisher_z(), places)
        else:
            fit = fitted(rows, signed=method == "randomised", centred=method == "observational")
        start = 0
        for source in sources:
            size = system.levels[source]
            found[source, names[k]] = _heard(fit, slice(start, start + size), seen[source].z, seen[names[k]].z)
            start += size
    return found


def _heard(fit: Fit, rows: slice, parents: Codes, children: Codes) -> Fit:
    """The effects of some parents, without echoes."""
    whole = fit.effects[rows]
    effects = without_echoes(whole, parents, children)
    return fit._replace(effects=effects, echoes=csr(whole - effects))


def rows_of(
    system: System, seen: Mapping[str, Level], sources: list[str], child: str, contexts: Contexts, method: Method
) -> Rows:
    """The regression of a level on others."""
    own, changes = seen[child], method == "randomised"
    x = [
        csr(hstack([system.carried(route, seen[s].x if changes else seen[s].z, contexts) for s in sources]))
        for route in system.routes
    ]
    candidates = []
    for source in sources:
        near = csr((own.z.shape[1], seen[source].z.shape[1]), dtype=bool)
        for route in system.routes:
            near = near + firing_together(system.carried(route, seen[source].z, contexts), own.z)
            if changes:
                near = near + firing_together(system.carried(route, seen[source].x, contexts), _changed(own), least=2, lift=1.0)
        if (weights := system.weights(source, child)) is not None:
            near = near + pointing(weights)
        later, earlier = (diags(eligible(z, system.rates).astype(np.float32)) for z in (own.z, seen[source].z))
        usable = later @ near @ earlier
        candidates.append(csr(usable))
    return Rows(tuple(x), own.y if changes else own.z, csr(hstack(candidates)))


def _changed(level: Level) -> Codes:
    """Where a level's latents changed by more than a little."""
    usual = np.asarray(level.z.sum(0)).ravel() / np.maximum(np.bincount(level.z.indices, minlength=level.z.shape[1]), 1)
    return entries(level.y, np.abs(level.y.data) > CHANGED * usual[level.y.indices])


class Discovery(NamedTuple):
    """A graph over latents named `level/index`, and how it came about. Effects are in the units of the readings."""

    graph: CausalGraph
    proposed: int
    untested: int
    refused: int
    """Edges that single ablations did not confirm; they are in no graph."""
    fits: Mapping[tuple[str, str], Fit]
    passive: Mapping[str, int]
    """Latents of each level that took no part, since they fire hardly ever or nearly always."""

    @property
    def echoes(self) -> list[tuple[str, str]]:
        """Edges that were dropped because they are explained by a correlated neighbour of the later latent."""
        ends = ((pair, fit.echoes.nonzero()) for pair, fit in self.fits.items() if fit.echoes is not None)
        return [(f"{src}/{a}", f"{dst}/{b}") for (src, dst), (p, c) in ends for a, b in zip(p, c, strict=True)]


def discover(
    system: System,
    *,
    method: Method = "randomised",
    skips: bool = False,
    held_out: float = 0.25,
    verify: Collection[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
    test: Test | None = None,
    environments: Sequence[Any] | None = None,
    accelerator: Any = None,
) -> Discovery:
    """Find and verify the causal graph of a system.

    Args:
        method: How edges are proposed from the first contexts; see above.
        skips: Also look for edges over a level: effects that are there while the level in between keeps its readings.
        held_out: Share of the contexts, the last ones, in which each parent is ablated alone.
        verify: Parents to ablate, by `level/index`; edges of others stay `randomised`. None: all.
        folder: Keeps what was run; the same call goes on from there.
        accelerator: Accelerate's; its processes share the runs through `folder`.
        test: The test of method `independence` (default: causal-learn's Fisher z; extra `graph`).
        environments: What each context belongs to, for example its set of prompts (`Edge.everywhere`); tests condition on it.

    Raises `BadRecipe` where `folder` holds a graph of other settings.
    """
    settings = {"method": method, "skips": skips, "share": ABLATED, "held_out": held_out, "seed": seed, "contexts": len(system)}
    settings |= {} if verify is None else {"verify": sorted(verify)}
    kept = Folder(None if folder is None else Path(folder), settings | {"levels": dict(system.levels)}, accelerator)
    first, last = np.split(np.arange(len(system)), [len(system) - int(len(system) * held_out)])
    levels = ablated_at_random(system, first, kept, seed=seed)
    fits = proposed(system, levels, first, method=method, skips=skips, test=test, environments=environments)
    seen, results = observed(system, last, kept), {}
    for (src, dst), fit in fits.items():
        only = None if verify is None else {int(own.rpartition("/")[2]) for own in verify if own.rpartition("/")[0] == src}
        results[src, dst] = confirmed(Pair(system, last, seen, src, dst, fit.effects), kept, seed=seed, only=only)
    found = _judged(fits, results, method)._replace(passive=_passive(system, {name: own.z for name, own in levels.items()}))
    whole = found.graph
    return found if environments is None else found._replace(graph=marked(system, whole, environments, last, kept, seed=seed))


def _passive(system: System, read: Mapping[str, Codes]) -> dict[str, int]:
    """How many latents take no part."""
    return {name: int((~eligible(z, system.rates)).sum()) for name, z in read.items()}


def _judged(fits: Mapping[tuple[str, str], Fit], results: Mapping[tuple[str, str], Confirmation], method: Method) -> Discovery:
    """The edges that passed, and those that could not be tested."""
    p = adjusted(np.concatenate([found.p for found in results.values()]))
    edges, refused, start = [], 0, 0
    for (src, dst), fit in fits.items():
        found, left = results[src, dst], fit.effects.todok()
        q = p[start : start + len(found.p)]
        for i, (parent, child, holds) in enumerate(zip(found.parent, found.child, found.holds(q), strict=True)):
            weight = float(left.pop((parent, child)))
            refused += not holds
            if holds:
                edges.append(Edge(src=f"{src}/{parent}", dst=f"{dst}/{child}", weight=weight, **found.facts(i, float(q[i]))))
        start += len(q)
        evidence = "randomised" if method == "randomised" else "observed"
        edges += [Edge(src=f"{src}/{a}", dst=f"{dst}/{b}", weight=float(w), evidence=evidence) for (a, b), w in left.items()]
    whole = sum(fit.effects.nnz for fit in fits.values())
    return Discovery(CausalGraph(edges), whole, sum(edge.n_verify == 0 for edge in edges), refused, fits, {})


def composition(system: System, read: Mapping[str, Codes] | None = None) -> Discovery:
    """Which latents of a level are parts of which of the level before: relation `selection`, from readings alone.

    Wholes are selected by their parts, and parts of one whole come together without an edge between them; so each whole is
    told by its parts, against the order of generation, and by no more of them than it takes ([conjunctions.py]). `weight` is
    what a part adds to the log-likelihood of the whole, nats a unit; necessity `1 - P(whole | no part) / P(whole | part)`,
    sufficiency `P(whole | part)`. `read`: what all contexts read, where that is known.
    """
    read = observed(system, np.arange(len(system)), Folder(None, {})) if read is None else read
    usable = {name: eligible(z, system.rates) for name, z in read.items()}
    edges = [
        edge
        for whole, part in pairwise(system.levels)
        for edge in _parts(parts_of_wholes(read[part], read[whole], (usable[part], usable[whole])), read, part, whole)
    ]
    return Discovery(CausalGraph(edges), len(edges), len(edges), 0, {}, _passive(system, read))


def _parts(gains: Codes, read: Mapping[str, Codes], part: str, whole: str) -> Iterator[Edge]:
    """The edges from parts to wholes, and how often the one is there without the other."""
    fires = [entries(read[name], np.ones(read[name].nnz)) for name in (part, whole)]
    often, n = [np.asarray(z.sum(0)).ravel() for z in fires], fires[0].shape[0]
    both = csr((fires[0].T @ fires[1]).multiply(gains != 0)).todok()
    for (a, b), gain in gains.todok().items():
        together = both.get((a, b), 0.0)
        given, without = together / often[0][a], (often[1][b] - together) / (n - often[0][a])
        yield Edge(
            src=f"{part}/{a}",
            dst=f"{whole}/{b}",
            weight=float(gain),
            relation="selection",
            evidence="observed",
            necessity=float(1 - without / max(given, 1e-12)),
            sufficiency=float(given),
        )


def with_graph(bank: ConceptBank, graph: CausalGraph) -> ConceptBank:
    """The bank with a graph over its latents, whose levels are its encoders. Effects are converted to units of the concepts;
    latents that were not listed among the concepts are added."""
    ends = {end: bank[end] for edge in graph.edges for end in (edge.src, edge.dst)}
    concepts = {**bank.concepts, **{concept.name: concept for concept in ends.values()}}
    edges = [_in_units(edge, ends[edge.src], ends[edge.dst]) for edge in graph.edges]
    return bank.with_concepts(list(concepts.values()), graph=CausalGraph(edges))


def _in_units(edge: Edge, src: Concept, dst: Concept) -> Edge:
    """`weight` and `tau` are of one unit of the one, in units of the other."""
    if edge.relation == "selection":  # its weight is in nats
        return replace(edge, src=src.name, dst=dst.name)
    figures = {name: getattr(edge, name) for name in ("weight", "tau", "tau_lo", "tau_hi")}
    scaled = {name: None if value is None else value * src.unit / dst.unit for name, value in figures.items()}
    return replace(edge, src=src.name, dst=dst.name, **scaled)
