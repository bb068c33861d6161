"""What follows from what in scenes: the truth is known, so every edge of a graph can be marked.

`PYTHONPATH=scripts python -m scenes.graph BANK …` holds the graphs of banks, however they were found, against the truth.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scenes import world
from scenes.measures import Cause, every
from steerlib.bank.concept_bank import ConceptBank
from steerlib.evaluation.report import markdown
from steerlib.graph.causal_graph import CausalGraph

LEAST = 0.2
"""Change of share from which a value follows another one."""
TRUE = 4000
"""Scenes from which true effects are computed."""
DEALT = 200
"""Graphs dealt at random, of which the mean is taken."""


def truth() -> Mapping[tuple[str, str], float]:
    """By lever and value of another factor, the true change of its share where the one is set."""
    drawn, found = world.draw(TRUE, seed=(0, 54)), {}
    for cause in every():
        after = world.redraw(drawn, cause.sets).factors
        for other in every():
            if other.factor != cause.factor:
                changes = [_shows(after, name, other) - _shows(drawn.factors, name, other) for name in other.sets]
                found[cause.value, other.value] = float(np.mean(changes))
    return found


def _shows(factors: Mapping[str, NDArray[Any]], name: str, cause: Cause) -> float:
    return float((factors[name] == world.VALUES[name].index(cause.value)).mean())


def marked(graph: CausalGraph, true: Mapping[tuple[str, str], float]) -> dict[str, Any]:
    """Edges beside the truth: right are those of a true effect of the same sign, due are true effects as large as an edge's."""
    right = [edge for edge in graph.edges if true[edge.src, edge.dst] * edge.effect > 0]
    due = {ends for ends, effect in true.items() if abs(effect) >= LEAST}
    hit = {(edge.src, edge.dst) for edge in right} & due
    return {
        "edges": len(graph),
        "right": len(right),
        "precision": round(len(right) / max(1, len(graph)), 4),
        "due": len(due),
        "recall": round(len(hit) / max(1, len(due)), 4),
        "wrong": [f"{edge.src} → {edge.dst}" for edge in graph.edges if edge not in right],
    }


def shuffled(graph: CausalGraph, true: Mapping[tuple[str, str], float]) -> float:
    """Precision of as many edges between levers and values dealt at random, signs kept; the mean over draws."""
    rng, pairs = np.random.default_rng(0), list(true)
    signs, found = [np.sign(edge.effect) for edge in graph.edges], []
    for _ in range(DEALT):
        drawn = rng.choice(len(pairs), len(signs), replace=False)
        found.append(np.mean([true[pairs[i]] * sign > 0 for i, sign in zip(drawn, signs, strict=True)]) if signs else 0.0)
    return round(float(np.mean(found)), 4)


def beside_truth(bank: ConceptBank, true: Mapping[tuple[str, str], float]) -> dict[str, Any]:
    """The edges of a bank between values of different factors, marked, beside chance; of one factor they are counted alone: all
    its values take each other away, and nothing says which is the cause."""
    edges = [edge for edge in bank.graph.edges if edge.relation == "compute"]
    apart = CausalGraph(edge for edge in edges if (edge.src, edge.dst) in true)
    return {**marked(apart, true), "of one factor": len(edges) - len(apart), "dealt": shuffled(apart, true)}


def table(banks: Sequence[ConceptBank]) -> str:
    """Graphs of banks beside the truth, as Markdown."""
    true = truth()
    found = {f"{bank.name} ({bank.folder or 'not saved'})": beside_truth(bank, true) for bank in banks}
    rows = [
        (
            name,
            *(str(own[what]) for what in ("edges", "right")),
            f"{own['precision']:.0%}",
            f"{own['dealt']:.0%}",
            str(own["due"]),
            f"{own['recall']:.0%}",
            str(own["of one factor"]),
        )
        for name, own in found.items()
    ]
    wrong = [f"Not in the truth, {name}: {', '.join(own['wrong']) or 'none'}." for name, own in found.items()]
    head = "bank | edges | right | precision | of as many dealt at random | due | recall | edges of one factor, not marked"
    return "\n\n".join([markdown(head, rows), *wrong])


if __name__ == "__main__":
    print(table([ConceptBank.from_pretrained(name) for name in sys.argv[1:]]))
