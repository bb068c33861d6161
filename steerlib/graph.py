"""Which concept moves which: a directed acyclic graph with an effect on every edge."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

from .errors import CorruptBank


@dataclass(frozen=True, kw_only=True)
class Edge:
    """One concept's effect on another, measured by intervention."""

    src: str
    dst: str
    weight: float
    """Change of `dst` per unit change of `src`, both in units of the concept, with no other concept between them."""


class CausalGraph:
    """Concepts joined by edges that an intervention confirmed, in the order of generation (relation `compute`)."""

    def __init__(self, edges: Iterable[Edge] = ()):
        self.edges = tuple(sorted(edges, key=lambda edge: (edge.src, edge.dst)))
        self._parents: dict[str, dict[str, float]] = {}
        for edge in self.edges:
            parents = self._parents.setdefault(edge.dst, {})
            if edge.src in parents:
                raise CorruptBank(f"expected one edge {edge.src!r} -> {edge.dst!r}, got two")
            parents[edge.src] = edge.weight
            self._parents.setdefault(edge.src, {})
        try:
            self._order = tuple(TopologicalSorter(self._parents).static_order())
        except CycleError as error:
            raise CorruptBank(f"expected a graph without cycles, got {' -> '.join(error.args[1])}") from None

    def parents(self, name: str) -> Mapping[str, float]:
        """Direct causes of a concept, with their weights."""
        return self._parents.get(name, {})

    def descendants(self, name: str) -> tuple[str, ...]:
        """All that a concept moves, nearest causes first."""
        reached = {name}
        for concept in self._order:
            if reached & self.parents(concept).keys():
                reached.add(concept)
        return tuple(concept for concept in self._order if concept in reached - {name})

    def forecast(self, changes: Mapping[str, float], *, fixed: Iterable[str] = ()) -> dict[str, float]:
        """Changes of all concepts that follow from some, in units of the concept.

        A `fixed` concept passes its own change on but receives none: Pearl's do-operator for a linear model.
        """
        held = set(fixed)
        result = dict(changes)
        for concept in self._order:
            carried = sum(weight * result.get(parent, 0.0) for parent, weight in self.parents(concept).items())
            if concept not in held and carried:
                result[concept] = result.get(concept, 0.0) + carried
        return result

    def __len__(self) -> int:
        return len(self.edges)
