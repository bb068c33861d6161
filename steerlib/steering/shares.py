"""By how much an edit is let through: tokens, schedule, half of guidance, gates, masks, norm. A share is one class here.

A share is one number for a whole pass, or `[B, N]` (rows or tokens may be 1). The shares of an edit multiply.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from ..bank.concepts import Gate
from ..errors import Unanswerable
from ..passes import Branch, StepState
from ..schedules import Schedule, Window
from ..sites import Site
from .masks import Mask
from .reading import Note, laid

Tokens = Literal["all", "prompt", "generated"] | slice


class Share(ABC):
    """One of the things that let an edit through."""

    is_constant: bool = False
    """Whether it is as a rule one number for a whole pass."""
    is_traceable: bool = False
    """Whether compiled code can weigh it."""
    clock: str = ""
    """What it counts, if it counts: `steps` or `progress`."""
    span: Window = Window()
    """The part of denoising outside of which it lets nothing through."""
    gate: Gate | None = None
    """The gate that it is, while it lets through where that is open."""
    notes: "tuple[tuple[str, Note], ...]" = ()
    """What it has to know, and the sites at which that is read."""

    @abstractmethod
    def weight(self, x: Float[Tensor, "B N D"], now: StepState) -> "float | Tensor":
        """How much of the edit each token gets in this pass."""

    def check(self, moved: Site, is_before: Callable[[str], bool]) -> None:  # noqa: B027 - most have to know nothing
        """Raise `Unanswerable` where what it has to know is only read after the edit at `moved`."""

    def why_closed(self, progress: tuple[float, float] | None, halves: frozenset[str]) -> str:  # noqa: ARG002
        """Why it let nothing through in a run over this progress and these halves of guidance; empty where that is unknown."""
        return ""


@dataclass(frozen=True)
class Section(Share):
    """Prompt, new tokens, or a slice of positions that counts both together."""

    tokens: Tokens
    is_traceable: bool = True

    @property
    def is_constant(self) -> bool:  # type: ignore[override]
        return not isinstance(self.tokens, slice)

    def weight(self, x: Tensor, now: StepState) -> "float | Tensor":  # noqa: ARG002
        if isinstance(self.tokens, slice):
            start, stop = self.numbers()[0]
            if start <= 1 and stop == inf and now.section == "generated":
                return 1.0  # new tokens come after a first one
            return ((now.positions >= start) & (now.positions < stop)).float()
        if now.section == "mixed":
            return ((now.steps > 0) == (self.tokens == "generated")).float()
        return float(now.section == self.tokens)

    def numbers(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Positions from and up to which it lets through; its shares of the prompt and of new tokens."""
        if isinstance(self.tokens, slice):
            return (self.tokens.start or 0, inf if self.tokens.stop is None else self.tokens.stop), (1.0, 1.0)
        return (0.0, inf), (float(self.tokens != "generated"), float(self.tokens != "prompt"))


@dataclass(frozen=True)
class When(Share):
    """A schedule."""

    schedule: Schedule

    @property
    def is_traceable(self) -> bool:  # type: ignore[override]
        return self.schedule.is_traceable

    @property
    def clock(self) -> str:  # type: ignore[override]
        return self.schedule.clock

    @property
    def span(self) -> Window:  # type: ignore[override]
        return self.schedule.span

    def weight(self, x: Tensor, now: StepState) -> "float | Tensor":  # noqa: ARG002
        return self.schedule.weight(now)

    def why_closed(self, progress: tuple[float, float] | None, halves: frozenset[str]) -> str:  # noqa: ARG002
        if progress is None or self.clock != "progress":
            return f"it waits for {self.schedule}"
        return f"it waits for {self.schedule}, and the run went from progress {progress[0]:.2f} to {progress[1]:.2f}"


@dataclass(frozen=True)
class Half(Share):
    """One half of guidance. Without guidance everything is conditional."""

    branch: Branch
    name: str

    def weight(self, x: Tensor, now: StepState) -> "float | Tensor":
        if now.branches is None:
            raise Unanswerable(
                f"{self.name!r}: branch={self.branch!r} needs to know which half of guidance this pass computes, and neither "
                "the source of the pipeline that runs nor what it passes on shows it, nor generate(guidance_scale=...): "
                "processors and loops of your own do not tell. Call a pipeline of diffusers, enter the order of your own in "
                "steerlib.hooks.diffusers.families.GUIDANCE, or pass each half alone with branch='both'"
            )
        halves = [float(half == self.branch) for half in now.branches or ("cond",)]
        if len({*halves}) == 1:
            return halves[0]
        column = x.new_zeros(len(halves)).float()
        for k, half in enumerate(halves):
            column[k] = half  # filled on the device: numbers from the host would be waited for
        return column.repeat_interleave(len(x) // len(halves))[:, None]

    def why_closed(self, progress: tuple[float, float] | None, halves: frozenset[str]) -> str:
        if progress is None or self.branch in (halves or {"cond"}):
            return ""
        return f"it acts on branch={self.branch!r}, and no pass was of that half of guidance: is guidance on?"


@dataclass(frozen=True)
class Gated(Share):
    """A gate on what another concept reads; `closed`: where the gate is closed instead."""

    on: Gate
    note: Note
    site: str
    """Where its concept is read."""
    name: str
    closed: bool = False

    @property
    def gate(self) -> Gate | None:  # type: ignore[override]
        return None if self.closed else self.on

    @property
    def notes(self) -> tuple[tuple[str, Note], ...]:  # type: ignore[override]
        return ((self.site, self.note),)

    def weight(self, x: Tensor, now: StepState) -> Tensor:
        if (reading := now.notes.get(self.note.key)) is None:
            if self.note.key in now.notes:
                raise Unanswerable(
                    f"the gate over the prompt on {self.on.concept!r} needs all of it in one pass, and {now.lacks_prompt}"
                )
            raise Unanswerable(
                f"the gate on {self.on.concept!r} is read after {self.name!r} is edited; "
                "gate with a concept of an earlier site, or of the same one"
            )
        passed = self.on.passed(laid(reading, x, f"the gate on {self.on.concept!r}", repr(self.name)))
        return 1 - passed if self.closed else passed

    def check(self, moved: Site, is_before: Callable[[str], bool]) -> None:
        if self.site != moved.name and not is_before(self.site):
            raise Unanswerable(
                f"the gate on {self.on.concept!r} is read at {self.site!r}, after {self.name!r} is edited at {moved.name!r}; "
                "gate with a concept of an earlier site"
            )

    def why_closed(self, progress: tuple[float, float] | None, halves: frozenset[str]) -> str:  # noqa: ARG002
        return "" if self.closed else f"its gate on {self.on.concept!r} never opened"


@dataclass(frozen=True, eq=False)
class Masked(Share):
    """A mask over positions, or over places of an image."""

    mask: Mask
    name: str

    @property
    def notes(self) -> tuple[tuple[str, Note], ...]:  # type: ignore[override]
        return tuple((site, Note(("kept", site), None)) for site in self.mask.reads)

    def check(self, moved: Site, is_before: Callable[[str], bool]) -> None:
        self.mask.check(moved, is_before, self.name)

    def weight(self, x: Tensor, now: StepState) -> Tensor:
        return self.mask.share(now, x, self.name)


@dataclass(frozen=True)
class OwnLength(Share):
    """Each token's own length over the site's median."""

    norm: float

    def weight(self, x: Tensor, now: StepState) -> Tensor:  # noqa: ARG002
        return x.float().norm(dim=-1) / self.norm
