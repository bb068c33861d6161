"""`steer`, `attach` and `record`: the live session between a bank and a model."""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import inf
from types import TracebackType
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .bank import ConceptBank
from .concepts import Concept
from .edits import Edit, Key, Program, Reading, Table
from .errors import (
    BadEdit,
    ConflictingEdits,
    ModelBusy,
    OtherWeights,
    OutOfRange,
    SiteNotReached,
    Unanswerable,
)
from .hooks.attach import ASIDE, Attachment, Dispatch, Socket, attachment, before_forward, is_compiled, modules_on
from .hosts import Host, host_for
from .interventions import Ablate, Add, Clamp, Intervention, Patch, Rule, Set
from .schedules import Branch, StepState
from .sites import Site

Edits = Mapping[str, float | Sequence[float] | Intervention]
Do = Literal["model", "hold", "graph"]
SHARE = 0.35
"""Longest change at a site, as a share of its activations' median length."""


class Options(NamedTuple):
    """How edits are carried out."""

    branch: Literal["both"] | Branch = "both"
    do: Do = "model"
    hold: tuple[str, ...] = ()
    free: tuple[str, ...] = ()
    allow_ood: bool = False


@dataclass(eq=False)
class Plan:
    """Edits resolved against one bank and one model, by site."""

    sites: tuple[Site, ...]
    edits: dict[str, tuple[Edit, ...]]
    readings: dict[str, tuple[Reading, ...]]
    caps: dict[str, float]
    programs: dict[str, Program]
    holds: bool


# -- from names to a plan ------------------------------------------------------------------------------------


def resolve(bank: ConceptBank, host: Host, edits: Edits, options: Options) -> Plan:
    """Everything that can be known, and refused, before the first pass."""
    _check_options(bank, options)
    if notice := bank.check(host):
        warnings.warn(notice, OtherWeights, stacklevel=4)
    wanted = {name: _intervention(name, value) for name, value in edits.items()}
    chosen = {name: bank[name] for name in wanted}
    if len({concept.id for concept in chosen.values()}) < len(chosen):
        raise ConflictingEdits(f"one concept is named twice among {', '.join(map(repr, chosen))}")
    made = [_edit(bank, host, chosen[name], wanted[name], options) for name in wanted]
    made += _held(bank, host, chosen.values(), options)
    made += _forecasts(bank, host, made, options)
    by_site: dict[str, list[Edit]] = {}
    for edit in made:
        by_site.setdefault(bank.site_of(edit.concept), []).append(edit)
    readings = _readings(bank, made)
    names = [*by_site, *(name for name in readings if name not in by_site)]
    caps = {name: _cap(bank, name, options) for name in names}
    plan = Plan(
        sites=tuple(host.site(name) for name in names),
        edits={name: tuple(by_site.get(name, ())) for name in names},
        readings={name: tuple(readings.get(name, ())) for name in names},
        caps=caps,
        programs={},
        holds=options.do == "hold",
    )
    _check_gates(bank, host, made)
    for name in names:
        _warn_of_cap(name, plan.edits[name], caps[name])
        plan.programs[name] = Program(plan.edits[name], plan.readings[name], caps[name])
    return plan


def _check_options(bank: ConceptBank, options: Options) -> None:
    if options.branch not in ("both", "cond", "uncond"):
        raise BadEdit(f"expected branch 'both', 'cond' or 'uncond', got {options.branch!r}")
    if options.do not in ("model", "hold", "graph"):
        raise BadEdit(f"expected do 'model', 'hold' or 'graph', got {options.do!r}")
    if (options.hold or options.free) and options.do != "hold":
        raise BadEdit(f"hold= and free= belong to do='hold', got do={options.do!r}")
    for name in (*options.hold, *options.free):
        bank[name]


def _intervention(name: str, value: Any) -> Intervention:
    if isinstance(value, Intervention):
        return value
    try:
        return Add(value)
    except (TypeError, ValueError) as error:
        raise BadEdit(f"expected a number, one per row, or an intervention for {name!r}, got {value!r}: {error}") from None


def _key(bank: ConceptBank, concept: Concept) -> Key:
    return id(bank), concept.id


def _edit(bank: ConceptBank, host: Host, concept: Concept, intervention: Intervention, options: Options) -> Edit:
    when = intervention.when
    if when is not None and when.clock == "progress" and not host.has_progress:
        raise Unanswerable(
            f"{concept.name!r}: text has no progress to open a {type(when).__name__} on, because nobody knows how long "
            "it will get; use Steps, which counts new tokens"
        )
    if isinstance(intervention, Patch) and concept.name not in intervention.tape:
        raise BadEdit(f"the tape does not hold {concept.name!r}; record it with sl.record(model, bank, [{concept.name!r}])")
    _warn_of_range(concept, intervention)
    branch = intervention.branch or options.branch
    return Edit(
        key=_key(bank, concept),
        concept=concept,
        rows=bank.rows(concept),
        rule=_natural(concept, intervention, options),
        intervention=intervention,
        branch=None if branch == "both" else branch,  # type: ignore[arg-type]
        noted=options.do == "graph",
    )


def _natural(concept: Concept, intervention: Intervention, options: Options) -> Rule:
    """The rule in raw coordinates, a value it asks for capped at the natural ones."""
    rule = intervention.rule(concept.unit)
    if options.allow_ood or concept.natural is None or not isinstance(intervention, (Set, Clamp)):
        return rule
    low, high = concept.natural

    def capped(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(capped, value))
        return value if abs(value) == inf else min(max(value, low), high)

    new = rule._replace(low=capped(rule.low), high=capped(rule.high))
    if new != rule:
        ends = f"{low / concept.unit:+.2f} to {high / concept.unit:+.2f}"
        warnings.warn(
            f"{concept.name!r} is capped at its natural values, {ends} units; pass allow_ood=True to go beyond",
            OutOfRange,
            stacklevel=6,
        )
    return new


def _warn_of_range(concept: Concept, intervention: Intervention) -> None:
    if concept.range is None or not isinstance(intervention, Add) or intervention.unit != "concept":
        return
    given: Any = intervention.amount
    amounts = given if isinstance(given, tuple) else (given,)
    low, high = concept.range
    if min(amounts) < low or max(amounts) > high:
        seen = concept.beyond or "nothing was measured there"
        warnings.warn(
            f"{concept.name!r} was measured to be safe from {low:+.2f} to {high:+.2f}, got {given}; beyond: {seen}",
            OutOfRange,
            stacklevel=6,
        )


def _cap(bank: ConceptBank, site: str, options: Options) -> float:
    norm = bank.sites[site].norm
    return inf if options.allow_ood or norm is None else SHARE * norm


def _warn_of_cap(site: str, edits: Sequence[Edit], cap: float) -> None:
    """One warning where the additions of a site are longer than the site allows."""
    adds = [edit for edit in edits if not edit.is_target and edit.rule.shift != 0]
    if cap == inf or not adds:
        return
    table = Table.of(adds)
    longest = float((table.shift @ table.write).norm(dim=-1).max())
    if longest > cap * 1.0001:
        names = ", ".join(repr(edit.concept.name) for edit in adds)
        warnings.warn(
            f"{names}: a change of length {longest:.1f} at {site!r} is capped at {cap:.1f}, {SHARE:.0%} of what "
            "activations there measure; pass allow_ood=True to go beyond",
            OutOfRange,
            stacklevel=5,
        )


def _held(bank: ConceptBank, host: Host, chosen: Iterable[Concept], options: Options) -> list[Edit]:
    """Concepts that keep the reading of an unsteered twin."""
    if options.do != "hold":
        return []
    edited = {concept.name for concept in chosen}
    follow = [child for name in edited for child in bank.graph.descendants(name)]
    free = {bank[name].name for name in options.free}
    names = dict.fromkeys([*follow, *(bank[name].name for name in options.hold)])
    concepts = [bank[name] for name in names if name not in edited | free]
    for concept in concepts:
        host.site(bank.site_of(concept))
    return [
        Edit(
            key=_key(bank, concept),
            concept=concept,
            rows=bank.rows(concept),
            rule=Rule(),
            intervention=Ablate(),
            held=True,
        )
        for concept in concepts
    ]


def _forecasts(bank: ConceptBank, host: Host, made: Sequence[Edit], options: Options) -> list[Edit]:
    """Edits that carry the graph's forecast to later sites; a set concept is cut from its parents."""
    if options.do != "graph":
        return []
    moving = {edit.concept.name for edit in made}
    fixed = {edit.concept.name for edit in made if edit.is_target}
    reached = dict.fromkeys(child for name in sorted(moving) for child in bank.graph.descendants(name))
    new = []
    for name in reached:
        parents = {p: w for p, w in bank.graph.parents(name).items() if p in moving or p in reached}
        if name in fixed or not parents:
            continue
        child = bank[name]
        for parent in parents:
            if host.order(host.site(bank.site_of(bank[parent]))) >= host.order(host.site(bank.site_of(child))):
                raise Unanswerable(f"do='graph' needs {name!r} at a later site than its cause {parent!r}")
        carried = {_key(bank, bank[p]): w * child.unit / bank[p].unit for p, w in parents.items()}
        key = _key(bank, child)
        new.append(
            Edit(
                key=key,
                concept=child,
                rows=bank.rows(child),
                rule=Rule(),
                intervention=Add(0.0),
                forecast=carried,
                noted=True,
            )
        )
    return new


def _gate_key(edit: Edit) -> Key:
    return "gate", edit.key, edit.intervention.gate


def _readings(bank: ConceptBank, made: Sequence[Edit]) -> dict[str, list[Reading]]:
    """What gates have to know, by the site at which it is read."""
    found: dict[str, list[Reading]] = {}
    for edit in made:
        if (gate := edit.intervention.gate) is not None:
            concept = bank[gate.concept]
            found.setdefault(bank.site_of(concept), []).append(Reading(_gate_key(edit), bank.rows(concept), concept.unit))
    return found


def _check_gates(bank: ConceptBank, host: Host, made: Sequence[Edit]) -> None:
    for edit in made:
        if (gate := edit.intervention.gate) is not None:
            read, moved = (host.site(bank.site_of(c)) for c in (bank[gate.concept], edit.concept))
            if host.order(read) > host.order(moved) or host.clocks(read) != host.clocks(moved):
                raise Unanswerable(
                    f"the gate on {gate.concept!r} is read at {read.name!r}, after {edit.concept.name!r} is edited at "
                    f"{moved.name!r}; gate with a concept of an earlier site"
                )


_PLANS: WeakKeyDictionary[nn.Module, OrderedDict[Any, tuple[ConceptBank, Plan]]] = WeakKeyDictionary()
KEPT_PLANS = 64


def _plan(bank: ConceptBank, host: Host, edits: Edits, options: Options) -> Plan:
    """The plan for these edits, remembered for the next time they are asked for."""
    try:
        key = (id(bank), tuple(edits.items()), options)
        known = _PLANS.setdefault(host.model, OrderedDict())
        if (found := known.get(key)) is not None:
            return found[1]
    except TypeError:  # an amount that cannot be hashed, such as a list
        return resolve(bank, host, edits, options)
    plan = resolve(bank, host, edits, options)
    if not any(i.mask is not None or isinstance(i, Patch) for i in edits.values() if isinstance(i, Intervention)):
        known[key] = bank, plan
        if len(known) > KEPT_PLANS:
            known.popitem(last=False)
    return plan


# -- the live session ----------------------------------------------------------------------------------------


class Contents:
    """What a compiled model runs at one site: a table of fixed size, changed in place."""

    def __init__(self, table: Table):
        self.table = table
        self.hits = torch.zeros((), dtype=torch.long, device=table.read.device)

    def __call__(self, x: Tensor, state: StepState) -> Tensor:
        self.hits.add_(1)
        delta, _, _ = self.table.change(x, state)
        return x + delta.to(x.dtype)


class Steering:
    """A live session: what is attached, what is edited, what happened. Also a context manager."""

    def __init__(self, target: object, bank: ConceptBank, *, edits: Edits, options: Options):
        self.host, self.bank = host_for(target), bank
        self.programs: dict[str, Program] = {}
        self._options = options
        self._plan = _plan(bank, self.host, edits, options)
        self._standing: tuple[Site, ...] = ()
        self._held: tuple[Site, ...] = ()
        self._attachment: Attachment | None = None
        self._thread = 0
        self._passes: dict[str, int] = {}
        self._ran = False
        self._undo_twin: Callable[[], None] | None = None
        self._caches: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

    # -- life ------------------------------------------------------------------------------------------------

    def attach(self) -> "Steering":
        """Put permanent sockets at every site of the bank, so that the model can be compiled."""
        place = attachment(self.host)
        sites = tuple(self.host.site(name) for name in self.bank.sites)
        place.require(self.host, sites)
        self._attachment, self._standing = place, sites
        room = {name: sum(self.bank.site_of(c) == name for c in self.bank.concepts.values()) for name in self.bank.sites}
        for site in sites:
            socket = place.sockets[site.name]
            if socket.traced is None:
                device = _device(self.host.model, site)
                width = self.bank.sites[site.name].width
                socket.traced = Contents(Table.empty(max(1, room[site.name]), width, ROWS, device))
        return self

    def set(self, edits: Edits) -> "Steering":
        """Edit these concepts from now on, in place of those before."""
        plan = _plan(self.bank, self.host, edits, self._options)
        self._leave()
        self._plan = plan
        self._enter()
        return self

    def clear(self) -> "Steering":
        """Edit nothing, and stay attached."""
        return self.set({})

    def detach(self) -> None:
        """Leave the model as it was."""
        self._leave()
        if self._standing and self._attachment is not None:
            for site in self._standing:
                if (socket := self._attachment.sockets.get(site.name)) is not None and self._attachment.uses(site) == 1:
                    socket.traced = None
            self._attachment.release(self.host, self._standing)
            self._standing = ()

    def __enter__(self) -> "Steering":
        if not self.programs:
            self._enter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        missed, capped = ([], False) if kind else (self._missed(), self._capped())
        self.detach()
        if missed:
            raise SiteNotReached(
                f"the model ran, but never through {', '.join(map(repr, missed))}; "
                f"nothing was edited there. Sites of this model: {', '.join(list(self.host.sites())[:6])}, …"
            )
        if capped:
            warnings.warn("edits were capped in length at run time; see report()", OutOfRange, stacklevel=2)

    def _enter(self) -> None:
        place = attachment(self.host)
        self._thread = threading.get_ident()
        with place.lock:
            others = [s for s in place.sessions if s._plan.edits]
            if any(s._thread != self._thread for s in others) and self._plan.edits and is_compiled([self.host.model]):
                raise ModelBusy("another thread steers this compiled model; take turns, or load a second copy")
            self._refuse_conflicts(others)
            place.require(self.host, self._plan.sites)
            self._attachment, self._held = place, self._plan.sites
            self.programs = {name: program.anew() for name, program in self._plan.programs.items()}
            self._passes = {path: clock.passes for path, clock in place.clocks.items()}
            if self._plan.holds and self._plan.edits:
                self._undo_twin = before_forward(self.host.model, self._run_twin)
            if self._plan.edits:
                place.sessions.append(self)
            try:
                _rewire(place)
            except BaseException:
                self._leave()
                raise

    def _leave(self) -> None:
        place = self._attachment
        if place is None:
            return
        self._ran = self._ran or self._has_run()
        with place.lock:
            if self._undo_twin is not None:
                self._undo_twin()
                self._undo_twin = None
            if self in place.sessions:
                place.sessions.remove(self)
            held, self._held = self._held, ()
            _rewire(place)
            place.release(self.host, held)

    def _refuse_conflicts(self, others: Sequence["Steering"]) -> None:
        """One concept may be given one value only."""
        fixed = {e.key for s in others if s._thread == self._thread for es in s._plan.edits.values() for e in es if e.is_target}
        for edits in self._plan.edits.values():
            for edit in edits:
                if edit.is_target and edit.key in fixed:
                    raise ConflictingEdits(f"{edit.concept.name!r} is set by an outer steer() already; set it once")

    def _run_twin(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before each pass: the same pass without edits, to know what held concepts would have read."""
        if ASIDE.running:
            return
        if reason := self.host.refuse_twin():
            raise Unanswerable(reason)
        ASIDE.running = True
        try:
            self.host.run_twin(args, kwargs, self._caches)
        finally:
            ASIDE.running = False

    # -- what happened ---------------------------------------------------------------------------------------

    def _missed(self) -> list[str]:
        """Sites that were never reached although the model ran."""
        place = self._attachment
        if place is None or not self._held:
            return []
        reached = {name for name, program in self.programs.items() if program.tally.passes}
        ran = self._has_run()
        return [site.name for site in self._held if ran and site.name not in reached and not self._hit(site)]

    def _has_run(self) -> bool:
        """Whether the model made a pass inside this session."""
        place = self._attachment
        return place is not None and any(c.passes > self._passes.get(path, 0) for path, c in place.clocks.items())

    def _hit(self, site: Site) -> bool:
        socket = self._attachment.sockets.get(site.name) if self._attachment else None
        return socket is not None and isinstance(socket.traced, Contents) and bool(socket.traced.hits)

    def _capped(self) -> bool:
        return any(int(p.tally.capped) for p in self.programs.values() if p.part is None)

    def report(self) -> "Report":
        """What was edited where, how much, and how far off the natural range; and why nothing happened, if so."""
        lines = []
        for name, program in self.programs.items():
            tally, norm = program.tally, self.bank.sites[name].norm
            looked = max(1, int(tally.looked))
            for k, edit in enumerate(program.edits):
                lines.append(
                    Line(
                        concept=edit.concept.name,
                        site=name,
                        passes=tally.passes,
                        tokens=tally.tokens,
                        change=float(tally.changed) / looked / norm if norm else None,
                        off_range=None if tally.off is None or edit.concept.natural is None else float(tally.off[k]) / looked,
                        largest=None if tally.largest is None else float(tally.largest[k]),
                        capped=float(tally.capped) / looked,
                    )
                )
        return Report(tuple(lines), self._ran or self._has_run())

    def __repr__(self) -> str:
        return str(self.report())


@dataclass(frozen=True)
class Line:
    """What became of one concept."""

    concept: str
    site: str
    passes: int
    tokens: int
    """Positions per row, pads included."""
    change: float | None
    """Mean length of the site's change, as a share of the median activation there."""
    off_range: float | None
    """Share of looked-at tokens at which the concept reads outside its natural range."""
    largest: float | None
    """Largest reading, in units."""
    capped: float
    """Share of looked-at tokens whose change was cut short."""


@dataclass(frozen=True)
class Report:
    """What a session did. Prints as a table."""

    lines: tuple[Line, ...]
    ran: bool

    def __str__(self) -> str:
        if not self.lines:
            return "Steering: no edits are set"
        head = f"{'concept':<18}{'site':<14}{'passes':>7}{'tokens':>8}{'change':>9}{'off range':>11}{'largest':>9}{'capped':>8}"
        rows = [head]
        for line in self.lines:
            change = "–" if line.change is None else f"{line.change:.0%}"
            off = "–" if line.off_range is None else f"{line.off_range:.0%}"
            largest = "–" if line.largest is None else f"{line.largest:.1f}"
            rows.append(
                f"{line.concept:<18}{line.site:<14}{line.passes:>7}{line.tokens:>8}{change:>9}{off:>11}{largest:>9}"
                f"{line.capped:>8.0%}"
            )
        if not self.ran:
            rows.append("nothing happened: the model did not run inside this session")
        elif not any(line.tokens for line in self.lines):
            rows.append("nothing happened: the model ran, but no schedule, part of the text or gate let an edit through")
        return "\n".join(rows)


ROWS = 64
"""Rows for which a compiled site has room."""


def _device(model: nn.Module, site: Site) -> torch.device:
    inside = model.get_submodule(site.module).parameters()
    return next(inside, next(model.parameters(), torch.zeros(()))).device


def _rewire(place: Attachment) -> None:
    """Give every socket what the active sessions want there, thread by thread."""
    threads = {session._thread for session in place.sessions}
    for name, socket in place.sockets.items():
        if len(threads) <= 1:
            socket.edit = _merged(place.sessions, name)
        else:
            socket.edit = Dispatch({t: _merged([s for s in place.sessions if s._thread == t], name) for t in threads})
        if isinstance(socket.traced, Contents):
            _fill(socket, [program for s in place.sessions if (program := s.programs.get(name)) is not None])


def _merged(sessions: Sequence[Steering], name: str) -> Callable[[Tensor, StepState], Tensor] | None:
    """One edit for all sessions of a thread at one site."""
    programs = [program for session in sessions if (program := session.programs.get(name)) is not None]
    if not programs:
        return None
    merged = programs[0] if len(programs) == 1 else _Together(programs)
    return _Listening(merged, programs) if any(session._plan.holds for session in sessions) else merged


class _Together:
    """The programs of several sessions as one, so that their additions and targets are solved together."""

    def __init__(self, programs: Sequence[Program]):
        self.programs = programs
        edits = [edit for program in programs for edit in program.edits]
        readings = [reading for program in programs for reading in program.readings]
        self.merged = Program(edits, readings, min(program.cap for program in programs))
        self.merged.twin = {}
        for program in programs:
            program.twin = self.merged.twin

    def __call__(self, x: Tensor, state: StepState) -> Tensor:
        for program in self.programs:
            program.tally.passes += 1
            program.tally.tokens += state.length
        return self.merged(x, state)


class _Listening:
    """A program that only listens while the unsteered twin runs."""

    def __init__(self, edit: Callable[[Tensor, StepState], Tensor], programs: Sequence[Program]):
        self.edit, self.programs = edit, programs

    def __call__(self, x: Tensor, state: StepState) -> Tensor:
        if ASIDE.running:
            for program in self.programs:
                program.listen(x)
            return x
        return self.edit(x, state)


def _fill(socket: Socket, programs: Sequence[Program]) -> None:
    """Put the edits into the tensors that compiled code reads."""
    assert isinstance(socket.traced, Contents)
    edits = [edit for program in programs for edit in program.edits]
    for edit in edits:
        i = edit.intervention
        if i.gate is not None or i.mask is not None or edit.branch or edit.held or edit.forecast or isinstance(i, Patch):
            if is_compiled(modules_on(socket.model, socket.site.module)):
                raise Unanswerable(
                    f"{edit.concept.name!r}: gates, masks, branches, patches and do='hold' or 'graph' need Python at every "
                    "pass, which a compiled model leaves out; use them on a model that is not compiled"
                )
            socket.traced.table.fill(None)
            return
    socket.traced.hits.zero_()
    socket.traced.table.fill(Table.of(edits, min(program.cap for program in programs)) if edits else None)


def steer(
    target: object,
    bank: ConceptBank,
    edits: Edits,
    *,
    branch: Literal["both"] | Branch = "both",
    do: Do = "model",
    hold: Sequence[str] = (),
    free: Sequence[str] = (),
    allow_ood: bool = False,
) -> Steering:
    """Change concepts of a model inside a `with` block.

    `edits` maps concept names to a number (an addition, in units of the concept), one number per row, or an
    intervention. With `do="hold"` the concept's descendants, but for those in `free`, and the concepts in `hold` keep
    their unsteered reading; with `do="graph"` the bank's graph moves descendants too. Edits are capped where the bank
    knows what is natural, unless `allow_ood`. Raises `BadEdit`, `BadBank` or `UnknownConcept` before anything is touched.
    """
    if not isinstance(edits, Mapping):
        raise BadEdit(f"expected edits as a mapping from concept names, got {type(edits).__name__}")
    return Steering(target, bank, edits=edits, options=Options(branch, do, tuple(hold), tuple(free), allow_ood))


def attach(target: object, bank: ConceptBank, *, allow_ood: bool = False) -> Steering:
    """Put sockets at every site of a bank that stay until `detach()`; edit with `set`. Do this before compiling."""
    return Steering(target, bank, edits={}, options=Options(allow_ood=allow_ood)).attach()


Tape = dict[str, list[tuple[StepState, Tensor]]]


@contextmanager
def record(target: object, bank_or_sites: ConceptBank | Sequence[str], concepts: Sequence[str] | None = None) -> Iterator[Tape]:
    """Record every pass inside a `with` block: `tape[name]` lists `(state, values)`.

    With a bank, values are the concepts' readings `z[B, N]` (raw coordinates, after any edit); with names of sites,
    the activations `x[B, N, D]` themselves.
    """
    host = host_for(target)
    tape: Tape = {}
    with ExitStack() as stack:
        if isinstance(bank_or_sites, ConceptBank):
            bank_or_sites.check(host)
            for name in concepts if concepts is not None else bank_or_sites.concepts:
                concept = bank_or_sites[name]
                site = host.site(bank_or_sites.site_of(concept))
                _observe(host, site, _reader(bank_or_sites, concept, tape.setdefault(concept.name, [])), stack)
        else:
            for name in [bank_or_sites] if isinstance(bank_or_sites, str) else bank_or_sites:
                _observe(host, host.site(name), _keeper(tape.setdefault(name, [])), stack)
        yield tape


def _observe(host: Host, site: Site, observe: Callable[[Tensor, StepState], None], stack: ExitStack) -> None:
    place = attachment(host)
    place.require(host, [site])
    stack.callback(place.release, host, [site])
    observers = place.sockets[site.name].observers
    observers.append(observe)
    stack.callback(observers.remove, observe)


def _reader(bank: ConceptBank, concept: Concept, out: list[tuple[StepState, Tensor]]) -> Callable[[Tensor, StepState], None]:
    read, bias, _ = bank.rows(concept)

    def observe(x: Tensor, state: StepState) -> None:
        out.append((state, x.float() @ read[0].to(x.device) + bias[0].to(x.device)))

    return observe


def _keeper(out: list[tuple[StepState, Tensor]]) -> Callable[[Tensor, StepState], None]:
    return lambda x, state: out.append((state, x.detach().clone()))
