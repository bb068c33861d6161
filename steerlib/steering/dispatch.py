"""Who acts at a socket: the one place where steering, replacing, recording and pinning compose.

A socket has an ordered list of owners. In each pass those act that were entered where the pass runs (`contexts.py`): what
replaces comes first, in the order of entering; then the edits of all sessions, solved together; then what observes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal
from weakref import WeakSet

from torch import Tensor, nn

from ..contexts import ENTERED, Entry, acting
from ..errors import CompiledModel, NoSession, Unanswerable
from ..hooks.attach import ASIDE, LOCK, Act, Attachment, Socket, attachment, is_compiled, modules_on, related
from ..hooks.checkpoints import uncheckpointed, unfinished
from ..hosts import Host
from ..passes import StepState
from ..sites import Site
from .compiled import CompiledEdit, why_not
from .program import Program, Run

SHARED: WeakSet[nn.Module] = WeakSet()
"""Modules of models that were declared shared: a pass that entered nothing is plain there."""


@dataclass(frozen=True, eq=False)
class Owner:
    """One of those who act at a socket.

    Attributes:
        role: replace, edit or observe.
        act: what it does with `x[B, N, D]` and the pass; a `Run` where it edits.
        entry: where it was entered.
    """

    role: Literal["replace", "edit", "observe"]
    act: Any
    entry: Entry


@dataclass(eq=False)
class Present:
    """One that was entered at a model.

    Attributes:
        entry: where.
        plan: what a session edits, and the `Stay` that it makes here; None: this replaces or observes.
        owners: what it does at sockets; was_asked: whether a pass was refused since it could have been of this or of another.
    """

    entry: Entry
    plan: Any = None
    stay: Any = None
    owners: list[tuple[Socket, Owner]] = field(default_factory=list)
    was_asked: bool = False

    @property
    def is_idle(self) -> bool:
        """Whether it is a handle that edits nothing now; a block that edits nothing keeps others' edits out."""
        return self.entry.standing and self.plan is not None and not self.plan.programs


@contextmanager
def beside(host: Host, acts: Sequence[tuple[Site, Literal["replace", "observe"], Act]]) -> Iterator[None]:
    """Let some who replace or observe act at their sites, inside a `with` block.

    Raises `CompiledModel` where torch has compiled the site: compiled code runs no Python, so they would never be called.
    """
    sites = [site for site, _, _ in acts]
    with LOCK:
        place = attachment(host)
        place.require(host, sites)
        if compiled := next((s.name for s in sites if is_compiled(modules_on(host.model, s.module))), None):
            place.release(host, sites)
            raise CompiledModel(f"{compiled!r} is compiled, where nothing can be recorded or replaced; use a model that is not")
        one = Present(Entry())
        place.present.append(one)
        own(one, [(place.sockets[site.name], Owner(role, act, one.entry)) for site, role, act in acts])
        rewire(place)
    try:
        yield
    finally:
        with LOCK:
            depart(place, one)
            place.release(host, sites)


def own(one: Present, owners: Sequence[tuple[Socket, Owner]]) -> None:
    """Let one that was entered do this at sockets, in place of what it did."""
    for socket, owner in one.owners:
        if owner in socket.owners:
            socket.owners.remove(owner)
    for socket, owner in owners:
        socket.owners.append(owner)
    one.owners = [*owners]


def depart(place: Attachment, one: Present) -> None:
    """Let one that was entered go, with what it did at sockets."""
    one.entry.close()
    if one in place.present:
        place.present.remove(one)
    own(one, ())
    for clock in place.clocks.values():
        for entered in [entered for entered in [*clock.passes] if entered and one.entry in entered]:
            del clock.passes[entered]
    rewire(place)


def rewire(place: Attachment) -> None:
    """Give every socket what its owners want there; compiled sites get it in their tensors."""
    present = [one for kin in place.kin for one in kin.present]
    for kin in place.kin:
        shared = is_shared(kin)
        for socket in kin.sockets.values():
            has_work = socket.owners or unfinished(socket.key)
            socket.edit = ByContext(socket.owners, present, is_shared=shared) if has_work else None
    for socket in place.sockets.values():
        if isinstance(socket.traced, CompiledEdit):
            _fill(socket, socket.traced)


def is_shared(place: Attachment) -> bool:
    """Whether a model, or a part of a pipeline, was declared shared."""
    return place.model in SHARED or any(child in SHARED for child in place.model.children())


def is_edited(host: Host) -> bool:
    """Whether a session would edit a pass that runs here; raises `NoSession` where that cannot be known."""
    places = related(host.model)
    present = [one for place in places for one in place.present if one.plan is not None and one.plan.programs]
    return bool(acting([one.entry for one in present], is_shared=any(map(is_shared, places))))


class ByContext:
    """What the owners of a socket do, in each context that a pass runs in."""

    def __init__(self, owners: Sequence[Owner], present: Sequence[Present], *, is_shared: bool):
        self.owners, self.is_shared = tuple(owners), is_shared
        self.present = {one.entry: one for one in present}
        self.alive = tuple(one.entry for one in present if not one.is_idle)
        self.in_generators = any(entry.home is not None for entry in self.alive)
        self.acts: dict[tuple[Entry, ...], Act | None] = {}
        self.known: tuple[Any, Act | None] = (self, None)
        for owner in owners:
            if owner.role == "edit":
                owner.act.leave_joined()

    def __call__(self, x: Tensor, now: StepState) -> Tensor:
        """The x that flows on. Every microsecond here is paid at every site of every token."""
        entered, act = self.known
        if entered is not ENTERED.get():
            act = self.find()
        return x if act is None else act(x, now)

    def find(self) -> Act | None:
        """What to do in the pass that runs here; None: nothing."""
        entered = ENTERED.get()
        try:
            found = acting(self.alive, is_shared=self.is_shared)
        except NoSession:
            for one in self.present.values():
                one.was_asked = True
            raise
        if found not in self.acts:
            self.acts[found] = self._compose(found)
        if entered is not None and not self.in_generators:
            self.known = entered, self.acts[found]
        return self.acts[found]

    def _compose(self, found: tuple[Entry, ...]) -> Act | None:
        """One function of all owners that act together."""
        roles: dict[str, list[Any]] = {"replace": [], "edit": [], "observe": []}
        for owner in self.owners:
            if owner.entry in found:
                roles[owner.role].append(owner.act)
        acts, runs = roles["replace"], roles["edit"]
        if runs:
            act = runs[0] if len(runs) == 1 else Joined(runs)
            acts = [
                *acts,
                TwinListener(act, runs) if any(one.plan.pins for entry in found if (one := self.present[entry]).plan) else act,
            ]
        if roles["observe"]:
            acts = [*acts, Observing(roles["observe"])]
        return None if not acts else acts[0] if len(acts) == 1 else Chain(acts)


def _fill(socket: Socket, compiled: CompiledEdit) -> None:
    """Put the edits of all sessions into the tensors that compiled code reads; what it cannot do is refused once the site is
    compiled."""
    runs = [owner.act for owner in socket.owners if owner.role == "edit"]
    programs = [run.program for run in runs]
    blind = not socket.clocks[0].host.counts_compiled and any(
        is_compiled([socket.model.get_submodule(clock.path)]) for clock in socket.clocks
    )
    edits = [edit for program in programs for edit in program.edits]
    compiled.tell()
    ends = [sum(len(program.edits) for program in programs[: k + 1]) for k in range(len(programs))]
    compiled.runs = [(run, slice(end - len(run.program.edits), end)) for run, end in zip(runs, ends, strict=True)]
    for run in runs:
        run.tell = compiled.tell
    try:
        if reason := next((why for edit in edits if (why := why_not(edit, blind=blind))), ""):
            raise Unanswerable(reason)
        compiled.fill(edits, cap_of(programs))
    except Unanswerable:
        compiled.fill([], inf)
        compiled.runs = []
        if is_compiled(modules_on(socket.model, socket.site.module)):
            raise


class Chain:
    """Several that act one after the other."""

    def __init__(self, acts: Sequence[Act]):
        self.acts = acts

    def __call__(self, x: Tensor, now: StepState) -> Tensor:
        for act in self.acts:
            x = act(x, now)
        return x


class Observing:
    """Observers, which see what flows on; not that of a pass on the side."""

    def __init__(self, observers: Sequence[Callable[[Tensor, StepState], None]]):
        self.observers = observers

    def __call__(self, x: Tensor, now: StepState) -> Tensor:
        if not ASIDE.running and not now.is_again:
            with uncheckpointed():
                for observe in self.observers:
                    observe(x, now)
        return x


def cap_of(programs: Sequence[Program]) -> float:
    """The tightest cap among those that edit; a program that only reads here has no say."""
    return min((program.cap for program in programs if program.edits), default=inf)


class Joined:
    """The runs of several sessions as one, so that their additions and targets are solved together."""

    def __init__(self, runs: Sequence[Run]):
        programs = [run.program for run in runs]
        edits, notes = ([one for p in programs for one in many(p)] for many in (lambda p: p.edits, lambda p: p.notes))
        self.runs, self.run = runs, Run(Program(edits, notes, cap_of(programs)))
        at, self.run.twin = 0, runs[0].twin
        for run in runs:
            end = at + len(run.program.edits)
            run.twin, at = self.run.twin, end
            run.joined.append((self.run, slice(end - len(run.program.edits), end)))

    def __call__(self, x: Tensor, now: StepState) -> Tensor:
        for run in self.runs if not now.is_again else ():
            run.tally.passes += 1
        return self.run(x, now)


class TwinListener:
    """Runs that only listen while the unsteered twin of the pass runs."""

    def __init__(self, act: Act, runs: Sequence[Run]):
        self.act, self.runs = act, runs

    def __call__(self, x: Tensor, now: StepState) -> Tensor:
        if ASIDE.running:
            for run in self.runs:
                run.listen(x, now)
            return x
        return self.act(x, now)
