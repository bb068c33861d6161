"""Where one forward pass stands: one small type for each kind of pass.

`B` rows, `N` tokens of this pass, `T` tokens so far.

Text: *columns* count tokens as they lie in the batch, pads included; *positions* count from each row's first real token. A
*step* is the number of new tokens there are once the model has read a position: 0 in the prompt, 1 at the first new token, so
the pass at step k makes new token k. Images: *progress* is 0 at pure noise and 1 at the finished image, a *step* is one of
the scheduler's, and positions count the tokens of a site.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable
from copy import copy
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .errors import Unanswerable

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


class StepState(ABC):
    """Where one forward pass stands, in words that hold for every generation library.

    Schedules, observers of `sl.record` and functions of `replacing` are given one.

    Attributes:
        length: tokens of this pass at this site.
        progress: from 0, pure noise, to 1, the finished image; None for text.
        step: the scheduler's step of a denoiser; for text see `steps`.
        prompts: rows that were asked for, which beams or images per prompt repeat; None where unknown.
        images: images made at once; None for text.
        branches: halves of guidance in this pass, one for each copy of the rows; empty without guidance, None where unknown.
        copies: how often the rows lie in the batch: twice where guidance stacks its halves; 0: as often as amounts fit.
        section: whether the pass reads prompt, new tokens, or both.
        is_plain: whether all tokens are of one section and none is a pad.
        positions: `[rows, N]`; steps: `[rows, N]`, 0 in the prompt; real: `[B, N]`, False on pads, None without pads.

    >>> with sl.record(model, bank, ["a"]) as tape:
    ...     _ = model(torch.ones(1, 4, dtype=torch.long))
    >>> tape["a"][0][0].positions.tolist()
    [[0, 1, 2, 3]]
    """

    length: int
    progress: Any = None
    step: int = 0
    visit: int = 0
    """Earlier steps that used this very noise level, as schedulers of higher order do."""
    prompts: int | None = None
    images: int | None = None
    branches: "tuple[Branch, ...] | None" = ()
    copies: Any = 1
    section: Section = "prompt"
    is_plain: bool = True
    learns: bool = False
    """Whether gradients are kept in this pass."""
    is_again: bool = False
    """Whether backward() runs a checkpointed part of it a second time, where nothing is counted or shown."""
    grid: Grid | None = None
    """Of the latent."""
    film: int | None = None
    """Frames of the video that is made, the first packed by itself and the others by equal numbers; None where unknown."""
    first: int | None = None
    """Which of the images is the first of this pass, where it is a part of them alone, as in a sliced autoencoder."""
    texts: int = 0
    """Tokens of text, which some blocks keep in front of those of the image."""
    words: Any = None
    """Finds the words of the prompt: `columns(word, row, rows)`, and how many `heads(site)` attend to them."""
    like: Tensor | None = None
    """A tensor on the device of this pass."""
    refused: str = ""
    """Why steps and rows cannot be told, if so."""

    @property
    @abstractmethod
    def positions(self) -> Int[Tensor, "rows N"]:
        """Position of every token, from its row's first real one; one row where all rows agree."""

    @property
    @abstractmethod
    def steps(self) -> Int[Tensor, "rows N"]:
        """New tokens there are once each position is read, 0 in the prompt; of a denoiser its step."""

    @property
    def real(self) -> Bool[Tensor, "B N"] | None:
        """False on pads; None where there is nothing but real tokens."""
        return None

    @abstractmethod
    def at(self, count: int) -> "StepState":
        """This pass at a site with `count` tokens."""

    def beside(self, count: int) -> "StepState":
        """This pass in a stream of more tokens than were given, such as those of an image that the model puts in front."""
        return self.at(count)

    def on(self, device: torch.device) -> "StepState":
        """This pass at a site on a device, where a model is split over several: its tensors are there, its notes are shared."""
        if self.like is None or self.like.device == device:
            return self
        there: Any = copy(self)
        there.like, there.notes = self.like.new_empty(0, device=device), self.notes
        if isinstance(mask := getattr(self, "mask", None), Tensor):
            there.mask = mask.to(device)
        for made in ("real", "columns", "positions", "steps"):
            there.__dict__.pop(made, None)
        return there

    @cached_property
    def notes(self) -> dict[Hashable, Any]:
        """What earlier sites of this pass leave for later ones."""
        return {}

    @cached_property
    def memory(self) -> dict[Hashable, Any]:
        """What passes over one text leave for later ones; a pass that is not one of several has its own."""
        return {}

    @property
    def lacks_prompt(self) -> str:
        """Why this pass does not see the whole prompt at this site; empty if it does."""
        return "this is no pass over a text"

    @property
    def moment(self) -> "float | Tensor":
        """What `Steps` counts: one number where the whole pass is at one step."""
        return self.steps

    @property
    def device(self) -> torch.device | None:
        """Of this pass; None where unknown, which means the CPU."""
        return None if self.like is None else self.like.device

    def row(self, amounts: "int | Tensor", rows: int) -> Int[Tensor, " rows"]:
        """For each of the batch's `rows` the one of `amounts` that is meant for it."""
        if isinstance(self.copies, int) and not self.copies:
            return torch.arange(rows, device=self.device) % amounts
        each = rows // self.copies  # prompts, which beams and images per prompt repeat, one copy after the other
        return (torch.arange(rows, device=self.device) % each * amounts) // each

    def again(self) -> "StepState":
        """The same for a second run of a checkpointed part, with the notes there are now."""
        there: Any = copy(self)
        there.is_again, there.notes = True, dict(self.notes)
        there.__dict__.pop("_own", None)
        if "_sizes" in vars(there):
            there._sizes = {}
        return there

    def detached(self) -> "StepState":
        """The same for a tape, which must not keep a pipeline or its activations alive."""
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._where()}{''.join(', ' + branch for branch in self.branches or ())})"

    @abstractmethod
    def _where(self) -> str:
        """In words, for the repr."""


class TextPass(StepState):
    """A pass over `length` tokens from column `start`.

    Args:
        length: tokens read.
        start: column of the first.
        prompt: columns of the prompt; None: all are prompt.
        mask: `[B, T]`, 1 on real tokens.
        prompts: rows that were asked for, which beams may repeat.
        branches: halves of guidance in this pass; None where unknown.
        like: a tensor on the device of this pass.

    Attributes:
        places: `[B, N]`, the positions of texts that lie packed in one row; None where columns tell them.
        text: what the host knows of the text that is read in several passes: its `memory`, `ids(state)`, tokens up to the end
            of a pass, and `is_aside`, whether `generate()` reads it beside its own; None: this pass is all that is known.
    """

    places: Tensor | None = None
    text: Any = None

    def __init__(
        self,
        length: int,
        start: int = 0,
        prompt: int | None = None,
        mask: Tensor | None = None,
        prompts: int | None = None,
        branches: "tuple[Branch, ...] | None" = (),
        like: Tensor | None = None,
    ):
        self.length, self.start, self.prompt, self.mask = length, start, prompt, mask
        self.prompts, self.branches, self.like = prompts, branches, like
        if branches and len(branches) > 1:
            self.copies = len(branches)
        if prompt is None or start + length <= prompt:
            self.is_plain = mask is None
        elif start >= prompt:
            self.section = "generated"
        else:
            self.section, self.is_plain = "mixed", False

    def at(self, count: int) -> "TextPass":
        """This pass where only the last `count` tokens flow (`logits_to_keep`)."""
        if count == self.length:
            return self
        if count > self.length:  # called by hand, outside the model's own forward
            more = TextPass(count, like=self.like)
            more.notes = self.notes
            return more
        start = self.start + self.length - count
        last = TextPass(count, start, self.prompt, self.mask, self.prompts, self.branches, self.like)
        last.refused, last.places = self.refused, None if self.places is None else self.places[:, -count:]
        last.text, last.notes = self.text, self.notes
        return last

    def beside(self, count: int) -> "TextPass":
        more = count - self.length
        if self.prompt is None or self.start or self.places is not None:
            return self.at(count)
        mask = None if self.mask is None else torch.cat((self.mask.new_ones(len(self.mask), more), self.mask), dim=1)
        whole = TextPass(count, 0, self.prompt + more, mask, self.prompts, self.branches, self.like)
        whole.refused, whole.text = self.refused, self.text
        return whole

    def row(self, amounts: "int | Tensor", rows: int) -> Int[Tensor, " rows"]:
        if self.refused or self.branches is None:
            raise Unanswerable(self.refused or "nothing tells how this generate() stacks its rows; give one number for all")
        return super().row(amounts, rows)

    @property
    def memory(self) -> dict[Hashable, Any]:  # type: ignore[override]
        return self._own if self.text is None else self.text.memory

    @property
    def lacks_prompt(self) -> str:
        if self.refused or self.places is not None:
            return self.refused or "several texts lie in one row; pass one text a row"
        if self.text is not None and self.text.is_aside:
            return "guidance and processors make passes of their own over other prompts; use branch='cond'"
        if self.start or self.length < (self.prompt or 0):
            return (
                "this pass has a part; leave out prefill_chunk_size, logits_to_keep and caches that were filled before, "
                "and enter the session before generate()"
            )
        return ""

    @cached_property
    def _own(self) -> dict[Hashable, Any]:
        return {}

    @cached_property
    def real(self) -> Bool[Tensor, "B N"] | None:
        if self.mask is None or self.section == "generated":
            return None
        return self.mask[:, self.start : self.start + self.length].bool()

    @cached_property
    def columns(self) -> Int[Tensor, "1 N"]:
        """Column of every token of this pass."""
        return torch.arange(self.start, self.start + self.length, device=self.device)[None]

    @cached_property
    def positions(self) -> Int[Tensor, "rows N"]:
        if self.places is not None:
            return self.places
        if self.mask is None:
            return self.columns
        before = self.mask.bool().cumsum(dim=1)[:, : self.start + self.length] - 1  # pads may lie anywhere in the prompt
        missing = self.start + self.length - before.shape[1]
        if missing > 0:  # the mask of the prompt alone: all that follows is real
            before = torch.cat((before, before[:, -1:] + torch.arange(1, missing + 1, device=before.device)), dim=1)
        return before[:, self.start :]

    @cached_property
    def steps(self) -> Int[Tensor, "rows N"]:
        if self.refused:
            raise Unanswerable(self.refused)
        if self.prompt is None:
            return torch.zeros_like(self.columns)
        return (self.columns - self.prompt + 1).clamp(min=0)

    @property
    def moment(self) -> "float | Tensor":
        if self.section == "prompt":
            return 0.0
        return self.steps if self.prompt is None or self.length > 1 else float(self.start - self.prompt + 1)

    def _where(self) -> str:
        return f"columns {self.start}–{self.start + self.length}, {self.section}"


class DenoisingPass(StepState):
    """A pass of a denoiser, seen `at` each site by its number of tokens.

    Args:
        progress: from 0, pure noise, to 1, the finished image.
        step: of the scheduler.
        visit: earlier steps that used this very noise level.
        prompts: for which `images` are made; each lies in the batch once for each of the `branches`.
        grid: sizes of the latent.
        film: frames of the video that is made.
        first: which of the images is the first of this pass, where it is given only some of them.
        texts: tokens of text in front of those of the image; -1 where rows differ.
        words: finds the words of the prompt.
        like: a tensor on the device of this pass.
    """

    length = 0

    def __init__(
        self,
        progress: float,
        *,
        step: int = 0,
        visit: int = 0,
        prompts: int | None = None,
        images: int | None = None,
        branches: "tuple[Branch, ...] | None" = (),
        grid: Grid | None = None,
        film: int | None = None,
        first: int | None = None,
        texts: int = 0,
        words: Any = None,
        like: Tensor | None = None,
    ):
        self.progress, self.step, self.visit, self.prompts, self.images = progress, step, visit, prompts, images
        self.branches, self.copies = branches, len(branches or ()) or 1
        self.grid, self.film, self.first, self.texts, self.words, self.like = grid, film, first, texts, words, like
        self.notes: dict[Hashable, Any] = {}  # shared with the same pass at other sites
        self._sizes: dict[int, DenoisingPass] = {}

    def row(self, amounts: "int | Tensor", rows: int) -> Int[Tensor, " rows"]:
        if self.first is None:
            return super().row(amounts, rows)
        return (self.first + torch.arange(rows, device=self.device)) * amounts // (self.images or 1)

    def at(self, count: int) -> "DenoisingPass":
        """This pass at another resolution."""
        if count == self.length:
            return self
        if count not in self._sizes:
            self._sizes[count] = copy(self)
            self._sizes[count].length = count
        return self._sizes[count]

    @property
    def positions(self) -> Int[Tensor, "1 N"]:
        return torch.arange(self.length, device=self.device)[None]

    @property
    def steps(self) -> Int[Tensor, "1 1"]:
        return torch.full((1, 1), self.step, device=self.device)

    @property
    def moment(self) -> float:
        return float(self.step)

    def detached(self) -> "DenoisingPass":
        state = copy(self)
        state.words, state.like, state.notes, state._sizes = None, None, {}, {}
        return state

    def into_tensors(self, before: "TracedPass | None") -> "TracedPass":
        """Write this pass into the persistent tensors that compiled blocks read; `before` holds them, None: make them."""
        if before is None or before.steps.device != (self.device or torch.device("cpu")):
            with torch.inference_mode(False):  # they outlive this pass, whatever mode it runs in
                new = torch.zeros(0, device=self.device).new_zeros
                steps = new((1, 1), dtype=torch.long)
                before = TracedPass(steps, steps.clone(), None, progress=new(()), copies=new((), dtype=torch.long))
        for tensor, value in ((before.steps, self.step), (before.progress, self.progress), (before.copies, self.copies)):
            tensor.fill_(value)
        return before

    def _where(self) -> str:
        return f"step {self.step}, progress {float(self.progress):.3f}"


class TracedPass(StepState):
    """A pass in tensors alone, for code that is being compiled.

    Args:
        positions: `[rows, N]`.
        steps: `[rows, N]`.
        real: `[B, N]`, False on pads; None without pads.
        progress: of a denoiser, one number.
        copies: how often the rows lie in the batch.
    """

    positions: Any = None
    steps: Any = None
    real: Any = None

    def __init__(self, positions: Tensor, steps: Tensor, real: Tensor | None, *, progress: Any = None, copies: Any = 1):
        self.length, self.positions, self.steps, self.real = positions.shape[-1], positions, steps, real
        self.progress, self.copies = progress, copies

    @property
    def device(self) -> torch.device:
        return self.positions.device

    def at(self, count: int) -> "TracedPass":
        """This pass at a site with `count` tokens: a denoiser's resolutions differ."""
        if self.progress is None:
            return self
        positions = torch.arange(count, device=self.steps.device)[None]
        return TracedPass(positions, self.steps, None, progress=self.progress, copies=self.copies)

    def _where(self) -> str:
        return f"{self.length} tokens, traced"
