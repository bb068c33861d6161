"""The unsteered twin of a pass, which tells what pinned concepts would have read (`do="hold"`)."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from ..errors import Unanswerable
from ..hooks.attach import ASIDE, before_forward
from ..hosts import Host


def follow(host: Host, is_acting: Callable[[], bool]) -> Callable[[], None]:
    """Run every pass that a session acts in without edits first; gives back what undoes it."""
    caches: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # the twin's own, by the cache of the steered pass
    with ExitStack() as stack:
        for path in host.passes():
            module = host.model.get_submodule(path)
            stack.callback(before_forward(module, partial(_run, host, is_acting, caches, path)))
        return stack.pop_all().close


def _run(
    host: Host, is_acting: Callable[[], bool], caches: WeakKeyDictionary[Any, Any], path: str, args: tuple, kwargs: Any
) -> None:
    if ASIDE.running or not is_acting():
        return
    if reason := host.refuse_twin():
        raise Unanswerable(reason)
    ASIDE.running = True
    try:
        host.run_twin(path, args, kwargs, caches)
    finally:
        ASIDE.running = False
