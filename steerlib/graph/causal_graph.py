"""Which concept moves which: a directed acyclic graph with an effect on every edge."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import BadBank, CorruptBank

Relation = Literal["compute", "selection", "context"]
Evidence = Literal["observed", "randomised", "verified"]
RELATIONS: tuple[Relation, ...] = get_args(Relation)
EVIDENCE: tuple[Evidence, ...] = get_args(Evidence)


@dataclass(frozen=True, kw_only=True)
class Edge:
    """One concept's effect on another, measured by intervention. Figures are in units of the two concepts.

    Args:
        src: name of the cause.
        dst: name of the effect.
        weight: change of `dst` per unit of `src`, with no other concept between them.
        relation: `compute`: moving the one moves the other, along the order of generation. `selection`: the one is a part of
            the other in the data, against that order; steering follows no such edge. `context`: a total effect that a
            context module learned, over all paths; `sl.Do` has the module itself compute it.
        evidence: `observed` in readings, or stated by hand; `randomised`: found by ablating many at random; `verified`: by
            ablating the source alone, `n_verify` times, with `tau` as the result.
        tau: `E[z_dst - z_dst | do(z_src = 0)] / E[z_src]` on contexts that nothing was fitted to.
        tau_lo: lower end of its 95 % interval, by bootstrap over contexts; of a context module, the least over seeds.
        tau_hi: upper end, or the largest.
        necessity: `1 - E[z_dst | do(z_src = 0)] / E[z_dst]` where both fire.
        sufficiency: `E[z_dst | do(z_src = q90)] / q90_dst` where the source does not fire.
        n_verify: number of contexts in which the source was ablated alone.
        p_adj: p value of `tau` being 0, adjusted for all edges that were tested (Benjamini & Hochberg 1995).

    Raises:
        BadBank: it says that it is verified, and lacks `tau` or `n_verify`.

    >>> sl.Edge(src="a", dst="b", weight=0.5, tau=0.4, evidence="verified", n_verify=20).effect
    0.4
    """

    src: str
    dst: str
    weight: float
    relation: Relation = "compute"
    evidence: Evidence = "observed"
    tau: float | None = None
    tau_lo: float | None = None
    tau_hi: float | None = None
    necessity: float | None = None
    sufficiency: float | None = None
    n_verify: int = 0
    p_adj: float | None = None

    def __post_init__(self) -> None:
        if self.evidence == "verified" and (self.tau is None or self.n_verify < 1):
            raise BadBank(
                f"edge {self.src!r} -> {self.dst!r}: a verified edge needs tau and n_verify, what ablating {self.src!r} alone "
                f"showed and how often, got {self.tau} and {self.n_verify}; leave evidence out for one that is stated by hand"
            )

    @property
    def effect(self) -> float:
        """What forecasts go by: `tau` where the edge is verified, else `weight`."""
        return self.weight if self.tau is None or self.evidence != "verified" else self.tau


class Forecast(dict[str, float]):
    """Changes by name, in units of each concept.

    Attributes:
        unmeasured: names whose change came over two edges or more. An edge's effect was measured by ablating its source alone;
            that effects multiply along a path was not. In the latents of SmolLM2-135M such changes were too small by a factor
            of four at the median.
    """

    unmeasured: tuple[str, ...] = ()

    def __repr__(self) -> str:
        said = f"; over two edges or more, which nothing measured: {', '.join(self.unmeasured)}" if self.unmeasured else ""
        return super().__repr__() + said


class CausalGraph:
    """Concepts joined by edges. Causes and forecasts follow those of relation `compute`; of the others only `edges` tells.

    Total effects (`context`) are learned pair by pair, so two concepts may move each other; other relations have no cycles.

    Args:
        edges: in any order; at most one for each pair and relation.

    Raises:
        CorruptBank: the edges of a relation other than `context` form a cycle, or one stands twice.

    >>> graph = sl.CausalGraph([sl.Edge(src="a", dst="b", weight=0.5), sl.Edge(src="b", dst="c", weight=2.0)])
    >>> graph.descendants("a")
    ('b', 'c')
    >>> graph.forecast({"a": 1.0})
    {'a': 1.0, 'b': 0.5, 'c': 1.0}; over two edges or more, which nothing measured: c
    """

    def __init__(self, edges: Iterable[Edge] = ()):
        self.edges = tuple(sorted(edges, key=lambda edge: (edge.relation, edge.src, edge.dst)))
        orders = {relation: _order([e for e in self.edges if e.relation == relation], relation) for relation in RELATIONS}
        self._parents, self._order = orders["compute"]

    def parents(self, name: str) -> Mapping[str, float]:
        """Direct causes of a concept by name, with their effects: units of the concept per unit of the cause."""
        return self._parents.get(name, {})

    def descendants(self, name: str) -> tuple[str, ...]:
        """Names of all concepts that a concept moves, causes before their effects."""
        reached = {name}
        for concept in self._order:
            if reached & self.parents(concept).keys():
                reached.add(concept)
        return tuple(concept for concept in self._order if concept in reached - {name})

    def forecast(self, changes: Mapping[str, float], *, fixed: Iterable[str] = ()) -> Forecast:
        """Changes of all concepts that follow from `changes` of some, by name, in units of each concept.

        A `fixed` concept passes its own change on but receives none: Pearl's do-operator for a linear model. Effects are means
        over texts in which the source fires; where a source reads 0, taking it away moves nothing, whatever a forecast says.
        What comes over more than one edge is listed in `unmeasured` of the answer, a dict.
        """
        held, reached, far = set(fixed), set(), []
        result = Forecast(changes)
        for concept in self._order:
            carried = {parent: weight * result[parent] for parent, weight in self.parents(concept).items() if parent in result}
            if concept not in held and any(carried.values()):
                result[concept] = result.get(concept, 0.0) + sum(carried.values())
                far += [concept] * bool(reached & carried.keys())
                reached.add(concept)
        result.unmeasured = tuple(far)
        return result

    def __len__(self) -> int:
        return len(self.edges)

    def to_tensors(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The columns of `graph.safetensors`, an entry an edge; ends are places among `names`."""
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


MEASURED = ("tau", "tau_lo", "tau_hi", "necessity", "sufficiency", "p_adj")
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
    relation, evidence = row.get("relation", 0), row.get("evidence", EVIDENCE.index("observed"))
    if not (0 <= relation < len(RELATIONS) and 0 <= evidence < len(EVIDENCE)):
        raise CorruptBank(f"graph.safetensors has an edge of unknown relation or evidence: {relation}, {evidence}")
    figures = {name: row[name] for i, name in enumerate(MEASURED) if row.get("known", 0) >> i & 1 and name in row}
    codes: Any = {"relation": RELATIONS[relation], "evidence": EVIDENCE[evidence], "n_verify": row.get("n_verify", 0)}
    try:
        return Edge(src=names[int(row["src"])], dst=names[int(row["dst"])], weight=row["weight"], **codes, **figures)
    except BadBank as error:
        raise CorruptBank(f"graph.safetensors: {error}") from None


def _order(edges: Iterable[Edge], relation: Relation) -> tuple[dict[str, dict[str, float]], tuple[str, ...]]:
    """Parents of each concept, and all concepts behind their parents; total effects have no such order."""
    parents: dict[str, dict[str, float]] = {}
    for edge in edges:
        own = parents.setdefault(edge.dst, {})
        if edge.src in own:
            raise CorruptBank(f"expected one edge {edge.src!r} -> {edge.dst!r}, got two")
        own[edge.src] = edge.effect
        parents.setdefault(edge.src, {})
    if relation == "context":
        return parents, ()
    try:
        return parents, tuple(TopologicalSorter(parents).static_order())
    except CycleError as error:
        raise CorruptBank(f"expected a graph without cycles, got {' -> '.join(error.args[1])}") from None
