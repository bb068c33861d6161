"""What moving each concept does to answers: it is moved alone, and a scorer reads answers to the same requests.

d  by how much more answers show each outcome where a concept is moved, [M requests, O outcomes]     tau  that by unit
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...bank.concept_bank import ConceptBank
from ...evaluation.comparison import Condition, answer
from ...evaluation.text import Judge
from ...graph.causal_graph import CausalGraph, Edge
from ...graph.edge import ANSWERS
from .concept_graph import Moved
from .confirm import FDR, adjusted, effects
from .text_graph import Foretold


def moved(
    model: Any, tokenizer: Any, bank: ConceptBank, names: Sequence[str], prompts: Sequence[str], judge: Judge, *, seeds: int = 2
) -> list[Moved]:
    """Each concept moved alone by its useful amount, and what that did to sampled answers: by prompt, a mean over `seeds`, in
    logits of the judge (`Judge.evidence`), an outcome for each concept that it learned from texts."""
    edits = {name: {name: bank[name].useful or 0.0} for name in names}
    conditions = [Condition(name=""), *(Condition(name=name, bank=bank, edits=own) for name, own in edits.items())]
    texts = answer(model, tokenizer, conditions, prompts, judge, seeds=range(seeds)).texts
    flat = [text for by_seed in texts for by_prompt in by_seed for text in by_prompt]
    z = judge.evidence(flat).reshape(len(conditions), seeds, len(prompts), -1).mean(1)
    return [Moved(name, edits[name][name], own - z[0]) for name, own in zip(names, z[1:], strict=True)]


def answered(moves: Sequence[Moved], outcomes: Sequence[str]) -> CausalGraph:
    """Edges from each concept to the outcomes that it moves, `answers:<outcome>`: a 95 % interval without 0, by bootstrap over
    requests, and 5 % false among all that are found. They are total effects: whatever lies between is not known.

    Args:
        moves: concepts that were moved alone, with their amounts and what that did.
        outcomes: names of the columns of `d`: what a scorer tells, such as the names of a judge's concepts.

    >>> d = np.random.default_rng(0).normal((2.0, 0.0), 0.1, (24, 2))
    >>> [(edge.dst, round(edge.effect, 1)) for edge in answered([Moved("wine", 2.0, d)], ["wine", "chess"]).answers]
    [('answers:wine', 1.0)]
    """
    found = [effects(own.d, np.full(len(own.d), own.amount)) for own in moves]
    q = adjusted(np.concatenate([np.empty(0), *(p for *_, p in found)])).reshape(-1, len(outcomes))
    made = []
    for own, (tau, low, high, _), adj in zip(moves, found, q, strict=True):
        for k in np.flatnonzero((adj <= FDR) & ((low > 0) | (high < 0))).tolist():
            told = {"weight": tau[k], "tau": tau[k], "tau_lo": low[k], "tau_hi": high[k], "p_adj": adj[k]}
            facts: dict[str, Any] = {name: float(value) for name, value in told.items()}
            facts |= {"n_verify": len(own.d), "relation": "total", "evidence": "verified"}
            made.append(Edge(src=own.name, dst=ANSWERS + outcomes[k], **facts))
    return CausalGraph(made)


def foretold(graph: CausalGraph, moves: Iterable[Moved], outcomes: Sequence[str], *, whole: bool = False) -> list[Foretold]:
    """Each pair of a moved concept and an outcome of another name (with `whole`, also of its own), with what the graph says of
    it, 0 where it has no edge, beside what happened to requests that the graph was not made from."""
    rows = []
    for own in moves:
        said: Mapping[str, float] = graph.forecast({own.name: own.amount})
        for k, outcome in enumerate(outcomes):
            if whole or outcome != own.name:
                change: NDArray[np.float64] = np.full(len(own.d), said.get(ANSWERS + outcome, 0.0))
                edge = Edge(src=own.name, dst=ANSWERS + outcome, weight=0.0, relation="total")
                rows.append(Foretold("", edge, False, change, own.d[:, k]))
    return rows
