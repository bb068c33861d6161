"""The unsteered twin of a pass, which tells what pinned concepts would have read (`do="hold"`)."""

import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from ..errors import Unanswerable
from ..hooks.attach import ASIDE, Attachment, before_forward


def follow(session: Any, place: Attachment) -> Callable[[], None]:
    """Run every pass of a session's model without edits first; gives back what undoes it."""
    caches: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # the twin's own, by the cache of the steered pass
    with ExitStack() as stack:
        for path in session.host.passes():
            module = session.host.model.get_submodule(path)
            stack.callback(before_forward(module, partial(_run, session, place, caches, path)))
        return stack.pop_all().close


def _run(session: Any, place: Attachment, caches: WeakKeyDictionary[Any, Any], path: str, args: tuple, kwargs: Any) -> None:
    elsewhere = threading.get_ident() != session.thread
    if ASIDE.running or (elsewhere and {other.thread for other in place.sessions} != {session.thread}):
        return
    if reason := session.host.refuse_twin():
        raise Unanswerable(reason)
    ASIDE.running = True
    try:
        session.host.run_twin(path, args, kwargs, caches)
    finally:
        ASIDE.running = False
