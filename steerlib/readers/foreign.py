"""What a reader gives, and the bank that is made of it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from ..bank.concept_bank import BaseModel, ConceptBank, SiteFacts
from ..bank.concepts import Concept
from ..encoders import Encoder
from ..errors import BadBank, UnknownFormat, WrongWidth
from ..hosts import host_for
from . import hookpoints

Place = str | Mapping[str, str] | None
"""A site that a user names: for the only encoder, or by the hook point in the files."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """One encoder of a foreign bank, and where the files say it belongs."""

    encoder: Encoder
    hook: str
    """Where it writes, in the words of the format."""
    reads: str = ""
    """Where it reads, if elsewhere."""
    tag: str = ""
    """What tells it from others at the same site."""
    base: str = ""
    """The model, as the files call it."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """Plain values of the original that belong to it."""


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """A foreign bank. Its concepts name encoders by their hook points; latents need no line each."""

    found: Sequence[Found]
    concepts: Sequence[Concept] = ()


def refuse(path: Path, what: str, do: str) -> NoReturn:
    """Raise for something that no encoder here can express."""
    raise UnknownFormat(f"{path.name} is {what}, which no encoder here computes; {do}")


def bank_of(foreign: Foreign, name: str, format: str, *, site: Place, reads: Place, base: object) -> ConceptBank:
    """The bank of what a reader found."""
    found = foreign.found
    where = [_place(site, f.hook, "site", len(found)) for f in found]
    ids = _ids(where, [f.tag for f in found])
    read_at = [_place(reads, f.reads, "reads", len(found)) if f.reads or isinstance(reads, str) else "" for f in found]
    return ConceptBank(
        name,
        [_renamed(concept, {f.hook: id for f, id in zip(found, ids, strict=True)}) for concept in foreign.concepts],
        {id: f.encoder for id, f in zip(ids, found, strict=True)},
        base=_base(base, next((f.base for f in found if f.base), "")),
        sites=_sites(found, where, read_at),
        where=dict(zip(ids, where, strict=True)),
        reads={id: place for id, place in zip(ids, read_at, strict=True) if place},
        provenance={"format": format, "encoders": {id: dict(f.source) for id, f in zip(ids, found, strict=True) if f.source}},
    )


def _place(given: Place, hook: str, argument: str, count: int) -> str:
    if isinstance(given, str):
        if count > 1:
            raise BadBank(f"expected {argument}= as a mapping from hook points of the {count} encoders, got {given!r}")
        return given
    return given[hook] if given and hook in given else hookpoints.site(hook)


def _ids(where: Sequence[str], tags: Sequence[str]) -> list[str]:
    """The site where that is enough to tell encoders apart, else with a tag behind it."""
    taken = Counter(where)
    ids = [site if taken[site] == 1 else f"{site}#{tag}" for site, tag in zip(where, tags, strict=True)]
    if twice := [id for id, count in Counter(ids).items() if count > 1]:
        raise BadBank(f"there are several encoders for {twice[0]!r}; read a folder of them at a time")
    return ids


def _renamed(concept: Concept, ids: Mapping[str, str]) -> Concept:
    parts = tuple(replace(part, encoder=ids[part.encoder]) for part in concept.parts)
    return replace(concept, encoder=ids[concept.encoder], parts=parts)


def _sites(found: Sequence[Found], where: Sequence[str], read_at: Sequence[str]) -> dict[str, SiteFacts]:
    widths: dict[str, int] = {}
    for f, site, place in zip(found, where, read_at, strict=True):
        rows = f.encoder.rows([0])
        for at, tensor in ((site, rows.write), (place or site, rows.read)):
            if widths.setdefault(at, tensor.shape[-1]) != tensor.shape[-1]:
                raise WrongWidth(f"encoders for {at!r} have widths {widths[at]} and {tensor.shape[-1]}; give site= or reads=")
    return {site: SiteFacts(width=width) for site, width in widths.items()}


def _base(given: object, id: str) -> BaseModel:
    if isinstance(given, BaseModel):
        return given
    if given is None or isinstance(given, str):
        return BaseModel(id=given or id)
    return BaseModel(id=id, fingerprint=host_for(given).fingerprint())
