"""What a reader gives, and the bank that is made of it."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from ..bank.concept_bank import BaseModel, ConceptBank, SiteFacts
from ..bank.concepts import Concept, printable
from ..encoders import Encoder
from ..errors import BadBank, CorruptBank, SteeringWarning, UnknownFormat, WrongWidth
from ..hosts import host_for
from . import hookpoints

HERE = "here"
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
    norm: float | None = None
    """Median length of an activation where it writes, if the files say."""
    concepts: Sequence[Concept] = ()
    """Of which more is known than that they are its rows; their encoder is `HERE`."""
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


def bound(bank: ConceptBank, concept: Concept) -> list[str]:
    """What a file of vectors or latents alone has no place for of a concept, in words: its gate, norms, windows."""
    name, when = repr(concept.name), {bank.window_of(place) for place in concept.places} - {None}
    return [
        *([f"{name} acts where {concept.gate.concept!r} shows"] if concept.gate else []),
        *([f"{name} grows with the length of each token"] if concept.match_norm else []),
        *([f"{name} turns tokens and leaves their length as it is"] if concept.keep_norm else []),
        *([f"{name} acts in {'windows' if len(when) > 1 else 'a window'} of denoising"] if when else []),
    ]


def settle(lost: Sequence[str], lossy: bool, format: str) -> None:
    """Raise `BadBank` for what a format has no place for, or warn of it where a loss is asked for."""
    said = "; ".join(lost)
    if lost and not lossy:
        raise BadBank(f"{format} has no place for this: {said}; steer with steerlib, or say lossy=True to write the rest")
    if lost:
        warnings.warn(f"{format} has no place for this, which is lost: {said}", SteeringWarning, stacklevel=5)


def told(path: Path, lost: object) -> list[str]:
    """What a file says was lost when it was written."""
    said = [printable(str(one), 200) for one in lost[:100]] if isinstance(lost, list) else []
    if said:
        warnings.warn(f"{path.name} was written with a loss: {'; '.join(said)}", SteeringWarning, stacklevel=6)
    return said


def bank_of(foreign: Foreign, name: str, format: str, *, site: Place, reads: Place, base: object) -> ConceptBank:
    """The bank of what a reader found."""
    found = foreign.found
    if wrong := [f.norm for f in found if f.norm is not None and not (isinstance(f.norm, int | float) and 0 < f.norm < 1e30)]:
        raise CorruptBank(f"expected the length of an activation as a positive number, got {wrong[0]!r:.80}")
    where = [_place(site, f.hook, "site", len(found)) for f in found]
    ids = _ids(where, [f.tag for f in found])
    read_at = [_place(reads, f.reads, "reads", len(found)) if f.reads or isinstance(reads, str) else "" for f in found]
    known = {f.hook: id for f, id in zip(found, ids, strict=True)}
    concepts = [_renamed(concept, known) for concept in foreign.concepts]
    return ConceptBank(
        name,
        concepts + [_renamed(concept, {HERE: id}) for f, id in zip(found, ids, strict=True) for concept in f.concepts],
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
    moved = replace(concept, encoder=ids[concept.encoder], parts=parts)
    return replace(moved, name=moved.id) if concept.name == concept.id else moved


def _sites(found: Sequence[Found], where: Sequence[str], read_at: Sequence[str]) -> dict[str, SiteFacts]:
    widths: dict[str, int] = {}
    for f, site, place in zip(found, where, read_at, strict=True):
        rows = f.encoder.rows([0])
        for at, tensor in ((site, rows.write), (place or site, rows.read)):
            if widths.setdefault(at, tensor.shape[-1]) != tensor.shape[-1]:
                raise WrongWidth(f"encoders for {at!r} have widths {widths[at]} and {tensor.shape[-1]}; give site= or reads=")
    norms = {site: f.norm for f, site in zip(found, where, strict=True) if f.norm is not None}
    return {site: SiteFacts(width=width, norm=norms.get(site)) for site, width in widths.items()}


def _base(given: object, id: str) -> BaseModel:
    if isinstance(given, BaseModel):
        return given
    if given is None or isinstance(given, str):
        return BaseModel(id=given or id)
    return BaseModel(id=id, fingerprint=host_for(given).fingerprint())
