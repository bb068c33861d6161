"""`steer` and `attach`: the live session between a bank and a model."""

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from math import inf
from types import TracebackType
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..bank.concept_bank import ConceptBank
from ..errors import BadEdit, ConflictingEdits, ModelBusy, OutOfRange, SiteNotReached, Unanswerable
from ..hooks.attach import ASIDE, LOCK, Attachment, Dispatch, Socket, attachment, before_forward, is_compiled, modules_on
from ..hosts import host_for
from ..passes import Branch, StepState
from ..schedules import PerStep, Within
from ..sites import Site
from .edit import Table
from .interventions import Patch
from .plan import Do, Edits, Options, plan_for
from .program import Program, why_not
from .report import Line, Report


class Contents:
    """What a compiled model runs at one site: a table of fixed size, changed in place."""

    def __init__(self, table: Table):
        self.table = table
        self.hits = torch.zeros((), dtype=torch.long, device=table.read.device)

    def __call__(self, x: Tensor, state: StepState) -> Tensor:
        self.hits.add_(1)
        delta, *_ = self.table.change(x, state)
        return x + delta.to(x.dtype)


class Steering:
    """A live session: what is attached, what is edited, what happened. Also a context manager."""

    def __init__(self, target: object, bank: ConceptBank, *, edits: Edits, options: Options):
        self.host, self.bank = host_for(target), bank
        self.programs: dict[str, Program] = {}
        self._options = options
        self._plan = plan_for(bank, self.host, edits, options)
        self._standing: tuple[Site, ...] = ()
        self._held: tuple[Site, ...] = ()
        self._attachment: Attachment | None = None
        self._thread = 0
        self._passes: dict[str, Counter[int]] = {}
        self._place: Attachment | None = None
        self._ran = self._entered = False
        self._undo_twin = ExitStack()
        self._caches: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

    # -- life ------------------------------------------------------------------------------------------------

    def attach(self) -> "Steering":
        """Put permanent sockets at every site of the bank, so that the model can be compiled."""
        with torch.inference_mode(False):  # their contents are changed in place later, in whatever mode
            return self._attach()

    def _attach(self) -> "Steering":
        sites = tuple(self.host.site(name) for name in self.bank.sites)
        with LOCK:
            place = attachment(self.host)
            place.require(self.host, sites)
        self._attachment, self._place, self._standing = place, place, sites
        room = Counter(self.bank.site_of(place) for concept in self.bank.concepts.values() for place in concept.places)
        for site in sites:
            socket = place.sockets[site.name]
            if socket.traced is None:
                device = _device(self.host.model, site)
                width = self.bank.sites[site.name].width
                socket.traced = Contents(Table.empty(max(EDITS, room[site.name]), width, ROWS, device))
        return self

    def set(self, edits: Edits) -> "Steering":
        """Edit these concepts from now on, in place of those before."""
        before, plan = self._plan, plan_for(self.bank, self.host, edits, self._options)
        self._leave()
        self._plan, self._ran = plan, False
        try:
            self._enter()
        except BaseException:
            self._plan = before
            self._enter()
            raise
        return self

    def clear(self) -> "Steering":
        """Edit nothing, and stay attached."""
        return self.set({})

    def detach(self) -> None:
        """Leave the model as it was."""
        self._leave()
        if self._place is not None:
            with LOCK:
                for site in self._standing:
                    if (socket := self._place.sockets.get(site.name)) is not None and self._place.uses(site) == 1:
                        socket.traced = None
                self._place.release(self.host, self._standing)
            self._place, self._standing = None, ()

    def __enter__(self) -> "Steering":
        if not self._entered:
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
        self._thread = threading.get_ident()
        with LOCK:
            place = attachment(self.host)
            others = [session for session in place.sessions if session._plan.edits]
            if any(s._thread != self._thread for s in others) and self._plan.edits and is_compiled([self.host.model]):
                raise ModelBusy("another thread steers this compiled model; take turns, or load a second copy")
            self._refuse_conflicts(others)
            place.require(self.host, self._plan.sites)
            self._attachment, self._held, self._entered = place, self._plan.sites, True
            try:
                self._passes = {path: clock.passes.copy() for path, clock in place.clocks.items()}
                self.programs = {name: program.anew() for name, program in self._plan.programs.items()}
                if self._plan.edits:
                    place.sessions.append(self)
                    if self._plan.holds:
                        for path in self.host.passes():
                            module = self.host.model.get_submodule(path)
                            self._undo_twin.callback(before_forward(module, partial(self._run_twin, path)))
                _rewire(place)
            except BaseException:
                self._leave()
                raise

    def _leave(self) -> None:
        place = self._attachment
        if place is None or not self._entered:
            return
        self._ran, self._entered = self._ran or self._has_run(), False
        with LOCK:
            self._undo_twin.close()
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

    def _run_twin(self, path: str, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before each pass: the same pass without edits, to know what held concepts would have read."""
        place = self._attachment
        elsewhere = threading.get_ident() != self._thread
        if ASIDE.running or (elsewhere and place is not None and {s._thread for s in place.sessions} != {self._thread}):
            return
        if reason := self.host.refuse_twin():
            raise Unanswerable(reason)
        ASIDE.running = True
        try:
            self.host.run_twin(path, args, kwargs, self._caches)
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
        if place is None:
            return False
        alone = all(session._thread == self._thread for session in place.sessions)
        for path, clock in place.clocks.items():
            new = clock.passes - self._passes.get(path, Counter())
            if new[self._thread] or (alone and new):
                return True
        return False

    def _hit(self, site: Site) -> bool:
        socket = self._attachment.sockets.get(site.name) if self._attachment else None
        return socket is not None and isinstance(socket.traced, Contents) and bool(socket.traced.hits)

    def _capped(self) -> bool:
        """Whether a change that only the run could tell was cut short."""
        return any(int((p.merged or (p, 0))[0].tally.capped) for p in self.programs.values())

    def report(self) -> "Report":
        """What was edited where, how much, and how far off the natural range; and why nothing happened, if so."""
        lines = []
        for name, program in self.programs.items():
            if not program.edits:
                continue
            whole, at = program.merged or (program, 0)
            tally, norm, looked = whole.tally, self.bank.sites[name].norm, int(whole.tally.looked)
            for k, edit in enumerate(program.edits, start=at):
                lines.append(
                    Line(
                        concept=edit.concept.name,
                        site=name,
                        passes=program.tally.passes,
                        acted=tally.acts + int(tally.acted),
                        tokens=round(float(tally.tokens)),
                        seen=tally.seen,
                        change=float(tally.changed) / looked / norm if norm and looked else None,
                        off_range=float(tally.off[k]) / looked if edit.concept.natural and tally.off is not None else None,
                        largest=None if tally.largest is None else float(tally.largest[k]),
                        capped=float(tally.capped) / max(1.0, float(tally.tokens)),
                        why="" if float(tally.tokens) else why_not(edit, tally),
                    )
                )
        return Report(tuple(lines), self._ran or self._has_run())

    def __repr__(self) -> str:
        return str(self.report())


EDITS, ROWS = 8, 64
"""Edits, and rows, for which a compiled site has room at least."""


def _device(model: nn.Module, site: Site) -> torch.device:
    inside = model.get_submodule(site.module).parameters()
    return next(inside, next(model.parameters(), torch.zeros(()))).device


def _rewire(place: Attachment) -> None:
    """Give every socket what the active sessions want there, thread by thread."""
    threads = {session._thread for session in place.sessions}
    for name, socket in place.sockets.items():
        if len(threads) <= 1:
            socket.edit = _merged(place.sessions, name) if threads else None
        else:
            socket.edit = Dispatch({t: _merged([s for s in place.sessions if s._thread == t], name) for t in threads})
        if isinstance(socket.traced, Contents):
            blind = not place.sessions[0].host.counts_compiled if place.sessions else False
            _fill(socket, [program for s in place.sessions if (program := s.programs.get(name)) is not None], blind)


def _merged(sessions: Sequence[Steering], name: str) -> Callable[[Tensor, StepState], Tensor] | None:
    """One edit for all sessions of a thread at one site."""
    programs = [program for session in sessions if (program := session.programs.get(name)) is not None]
    if not programs:
        return None
    merged = programs[0] if len(programs) == 1 else _Together(programs)
    return _Listening(merged, programs) if any(session._plan.holds for session in sessions) else merged


def _cap(programs: Sequence[Program]) -> float:
    """The tightest cap among sessions that edit here; one that only reads has no say."""
    return min((program.cap for program in programs if program.edits), default=inf)


class _Together:
    """The programs of several sessions as one, so that their additions and targets are solved together."""

    def __init__(self, programs: Sequence[Program]):
        self.programs = programs
        edits = [edit for program in programs for edit in program.edits]
        readings = [reading for program in programs for reading in program.readings]
        self.merged = Program(edits, readings, _cap(programs))
        at = 0
        for program in programs:
            program.twin = self.merged.twin
            program.merged, at = (self.merged, at), at + len(program.edits)

    def __call__(self, x: Tensor, state: StepState) -> Tensor:
        for program in self.programs:
            program.tally.passes += 1
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


def _fill(socket: Socket, programs: Sequence[Program], blind: bool) -> None:
    """Put the edits into the tensors that compiled code reads, and refuse what only Python can do once it is compiled.

    `blind`: a clock that is compiled cannot count steps.
    """
    assert isinstance(socket.traced, Contents)
    blind = blind and any(is_compiled([socket.model.get_submodule(clock.path)]) for clock in socket.clocks)
    edits = [edit for program in programs for edit in program.edits]
    try:
        for edit in edits:
            i = edit.intervention
            if (
                edit.gates
                or edit.norm is not None
                or i.mask is not None
                or edit.branch
                or edit.held
                or edit.forecast
                or isinstance(i, Patch)
                or isinstance(i.when, PerStep | Within)
                or edit.keeps_norm
            ):
                raise Unanswerable(
                    f"{edit.concept.name!r}: gates, PerStep, when= at several levels, match_norm, keep_norm, masks, branches, "
                    "patches, do='hold' and 'graph' need Python at every pass, which a compiled model leaves out; use them "
                    "on one that is not compiled"
                )
            if blind and i.when is not None and i.when.clock == "steps":
                raise Unanswerable(
                    f"{edit.concept.name!r}: steps cannot be counted where the whole denoiser is compiled; use a Window, or "
                    "compile_repeated_blocks() in place of compile()"
                )
            if not edit.is_constant and (edit.crowd is not None or edit.heard is not None or edit.rows.norm):
                raise Unanswerable(
                    f"{edit.concept.name!r}: latents that compete, that are read at an earlier site or from normalised tokens "
                    "need Python at every pass, which a compiled model leaves out; a TopK latent can do with exact=False"
                )
        socket.traced.table.fill(Table.of(edits, _cap(programs)) if edits else None)
        socket.traced.hits.zero_()
    except Unanswerable:
        socket.traced.table.fill(None)
        if is_compiled(modules_on(socket.model, socket.site.module)):
            raise


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
    exact: bool = True,
) -> Steering:
    """Change concepts of a model inside a `with` block.

    `edits` maps concept names to a number (an addition, in units of the concept), one number per row, or an
    intervention. With `do="hold"` the concept's descendants, but for those in `free`, and the concepts in `hold` keep
    their unsteered reading; where one has a place of its own (a stored gate), edits of other places are not written there.
    With `do="graph"` the bank's graph moves descendants too. Edits are capped where the bank knows what is natural, unless
    `allow_ood`. Latents of TopK encoders are read beside all others; with `exact=False` by the
    threshold that the bank stores, which costs no more than a direction. Raises `BadEdit`, `BadBank` or `UnknownConcept`
    before anything is touched.
    """
    if not isinstance(edits, Mapping):
        raise BadEdit(f"expected edits as a mapping from concept names, got {type(edits).__name__}")
    return Steering(target, bank, edits=edits, options=Options(branch, do, tuple(hold), tuple(free), allow_ood, exact))


def attach(target: object, bank: ConceptBank, *, allow_ood: bool = False, exact: bool = True) -> Steering:
    """Put sockets at every site of a bank that stay until `detach()`; edit with `set`. Do this before compiling."""
    return Steering(target, bank, edits={}, options=Options(allow_ood=allow_ood, exact=exact)).attach()
