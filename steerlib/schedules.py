"""When an edit acts: the share of it that applies at a moment of the run. A schedule is one class here."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf, isfinite

import torch
from torch import Tensor

from .devices import numbers
from .passes import StepState


class Schedule(ABC):
    """The share of an edit, in [0, 1] unless a `Ramp` or `PerStep` says otherwise, that applies at a moment.

    Your own schedule is one subclass: `clock` says what it counts, `weight` how much applies. One that gives its five
    `numbers` also works in compiled code.

    >>> isinstance(sl.Window(0.0, 0.4), sl.Schedule), sl.Steps(0, 5).clock
    (True, 'steps')
    """

    clock: str
    """What it counts: `steps` or `progress`."""
    is_traceable: bool = True
    """Whether its `numbers` say all, so that compiled code can follow it."""

    @abstractmethod
    def numbers(self) -> tuple[float, float, float, float, float]:
        """`(start, stop, first, last, ramp)`: the form in which `gain` takes a schedule."""

    def weight(self, now: StepState) -> "float | Tensor":
        """The share in this pass: one number, or `[rows, N]` where tokens are at different moments."""
        moment, form = now.progress if self.clock == "progress" else now.moment, self.numbers()
        if isinstance(moment, Tensor) and moment.ndim:
            return gain(moment[..., None], numbers(form, moment.device)[None])[..., 0]
        return float(gain(torch.tensor([float(moment)]), torch.tensor(form)[None]))

    @property
    def span(self) -> "Window":
        """The part of denoising outside of which it lets nothing through."""
        return Window()


@dataclass(frozen=True)
class Window(Schedule):
    """A span of denoising progress: 0 is pure noise, 1 the finished image. It does not depend on the number of steps.

    Args:
        start: progress from which on the edit acts, 0 to 1.
        stop: progress before which it ends; 1 includes the end.

    Raises `ValueError` unless `0 <= start < stop <= 1`. For text a window is refused: its end is unknown.

    >>> sl.Set(1.5, when=sl.Window(0.0, 0.4)).when
    Window(start=0.0, stop=0.4)
    """

    start: float = 0.0
    stop: float = 1.0
    clock: str = field(default="progress", init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= 1:
            raise ValueError(f"expected 0 <= start < stop <= 1, got start={self.start} and stop={self.stop}")

    def numbers(self) -> tuple[float, float, float, float, float]:
        return self.start, inf if self.stop == 1 else self.stop, 1.0, 1.0, 0.0

    @property
    def span(self) -> "Window":
        return self


def windows(moments: Sequence[float]) -> list[Window]:
    """For each of some moments of progress, in rising order, the span that lies nearest to it."""
    ends = [0.0, *(sum(pair) / 2 for pair in pairwise(moments)), 1.0]
    return [Window(*span) for span in pairwise(ends)]


@dataclass(frozen=True)
class Steps(Schedule):
    """A span of steps. For text, `Steps(0, 5)` acts on the passes that make the first five new tokens, the first of which
    reads the prompt; for images, steps are the scheduler's.

    Args:
        start: first step, from 0.
        stop: step before which it ends; None: never.

    Raises `ValueError` unless `0 <= start < stop`.

    >>> sl.Add(2.0, when=sl.Steps(0, 5)).when
    Steps(start=0, stop=5)
    """

    start: int = 0
    stop: int | None = None
    clock: str = field(default="steps", init=False, repr=False)

    def __post_init__(self) -> None:
        if self.start < 0 or (self.stop is not None and self.stop <= self.start):
            raise ValueError(f"expected 0 <= start < stop, got start={self.start} and stop={self.stop}")

    def numbers(self) -> tuple[float, float, float, float, float]:
        return self.start, inf if self.stop is None else self.stop, 1.0, 1.0, 0.0


@dataclass(frozen=True)
class PerStep(Schedule):
    """A strength for each step, as `Steps` counts them; the last holds from then on.

    Args:
        strengths: finite numbers that multiply the edit, one for each step from 0.

    >>> sl.Add(2.0, when=sl.PerStep((1.0, 0.5, 0.0))).when
    PerStep(strengths=(1.0, 0.5, 0.0))
    """

    strengths: tuple[float, ...]
    clock: str = field(default="steps", init=False, repr=False)
    is_traceable = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "strengths", tuple(map(float, self.strengths)))
        if not self.strengths or not all(map(isfinite, self.strengths)):
            raise ValueError(f"expected a finite strength for each step, got {self.strengths}")

    def numbers(self) -> tuple[float, float, float, float, float]:
        return 0.0, inf, 1.0, 1.0, 0.0

    def weight(self, now: StepState) -> "float | Tensor":
        moment, last = now.moment, len(self.strengths) - 1
        if isinstance(moment, Tensor):
            return numbers(self.strengths, moment.device)[moment.clamp(max=last)]
        return self.strengths[min(int(moment), last)]


@dataclass(frozen=True)
class Ramp(Schedule):
    """A straight line from `first` to `last` over a span; `first` before it, `last` from its end on.

    Args:
        over: a `Window` or `Steps` that has an end.
        first: share at its start.
        last: share at its end.

    Raises `ValueError` for a span without an end.

    >>> sl.Ramp(sl.Window(0.2, 0.8), first=1.0, last=0.0).clock
    'progress'
    """

    over: Steps | Window
    first: float = 0.0
    last: float = 1.0

    def __post_init__(self) -> None:
        if self.over.stop is None:
            raise ValueError(f"expected a span with an end to ramp over, got {self.over}; give it a stop")

    @property
    def clock(self) -> str:  # type: ignore[override]
        return self.over.clock

    def numbers(self) -> tuple[float, float, float, float, float]:
        return self.over.start, float(self.over.stop or 0), self.first, self.last, 1.0


@dataclass(frozen=True)
class Within(Schedule):
    """Another schedule, and nothing outside a window: what an edit's `when` means at each level of a concept of several."""

    inner: Schedule
    window: Window
    is_traceable = False

    @property
    def clock(self) -> str:  # type: ignore[override]
        return self.inner.clock

    def numbers(self) -> tuple[float, float, float, float, float]:
        return self.inner.numbers()

    def weight(self, now: StepState) -> "float | Tensor":
        return self.window.weight(now) * self.inner.weight(now)

    @property
    def span(self) -> Window:
        return self.window


def gain(moment: Tensor, numbers: Tensor) -> Tensor:
    """Share of each of `K` edits: `moment[..., K]` or `[..., 1]`, `numbers[K, 5]` -> `[..., K]`."""
    start, stop, first, last, ramp = numbers.unbind(-1)
    moment = moment.to(numbers.dtype)
    inside = ((moment >= start) & (moment < stop)).to(numbers.dtype)
    way = ((moment - start) / (stop - start)).clamp(0, 1)
    return torch.where(ramp > 0, first + (last - first) * way, inside)
