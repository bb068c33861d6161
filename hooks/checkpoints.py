"""Parts of a pass that backward() runs a second time (gradient checkpointing): what was done at their sites is done again.

By then other passes may have run, the thread may be another one, and the session may have been set to something else. So each
part keeps what was done there, call by call, as long as its graph lives. torch has one object for a part, which is there both
times: the context of the autograd function that runs it, or what `torch.utils.checkpoint` keeps of it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import GeneratorType
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.utils import checkpoint

from steerlib.errors import Unanswerable
from steerlib.passes import StepState

from .modules import frames

Act = Callable[[Tensor, StepState], Tensor]
TORCHS: Any = checkpoint._CheckpointFrame
"""What torch keeps of a part with `use_reentrant=False`."""
backward_now: Callable[[], int] = torch._C._current_graph_task_id  # type: ignore[attr-defined]
"""The number of the backward pass that runs in this thread; -1: none."""
hooks_now: Callable[[bool], Any] = torch._C._autograd._top_saved_tensors_default_hooks  # type: ignore[attr-defined]
"""What is done with tensors that are kept for backward; None: nothing."""


Call = tuple[Act | None, StepState, list[bool]]
"""What was done at a site, None: nothing; where the pass stood; and whether it was done again."""


class Part:
    """What was done at the sites of one checkpointed part.

    Attributes:
        calls: by site, in order.
        ran_again: whether backward() has come to it.
    """

    def __init__(self) -> None:
        self.calls: dict[Any, list[Call]] = defaultdict(list)
        self.ran_again = False
        self._seen: Any = lambda: None
        self._task, self._turns, self._states = -1, Counter[Any](), dict[StepState, StepState]()

    def keep(self, site: Any, act: Act | None, state: StepState, done: list[bool]) -> None:
        """Keep what is done at a site now; `done` is shared by the parts that lie in each other."""
        if self._seen() is not state:  # with the notes of earlier parts alone: own ones would keep the graph alive
            self._seen, self._kept = ref(state), state.again()
        self.calls[site].append((act, self._kept, done))

    def next(self, site: Any, task: int) -> tuple[Act | None, StepState | None]:
        """What was done at a site when this backward pass comes to it."""
        if task != self._task:
            self.ran_again, self._task, self._turns, self._states = True, task, Counter(), {}
        calls, turn = self.calls[site], self._turns[site]
        self._turns[site] += 1
        if turn >= len(calls):
            return None, None  # it was not steered
        act, kept, done = calls[turn]
        done[0] = True
        if kept not in self._states:
            self._states[kept] = kept.again()
        return act, self._states[kept]


PARTS: WeakKeyDictionary[Any, Part] = WeakKeyDictionary()


def around() -> list[Any]:
    """What torch has for each checkpointed part that runs here, the innermost first."""
    found: dict[Any, None] = dict.fromkeys(_in_closure())
    for step in frames():
        if step.f_globals.get("__name__") == checkpoint.__name__:
            for value in [*step.f_locals.values()]:
                inside = value.gi_frame.f_locals.values() if isinstance(value, GeneratorType) and value.gi_frame else (value,)
                found |= dict.fromkeys(one for one in inside if isinstance(one, TORCHS))
        if step.f_code.co_name in ("forward", "backward") and step.f_code.co_argcount:
            first = step.f_locals.get(step.f_code.co_varnames[0])
            found |= {first: None} if isinstance(first, FunctionCtx) else {}
    return [*found]


def _in_closure() -> Iterator[Any]:
    """The innermost part of the first run, also where torch leaves it to hooks of a module."""
    for hook in (hooks_now(True) or ())[:1]:
        yield from (cell.cell_contents for cell in hook.__closure__ or () if isinstance(cell.cell_contents, TORCHS))


def is_repeated() -> bool:
    """Whether backward() runs a part again here."""
    return backward_now() != -1 and bool(around())


def steered(site: Any, edit: Any, x: Tensor, state: StepState, task: int, *, has_rows: bool = True) -> Tensor:
    """x after an edit, which a checkpointed part keeps; in its second run, after what it kept. `task`: the backward pass in
    which the model was called, if it was called in one; `has_rows`: whether x is `[B, N, D]`, else `[1, B * N, D]`."""
    now = backward_now()
    parts = around() if now != -1 or hooks_now(True) is not None or not torch.is_grad_enabled() else []
    act = edit.find()
    if now != -1:
        known = next((k for k, part in enumerate(parts) if part in PARTS), None)
        if known is not None:
            (act, kept), parts = PARTS[parts[known]].next(site, now), parts[:known]
            state = kept or state
        elif parts:
            return x  # its first run was before anything acted here
        elif task != now:
            raise Unanswerable(
                "backward() runs a part of the model again in a way that steerlib does not know, so that it cannot tell what "
                "was done there; use torch.utils.checkpoint, or turn gradient checkpointing off"
            )
    done = [now != -1]
    for part in parts:
        PARTS.setdefault(part, Part()).keep(site, act, state, done)
    if act is None:
        return x
    if has_rows or state.like is None or len(state.like) * state.length != x.shape[1]:
        return act(x, state)
    return act(x.unflatten(1, (len(state.like), -1))[0], state).flatten(0, 1)[None]


def unfinished(site: Any) -> bool:
    """Whether backward() has not come yet to a part, still kept, in which something was done at a site."""
    parts = [part for part in [*PARTS.values()] if site in part.calls and not part.ran_again] if PARTS else []
    return any(not done[0] for part in parts for _, _, done in part.calls[site])


def uncheckpointed() -> AbstractContextManager[Any]:
    """A context in which what is kept for backward is no part of what is run again: it happens in the first run alone."""
    if torch.compiler.is_compiling() or hooks_now(True) is None:
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach(), lambda x: x)
