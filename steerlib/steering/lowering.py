"""From a concept and an intervention to an edit: done once, before the first pass; afterwards parts only run."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch

from ..bank import ConceptBank
from ..bank.concepts import Concept, Gate, Place
from ..bank.matching import Match
from ..encoders import KINDS, Context, Rows
from ..errors import BadEdit, Unanswerable
from ..hosts import Host
from ..passes import Branch
from ..schedules import Schedule, Within
from ..sites import Site
from . import masks
from .aims import AsTwin, Forecast
from .dialect import is_word
from .edit import Edit
from .interventions import Ablate, Coordinate, Intervention, Other
from .passages import passage
from .reading import Key, Note, NoteReader, PromptReader, Reader, reader
from .shares import Gated, Half, Masked, OwnLength, Section, Share, When

Do = Literal["model", "hold", "graph", "spare"]


class Options(NamedTuple):
    """How edits are carried out; `sl.steer` says what each means."""

    branch: Literal["both"] | Branch = "both"
    do: Do = "model"
    hold: tuple[str, ...] = ()
    free: tuple[str, ...] = ()
    allow_ood: bool = False
    exact: bool = True
    tokenizer: Any = None
    match: Match = "model"


@dataclass(frozen=True)
class Lowering:
    """Makes edits of one bank for one model."""

    bank: ConceptBank
    host: Host
    options: Options

    def key(self, place: Place | Concept) -> Key:
        """What notes on a concept are filed under."""
        return id(self.bank), place.id

    def edit(self, concept: Concept, place: Place, intervention: Intervention, leaves: Key | None = None) -> Edit:
        """One intervention at one of a concept's places."""
        site, when = self.bank.site_of(place), self._when(concept, place, intervention)
        _check(concept, self.host, site, intervention, when)
        module = _module(self.bank, concept, place, intervention)
        read, natural = self._reader(concept, place), None if self.options.allow_ood else reach(place.natural)
        is_latent, given, n = self.bank.rows(place).is_sparse, intervention.gate, len(concept.places)
        other = partial(_other, self, concept, place, is_open=given == "open")
        reads = self.bank.read_at(place) if isinstance(read, NoteReader) else ""
        at = Coordinate(concept.name, site, place.unit, read, natural, n, is_latent, other, module, reads, concept.keep_norm)
        aim, cut = intervention.aim(at), natural is not None and intervention.is_capped(place.unit, natural)
        if aim.is_exact and isinstance(read, NoteReader):
            raise Unanswerable(UNREAD.format(concept.name, self.bank.read_at(place), site))
        gates = [gate for gate in (None if given == "open" else concept.gate, given) if isinstance(gate, Gate)]
        shares: list[Share] = [When(when)] if when is not None else []
        spares = is_latent or intervention.spares_first
        shares += _sections(self.host, site, concept.name, intervention.tokens, spares, self.options.tokenizer)
        branch: Any = intervention.branch or self.options.branch
        shares += [Half(branch, concept.name)] if branch != "both" else []
        shares += [self._gated(concept.name, place, self._bounded(gate)) for gate in gates]
        if intervention.matches_norm(concept.match_norm):
            shares.append(OwnLength(self._norm(place)))
        shares += [Masked(masks.mask_of(intervention.mask), concept.name)] if intervention.mask is not None else []
        return replace(self._made(concept, place, read, aim, shares, leaves), cut=cut)

    def pinned(self, concept: Concept, place: Place) -> Edit:
        """An edit that keeps a concept at its reading in the unsteered twin, in the window of its level, where its gate is."""
        if self.bank.read_at(place) != self.bank.site_of(place):
            raise Unanswerable(f"do='hold' cannot hold {concept.name!r}, which is read at an earlier site than it is moved")
        plain = self.edit(concept, place, Ablate(tokens="all"))
        return replace(plain, aim=AsTwin(plain.key), shares=tuple(s for s in plain.shares if not isinstance(s, Half)))

    def forecast(self, name: str, place: Place, parents: Mapping[str, float], scope: object) -> Edit:
        """An edit that moves a concept as the graph foretells from the changes of its parents."""
        concept = self.bank[name]
        for parent in parents:
            if not self._is_before(self.bank.site_of(self.bank[parent]), self.bank.site_of(place)):
                raise Unanswerable(f"do='graph' needs {name!r} at a later site of the same stack than its cause {parent!r}")
        weights: dict[Key, float] = {}
        for parent, weight in ((self.bank[parent], weight) for parent, weight in parents.items()):
            weights[scope, self.key(parent)] = weight * place.unit / parent.unit
        return self._made(concept, place, self._reader(concept, place), Forecast(weights), (), (scope, self.key(place)))

    def notes(self, edit: Edit) -> list[tuple[str, Note]]:
        """What an edit has to know, and the sites at which that is read."""
        found = [*edit.aim.notes, *(note for share in edit.shares for note in share.notes)]
        if isinstance(edit.read, NoteReader):
            read = reader(self.bank, edit.place, edit.name, exact=self.options.exact)
            found.append((self.bank.read_at(edit.place), Note(edit.read.key, read)))
        return found

    def check_order(self, edit: Edit) -> None:
        """Raise `Unanswerable` where an edit has to know what is only read after it."""
        site, read = self.bank.site_of(edit.place), self.bank.read_at(edit.place)
        if read != site and not self._is_before(read, site):
            raise Unanswerable(f"{edit.name!r} is read at {read!r}, which is not before {site!r}, where it acts")
        for share in edit.shares:
            share.check(self.host.site(site), lambda earlier: self._is_before(earlier, site))

    def _is_before(self, one: str, other: str) -> bool:
        """Whether a pass of one stack reaches one site before another."""
        return _is_reached_first(self.host, self.host.site(one), self.host.site(other))

    def beside(self, edit: Edit, pinned: Iterable[Edit]) -> Edit:
        """An edit, closed wherever the gate of a pinned concept of its encoder is open that it does not share: pinning one
        coordinate cannot cancel all that the edit writes."""
        own = {gate.concept for gate in edit.gates}
        gates = [gate for other in pinned if other.place.encoder == edit.place.encoder for gate in other.gates]
        closed = [
            self._gated(edit.name, edit.place, gate, closed=True) for gate in dict.fromkeys(gates) if gate.concept not in own
        ]
        return replace(edit, shares=(*edit.shares, *closed)) if closed else edit

    # -- parts -------------------------------------------------------------------------------------------------

    def _made(
        self, concept: Concept, place: Place, read: Reader, aim: Any, shares: Sequence[Share], leaves: Key | None
    ) -> Edit:  # fmt: skip

        def rows() -> Rows:
            found = self.bank.rows(place)
            if isinstance(read, NoteReader):
                return found._replace(read=torch.zeros_like(found.write), bias=torch.zeros(1), norm="")
            # alone a row that competes tells one thing: at 0 or below a latent reads 0 whatever the others do
            return found if read.code is None or read.code.switched else found._replace(threshold=torch.zeros(1))

        return Edit(
            key=self.key(place),
            name=concept.name,
            place=place,
            rows=rows().detached(),
            now=rows if self.bank.learns(place) else None,
            read=read,
            aim=aim,
            shares=tuple(shares),
            leaves=leaves,
            natural=concept.natural if place == concept.places[0] else None,  # of its parts nothing was measured
        )

    def _reader(self, concept: Concept, place: Place) -> Reader:
        """How the site of the edit learns what its concept reads."""
        if self.bank.read_at(place) == self.bank.site_of(place):
            return reader(self.bank, place, concept.name, exact=self.options.exact)
        return NoteReader(("reading", self.key(place)), concept.name)

    def _when(self, concept: Concept, place: Place, intervention: Intervention) -> Schedule | None:
        """The edit's own schedule; that of the noise level; or, for a concept of several levels, both."""
        window, when = self.bank.window_of(place), intervention.when
        if window is None:
            return when
        several = len({*map(self.bank.window_of, concept.places)}) > 1
        return window if when is None else Within(when, window) if several else when

    def _gated(self, name: str, place: Place, gate: Gate, *, closed: bool = False) -> Gated:
        """A gate, read at the very place of the edit if its concept has a part there."""
        other = self.bank[gate.concept]
        where = self.bank.beside(place, other) or other.places[0]
        read = reader(self.bank, where, gate.concept, exact=self.options.exact)
        key, site = ("gate", self.key(place), gate), self.bank.read_at(where)
        if gate.over == "prompt":
            read = _over_prompt(self.host, site, PromptReader(read, key, gate.concept))
        return Gated(gate, Note(key, read, where.unit), site, name, closed)

    def _bounded(self, gate: Gate) -> Gate:
        """The gate, with the bank's threshold where it names none."""
        if gate.is_bounded:
            return gate
        if (present := self.bank[gate.concept].present) is None:
            raise BadEdit(
                f"bank {self.bank.name!r} does not know from which reading on {gate.concept!r} is present; give the gate a "
                f"bound: Gate({gate.concept!r}, above=1.0)"
            )
        return replace(gate, above=present)

    def _norm(self, place: Place) -> float:
        """The length that a token's own is compared with."""
        if (norm := self.bank.norm_of(place)) is None:
            raise BadEdit(NO_LENGTH.format(self.bank.site_of(place), self.bank.name))
        return norm


def _is_reached_first(host: Host, first: Site, second: Site) -> bool:
    """Whether a pass of one stack reaches one site before another; what a module is given, before what it gives."""
    if first.module == second.module and "input" in (first.side, second.side):
        return first.side == "input" != second.side
    return host.order(first) < host.order(second) and host.clocks(first) == host.clocks(second)


def _other(lower: Lowering, concept: Concept, place: Place, name: str | Concept, *, is_open: bool) -> Other:
    """How an edit at one of a concept's places learns what another concept reads, whose place the concept takes."""
    bank, old = lower.bank, lower.bank[name]
    if old.gate != concept.gate and not is_open:
        raise Unanswerable(
            f"{old.name!r} and {concept.name!r} act on other tokens, by the gates that bank {bank.name!r} stores with "
            "them, so one cannot take the other's place; lift both with gate='open'"
        )
    if {*map(bank.window_of, old.places)} != {*map(bank.window_of, concept.places)}:
        raise Unanswerable(f"{old.name!r} and {concept.name!r} are moved at other noise levels; swap concepts of one level")
    where, site = bank.beside(place, old) or old.places[0], bank.site_of(place)
    read, told = bank.read_at(where), reader(bank, where, old.name, exact=lower.options.exact)
    if read == site:
        return Other(told, where.unit)
    if not lower._is_before(read, site):
        raise Unanswerable(
            f"{old.name!r} is read at {read!r}, which is not before {site!r}, where {concept.name!r} takes its place"
        )
    key = "reading", lower.key(where)
    return Other(NoteReader(key, old.name), where.unit, ((read, Note(key, told)),))


NO_LENGTH = "match_norm needs the median length of activations at {0!r}, which bank {1!r} lacks"
UNREAD = (
    "{0!r} is read at {1!r}, where nothing is changed, so it cannot be made to read 0; Ablate() without exact= takes all of it "
    "away at {2!r}, where it is written"
)


def _sections(host: Host, site: str, name: str, tokens: Any, is_latent: bool, tokenizer: Any) -> list[Share]:
    """What of a text an edit acts on. Unless it says so, the ablation of a latent leaves first tokens alone."""
    if tokens is None and is_latent and host.begins_text(host.site(site)):
        return [Section(slice(1, None))]
    given = tokens if isinstance(tokens, tuple) else (tokens,)
    found: list[Any] = [part for part in given if isinstance(part, slice) or part in ("prompt", "generated")]
    words = [passage(word, tokenizer, name) for word in given if isinstance(word, str) and is_word(word)]
    return [*(Section(part, is_traceable=len(found) == 1) for part in found), *words]


def _over_prompt(host: Host, site: str, read: PromptReader) -> PromptReader:
    """What reads a prompt at a site, refused where there is none."""
    if not host.counts_tokens(host.site(site)):
        raise Unanswerable(
            f"the gate over the prompt on {read.name!r} counts tokens of text, and those of {site!r} are none; leave out "
            "over='prompt'"
        )
    return read


def _check(concept: Concept, host: Host, site: str, intervention: Intervention, when: Schedule | None) -> None:
    """Refuse what this model cannot answer."""
    if when is not None and when.clock == "progress" and not host.has_progress:
        raise Unanswerable(
            f"{concept.name!r}: text has no progress for a {type(when).__name__} to open on, because its end is unknown; "
            "use Steps, which counts new tokens"
        )
    if when is not None and when.clock == "progress" and host.counts_tokens(host.site(site)):
        raise Unanswerable(
            f"{concept.name!r} is written at {site!r}, which reads the prompt before there is any progress for a "
            f"{type(when).__name__} to open on; leave out when="
        )
    if intervention.tokens not in ("all", None) and not host.counts_tokens(host.site(site)):
        raise Unanswerable(
            f"{concept.name!r}: tokens={intervention.tokens!r} counts tokens of text, and those of {site!r} are none; "
            "use mask= for a part of an image, and when= for a part of the run"
        )


def _module(bank: ConceptBank, concept: Concept, place: Place, intervention: Intervention) -> Context | None:
    """The context module that switches a concept, if it is one of such; refuses an amount of what is there or not, or is
    switched."""
    kind = KINDS[bank.encoder_facts[place.encoder].kind]
    if kind.discrete and not intervention.keeps_codes:
        raise Unanswerable(
            f"{concept.name!r} is a code of a quantiser, which is there or not, so there is no amount of it to change; put "
            "another in its place with sl.Swap, or those of another run with sl.Patch"
        )
    if kind.switched != intervention.switches:
        raise Unanswerable(
            f"{concept.name!r} is a concept of a context module, which an intervention switches, alone or beside others; use "
            "sl.Do()"
            if kind.switched
            else f"sl.Do() switches concepts of context banks, and {concept.name!r} is none; move it by an amount or sl.Set"
        )
    encoder = bank.encoder(place.encoder) if kind.switched else None
    return encoder if isinstance(encoder, Context) else None


def reach(natural: tuple[float, float] | None) -> tuple[float, float] | None:
    """The readings that a concept may be forced to: the natural ones and those between them and 0, as nothing that takes away
    is capped."""
    return None if natural is None else (min(natural[0], 0.0), max(natural[1], 0.0))


SHARE = 0.35
"""Longest change at a site, as a share of its activations' median length."""
