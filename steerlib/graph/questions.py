"""Questions to a graph, which networkx answers; it comes with torch. Graphs go to networkx and back without loss.

X, Y  concepts     Z  what is held or adjusted for
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch

from ..errors import BadBank, UnknownConcept
from .causal_graph import CausalGraph, Edge

if TYPE_CHECKING:
    from networkx import DiGraph, MultiDiGraph


def to_networkx(graph: CausalGraph) -> "MultiDiGraph":
    """An edge for each of the graph, its relation as key, with all that is known of it.

    >>> to_networkx(sl.CausalGraph([sl.Edge(src="a", dst="b", weight=0.5)])).edges["a", "b", "compute"]["weight"]
    0.5
    """
    from networkx import MultiDiGraph

    made = MultiDiGraph()
    for edge in graph.edges:
        known = {name: value for name, value in asdict(edge).items() if value is not None and name not in ("src", "dst")}
        made.add_edge(edge.src, edge.dst, key=edge.relation, **known)
    return made


def from_networkx(graph: Any) -> CausalGraph:
    """From a directed graph of networkx, for example one that `networkx.read_graphml` gives. What its edges say that `Edge`
    does not know is left out; an edge without `weight` is refused (`BadBank`).

    >>> edge = sl.Edge(src="a", dst="b", weight=0.5, evidence="observed", necessity=0.25)
    >>> from_networkx(to_networkx(sl.CausalGraph([edge]))).edges == (edge,)
    True
    """
    known = Edge.__dataclass_fields__
    made = []
    for src, dst, said in graph.edges(data=True):
        if "weight" not in said:
            raise BadBank(f"edge {src!r} -> {dst!r}: expected a weight, the change of {dst!r} per unit of {src!r}, got none")
        facts = {name: value for name, value in said.items() if name in known and name not in ("src", "dst")}
        made.append(Edge(src=str(src), dst=str(dst), **facts))
    return CausalGraph(made)


def paths(graph: CausalGraph, src: str, dst: str) -> list[tuple[str, ...]]:
    """All ways from a concept to another, by the names along them, the shortest first.

    >>> graph = sl.CausalGraph(sl.Edge(src=a, dst=b, weight=1.0) for a, b in ("ab", "bc", "ac"))
    >>> paths(graph, "a", "c")
    [('a', 'c'), ('a', 'b', 'c')]
    """
    from networkx import all_simple_paths

    found = all_simple_paths(_causes(graph, src, dst), src, dst)
    return sorted((tuple(path) for path in found), key=lambda path: (len(path), path))


def separator(
    graph: CausalGraph, x: Collection[str], y: Collection[str], *, among: Iterable[str] | None = None
) -> set[str] | None:
    """A smallest set of other concepts, or of some `among` them, given which two sets of concepts tell nothing of each other
    (d-separation, by van der Zander & Liśkiewicz 2020). None where there is no such set. A set is smallest if no concept of it
    can be left out.

    >>> graph = sl.CausalGraph(sl.Edge(src=a, dst=b, weight=1.0) for a, b in ("ab", "bc"))
    >>> separator(graph, {"a"}, {"c"})
    {'b'}
    """
    from networkx import find_minimal_d_separator

    whole = _causes(graph, *x, *y)
    return find_minimal_d_separator(whole, {*x}, {*y}, restricted=({*whole} if among is None else {*among}) - {*x, *y})


def adjustment(graph: CausalGraph, cause: str, effect: str, *, among: Iterable[str] | None = None) -> set[str] | None:
    """Concepts, or some `among` those, to adjust for, so that what data say of `effect` given `cause` is the effect of doing it
    (adjustment criterion, Perković et al. 2018); none of them can be left out. None where there is no such set.

    >>> graph = sl.CausalGraph(sl.Edge(src=a, dst=b, weight=1.0) for a, b in ("za", "zb", "ab"))
    >>> adjustment(graph, "a", "b")
    {'z'}
    """
    from networkx import ancestors, descendants, find_minimal_d_separator

    whole = _causes(graph, cause, effect)
    along = descendants(whole, cause) & {*ancestors(whole, effect), effect}
    forbidden = along.union(*(descendants(whole, name) for name in along), {cause, effect})
    back = whole.copy()
    back.remove_edges_from([(cause, name) for name in along if whole.has_edge(cause, name)])
    return find_minimal_d_separator(back, cause, effect, restricted=({*whole} if among is None else {*among}) - forbidden)


def blocking(graph: CausalGraph, src: str, dst: str) -> set[str] | None:
    """The fewest concepts to hold so that a concept moves another no more, for `hold=` of `sl.steer`. None where it moves it
    directly.

    >>> graph = sl.CausalGraph(sl.Edge(src=a, dst=b, weight=1.0) for a, b in ("ab", "ac", "bd", "cd", "de"))
    >>> blocking(graph, "a", "e")
    {'d'}
    """
    from networkx import minimum_node_cut

    whole = _causes(graph, src, dst)
    if whole.has_edge(src, dst):
        return None
    return {*minimum_node_cut(whole, src, dst)} if dst in graph.descendants(src) else set()


def smallest_edit(
    graph: CausalGraph,
    goal: Mapping[str, float],
    *,
    among: Iterable[str] | None = None,
    still: Iterable[str] = (),
    most: int = 4,
    error: float = 1e-6,
) -> dict[str, float] | None:
    """Changes of as few concepts as possible whose forecast reaches a goal; of several as few, the smallest. None if none do.

    Args:
        goal: wanted changes by name, in units.
        among: concepts that may be changed. Default: causes of the goal, none of it itself.
        still: concepts that are not to move.
        most: concepts changed, at most.
        error: how far the forecast may lie from the goal, in units.

    Effects that nothing measured (see `CausalGraph.forecast`) count as products.

    >>> edges = [sl.Edge(src=a, dst=b, weight=w) for a, b, w in (("a", "c", 2.0), ("b", "c", 1.0), ("a", "d", 1.0))]
    >>> smallest_edit(sl.CausalGraph(edges), {"c": 1.0})
    {'a': 0.5}
    >>> smallest_edit(sl.CausalGraph(edges), {"c": 1.0}, still=["d"])
    {'b': 1.0}
    """
    wanted = {**dict.fromkeys(still, 0.0), **goal}
    causes = [n for n in _causes(graph, *goal) if n not in goal and not {*graph.descendants(n)}.isdisjoint(goal)]
    told = {name: graph.forecast({name: 1.0}, unmeasured=True) for name in sorted(causes if among is None else among)}
    for size in range(1, most + 1):
        found = [solved for some in combinations(told, size) if (solved := _solved({n: told[n] for n in some}, wanted, error))]
        if found:
            return min(found, key=lambda own: sum(amount**2 for amount in own.values()))
    return None


def _solved(told: Mapping[str, Mapping[str, float]], wanted: Mapping[str, float], error: float) -> dict[str, float] | None:
    """Amounts of some changes that together do what is wanted, from what one unit of each does."""
    effects = torch.tensor([[own.get(name, 0.0) for own in told.values()] for name in wanted], dtype=torch.float64)
    goal = torch.tensor([*wanted.values()], dtype=torch.float64)
    amounts = torch.linalg.lstsq(effects, goal[:, None], driver="gelsd").solution[:, 0]
    reached = float((effects @ amounts - goal).abs().max()) <= error
    return dict(zip(told, amounts.tolist(), strict=True)) if reached else None


def _causes(graph: CausalGraph, *named: str) -> "DiGraph":
    """Concepts and their direct causes, as far as they are known; raises where it lacks a name."""
    from networkx import DiGraph

    made = DiGraph((src, dst) for dst in graph.names for src in graph.parents(dst))
    made.add_nodes_from(graph.names)
    if missing := [name for name in named if name not in made]:
        raise UnknownConcept(f"the graph has no cause or effect {missing[0]!r}")
    return made
