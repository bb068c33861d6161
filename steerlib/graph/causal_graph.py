"""Which concept moves which: a directed acyclic graph with an effect on every edge."""

from collections.abc import Iterable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any

import torch
from torch import Tensor

from ..errors import BadBank, CorruptBank
from .edge import ANSWERS, RELATIONS
from .edge import EVIDENCE as EVIDENCE
from .edge import Edge as Edge
from .forecasts import Forecast, above, adding_up, floors_of, interval, is_some


class CausalGraph:
    """Concepts joined by edges. Causes and forecasts follow those of the relations `compute` and `total`; of the others only
    `edges` tells.

    Effects that a context module learned (`context`) are learned pair by pair, so two concepts may move each other; other
    relations have no cycles.

    Args:
        edges: in any order; at most one for each pair and relation. Those to outcomes (`answers:nature`) are kept apart, in
            `answers`: forecasts tell of them, while nothing can be done to an outcome, or held there.

    Raises:
        CorruptBank: the edges of a relation other than `context` form a cycle, or one stands twice.

    >>> graph = sl.CausalGraph([sl.Edge(src="a", dst="b", weight=0.5), sl.Edge(src="b", dst="c", weight=2.0)])
    >>> graph.children("a"), graph.descendants("a")
    (('b',), ('b', 'c'))
    >>> graph.forecast({"a": 1.0})
    {'a': 1.0, 'b': 0.5}; over two edges or more, which nothing measured: c
    """

    def __init__(self, edges: Iterable[Edge] = ()):
        given = sorted(edges, key=lambda edge: (edge.relation, edge.src, edge.dst))
        self.edges = tuple(edge for edge in given if not edge.is_outcome)
        self.answers = tuple(edge for edge in given if edge.is_outcome)
        by = {relation: _by_ends(e for e in given if e.relation == relation) for relation in RELATIONS}
        _order(by["selection"])
        self._direct, self._total = by["compute"], by["total"]
        both = {name: {**self._direct.get(name, {}), **self._total.get(name, {})} for name in {**self._direct, **self._total}}
        self._order = _order(both)
        self._weights = adding_up(self._order, self._direct, self._total)

    @property
    def every(self) -> tuple[Edge, ...]:
        """Edges between concepts, and those to outcomes."""
        return self.edges + self.answers

    @property
    def names(self) -> tuple[str, ...]:
        """Concepts that cause others or are caused, and outcomes, causes before their effects."""
        return self._order

    def parents(self, name: str) -> Mapping[str, float]:
        """Direct causes of a concept by name, with their effects: units of the concept per unit of the cause. Where a total
        effect is known, it is what of that comes past the concept's other parents."""
        return self._weights.get(name, {})

    def children(self, name: str) -> tuple[str, ...]:
        """Names of the concepts, and outcomes, of which a concept is a direct cause."""
        return tuple(concept for concept in self._order if name in self.parents(concept))

    def followers(self, name: str) -> tuple[str, ...]:
        """Names of the concepts that a concept moves, as `descendants` tells them, without outcomes."""
        return tuple(child for child in self.descendants(name) if not child.startswith(ANSWERS))

    def descendants(self, name: str, *, fixed: Iterable[str] = ()) -> tuple[str, ...]:
        """Names of all concepts and outcomes that a concept moves, causes before their effects; nothing moves a `fixed` one."""
        reached, held = {name}, {*fixed}
        for concept in self._order:
            if concept not in held and not reached.isdisjoint(self.parents(concept)):
                reached.add(concept)
        return tuple(concept for concept in self._order if concept in reached - {name})

    def measured(self, src: str, dst: str, *, fixed: Iterable[str] = ()) -> Edge | None:
        """The edge whose effect is all that `src` does to `dst`: a total one, or a direct one beside which no other path leads
        there. None where nothing says how much that is."""
        held = {*fixed} - {src, dst}
        if total := self._total.get(dst, {}).get(src):
            between = held.intersection(self.descendants(src))
            return None if any(dst in self.descendants(name) for name in between) else total
        others = {*self.parents(dst)}.intersection(self.descendants(src, fixed=held))
        return None if others else self._direct.get(dst, {}).get(src)

    def forecast(
        self, changes: Mapping[str, float], *, given: Any = None, fixed: Iterable[str] = (), unmeasured: bool = False
    ) -> Forecast:
        """Changes of all concepts that follow from `changes` of some, by name, in units of each concept.

        Args:
            given: readings to start from: a tape (`sl.record`) of the bank's concepts, or readings of sparse latents by name in
                their units, numbers or tensors. No such latent falls below 0: one that reads 0 moves nothing down. Changes then
                have the shape of the readings; added to these they are the counterfactual for this prompt.
            fixed: concepts that pass their own change on but receive none: Pearl's do-operator for a linear model.
            unmeasured: also tell what nothing measured, as products of effects along all paths. Else such concepts are left
                out, and listed in `unmeasured` of the answer.

        Effects are means over texts in which the source fires. Totals and direct effects that are all there is between two
        concepts come with intervals, in `intervals` of the answer.
        """
        held, floors = frozenset(fixed), floors_of(given)
        moved = {name: above(change, floors.get(name)) for name, change in changes.items()}
        reached = {name: {*self.descendants(name, fixed=held)} for name, change in changes.items() if is_some(change)}
        intervals, far = {}, []
        for concept in self.names:
            carried = [moved[cause] * effect for cause, effect in self.parents(concept).items() if cause in moved]
            if concept in held or not any(map(is_some, carried)):
                continue
            moved[concept] = above(changes.get(concept, 0.0) + sum(carried), floors.get(concept))
            parts = {name: self.measured(name, concept, fixed=held) for name, own in reached.items() if concept in own}
            far += [concept] * (None in parts.values())
            if not floors and (found := interval(changes, concept, parts)):
                intervals[concept] = found
        return Forecast({name: own for name, own in moved.items() if unmeasured or name not in far}, intervals, far)

    def __len__(self) -> int:
        return len(self.edges)

    def to_tensors(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The columns of `graph.safetensors`, an entry an edge; ends are places among `names`. Edges to
        outcomes, which are no concepts, are not among them (`outcomes.jsonl`)."""
        line = {name: i for i, name in enumerate(names)}
        if missing := [end for edge in self.edges for end in (edge.src, edge.dst) if end not in line]:
            raise BadBank(f"the graph joins {missing[0]!r}, which is none of the bank's concepts; list it among them")
        told = ("src", "dst", "n_verify", "weight", *MEASURED)
        columns: dict[str, list[Any]] = {name: [getattr(edge, name) or 0 for edge in self.edges] for name in told}
        columns |= {end: [line[name] for name in columns[end]] for end in ("src", "dst")}
        columns |= {
            "relation": [RELATIONS.index(edge.relation) for edge in self.edges],
            "evidence": [EVIDENCE.index(edge.evidence) for edge in self.edges],
            "known": [sum(1 << i for i, name in enumerate(MEASURED) if getattr(e, name) is not None) for e in self.edges],
        }
        return {name: torch.tensor(column, dtype=COLUMNS[name]) for name, column in columns.items()}

    @classmethod
    def from_tensors(cls, columns: Mapping[str, Tensor], names: Sequence[str]) -> "CausalGraph":
        """From the columns of a file, which may come from a stranger, or from before there was more than a weight."""
        known = {name: column for name, column in columns.items() if name in COLUMNS}
        if not {"src", "dst", "weight"} <= known.keys():
            raise CorruptBank("graph.safetensors lacks ends or weights")
        numbers = {n: c.ndim == 1 and not c.is_complex() for n, c in known.items()}
        if bad := [n for n in known if not numbers[n] or known[n].is_floating_point() != COLUMNS[n].is_floating_point]:
            raise CorruptBank(f"graph.safetensors: expected columns of numbers, got others for {', '.join(bad)}")
        if len({len(column) for column in known.values()}) != 1:
            raise CorruptBank("graph.safetensors has columns of several lengths")
        rows = zip(*(column.tolist() for column in known.values()), strict=True)
        return cls(_edge(dict(zip(known, row, strict=True)), names) for row in rows)


MEASURED = ("tau", "tau_lo", "tau_hi", "necessity", "sufficiency", "p_adj", "same", "everywhere")
"""Figures that an edge may lack; the bits of the column `known` say which it has."""
COLUMNS: dict[str, torch.dtype] = {
    **dict.fromkeys(("src", "dst", "n_verify"), torch.int64),
    **dict.fromkeys(("relation", "evidence", "known"), torch.uint8),
    **dict.fromkeys(("weight", *MEASURED), torch.float32),
}
"""What a graph is written as and read from; other columns are left alone."""


def _edge(row: Mapping[str, Any], names: Sequence[str]) -> Edge:
    """One entry of the columns."""
    if not all(0 <= row[end] < len(names) for end in ("src", "dst")):
        raise CorruptBank("graph.safetensors has an edge to a concept that the bank does not have")
    relation, evidence = row.get("relation", 0), row.get("evidence", EVIDENCE.index("asserted"))
    if not (0 <= relation < len(RELATIONS) and 0 <= evidence < len(EVIDENCE)):
        raise CorruptBank(f"graph.safetensors has an edge of unknown relation or evidence: {relation}, {evidence}")
    figures = {name: row[name] for i, name in enumerate(MEASURED) if row.get("known", 0) >> i & 1 and name in row}
    figures |= {"everywhere": bool(figures["everywhere"])} if "everywhere" in figures else {}
    codes: Any = {"relation": RELATIONS[relation], "evidence": EVIDENCE[evidence], "n_verify": row.get("n_verify", 0)}
    try:
        return Edge(src=names[int(row["src"])], dst=names[int(row["dst"])], weight=row["weight"], **codes, **figures)
    except BadBank as error:
        raise CorruptBank(f"graph.safetensors: {error}") from None


def _by_ends(edges: Iterable[Edge]) -> dict[str, dict[str, Edge]]:
    """Edges by effect and cause."""
    found: dict[str, dict[str, Edge]] = {}
    for edge in edges:
        if edge.src in found.setdefault(edge.dst, {}):
            raise CorruptBank(f"expected one edge {edge.src!r} -> {edge.dst!r}, got two")
        found[edge.dst][edge.src] = edge
        found.setdefault(edge.src, {})
    return found


def _order(causes: Mapping[str, Mapping[str, Edge]]) -> tuple[str, ...]:
    """All concepts behind their causes."""
    try:
        return tuple(TopologicalSorter(causes).static_order())
    except CycleError as error:
        raise CorruptBank(f"expected a graph without cycles, got {' -> '.join(error.args[1])}") from None
