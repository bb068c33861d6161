"""Who acts at a socket: the one place where steering, replacing, recording and pinning compose.

A socket has an ordered list of owners. What replaces comes first, in the order of entering; then the edits of all sessions,
solved together; then what observes. With several threads, each has the edits of its own sessions.
"""

import threading
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import Any, Literal

from torch import Tensor

from ..errors import NoSession, Unanswerable
from ..hooks.attach import ASIDE, LOCK, Act, Attachment, Socket, attachment, is_compiled, modules_on
from ..hosts import Host
from ..passes import StepState
from ..sites import Site
from .compiled import CompiledEdit, why_not
from .program import Program, Run


@dataclass(frozen=True, eq=False)
class Owner:
    """One of those who act at a socket.

    Attributes:
        role: replace, edit or observe.
        act: what it does with `x[B, N, D]` and the pass; a `Run` where it edits.
        thread: the only one that it acts in; None: any.
    """

    role: Literal["replace", "edit", "observe"]
    act: Any
    thread: int | None = None


@contextmanager
def acting(host: Host, site: Site, owner: Owner) -> Iterator[None]:
    """Let somebody who replaces or observes act at a site, inside a `with` block.

    Raises `CompiledModel` where torch has compiled the site, since compiled code calls no one.
    """
    with LOCK:
        place = attachment(host)
        place.require(host, [site])
        socket = place.sockets[site.name]
        socket.owners.append(owner)
        compose(place, socket)
    try:
        yield
    finally:
        with LOCK:
            socket.owners.remove(owner)
            compose(place, socket)
            place.release(host, [site])


def rewire(place: Attachment) -> None:
    """Give every socket what its owners want there; compiled sites get it in their tensors."""
    for socket in place.sockets.values():
        compose(place, socket)
        if isinstance(socket.traced, CompiledEdit):
            _fill(socket, socket.traced, is_blind=bool(place.sessions) and not place.sessions[0].host.counts_compiled)


def compose(place: Attachment, socket: Socket) -> None:
    """Make one function of all owners of a socket."""
    roles: dict[str, list[Owner]] = {"replace": [], "edit": [], "observe": []}
    for owner in socket.owners:
        roles[owner.role].append(owner)
    edit = _by_thread(roles["edit"], {session.thread for session in place.sessions if session.plan.pins})
    acts = [*(owner.act for owner in roles["replace"]), *([] if edit is None else [edit])]
    if roles["observe"]:
        acts.append(Observing([owner.act for owner in roles["observe"]]))
    socket.edit = None if not acts else acts[0] if len(acts) == 1 else Chain(acts)


def _fill(socket: Socket, compiled: CompiledEdit, *, is_blind: bool) -> None:
    """Put the edits of all sessions into the tensors that compiled code reads; what it cannot do is refused once the site is
    compiled."""
    programs = [owner.act.program for owner in socket.owners if owner.role == "edit"]
    blind = is_blind and any(is_compiled([socket.model.get_submodule(clock.path)]) for clock in socket.clocks)
    edits = [edit for program in programs for edit in program.edits]
    try:
        if reason := next((why for edit in edits if (why := why_not(edit, blind=blind))), ""):
            raise Unanswerable(reason)
        compiled.fill(edits, cap_of(programs))
    except Unanswerable:
        compiled.fill([], inf)
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
        if not ASIDE.running:
            for observe in self.observers:
                observe(x, now)
        return x


def _by_thread(owners: Sequence[Owner], pinning: Container[int | None]) -> Act | None:
    """The edits of all sessions, those of each thread together; `pinning` are the threads with an unsteered twin."""
    acts: dict[int | None, Act] = {}
    for thread in dict.fromkeys(owner.thread for owner in owners):
        runs: list[Run] = [owner.act for owner in owners if owner.thread == thread]
        for run in runs:
            run.leave_joined()
        act = runs[0] if len(runs) == 1 else Joined(runs)
        acts[thread] = TwinListener(act, runs) if thread in pinning else act
    return None if not acts else next(iter(acts.values())) if len(acts) == 1 else PerThread(acts)


class PerThread:
    """An edit for each thread, once several threads steer one model."""

    def __init__(self, acts: dict[Any, Act]):
        self.acts = acts

    def __call__(self, x: Tensor, now: StepState) -> Tensor:
        try:
            act = self.acts[threading.get_ident()]
        except KeyError:
            raise NoSession(
                f"{len(self.acts)} threads steer this model and this thread has no session; enter steer() in it too"
            ) from None
        return act(x, now)


def cap_of(programs: Sequence[Program]) -> float:
    """The tightest cap among those that edit; a program that only reads here has no say."""
    return min((program.cap for program in programs if program.edits), default=inf)


class Joined:
    """The runs of several sessions as one, so that their additions and targets are solved together."""

    def __init__(self, runs: Sequence[Run]):
        programs = [run.program for run in runs]
        edits, notes = ([one for p in programs for one in many(p)] for many in (lambda p: p.edits, lambda p: p.notes))
        self.runs, self.run = runs, Run(Program(edits, notes, cap_of(programs)))
        at = 0
        for run in runs:
            run.twin, run.joined, at = self.run.twin, (self.run, at), at + len(run.program.edits)

    def __call__(self, x: Tensor, now: StepState) -> Tensor:
        for run in self.runs:
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
