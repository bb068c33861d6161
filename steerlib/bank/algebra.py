"""Directions that are made of others: what a concept shares with others, and the rest.

With the directions `d` of a concept and `b_j` of the others, and the average activation `m`,

    shared = sum_j c_j b_j,  the point nearest to d among all such sums;  rest = d - shared

`rest` is at right angles to every `b_j`. What a direction reads is `<x, d> / |d|^2` less its average, and of a sum of
directions `<m, d>` is the sum of theirs, so averages follow from those that are stored. A standard deviation does not, since
the bank does not store how readings vary together; so one unit is what is left of one unit of the concept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..encoders import Directions, Rows
from ..errors import BadEdit, UnknownConcept
from .concepts import Concept, Part, Place

Concepts = Sequence[Concept] | Mapping[str, Concept]
"""Some concepts; a mapping says what they are called."""
LEAST = 1e-4
"""Share of a direction below which nothing is left of it but rounding."""


class Sum(NamedTuple):
    """A sum of directions."""

    direction: Float[Tensor, " D"]
    average: Float[Tensor, ""]
    """Its product with the average activation."""


def leaves(concept: Any) -> list[Concept]:
    """The concepts of a bank that a concept, or one of its places, is made of."""
    if (blend := concept.blend) is None:
        return [concept]
    return [leaf for one in (blend.of, *blend.others) for leaf in leaves(one)]


def check(bank: Any, concept: Concept) -> Concept:
    """The same concept; raises `UnknownConcept` where it is of another bank, `BadEdit` where it cannot be made."""
    facts = bank.encoder_facts
    for leaf in leaves(concept):
        is_own = bank.concepts.get(leaf.name) is leaf or (leaf.encoder in facts and bank[leaf.id] is leaf)
        if not is_own:
            raise UnknownConcept(
                f"{leaf.name!r} is a concept of another bank, or a changed one; take that of bank {bank.name!r}, by its name"
            )
        if concept.blend is not None and (other := {facts[at.encoder].kind for at in leaf.places} - {Directions.kind}):
            raise BadEdit(
                f"{leaf.name!r} is of an encoder of kind {min(other)!r}, which reads by another row than it writes; what such "
                "concepts write can be combined where ConceptBank.from_directions makes directions of it"
            )
    for place in concept.places if concept.blend is not None else ():
        rows(bank, place)
    return concept


def rows(bank: Any, at: Concept | Place) -> Rows:
    """What steering needs of a direction that is made of others."""
    d, average = _sum(bank, at.places[0] if isinstance(at, Concept) else at)
    size = d.square().sum()
    read, bias, write = (d / size)[None], -(average / size)[None], d[None]
    return Rows(read.float(), bias.float(), write.float(), torch.full((1,), -inf, device=d.device))


def _sum(bank: Any, place: Place) -> Sum:
    if (blend := place.blend) is None:
        own = bank.rows(place)
        d = own.write[0].double()
        return Sum(d, -own.bias[0].double() * d.square().sum())
    of = _sum(bank, replace(place, blend=blend.of.blend))
    others = [_sum(bank, _beside(bank, place, other)) for other in blend.others]
    b = torch.stack([other.direction.to(of.direction.device) for other in others])
    c = of.direction @ torch.linalg.pinv(b)
    shared = Sum(c @ b, sum((one * other.average for one, other in zip(c, others, strict=True)), torch.zeros_like(of.average)))
    found = shared if blend.only else Sum(of.direction - shared.direction, of.average - shared.average)
    if found.direction.norm() <= LEAST * of.direction.norm():
        names = " and ".join(repr(other.name) for other in blend.others)
        less = f"shares nothing with {names}" if blend.only else f"is nothing without what it shares with {names}"
        raise BadEdit(f"{blend.of.name!r} {less} at {bank.site_of(place)!r}")
    return found


def _beside(bank: Any, place: Place, other: Concept) -> Place:
    if (at := bank.beside(place, other)) is None:
        raise BadEdit(
            f"{other.name!r} is not moved at {bank.site_of(place)!r}, so nothing says what a direction there shares with it; "
            "combine concepts of the same sites"
        )
    return at


def stored(bank: Any, concepts: Concepts) -> tuple[list[Concept], dict[str, tuple[str, Directions]]]:
    """Concepts as a bank can keep them, those that are made of others by rows of their own; and the encoders that this takes,
    by id, with their sites."""
    made: dict[str, list[Rows]] = {}
    sites: dict[str, str] = {}

    def kept(place: Place) -> Part:
        id = f"{place.encoder.partition('#')[0]}#combined"
        while id in bank.encoder_facts:
            id += "+"
        made.setdefault(id, []).append(rows(bank, place).detached())
        sites[id] = bank.site_of(place)
        return Part(encoder=id, index=len(made[id]) - 1, unit=place.unit)

    found = []
    for name, concept in concepts.items() if isinstance(concepts, Mapping) else [(one.name, one) for one in concepts]:
        concept = concept if concept.name == name else replace(concept, name=name)
        if concept.blend is not None:
            first, *parts = map(kept, check(bank, concept).places)
            concept = replace(concept, encoder=first.encoder, index=first.index, parts=tuple(parts), blend=None)
        found.append(concept)
    columns = {id: [torch.cat(column) for column in list(zip(*some, strict=True))[1:3]] for id, some in made.items()}
    return found, {id: (sites[id], Directions(write, -bias)) for id, (bias, write) in columns.items()}
