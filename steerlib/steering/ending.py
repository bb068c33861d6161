"""What happened while a session was in a model, and what is to be said of it when its block ends."""

import threading
from collections.abc import Iterator
from typing import Any

from ..errors import Outlived, OutOfRange, SiteNotReached, SteeringWarning
from ..hooks.changes import in_place_of
from ..hooks.checkpoints import unfinished
from .dispatch import is_shared
from .stay import Stay


def said_of(stay: Stay) -> Iterator[Exception]:
    """Warnings, and, last, an error."""
    if any(run.counts.capped for run in stay.runs.values()):
        yield OutOfRange("edits were capped in length at run time; see report()")
    left = [socket for socket, _ in stay.one.owners if stay.place.uses(socket.site) == 1]
    if names := ", ".join(repr(socket.site.name) for socket in left if unfinished(socket.key)):
        yield Outlived(
            f"gradient checkpointing will run parts of this block's passes again, at {names}, where they are then unsteered: "
            "gradients will be wrong. Call backward() inside the block, or keep the edits with sl.attach"
        )
    if is_running(stay):
        yield Outlived(
            "a generation that began in this block goes on after it, in another thread; the rest of it is not steered. End the "
            "block when the generation has ended: join its thread, or read its stream, inside the block"
        )
        return
    if names := replaced(stay):
        yield SiteNotReached(f"the module at {names} was replaced inside this block; what came after was not edited there")
    ran = has_run(stay)
    if missed := [name for name, run in stay.runs.items() if not run.counts.passes] if ran else []:
        yield SiteNotReached(
            f"the model ran, but never through {', '.join(map(repr, missed))}; "
            f"nothing was edited there. Sites of this model: {', '.join(list(stay.host.sites())[:6])}, …"
        )
    elsewhere = sum(count for entered, count in new_passes(stay).items() if entered == ())
    if not ran and elsewhere and stay.runs and not is_shared(stay.place):
        yield SteeringWarning(
            f"the model made {elsewhere} passes meanwhile, none of them in this session: it acts in the context that it was "
            "entered in, and not in other tasks and threads"
        )


def new_passes(stay: Stay) -> dict[Any, int]:
    """Passes since this began, by what was entered in their context."""
    new: dict[Any, int] = {}
    for path, clock in stay.place.clocks.items():
        for entered, count in [*clock.passes.items()]:
            new[entered] = max(new.get(entered, 0), count - stay.before.get(path, {}).get(entered, 0))
    return {entered: count for entered, count in new.items() if count}


def has_run(stay: Stay) -> bool:
    """Whether the model made a pass that this session acts in."""
    if any(run.counts.passes for run in stay.runs.values()):
        return True
    return stay.is_here and stay.one.entry.home is None and any(_is_served(stay, entered) for entered in new_passes(stay))


def _is_served(stay: Stay, entered: Any) -> bool:
    """Whether it acts in passes with this entered in their context; a plain thread's are those of the only session."""
    entry = stay.one.entry
    others = [one.entry for kin in stay.place.kin for one in kin.present if one is not stay.one and not one.is_idle]
    is_alone = all(other.origin == entry.origin for other in others) and not is_shared(stay.place)
    return entry in entered if entered else is_alone and not stay.one.was_asked and (entered is None or entry.standing)


def is_running(stay: Stay) -> bool:
    """Whether a call of the model that began in this session goes on in another thread."""
    own = threading.get_ident()
    return any(ident != own and _is_served(stay, entered) for ident, entered in stay.host.under_way())


def replaced(stay: Stay) -> str:
    """Names of sites whose module is another one now, and not one that wraps it."""
    found = []
    for socket, _ in stay.one.owners:
        top, _, _ = socket.site.module.partition(".")
        part = stay.host.module(top)
        if top and part is not stay.place.model._modules.get(top):  # another component of the pipeline
            is_lost = part is None or socket.module not in [*part.modules()]
        else:
            is_lost = in_place_of(socket.module, stay.place.model, socket.site.module) is None
        found += [repr(socket.site.name)] if is_lost else []
    return ", ".join(found)
