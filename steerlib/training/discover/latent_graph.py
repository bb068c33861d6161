"""The graph of a bank of latents by noise level: parts of wholes, from readings alone, and each tested by moving the whole.

Wholes are latents of the noisier of two levels, parts of the next one. Some pictures propose edges, others verify them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ...bank.concept_bank import ConceptBank
from ...graph.causal_graph import CausalGraph, Edge
from ..entries import LatentGraphRecipe
from .discovery import composition, with_graph
from .rows import Folder, observed
from .steered_pictures import Cleared, thresholds
from .systems import System
from .verify import Tested, verify_edges

Ends = tuple[str, str]
"""Names of a whole and a part."""


def graphed(bank: ConceptBank, first: System, second: System, recipe: LatentGraphRecipe, folder: Path) -> ConceptBank:
    """The bank with edges from parts to wholes (`selection`), by readings of the first pictures, with those from wholes to
    parts (`compute`) that moving the wholes in the second ones verified, and in `provenance["graph"]` how it came about, beside
    pairs dealt at random and levels of different pictures.

    `folder` keeps what was read and run, from which the same call goes on.
    """
    kept = Folder(folder / "read", {"contexts": len(first), "levels": dict(first.levels)})
    raw = observed(first, np.arange(len(first)), kept)
    limits = {name: thresholds(z) for name, z in raw.items()}
    system = Cleared(first, limits)
    read = {name: system.cleared(name, z) for name, z in raw.items()}
    found = composition(system, read).graph
    pairs = [(edge.dst, edge.src) for edge in found.edges]
    moved = best_named(bank, pairs, recipe.parents)
    asked = [ends for ends in pairs if ends[0] in moved]
    random = [*dealt(asked, {*pairs}, recipe.seed)]
    tests = [*asked, *random]
    tested = verify_edges(Cleared(second, limits), tests, folder=folder / "verified", seed=recipe.seed) if tests else []
    own, others = tested[: len(asked)], tested[len(asked) :]
    selected = with_graph(bank, found)
    verified = [one.edge for one in own if one.verdict == "verified"]
    made = selected.with_concepts([*selected.concepts.values()], graph=CausalGraph([*selected.graph.edges, *verified]))
    rng = np.random.default_rng([recipe.seed, 43])
    apart = composition(system, {name: z[rng.permutation(z.shape[0])] for name, z in read.items()}).graph
    facts = {
        "recipe": asdict(recipe),
        "first": len(first),
        "second": len(second),
        "levels": {f"{a} to {b}": account(a, b, found, own, others, apart) for a, b in pairwise(first.levels)},
    }
    made.provenance = {**bank.provenance, "graph": facts}
    return made


def best_named(bank: ConceptBank, pairs: Sequence[Ends], count: int) -> set[str]:
    """Of the wholes of each level, those that go best with a word of the prompts."""
    wholes = sorted({whole for whole, _ in pairs}, key=lambda name: (-bank[name].effects.get("correlation", 0.0), name))
    by: dict[str, list[str]] = {}
    for name in wholes:
        by.setdefault(bank[name].encoder, []).append(name)
    return {name for own in by.values() for name in own[:count]}


def dealt(asked: Sequence[Ends], pairs: set[Ends], seed: int) -> Iterator[Ends]:
    """As many pairs of the same wholes with parts of others."""
    rng = np.random.default_rng([seed, 47])
    parts = sorted({part for _, part in pairs})
    for whole in sorted({whole for whole, _ in asked}):
        own = [part for one, part in asked if one == whole]
        level = own[0].rpartition("/")[0]
        others = [part for part in parts if part.rpartition("/")[0] == level and (whole, part) not in pairs]
        for k in rng.permutation(len(others))[: len(own)]:
            yield whole, others[k]


def account(
    whole: str, part: str, found: CausalGraph, own: Sequence[Tested], others: Sequence[Tested], apart: CausalGraph
) -> dict[str, Any]:
    """Counts of edges from one level to the next."""

    def here(edge: Edge) -> bool:
        return {edge.src.rpartition("/")[0], edge.dst.rpartition("/")[0]} == {whole, part}

    def fared(tested: Sequence[Tested]) -> dict[str, int]:
        verdicts = [one.verdict for one in tested if here(one.edge)]
        known = {"verified": "verified", "refused": "refused", "few": "too few contexts"}
        return {name: verdicts.count(verdict) for name, verdict in known.items()}

    positive = sum(one.verdict == "verified" and here(one.edge) and one.edge.effect > 0 for one in own)
    counts = {"parts": sum(map(here, found.edges)), "shuffled": sum(map(here, apart.edges))}
    return {**counts, **fared(own), "positive": positive, "dealt": fared(others)}
