"""The call of a pipeline that is running. Where it stands is in its local variables, so they are read off its frame."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn

from steerlib.errors import BadEdit, Unanswerable
from steerlib.passes import Branch

from ..attach import ASIDE
from ..modules import frames
from .families import halves


@dataclass
class Call:
    """A pipeline's call, by the local names of its frame."""

    pipe: Any
    names: Mapping[str, Any]

    @cached_property
    def latents(self) -> Tensor | None:
        """What the denoiser is given in this turn of the loop, each image once."""
        block = getattr(self.names.get("block_state"), "latents", None)  # of modular pipelines
        return next((x for x in (self.names.get("latents"), self.names.get("image"), block) if isinstance(x, Tensor)), None)

    @property
    def images(self) -> int | None:
        """How many images are made at once."""
        return None if self.latents is None else len(self.latents)

    @property
    def prompts(self) -> int | None:
        """How many prompts they are made for."""
        images, each = self.images, self.names.get("num_images_per_prompt", self.names.get("num_videos_per_prompt")) or 1
        return images // each if images is not None and images % each == 0 else images


@dataclass
class Turn:
    """One turn of a pipeline's denoising loop.

    Args:
        latents: a weak reference to what it began with, which some pipelines change in place.
        at: number of the turn, and which object its time is.
        time: at which the denoiser is called.
        visit: turns before this one at the same time, one after the other.
        calls: of each denoiser so far; one that stacks the halves of guidance counts for many.
    """

    latents: Callable[[], Tensor | None] = lambda: None
    at: tuple[Any, int] = (None, 0)
    time: float = -1.0
    visit: int = 0
    calls: dict[str, int] = field(default_factory=dict)


MANY = 100
"""What a call with both halves of guidance counts for."""
_TURNS: WeakKeyDictionary[Any, Turn] = WeakKeyDictionary()


def turn_of(call: Call, time: float) -> Turn:
    """The turn of the loop that a call is in."""
    turn, at = _TURNS.setdefault(call.pipe, Turn()), (call.names.get("i"), id(call.names.get("t")))
    if turn.latents() is not call.latents or turn.at != at:
        follows = isinstance(at[0], int) and isinstance(turn.at[0], int) and at[0] == turn.at[0] + 1
        visit = turn.visit + 1 if follows and time == turn.time else 0
        latents = (lambda: None) if call.latents is None else ref(call.latents)
        turn = _TURNS[call.pipe] = Turn(latents, at, time, visit)
    return turn


def branches(call: Call, turn: Turn, clock: str, copies: int) -> tuple[Branch, ...] | None:
    """The halves of guidance in this pass, one for each copy of the rows; None where they are unknown."""
    before = turn.calls.get(clock, 0)
    if not ASIDE.running:
        turn.calls[clock] = before + (1 if copies == 1 else MANY)
    guider = getattr(call.pipe, "guider", None)
    if guider is not None and hasattr(guider, "is_conditional"):
        return ("cond" if guider.is_conditional else "uncond",) * copies
    if copies == 1:  # by turns: first with the prompt; what follows a stacked call repeats the prompt
        return ("uncond",) if before == 1 else ("cond",)
    return halves(call.pipe, copies)


def running(pipe: Any, component: str, module: nn.Module) -> Call | None:
    """The call that runs this component: of the pipeline itself, or of another that shares the module."""
    for frame in frames():
        if frame.f_code.co_name == "__call__":
            names = frame.f_locals
            for owner in (names.get("self"), names.get("components")):
                if owner is not None and (
                    owner is pipe or (hasattr(owner, "components") and getattr(owner, component, 0) is module)
                ):
                    return Call(owner, names)
    return None


def asking(pipe: Any) -> tuple[Branch, ...] | None:
    """Which prompt a text encoder reads: the one that is wanted, or the negative one; what is both counts as wanted."""
    read: list[list[str]] = []
    for frame in frames():
        names = frame.f_locals if frame.f_code.co_varnames[:1] == ("self",) else {}
        if names.get("self") is not pipe:
            continue
        if {"uncond_tokens", "uncond_input"} & {*names}:
            return ("uncond",)
        unwanted, wanted = ([_texts(v) for k, v in names.items() if k.startswith(start) and isinstance(v, (str, list))]
                            for start in ("negative_prompt", "prompt"))  # fmt: skip
        if any(text in unwanted and text not in wanted for text in read):
            return ("uncond",)
        if isinstance(prompt := names.get("prompt"), (str, list)):
            read.append(_texts(prompt))
    return ("cond",) if read else None


def _texts(prompt: Any) -> list[str]:
    return [prompt] if isinstance(prompt, str) else list(prompt)


@dataclass
class Words:
    """Where the words of a call's prompts are."""

    call: Call
    model: nn.Module

    def heads(self, attention: str) -> int:
        """Of an attention, by its site."""
        return int(self.model.get_submodule(attention).heads)  # type: ignore[arg-type]

    def columns(self, word: str, row: int, rows: int) -> list[int]:
        """Tokens of a word in the prompt of one of so many images."""
        prompt, tokenizer = self.call.names.get("prompt"), getattr(self.call.pipe, "tokenizer", None)
        if prompt is None or tokenizer is None:
            raise Unanswerable(f"the pipeline was given no words to find {word!r} in; pass prompt=, or a tensor as the mask")
        prompts = _texts(prompt)
        text = prompts[row * len(prompts) // rows]
        ids = list(tokenizer(text, truncation=True, max_length=tokenizer.model_max_length).input_ids)
        wanted = [i for i in tokenizer(word, add_special_tokens=False).input_ids if i not in tokenizer.all_special_ids]
        found = [at for at in range(len(ids)) if wanted and ids[at : at + len(wanted)] == wanted]
        if not found:
            raise BadEdit(f"expected {word!r} among the {len(ids)} tokens that are read of the prompt, got {text!r}")
        return [at + k for at in found for k in range(len(wanted))]
