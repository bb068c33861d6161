"""`do="spare"`: edits planned from the bank's graph so that answers show no more of other concepts.

T_ab  what a unit of concept a does to the outcome of concept b     S  an edited concept, and those that it carries along
amounts a with `sum_s T_st a_s` as without sparing for the edited t, and 0 for each other one of S; of several edits, the sum
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..bank import ConceptBank
from ..errors import Unanswerable
from ..graph.causal_graph import CausalGraph
from ..graph.edge import ANSWERS
from ..graph.questions import smallest_edit
from .interventions import Add, Intervention, each

CARRIED = 0.1
"""Share of the effect on the edited concept's own outcome from which another one is carried along."""


def spared(bank: ConceptBank, wanted: Mapping[Any, Intervention]) -> dict[Any, Intervention]:
    """The edits, with amounts of the concepts beside them that they carry along, within the same scope."""
    adds = {bank[name].name: edit for name, edit in wanted.items() if isinstance(edit, Add) and edit.unit == "concept"}
    first = next(iter(adds.values()), None)
    if len(adds) < len(wanted) or any(edit.scope != first.scope for edit in adds.values() if first is not None):
        raise Unanswerable(
            "do='spare' plans amounts of concepts that act together: give it numbers or sl.Add alone, in units, all with "
            "the same when, tokens, branch, gate and mask"
        )
    for name in adds:
        if bank.graph.measured(name, ANSWERS + name) is None:
            raise Unanswerable(
                f"do='spare' needs to know what {name!r} does to answers, and the graph of bank {bank.name!r} has no edge "
                f"{name!r} -> {ANSWERS + name!r}; measure it (steerlib.training.discover.answered) or use do='model'"
            )
    if first is None:
        return dict(wanted)
    rows, found = max(len(each(edit.amount)) for edit in adds.values()), dict[str, Any]()
    for name, edit in adds.items():
        for row, amount in enumerate(each(edit.amount) * (rows // len(each(edit.amount)))):
            for other, own in _still(bank.graph, name, amount).items():
                found.setdefault(other, [0.0] * rows)[row] += own
    return {name: replace(adds.get(name, first), amount=own if rows > 1 else own[0]) for name, own in found.items()}


def _still(graph: CausalGraph, name: str, amount: float) -> dict[str, float]:
    """Amounts that do to answers of one concept what this amount of it would, and leave what it carries along as it is."""
    told = graph.forecast({name: amount})
    own = told.get(ANSWERS + name, 0.0)
    carried = [other for other, change in told.items() if change * own > CARRIED * own**2 and other.startswith(ANSWERS)]
    beside = [other for one in carried if graph.measured(other := one.removeprefix(ANSWERS), one) and other != name]
    if not beside:
        return {name: amount}
    among, still = [name, *beside], [ANSWERS + other for other in beside]
    found = smallest_edit(graph, {ANSWERS + name: own}, among=among, still=still, most=len(among))
    if found is None:
        raise Unanswerable(f"no amounts of {', '.join(map(repr, among))} leave answers as they are; use do='model'")
    return {other: found.get(other, 0.0) for other in among}
