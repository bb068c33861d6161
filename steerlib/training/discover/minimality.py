"""Edges explained by a correlated neighbour, duplicate latents, and latents that the data cannot distinguish.

B  effects [parents, children]     z  readings [units, latents]     pa(c)  parents of c, ch(c)  children
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from ...bank.concept_bank import ConceptBank
from ...bank.concepts import Part
from ...graph.causal_graph import EVIDENCE, CausalGraph, Edge
from .systems import Codes, Columns, csr

ALONE = 5
"""Fewest units from which an echo is concluded."""
ALIKE = 0.9
"""Cosine of decoder rows from which two latents may be one."""


def without_echoes(effects: Codes, parents: Codes, children: Codes) -> Codes:
    """The effects on each child, without those explained by a correlated neighbour of the child.

    A latent that fires wherever a stronger neighbour of its level does, even where none of their parents fires, echoes it; of
    the parents that they share, it has only those that move it more.
    """
    b, fires, own = effects.tocsc(), parents.tocsc(), children.tocsc()
    shared = (abs(effects).T @ abs(effects)).tocoo()
    kept = effects.tolil(copy=True)
    for c, other in zip(shared.row.tolist(), shared.col.tolist(), strict=True):
        both = _rows(b, c), _rows(b, other)
        if c == other or not _echoes(own, c, other, [_rows(fires, p) for p in np.union1d(*both).tolist()]):
            continue
        for p in np.intersect1d(*both):
            if abs(effects[p, c]) < abs(effects[p, other]):
                kept[p, c] = 0
    found = csr(kept)
    found.eliminate_zeros()
    return found


def _rows(z: Columns, column: int) -> NDArray[Any]:
    return z.indices[z.indptr[column] : z.indptr[column + 1]]


def _echoes(z: Columns, c: int, other: int, busy: list[NDArray[Any]]) -> bool:
    """Whether `c` fires on most units on which the other is the stronger, and on which nothing that moves either fires."""
    units, amounts = _rows(z, other), z.data[z.indptr[other] : z.indptr[other + 1]]
    mine = np.zeros(z.shape[0])
    mine[_rows(z, c)] = z.data[z.indptr[c] : z.indptr[c + 1]]
    told = ~np.isin(units, np.concatenate(busy)) & (amounts > mine[units])
    return bool(told.sum() >= ALONE) and bool((mine[units[told]] > 0).mean() > 0.5)


class Doubts(NamedTuple):
    """Latents that should not be offered as levers of their own."""

    same: tuple[tuple[str, ...], ...]
    """Groups with the same parents, the same children, and decoder rows that point the same way: one latent."""
    within: tuple[tuple[str, str], ...]
    """Pairs of one level of which the parents of the first are among the parents of the second: moving the first by its
    parents always moves the second, so that the data cannot distinguish the two component by component."""


def doubts(graph: CausalGraph, decoders: dict[str, Tensor]) -> Doubts:
    """Latents that the graph cannot distinguish; `decoders` has the rows of each level, `[latents, D]`."""
    parents: dict[str, set[str]] = {}
    children: dict[str, set[str]] = {}
    for edge in graph.edges:
        if edge.relation == "compute":
            parents.setdefault(edge.dst, set()).add(edge.src)
            children.setdefault(edge.src, set()).add(edge.dst)
    alike: dict[tuple, list[str]] = {}
    for name in sorted({*parents, *children}):
        neighbours = (frozenset(side.get(name, ())) for side in (parents, children))
        alike.setdefault((_level(name), *neighbours), []).append(name)
    same = [group for some in alike.values() for group in _pointing_alike(some, decoders)]
    return Doubts(tuple(sorted(same)), tuple(sorted(_subsets(parents))))


def merged(bank: ConceptBank, same: Iterable[tuple[str, ...]]) -> ConceptBank:
    """The bank with each group (`Doubts.same`) as one concept, the first, that moves all of its latents together.

    Its effect on others is the sum of theirs. Intervals are added as well, which makes them wider than necessary. Edges to it
    are those to the first.
    """
    concepts, first = dict(bank.concepts), {}
    for name, *others in same:
        first |= dict.fromkeys(others, name)
        parts = tuple(Part(encoder=c.encoder, index=c.index, unit=c.unit) for c in map(bank.__getitem__, others))
        concepts[name] = replace(bank[name], parts=parts)
    together: dict[tuple[str, str, str], list[Edge]] = {}
    for edge in bank.graph.edges:
        if edge.dst not in first:
            together.setdefault((first.get(edge.src, edge.src), edge.dst, edge.relation), []).append(edge)
    edges = [_sum(src, edges) if len(edges) > 1 else replace(edges[0], src=src) for (src, *_), edges in together.items()]
    kept = [c for name, c in concepts.items() if name not in first]
    return ConceptBank(**{**bank.contents(), "concepts": kept, "graph": CausalGraph(edges)})


def _sum(src: str, edges: list[Edge]) -> Edge:
    """One edge in place of several from latents that are moved together."""
    known = {name: [getattr(edge, name) for edge in edges] for name in ("tau", "tau_lo", "tau_hi", "p_adj")}
    tau, low, high, p = (None if None in values else values for values in known.values())
    return replace(
        edges[0],
        src=src,
        weight=sum(edge.weight for edge in edges),
        tau=tau and sum(tau),
        tau_lo=low and sum(low),
        tau_hi=high and sum(high),
        evidence=min((edge.evidence for edge in edges), key=("asserted", *EVIDENCE).index),
        n_verify=min(edge.n_verify for edge in edges),
        p_adj=p and max(p),
        necessity=None,
        sufficiency=None,
    )


def _level(name: str) -> str:
    return name.rpartition("/")[0]


def _pointing_alike(names: list[str], decoders: dict[str, Tensor]) -> Iterator[tuple[str, ...]]:
    """Of latents with the same neighbours, those whose decoder rows point the same way."""
    left = list(names)
    while left:
        rows = {name: normalize(decoders[_level(name)][int(name.rpartition("/")[2])].float(), dim=0) for name in left}
        group = [name for name in left if float(rows[left[0]] @ rows[name]) > ALIKE]
        if len(group) > 1:
            yield tuple(group)
        left = [name for name in left[1:] if name not in group]


def _subsets(parents: Mapping[str, set[str]]) -> set[tuple[str, str]]:
    """Pairs of one level by their parents; looked for among those that share one."""
    of: dict[tuple[str, str], list[str]] = {}
    for name, own in parents.items():
        for parent in own:
            of.setdefault((_level(name), parent), []).append(name)
    return {(a, b) for some in of.values() for a in some for b in some if a != b and parents[a] <= parents[b]}
