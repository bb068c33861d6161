"""What follows from what in the scenes bank: each lever is moved alone, and judges say which values of other factors the
pictures then show more, or less. The truth is known, so every edge can be marked.

`PYTHONPATH=scripts python -m scenes.graph BANK …` holds the graphs of banks, however they were found, against the truth.

a -> b  levers of different factors     d  change of b's share of a picture, [M, B]     M  scenes
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from tqdm.auto import tqdm

from scenes import measures, world
from scenes.experiment import Edits, Experiment, randomised
from scenes.judges import Readings
from scenes.measures import Cause, every
from steerlib.bank.concept_bank import ConceptBank
from steerlib.errors import CorruptBank
from steerlib.evaluation.report import markdown
from steerlib.graph.causal_graph import CausalGraph, Edge
from steerlib.steering.interventions import Add
from steerlib.training.discover.confirm import FDR, adjusted, effects

LEAST = 0.2
"""Change of share, at a lever's own dose, from which a value follows a lever; of 0.1, 0.2 and 0.3, chosen on other scenes."""
TRUE = 4000
"""Scenes from which true effects are computed."""
TESTED = {
    "scene": "sunset", "side": "left", "background": "pale", "ground": "stone", "shape": "circle", "hue": "blue",
    "size": "large", "texture": "striped",
}  # fmt: skip
"""The value of each factor whose directions are also dealt at random."""
DEALT = 200
"""Graphs dealt at random, of which the mean is taken."""


class Followed(NamedTuple):
    """The edges, with effects per unit of the lever, and how many were left out that close a cycle of stronger ones."""

    graph: CausalGraph
    circles: int


def with_followers(experiment: Experiment, n: int) -> ConceptBank:
    """The bank with its graph, and in `provenance["graph"]` how it stands beside the truth and beside chance."""
    (found, circles), true = followed(experiment, n), truth()
    random = followed(experiment, n, causes=[Cause(*pair) for pair in TESTED.items()], random=True).graph
    bank = experiment.bank.with_concepts(list(experiment.bank.concepts.values()), graph=found)
    facts = {"scenes": n, "circles": circles, "levers": marked(found, true), "random directions": marked(random, true)}
    bank.provenance = {**experiment.bank.provenance, "graph": facts | {"chance": shuffled(found, true)}}
    return bank


def share(read: Readings, cause: Cause) -> Float[NDArray, " M"]:
    """How much of each picture shows a value: of an object's factor, the share of its objects."""
    shows = (read[cause.factor] == cause.index).float()
    if cause.factor in measures.WHOLE:
        return shows.numpy()
    there = (read["shape"] > 0).float()
    return ((shows * there).sum(-1) / there.sum(-1).clamp(min=1)).numpy()


def followed(experiment: Experiment, n: int, *, causes: Sequence[Cause] | None = None, random: bool = False) -> Followed:
    """Move each lever of which an effect was measured, or some, at its own dose in the same `n` scenes; `random`: directions as
    long as its own in its place."""
    causes = [cause for cause in experiment.levers() if causes is None or cause in causes]
    asked = world.draw(n, seed=(experiment.seed, 53, 9))
    captions = world.captions(asked.factors, seed=(experiment.seed, 53, 9))
    before, found = experiment.judge.read(experiment.draw(captions)), []
    for cause in tqdm(causes, desc="what follows"):
        lever = experiment.bank[cause.value]
        amount = lever.effects["amount"]
        edits: Edits = {cause.value: Add(amount)} if random else experiment.lever(cause)
        bank = randomised(experiment.bank, lever, 0) if random else None
        after = experiment.judge.read(experiment.draw(captions, edits, bank))
        others = [other for other in every() if other.factor != cause.factor]
        d = np.stack([share(after, other) - share(before, other) for other in others], 1)
        found.append((cause, others, d, effects(d, np.full(n, amount))))
    return _joined(found, n)


def _joined(found: Sequence[tuple[Cause, Sequence[Cause], NDArray[Any], Any]], n: int) -> Followed:
    """Those that hold among all that were tested, the strongest first, without circles."""
    q = adjusted(np.concatenate([own[3] for *_, own in found]))
    edges, start = [], 0
    for cause, others, d, (tau, low, high, _) in found:
        for i, other in enumerate(others):
            holds = q[start + i] <= FDR and abs(d[:, i].mean()) >= LEAST and not low[i] <= 0 <= high[i]
            if holds:
                edge = Edge(
                    src=cause.value,
                    dst=other.value,
                    weight=float(tau[i]),
                    evidence="verified",
                    tau=float(tau[i]),
                    tau_lo=float(low[i]),
                    tau_hi=float(high[i]),
                    n_verify=n,
                    p_adj=float(q[start + i]),
                )
                edges.append((abs(float(d[:, i].mean())), edge))
        start += len(others)
    kept: list[Edge] = []
    for _, edge in sorted(edges, key=lambda pair: -pair[0]):
        try:
            CausalGraph([*kept, edge])
        except CorruptBank:
            continue
        kept.append(edge)
    return Followed(CausalGraph(kept), len(edges) - len(kept))


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
    found = {bank.name: beside_truth(bank, true) for bank in banks}
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
