"""When an edit happens: where a forward pass stands, and the share of an edit that applies there.

`B` rows, `N` tokens of this pass, `T` tokens so far.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from math import inf, isfinite
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Section = Literal["prompt", "generated", "mixed"]
Branch = Literal["cond", "uncond"]


class Grid(NamedTuple):
    """Sizes of a latent image or video: one frame for an image."""

    frames: int
    height: int
    width: int

    def of(self, count: int) -> "Grid | None":
        """The same where patches or halved resolutions leave `count` tokens; None where no patch size does."""
        for along in (1, 2, 4):
            for across in range(1, max(self.height, self.width) + 1):
                found = Grid(*(-(-n // by) for n, by in zip(self, (along, across, across), strict=True)))
                if found.frames * found.height * found.width == count:
                    return found
        return None


class StepState:
    """Where one forward pass stands, in words that hold for every generation library.

    Text: *columns* count tokens as they lie in the batch, pads included; *positions* count from each row's first real
    token. A *step* is the number of new tokens there are once the model has read a position: 0 in the prompt, 1 at the
    first new token; so the pass at step k makes new token k. Images: *progress* is 0 at pure noise and 1 at the finished
    image, a *step* is one of the scheduler's, and positions count the tokens of a site.
    """

    _sizes: "dict[int, StepState]"
    """This pass at sites with other numbers of tokens."""
    progress: Any = None
    """Of a denoiser; None for text."""
    step: int = 0
    """Of a denoiser."""
    visit: int = 0
    """Earlier steps that asked a denoiser about this very noise level, as schedulers of higher order do."""
    images: int | None = None
    """How many images are made at once."""
    grid: Grid | None = None
    """Of the latent."""
    texts: int = 0
    """Tokens of text, which some blocks keep in front of those of the image."""
    words: Any = None
    """Answers where the words of the prompt are: `columns(word, row, rows)`, and how many `heads(site)` look at them."""
    copies: Any = 1
    """How often the rows lie in the batch: twice where guidance stacks its two halves; 0: as often as amounts fit into it."""

    def __init__(
        self,
        length: int,
        *,
        start: int = 0,
        prompt: int | None = None,
        mask: Tensor | None = None,
        prompts: int | None = None,
        branches: "tuple[Branch, ...] | None" = (),
        like: Tensor | None = None,
    ):
        """`length` tokens from column `start`; the first `prompt` columns are the prompt (None: all are);
        `mask[B, T]` is 1 on real tokens; `prompts` rows were asked for, which beams may repeat; `branches` are the halves of
        guidance that this pass computes, one for each copy of the rows (none: no guidance; None: nobody knows); `like` is a
        tensor on the device of this pass."""
        self.length, self.start, self.prompt = length, start, prompt
        self.mask, self.prompts, self.like, self.branches = mask, prompts, like, branches
        self.section: Section = (
            "prompt" if prompt is None or start + length <= prompt else ("generated" if start >= prompt else "mixed")
        )
        """Whether this pass reads prompt, new tokens, or both."""
        self.is_plain = self.section == "generated" or (mask is None and self.section == "prompt")
        """Whether all of this pass is of one section and free of pads."""

    @classmethod
    def traced(cls, positions: Tensor, steps: Tensor, real: Tensor | None) -> "StepState":
        """A state made of tensors alone, for code that is being compiled."""
        state = cls(positions.shape[-1])
        state.__dict__.update(positions=positions, steps=steps, real=real)
        return state

    @classmethod
    def denoising(
        cls,
        progress: float,
        *,
        step: int = 0,
        visit: int = 0,
        prompts: int | None = None,
        images: int | None = None,
        branches: "tuple[Branch, ...] | None" = (),
        grid: Grid | None = None,
        texts: int = 0,
        words: Any = None,
        like: Tensor | None = None,
    ) -> "StepState":
        """A pass of a denoiser, seen `at` each site by its number of tokens. `images` are made for `prompts`; each lies in the
        batch once for each of the `branches`."""
        state = cls(0, prompts=prompts, branches=branches, like=like)
        steps = torch.full((1, 1), step, device=None if like is None else like.device)
        state.progress, state.step, state.visit, state.images, state.grid = progress, step, visit, images, grid
        state.texts, state.words, state.steps, state.notes, state._sizes = texts, words, steps, {}, {}
        state.copies = len(branches or ()) or 1
        return state

    def kept(self) -> "StepState":
        """The same for a tape, which is not to keep a pipeline or its activations alive."""
        if self.progress is None:
            return self
        state = copy(self)
        state.words, state.like, state.notes, state._sizes = None, None, {}, {}
        return state

    def at(self, count: int) -> "StepState":
        """This pass at a site with `count` tokens: the last ones of a text (`logits_to_keep`), or another resolution."""
        if count == self.length:
            return self
        if self.progress is not None:
            if count not in self._sizes:
                self._sizes[count] = copy(self)
                self._sizes[count].length = count
            return self._sizes[count]
        if count > self.length:  # called by hand, outside the model's own forward
            return StepState(count, like=self.like)
        start = self.start + self.length - count
        return StepState(
            count, start=start, prompt=self.prompt, mask=self.mask, prompts=self.prompts, branches=self.branches, like=self.like
        )

    def told(self, before: "StepState | None") -> "StepState":
        """This pass of a denoiser in tensors for compiled blocks: those of an earlier pass, changed in place."""
        if before is None or before.steps.device != self.steps.device:
            with torch.inference_mode(False):  # they outlive this pass, whatever mode it runs in
                new = torch.zeros(0, device=self.steps.device).new_zeros
                before = StepState.traced(new((1, 1), dtype=torch.long), new((1, 1), dtype=torch.long), None)
                before.progress, before.copies = new(()), new((), dtype=torch.long)
        for tensor, value in ((before.steps, self.step), (before.progress, self.progress), (before.copies, self.copies)):
            tensor.fill_(value)
        return before

    def at_traced(self, x: Tensor) -> "StepState":
        """A state in tensors at a site that has the tokens of `x[B, N, D]`."""
        if self.progress is None:
            return self
        state = StepState.traced(torch.arange(x.shape[1], device=x.device)[None], self.steps, None)
        state.progress, state.copies = self.progress, self.copies
        return state

    def row(self, amounts: "int | Tensor", rows: int) -> Int[Tensor, " rows"]:
        """For each row of the batch the one of `amounts` that is meant for it."""
        device = None if self.like is None else self.like.device
        if isinstance(self.copies, int) and not self.copies:
            return torch.arange(rows, device=device) % amounts
        each = rows // self.copies  # prompts, which beams and images per prompt repeat, one copy after the other
        return (torch.arange(rows, device=device) % each * amounts) // each

    @cached_property
    def notes(self) -> dict[Hashable, Any]:
        """What sites tell later sites in this pass."""
        return {}

    @cached_property
    def real(self) -> Bool[Tensor, "B N"] | None:
        """False on pads; None where there is nothing but real tokens."""
        if self.mask is None or self.section == "generated":
            return None
        return self.mask[:, self.start : self.start + self.length].bool()

    @cached_property
    def columns(self) -> Int[Tensor, "1 N"]:
        """Column of every token of this pass."""
        device = None if self.like is None else self.like.device
        return torch.arange(self.start, self.start + self.length, device=device)[None]

    @cached_property
    def positions(self) -> Int[Tensor, "rows N"]:
        """Position of every token, from its row's first real one; one row where all rows agree."""
        if self.mask is None:
            return self.columns
        return self.columns - self.mask.bool().int().argmax(dim=1, keepdim=True)

    @cached_property
    def steps(self) -> Int[Tensor, "rows N"]:
        """New tokens there are once each position is read; 0 in the prompt."""
        if self.prompt is None:
            return torch.zeros_like(self.columns)
        return (self.columns - self.prompt + 1).clamp(min=0)

    def __repr__(self) -> str:
        where = f"columns {self.start}–{self.start + self.length}, {self.section}"
        if self.progress is not None:
            where = f"step {self.step}, progress {float(self.progress):.3f}"
        return f"StepState({where}{''.join(', ' + branch for branch in self.branches or ())})"


class Schedule(ABC):
    """The share of an edit, in [0, 1] unless a `Ramp` says otherwise, that applies at a moment."""

    clock: str
    """What it counts: `steps` or `progress`."""

    @abstractmethod
    def numbers(self) -> tuple[float, float, float, float, float]:
        """`(start, stop, first, last, ramp)`: the form in which `gain` takes every schedule."""

    def weigh(self, state: StepState) -> "Float[Tensor, 'rows N'] | None":  # noqa: ARG002
        """What multiplies that, where five numbers do not say all; None where they do."""
        return None


@dataclass(frozen=True)
class Window(Schedule):
    """Half-open span of denoising progress: 0 is pure noise, 1 the finished image; a `stop` of 1 is included."""

    start: float = 0.0
    stop: float = 1.0
    clock: str = field(default="progress", init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= 1:
            raise ValueError(f"expected 0 <= start < stop <= 1, got start={self.start} and stop={self.stop}")

    def numbers(self) -> tuple[float, float, float, float, float]:
        return self.start, inf if self.stop == 1 else self.stop, 1.0, 1.0, 0.0


def windows(moments: Sequence[float]) -> list[Window]:
    """For each of some moments of progress, in rising order, the span that lies nearest to it."""
    ends = [0.0, *(sum(pair) / 2 for pair in pairwise(moments)), 1.0]
    return [Window(*span) for span in pairwise(ends)]


@dataclass(frozen=True)
class Steps(Schedule):
    """Half-open span of steps: for text, `Steps(0, 5)` acts on the passes that make the first five new tokens
    (the first of them reads the prompt); for images, scheduler steps."""

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
    """A strength for each step, as `Steps` counts them; the last holds from then on."""

    strengths: tuple[float, ...]
    clock: str = field(default="steps", init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "strengths", tuple(map(float, self.strengths)))
        if not self.strengths or not all(map(isfinite, self.strengths)):
            raise ValueError(f"expected a finite strength for each step, got {self.strengths}")

    def numbers(self) -> tuple[float, float, float, float, float]:
        return 0.0, inf, 1.0, 1.0, 0.0

    def weigh(self, state: StepState) -> Float[Tensor, "rows N"]:
        table = torch.tensor(self.strengths, device=state.steps.device)
        return table[state.steps.clamp(max=len(table) - 1)]


@dataclass(frozen=True)
class Ramp(Schedule):
    """A straight line from `first` to `last` over a span; `first` before it, `last` from its end on."""

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
    """Another schedule, and nothing outside a window: what an edit's own `when` means at each level of a concept of several."""

    inner: Schedule
    window: Window

    @property
    def clock(self) -> str:  # type: ignore[override]
        return self.inner.clock

    def numbers(self) -> tuple[float, float, float, float, float]:
        return self.inner.numbers()

    def weigh(self, state: StepState) -> Float[Tensor, "rows N"]:
        start, stop, *_ = self.window.numbers()
        progress = torch.as_tensor(state.progress, dtype=torch.float32).reshape(1, 1)
        inside = ((progress >= start) & (progress < stop)).float()
        return inside if (own := self.inner.weigh(state)) is None else inside.to(own.device) * own


def gain(moment: Tensor, numbers: Tensor) -> Tensor:
    """Share of each of `K` edits: `moment[..., K]` or `[..., 1]`, `numbers[K, 5]` -> `[..., K]`."""
    start, stop, first, last, ramp = numbers.unbind(-1)
    moment = moment.to(numbers.dtype)
    inside = ((moment >= start) & (moment < stop)).to(numbers.dtype)
    way = ((moment - start) / (stop - start)).clamp(0, 1)
    return torch.where(ramp > 0, first + (last - first) * way, inside)
