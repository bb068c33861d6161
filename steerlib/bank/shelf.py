"""The encoders of a bank: in memory, or in files of which single rows are read and checked."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..encoders import KINDS, Encoder, Rows, Transcoder
from ..encoders.sparse import STATISTICS
from ..errors import BadBank, CorruptBank, SteeringWarning, UnknownConcept, WrongWidth
from . import trust
from .concepts import Concept, Place
from .hub import SIGNATURE, Home
from .manifest import EncoderFacts, SiteFacts, file_of

MAKING = RLock()
"""Held while a concept is made."""


class Maker(NamedTuple):
    """Makes concepts of a bank when they are asked for: `can(name)` says which, and `make(name)` gives a concept with the one
    of its encoder, which becomes the next there. `what` says what they are."""

    what: str
    can: Callable[[str], bool]
    make: Callable[[str], tuple[Concept, Encoder]]


class Shelf:
    """Encoders by id: those `made`, to which a `maker` adds rows, and those in files of `home`; `records`: sizes and hashes.

    Or those of other shelves: `lent` says of which, and what each is called there.
    """

    def __init__(
        self,
        facts: Mapping[str, EncoderFacts],
        made: Mapping[str, Encoder] | None = None,
        *,
        home: Home | None = None,
        records: Mapping[str, Mapping[str, Any]] | None = None,
        maker: Maker | None = None,
        lent: "Mapping[str, tuple[Shelf, str]] | None" = None,
    ):
        self.facts, self.home, self.records, self.maker = dict(facts), home, records or {}, maker
        self._lent = {id: shelf._lent.get(own, (shelf, own)) for id, (shelf, own) in (lent or {}).items()}
        self._made: dict[str, Encoder] = dict(made or {})
        self._files: dict[str, trust.Tensors] = {}
        self._rows: dict[str, Rows] = {}

    @classmethod
    def joined(cls, *shelves: "Shelf") -> "Shelf":
        """The encoders of several shelves, whose ids differ; nothing is read for it."""
        facts = {id: facts for shelf in shelves for id, facts in shelf.facts.items()}
        return cls(facts, lent={id: (shelf, id) for shelf in shelves for id in shelf.facts})

    @classmethod
    def of(cls, encoders: Mapping[str, Encoder], where: Mapping[str, str] | None, reads: Mapping[str, str] | None) -> "Shelf":
        """Encoders in memory; `where` and `reads` are the arguments of `ConceptBank`."""
        site_of = where or {id: id.partition("@")[0].partition("#")[0] for id in encoders}
        for id, encoder in encoders.items():
            if isinstance(encoder, Transcoder) and not (reads or {}).get(id):
                raise BadBank(
                    f"{id!r} is a transcoder, which reads at an earlier site than it writes at; say where, with reads= (the "
                    "same site, if it does read where it writes)"
                )
        return cls(
            {
                id: EncoderFacts(
                    site=site_of[id], kind=e.kind, file=file_of(id), reads=(reads or {}).get(id, ""), settings=e.settings
                )
                for id, e in encoders.items()
            },
            encoders,
        )

    def whole(self, others: Mapping[str, Encoder], more: Mapping[str, tuple[str, Encoder]]) -> "Shelf":
        """All encoders in memory, `others` in place of those of the same id, and `more` with their sites."""
        made = {id: others[id] if id in others else self.encoder(id) for id in self.facts}
        made |= {id: encoder for id, (_, encoder) in more.items()}
        where = {id: facts.site for id, facts in self.facts.items()} | {id: site for id, (site, _) in more.items()}
        return Shelf.of(made, where, {id: facts.reads for id, facts in self.facts.items()})

    def learns(self, id: str) -> bool:
        """Whether an encoder has tensors that require gradients."""
        shelf, own = self._lent.get(id, (self, id))
        return own in shelf._made and shelf._made[own].learns

    def encoder(self, id: str) -> Encoder:
        """A whole encoder, kept once it was read."""
        if id in self._lent:
            shelf, own = self._lent[id]
            return shelf.encoder(own)
        if id not in self._made:
            facts, file = self.facts[id], self._file(id)
            tensors = {name: file.all(name) for name in file.header}
            self._made[id] = self._checked(id, lambda kind: kind.from_tensors(tensors, facts.settings))
        return self._made[id]

    def count(self, id: str) -> int:
        """Rows of an encoder."""
        if id in self._lent:
            shelf, own = self._lent[id]
            return shelf.count(own)
        first = KINDS[self.facts[id].kind].tensors[0]
        return len(self._made[id].to_tensors()[first]) if id in self._made else self._file(id).shape(first)[0]

    def concept(self, name: str) -> Concept | None:
        """The concept `encoder/index`, of which no more is known than its statistics; None where there is no such encoder."""
        id, _, row = name.rpartition("/")
        if id not in self.facts:
            return None
        if not (row.isascii() and row.isdigit()) or int(row) >= self.count(id):
            raise UnknownConcept(f"encoder {id!r} has rows 0 to {self.count(id) - 1}, got {row!r}")
        known = {key: float(tensor) for key, tensor in self._one(id, int(row), STATISTICS).items()}
        high = known.get("high", 0.0)
        unit = known.get("unit") or 1.0  # a latent that never fired on reference data has none
        natural = (0.0, high) if high > 0 else None
        return Concept(name=f"{id}/{int(row)}", encoder=id, index=int(row), unit=unit, natural=natural)

    def rows(self, at: Concept | Place, sites: Mapping[str, SiteFacts]) -> Rows:
        """What steering needs of one coordinate, on the CPU, read when first asked for, and checked; `sites` are the bank's."""
        if (found := self._rows.get(at.id)) is None or self.learns(at.encoder):
            found, facts = self._read(at).to(torch.device("cpu")), self.facts[at.encoder]
            for site, tensor in ((facts.reads or facts.site, found.read), (facts.site, found.write)):
                if (width := sites[site].width) != tensor.shape[-1]:
                    raise WrongWidth(f"concept {at.id!r} has width {tensor.shape[-1]}, its site {site!r} has width {width}")
            self._rows[at.id] = found
        return found

    def _read(self, at: Concept | Place) -> Rows:
        if at.encoder in self._lent:
            shelf, own = self._lent[at.encoder]
            return shelf._read(replace(at, encoder=own))
        if at.encoder in self._made:
            return self._checked(at.encoder, lambda _: self._made[at.encoder].rows([at.index]))
        stored, settings = KINDS[self.facts[at.encoder].kind], self.facts[at.encoder].settings
        one = self._one(at.encoder, at.index, (*stored.tensors, *stored.shared))
        return self._checked(at.encoder, lambda kind: kind.from_tensors(one, kind.of_rows(settings, 1)).rows([0]))

    def _one(self, id: str, index: int, names: Iterable[str]) -> dict[str, Tensor]:
        """One row of each of these tensors that an encoder has, and the whole of those that all rows share."""
        if id in self._lent:
            shelf, own = self._lent[id]
            return shelf._one(own, index, names)
        shared = KINDS[self.facts[id].kind].shared
        if id in self._made:
            tensors = self._made[id].to_tensors()
            return {n: tensors[n] if n in shared else tensors[n][index : index + 1] for n in names if n in tensors}
        file = self._file(id)
        here = [name for name in names if name in file.header]
        return {name: file.all(name) if name in shared else file.rows(name, index, index + 1) for name in here}

    def _file(self, id: str) -> trust.Tensors:
        name = self.facts[id].file
        for each in (trust.HASHES, name):
            if each not in self._files:
                assert self.home is not None
                if each not in self.records:
                    raise CorruptBank(f"bank.json does not describe {each}; download the bank again")
                hashes = self._files.get(trust.HASHES)
                self._files[each] = trust.Tensors(self.home.read, each, self.records[each], hashes)
        return self._files[name]

    def _checked(self, id: str, make: Callable[[type[Encoder]], Any]) -> Any:
        """An encoder of a stranger's tensors and settings, or its rows."""
        kind = KINDS[self.facts[id].kind]
        try:
            return make(kind)
        except (ArithmeticError, AttributeError, LookupError, TypeError, RuntimeError) as error:
            raise CorruptBank(f"an encoder of kind {kind.kind!r} is not made of this: {error!s:.200}") from None


def verify(shelf: Shelf, places: Sequence[Place], sites: Mapping[str, SiteFacts]) -> None:
    """Check every file, hash, value and row; raises `CorruptBank` at the first that is wrong."""
    if shelf.home is not None:
        shelf.home.fetch(shelf.records)
        for name, record in shelf.records.items():
            shelf.home.check(name, record)
        _say_strays(shelf.home, shelf.records)
    for lender in dict.fromkeys(lender for lender, _ in shelf._lent.values()):
        verify(lender, (), sites)
    for id in shelf.facts:
        encoder = shelf.encoder(id)
        tensors = encoder.to_tensors()
        if not all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point()):
            raise CorruptBank(f"encoder {id!r} has values that are not finite")
        count = {len(tensor) for name, tensor in tensors.items() if name not in encoder.shared}
        most = max((place.index for place in places if place.encoder == id), default=-1)
        if len(count) != 1 or most >= count.pop():
            raise CorruptBank(f"encoder {id!r} does not fit its concepts or its site")
    for place in places:
        shelf.rows(place, sites)


def _say_strays(home: Home, records: Mapping[str, Any]) -> None:
    """Warn of files in a folder that nothing checks."""
    known = {*records, "bank.json", SIGNATURE}
    if not home.repository and (found := trust.strays(home.path, known)):
        warnings.warn(
            f"{home.path.name} holds {len(found)} files that bank.json does not list, so that nothing checks them and they "
            f"are not published: {', '.join(found[:5])}{', …' if len(found) > 5 else ''}; to make them part of the bank, "
            "save it with files={name: path}",
            SteeringWarning,
            stacklevel=4,
        )


def grown(shelf: Shelf, name: str, known: dict[str, Concept]) -> Concept | None:
    """A concept that the shelf's maker makes, kept in `known`, its row in the shelf; None without a maker."""
    if shelf.maker is None:
        return None
    with MAKING:  # two at once would take the same index
        concept, encoder = shelf.maker.make(name)
        if concept.name not in known:
            own = shelf.encoder(concept.encoder).to_tensors()
            tensors = {key: torch.cat((own[key], row)) for key, row in encoder.to_tensors().items()}
            known[concept.name] = replace(concept, index=shelf.count(concept.encoder))
            shelf._made[concept.encoder] = type(encoder).from_tensors(tensors, encoder.settings)
        return known[concept.name]
