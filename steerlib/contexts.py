"""Whose pass it is: what was entered in the context (`contextvars`) of the code that runs.

A session acts in the context that it was entered in: in its task, and in threads that were given that context. One that was
entered inside a generator acts in what the generator runs, wherever that is driven from, and not in what its consumer runs
between two values. A thread that was started plainly carries no context of its own; a context in which steerlib is known and
nothing was entered belongs to code that asked for nothing.
"""

import asyncio
import sys
import threading
from collections.abc import Iterator, Sequence
from contextvars import Context, ContextVar
from dis import opmap
from inspect import CO_ASYNC_GENERATOR, CO_GENERATOR
from types import FrameType
from typing import Any
from weakref import WeakSet

from .errors import NoSession

MANAGERS = ("contextlib", "_pytest.fixtures", "pytest_asyncio.plugin")
"""Modules that run a generator as a context manager: what it enters is entered by their caller."""


class Entry:
    """One entering of a session.

    Args:
        standing: whether it was set on an attached model, and so also serves code that entered nothing; else it is a block's.

    Attributes:
        within: this and what was entered around it, the outermost first.
        home: the generator in which it was entered; None: outside of any.
        origin: thread, task and generator; busy: threads that were there already.
        is_first: whether the context was one of a plain thread in which nothing had been entered.
    """

    def __init__(self, *, standing: bool = False):
        self.standing, self.is_open = standing, True
        self.home = None if standing else _generator()
        self.origin = (threading.get_ident(), _task(), self.home)
        self.busy = WeakSet(threading.enumerate()) if threading.active_count() > 1 else WeakSet()
        entered = ENTERED.get()
        self.is_first = entered is None
        self.within = (*opened(entered), self)
        ENTERED.set(self.within)

    def close(self) -> None:
        """It is left, wherever that happens."""
        self.is_open, self.home, self.origin = False, None, (0, None, None)
        if self in (entered := ENTERED.get() or ()):
            ENTERED.set(opened(entered) or (None if self.is_first else ()))


def opened(entered: tuple[Entry, ...] | None) -> tuple[Entry, ...]:
    """Those that were not left yet."""
    return tuple(entry for entry in entered or () if entry.is_open)


ENTERED: ContextVar[tuple[Entry, ...] | None] = ContextVar("steerlib_entered", default=None)
"""What was entered in this context; None in a thread that was started plainly."""
ENTERED.set(ENTERED.get() or ())


def acting(alive: Sequence[Entry], *, is_shared: bool = False) -> tuple[Entry, ...]:
    """Those of the entries of a model that the running code is inside of; `is_shared`: a pass that entered nothing is plain.

    Raises `NoSession` where that cannot be known.
    """
    found = tuple(entry for entry in alive if is_inside(entry))
    if found or is_shared:
        return found
    job = None if opened(ENTERED.get()) else _own_job()
    able = tuple(alive) if job else tuple(entry for entry in alive if entry.standing)
    if not able:
        return ()
    last = max(able, key=lambda entry: len(entry.within))
    if not all(entry in last.within and entry.origin == last.origin for entry in able):
        raise NoSession(f"{len(able)} sessions steer this model and this {'thread' if job else 'task'} has none; {WAYS}")
    if not last.standing and (job is threading.main_thread() or job in last.busy):
        raise NoSession(f"this thread was at work before the session that steers this model was entered; {WAYS}")
    return able


WAYS = (
    "enter steer() in it too, run it in the session's context (asyncio.to_thread, contextvars.copy_context().run), or, where "
    "passes without a session are to stay unsteered, call sl.share(model) once"
)


def is_inside(entry: Entry) -> bool:
    """Whether the running code is inside of an entry: in its context, or run by its generator, which may hand that on."""
    home, is_known = entry.home, entry in (ENTERED.get() or ())
    if home is None:
        return is_known
    if any(frame is home for frame in outward(sys._getframe(1))):
        return True
    is_handed = home.f_code.co_flags & CO_ASYNC_GENERATOR or threading.get_ident() != entry.origin[0]
    return is_known and bool(is_handed) and _is_at_work(home)


def _is_at_work(home: FrameType) -> bool:
    """Whether a generator that is not among the calls that lead here runs elsewhere, or awaits."""
    if home.f_back is not None:  # a suspended one has no caller
        return True
    code, at = home.f_code.co_code, home.f_lasti
    at += 0 if code[at] == opmap["RESUME"] else 2  # where it goes on; up to Python 3.12 the last one done is the yield
    return code[at] == opmap["RESUME"] and code[at + 1] & 3 == 3  # after an await, not after a yield


def outward(frame: FrameType | None) -> Iterator[FrameType]:
    """A call and those that lead to it."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _generator() -> FrameType | None:
    """The innermost generator among the calls that lead here; not those that run as context managers."""
    for frame in outward(sys._getframe(1)):
        if frame.f_code.co_flags & (CO_GENERATOR | CO_ASYNC_GENERATOR):
            driver = frame.f_back
            if driver is None or driver.f_globals.get("__name__") not in MANAGERS:
                return frame
    return None


def _task() -> Any:
    """The task of asyncio that runs here; None outside of any."""
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread
        return None


def _own_job() -> Any:
    """What this thread does, if it was started plainly; None for tasks and what was given a context."""
    thread = threading.current_thread()
    is_main = thread is threading.main_thread()
    if _task() is not None or (ENTERED.get() is not None and not is_main):
        return None
    job = thread if is_main else _job(thread, sys._getframe(1))
    return None if isinstance(getattr(getattr(getattr(job, "fn", None), "func", None), "__self__", None), Context) else job


def _job(thread: threading.Thread, frame: FrameType) -> Any:
    """The work that a pool gave a thread; where it belongs to no pool, the thread itself; None: it waits, or has a context."""
    for step in outward(frame):
        match step.f_globals.get("__name__"), step.f_code.co_name:
            case "concurrent.futures.thread", "run":
                return step.f_locals["self"]
            case ("concurrent.futures.thread", "_worker") | ("anyio._backends._asyncio", _):
                return None
    return thread
