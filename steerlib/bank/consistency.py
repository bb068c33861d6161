"""What a bank says of its concepts in other places (card, graph, measured effects) is said of concepts that it has."""

import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ..errors import BadBank, SteeringWarning
from .card import FRONT, METRICS
from .concepts import Concept

MEASURED_TYPE = re.compile(rf"""^\s*(?:- )?type: ["']?(.+?): (?:{"|".join(METRICS)})["']?$""", re.MULTILINE)


def check_said(concepts: Mapping[str, Concept], graph: Any, card: str) -> None:
    """Raise `BadBank` where effects, the graph or the metadata of the card name what is not there."""
    for concept in concepts.values():
        for key, own in (("concept", concept.name), ("label", concept.label)):
            if (said := concept.effects.get(key, own)) != own:
                raise BadBank(
                    f"the measured effects of {concept.name!r} are of {key} {said!r:.80}, it has {own!r:.80}; if it changed, "
                    f"give effects={{**concept.effects, {key!r}: {own!r:.80}}} too, or effects={{}}"
                )
    joined = {edge.src for edge in graph.every} | {edge.dst for edge in graph.edges}
    if missing := joined - concepts.keys():
        raise BadBank(
            f"the graph joins {sorted(missing)[0]!r}, which is none of the bank's concepts; list it among them, or give graph= "
            "without it"
        )
    front = FRONT.match(card)
    if front and (missing := {*MEASURED_TYPE.findall(front[1])} - concepts.keys()):
        raise BadBank(f"the card has figures of {sorted(missing)[0]!r}, which is none of the bank's concepts; give card=")


def check_copy(bank: Any, copy: Any, given: Collection[str]) -> Any:
    """The copy of a bank; raises where it would go on to say what it does not have, and warns of concepts that are dropped.

    `given` names what the copy has in place of the bank's own.
    """
    check_said(copy.concepts, copy.graph, "")
    old, new, card = bank.concepts, copy.concepts, bank.card
    ids = {concept.id: concept for concept in new.values()}
    gone = [concept for name, concept in old.items() if name not in new]
    stale = [concept for concept in gone if _is_named(concept.name, card)]
    for concept in old.values():
        other = new.get(concept.name) or ids.get(concept.id, concept)
        relabelled = other.label != concept.label and len(concept.label) > 3 and concept.label in card
        moved = (other.useful, other.range) != (concept.useful, concept.range) and _is_named(concept.name, card)
        stale += [concept] if relabelled or moved else []
    if stale and "card" not in given:
        raise BadBank(
            f"the card describes {_listed(stale)} as before: by name, label or amounts that the copy does not have; give card= "
            'with the new text, or card="" for none'
        )
    if dropped := [concept for concept in gone if concept.id not in ids]:
        warnings.warn(
            f"{len(dropped)} of {len(old)} concepts are not among those given and are dropped: {_listed(dropped)}; give "
            "[*bank.concepts.values(), ...] to keep them",
            SteeringWarning,
            stacklevel=4,
        )
    return copy


def _is_named(name: str, card: str) -> bool:
    """Whether a text has a name between quotes, or alone in a cell of a table."""
    return re.search(rf"""["'`*|]\s*{re.escape(name)}\s*["'`*|]""", card) is not None


def _listed(concepts: Iterable[Concept]) -> str:
    names = [repr(concept.name) for concept in concepts]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
