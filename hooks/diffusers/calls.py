"""The call of a pipeline that is running. Where it stands is in its local variables, so they are read off its frame."""

import ast
import re
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn

from steerlib.errors import BadEdit, Unanswerable
from steerlib.passes import Branch

from ..attach import ASIDE
from ..modules import frames
from ..source import function_of, names_in
from .guidance import PROMPT, asked, halves_of


@dataclass
class Call:
    """A pipeline's call, by the local names of its frame."""

    pipe: Any
    names: Mapping[str, Any]
    stepped: str = ""
    """What its loop calls the latents."""

    @cached_property
    def latents(self) -> Tensor | None:
        """What the denoiser is given in this turn of the loop, each image once."""
        block = getattr(self.names.get("block_state"), "latents", None)  # of modular pipelines
        found = (self.names.get("latents"), self.names.get(self.stepped), block)
        return next((x for x in found if isinstance(x, Tensor)), None)

    @property
    def images(self) -> int | None:
        """How many images are made at once."""
        return None if self.latents is None else len(self.latents)

    def film(self, latent: int) -> int | None:
        """Frames of the video that is made, where the autoencoder packs them into `latent` frames, the first by itself."""
        count, packs = self.names.get("num_frames"), [v for name, v in vars(self.pipe).items() if "temporal" in name]
        if not isinstance(count, int) or latent < 2:
            return None
        return count if count == latent or any(count - 1 == (latent - 1) * n for n in packs if isinstance(n, int)) else None

    @property
    def prompts(self) -> int | None:
        """How many prompts they are made for."""
        each = next((n for name, n in self.names.items() if re.fullmatch(r"num_\w+_per_prompt", name) and n), 1)
        images = self.images
        return images // each if images is not None and images % each == 0 else images


@dataclass
class Turn:
    """One turn of a pipeline's denoising loop.

    Args:
        latents: a weak reference to what it began with, which some pipelines change in place.
        at: number of the turn, and which object its time is.
        time: at which the denoiser is called.
        visit: turns before this one at the same time, one after the other.
        asked: denoisers that were called so far.
    """

    latents: Callable[[], Tensor | None] = lambda: None
    at: tuple[Any, int] = (None, 0)
    time: float = -1.0
    visit: int = 0
    asked: set[str] = field(default_factory=set)


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


def branches(
    call: Call, chain: Sequence[FrameType], turn: Turn, clock: str, given: Mapping[str, Any], copies: int
) -> tuple[Branch, ...] | None:
    """The halves of guidance in this pass, one for each copy of the rows; None where they are unknown."""
    is_first = clock not in turn.asked
    if not ASIDE.running:
        turn.asked.add(clock)
    return halves_of(chain, call.pipe, given, copies, is_first=is_first)


def running(pipe: Any, component: str, module: nn.Module) -> tuple[Call | None, list[FrameType]]:
    """The call that runs this component, of the pipeline or of another that shares the module, and the frames between."""
    chain: list[FrameType] = []
    for frame in frames():
        code = frame.f_code
        if code.co_name == "_wrapped_call_impl" and frame.f_locals.get("self") is module:
            chain.clear()
        elif not frame.f_globals.get("__name__", "").startswith("torch."):
            chain.append(frame)
        if code.co_name == "__call__":
            names = frame.f_locals
            for owner in (names.get("self"), names.get("components")):
                if owner is not None and (
                    owner is pipe or (hasattr(owner, "components") and getattr(owner, component, 0) is module)
                ):
                    return Call(owner, ChainMap(*(inner.f_locals for inner in chain)), stepped(chain)), chain
    return None, []


def first_of(images: int | None, rows: int) -> int | None:
    """Which of so many images is the first of these rows, where an autoencoder works on slices, views of the batch."""
    if images is None or rows >= images:
        return None
    tensors = [v for frame in islice(frames(), 40) for v in frame.f_locals.values() if isinstance(v, Tensor) and v.ndim > 1]
    for whole in (x for x in tensors if len(x) == images):
        for part in (x for x in tensors if len(x) == rows and x.shape[1:] == whole.shape[1:]):
            if part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr():
                return (part.storage_offset() - whole.storage_offset()) // whole.stride(0)
    return None


def stepped(chain: Sequence[FrameType]) -> str:
    """What the loop calls its latents: the sample that it gives to the scheduler next."""
    for frame in chain:
        function, line = function_of(frame.f_code), frame.f_lineno
        calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)] if function else []
        for call in sorted((c for c in calls if c.lineno >= line), key=lambda c: c.lineno):
            if getattr(call.func, "attr", "") == "step" and any(n.endswith("scheduler") for n in names_in(call.func)):
                given = [k.value for k in call.keywords if k.arg == "sample"] or call.args[2:3]
                return next((name for value in given for name in names_in(value)), "")
    return ""


def asking(pipe: Any) -> tuple[Branch, ...] | None:
    """Which prompt a text encoder reads: the one that is wanted, or the negative one; None where nothing shows it."""
    above = list(frames())
    inside = [
        k for k, frame in enumerate(above) if frame.f_code.co_varnames[:1] == ("self",) and frame.f_locals.get("self") is pipe
    ]
    half = asked(above[inside[0] : inside[-1] + 1], PROMPT, deep=True) if inside else None
    return (half,) if half else None


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
