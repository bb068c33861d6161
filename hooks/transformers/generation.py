"""What a call of `generate()` was asked for, and where its decoder stands: prompt, pads, beams, guidance."""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, update_wrapper
from itertools import takewhile
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from steerlib.contexts import ENTERED
from steerlib.errors import BadEdit, Unanswerable
from steerlib.passes import Branch, TextPass

from ..attach import ASIDE, is_compiled
from ..copies import StandIn
from ..modules import entry_of, frames
from .families import STACKED, Stacked

ROWS = 64
"""Rows for which a compiled model has room."""
NEVER = 2**31
"""A prompt that does not end: a bare forward."""
ARGUMENTS = ("inputs", "generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn")
"""Of `generate()`, in order."""
LISTS = {"LogitsProcessorList": "processor", "StoppingCriteriaList": "criteria"}
"""What `generate()` calls between two passes, and its variable that holds the member that is called."""
ASIDES: dict[str, tuple[Branch, ...]] = {"UnbatchedClassifierFreeGuidanceLogitsProcessor": ("uncond",)}
"""Which half of guidance the passes of a logits processor are; unknown for all others."""
TOKENS = ("candidate_input_ids", "flat_running_sequences", "input_ids")
"""Variables of the loops of `generate()` that hold prompt and new tokens together."""
GENERATE = "transformers.generation.utils"
LOOPS = ("generate", "_sample", "_get_logits_processor")
"""Methods that decide how a call is guided."""
_PROMPT_POSITIONS: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()


@dataclass(eq=False)
class Text:
    """One text that is being decoded: columns of its prompt, and columns read so far."""

    prompt: int = 0
    end: int = 0
    is_aside: bool = False
    """Whether a processor or a criterion makes its passes."""
    memory: dict[Any, Any] = field(default_factory=dict)
    """What its passes leave for later ones."""

    def start(self, length: int, kwargs: dict[str, Any]) -> int:
        """The column of the first token of a pass that was given no mask."""
        if (cache := kwargs.get("past_key_values")) is not None:
            try:
                read = cache.get_seq_length()
            except (ValueError, AttributeError):  # caches of models without attention do not count
                read = None
            if isinstance(read, Tensor) and self.end:
                return self.end  # a static cache counts on the device, which would be waited for
            if read is not None:
                return int(read)
        return 0 if length == self.end + 1 and length > 1 else self.end  # without a cache all is read anew

    def begins(self, start: int, length: int, kwargs: dict[str, Any]) -> bool:
        """Whether a pass is the first over a text: one call decodes several, as where a language is detected first."""
        return not self.end or (not start and (length != self.end + 1 or kwargs.get("past_key_values") is not None))

    def ids(self, state: TextPass) -> Tensor | None:
        """Tokens of each row up to the end of a pass, as the loop of `generate()` has them; None where it does not."""
        assert state.like is not None
        rows, end, names = len(state.like), state.start + state.length, () if self.is_aside else TOKENS
        calls = ((frame, name) for frame in _inside() for name in names if name in frame.f_code.co_varnames)
        found: Iterator[Any] = (frame.f_locals.get(name) for frame, name in calls)
        whole = next((ids for ids in found if _reaches(ids, rows, end)), None)
        return None if whole is None else whole[:, :end]


def _reaches(ids: Any, rows: int, end: int) -> bool:
    """Whether a variable holds a table of so many rows, with all columns before `end`."""
    return isinstance(ids, Tensor) and ids.ndim == 2 and len(ids) == rows and ids.shape[1] >= end


@dataclass(eq=False)
class Generation:
    """One call of `generate()`, and how far it has come.

    Args:
        model: whose method was called.
        prompt: columns of the prompt as far as arguments tell, for compiled code; None: one start token.
        prompts: rows, before beams repeat them; None where unknown.
        mask: `[prompts, columns]`, 1 on real tokens of the prompt; None without pads.
        branches: halves of guidance in each pass of the loop itself; None where unknown.
        has_asides: whether processors or criteria may run the model between two passes of the loop.
        refuse_twin: why no unsteered twin can run beside it, or "".
        texts: by clock and by who makes the passes.
    """

    model: nn.Module
    prompt: int | None
    prompts: int | None
    mask: Tensor | None
    branches: tuple[Branch, ...] | None
    has_asides: bool
    refuse_twin: str
    texts: dict[Any, Text] = field(default_factory=lambda: defaultdict(Text))

    def at(
        self, clock: str, tokens: Tensor, length: int, start: int | None, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> TextPass:
        """Where a pass of this call over `tokens` `[B, length, ...]` stands; `start` and `mask` are known together."""
        branches, aside = self.branches, None
        if self.has_asides and (aside := _aside()) is not None:
            branches = entry_of(ASIDES, aside, None)
        text = self.texts[clock, aside]
        if start is None:
            start = text.start(length, kwargs)
        if text.begins(start, length, kwargs):
            text.prompt, text.is_aside = start + length + _to_come(), aside is not None
            if not ASIDE.running:
                text.memory = {}
        elif start > text.end:  # the first pass put tokens of its own in front, such as those of an image
            text.prompt += start - text.end
        if not ASIDE.running:
            text.end = start + length
        if mask is None and aside is None and self.mask is not None:
            mask = self.mask.repeat_interleave(len(tokens) // len(self.mask), dim=0)
        # arguments by place, since by name this call takes twice as long
        state = TextPass(length, start, text.prompt, mask, self.prompts, branches, tokens)
        state.text = text
        return state

    @cached_property
    def encoded(self) -> tuple[Branch, ...] | None:
        """Halves of guidance in the passes of an encoder."""
        stacked = self.branches is None or entry_of(STACKED, self.model, Stacked()).encoder
        return self.branches if stacked else ()


def _inside() -> Iterator[FrameType]:
    """The calls between here and the `generate()` that is followed, the innermost first."""
    return takewhile(lambda frame: frame.f_code.co_name != "_follow" or frame.f_code.co_filename != __file__, frames())


def _aside() -> Any:
    """The logits processor or stopping criterion that runs this pass; None in the loop itself."""
    calls = (frame.f_locals for frame in _inside() if frame.f_code.co_name == "__call__")
    return next((call[name] for call in calls if (name := entry_of(LISTS, call.get("self"), "")) in call), None)


def _to_come() -> int:
    """Columns of the prompt after this pass, the first, where it is read in chunks; less those that an assistant guessed."""
    for frame in _inside():
        if "candidate_length" in frame.f_code.co_varnames:
            return -frame.f_locals["candidate_length"]
        if "input_chunks" in frame.f_code.co_varnames and (chunks := frame.f_locals.get("input_chunks")):
            return sum(chunk.shape[1] for chunk in chunks[1:])
    return 0


class _Running(threading.local):
    """The `generate()` call of this thread."""

    call: Generation | None = None


RUNNING = _Running()


UNDER_WAY: dict[object, tuple[Any, int, Any]] = {}
"""Calls that have not ended: model, thread, and what was entered where they began."""


class Watched(StandIn):
    """A method of one model whose calls are followed; it takes the place of the attribute."""

    def __init__(self, model: Any, name: str):
        self.model, self.name, self.plain, self.is_open = model, name, getattr(model, name), True
        update_wrapper(self, self.plain)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.is_open:  # someone kept it
            return self.plain(*args, **kwargs)
        key = object()
        UNDER_WAY[key] = self.model, threading.get_ident(), ENTERED.get()
        try:
            return FOLLOWED[self.name](self.model, self.plain, args, kwargs)
        finally:
            del UNDER_WAY[key]

    def __reduce__(self) -> Any:
        return getattr, (self.model, self.name)


def watch(model: Any) -> Callable[[], None]:
    """Follow `generate()` and `generate_batch()` of this one object, by attributes of it. Returns what undoes it."""
    own, followed = vars(model), [name for name in FOLLOWED if hasattr(type(model), name)]
    before = {name: own[name] for name in followed if name in own}
    watched = {name: Watched(model, name) for name in followed}
    own.update(watched)

    def undo() -> None:
        for name, one in watched.items():
            one.is_open = False
            if own.get(name) is one:  # else the user has put another one there meanwhile
                del own[name]
                own.update({name: before[name]} if name in before else {})

    return undo


def _follow(model: Any, plain: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """Call `generate()`, and know meanwhile what it was asked for."""
    outer, RUNNING.call = RUNNING.call, _generation(model, args, kwargs)
    _write_prompt_positions(model, RUNNING.call)
    try:
        return plain(*args, **kwargs)
    finally:
        RUNNING.call = outer
        _write_prompt_positions(model, outer)


def _follow_batch(model: Any, plain: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:  # noqa: ARG001
    """Call `generate_batch()`, and raise what ended its own thread, which keeps it to itself."""
    results = plain(*args, **kwargs)
    if results and all(result.error for result in results.values()):
        raise Unanswerable(f"generate_batch() stopped: {next(iter(results.values())).error}")
    return results


FOLLOWED = {"generate": _follow, "generate_batch": _follow_batch}


def cached(kwargs: dict[str, Any]) -> Any:
    """Tokens read before this pass, by its cache; a tensor where the cache counts in one."""
    cache = kwargs.get("past_key_values")
    return 0 if cache is None else cache.get_seq_length()


def prompt_positions(model: nn.Module) -> Tensor:
    """What compiled code reads of `generate()`: real prompt tokens of each row, and, last, how many rows there are."""
    if model not in _PROMPT_POSITIONS:
        device = next((p.device for p in model.parameters() if not p.is_meta), None)
        _PROMPT_POSITIONS[model] = torch.tensor([NEVER] * ROWS + [1], device=device)
    return _PROMPT_POSITIONS[model]


def _write_prompt_positions(model: nn.Module, call: Generation | None) -> None:
    ends = prompt_positions(model)
    ends.fill_(NEVER)
    ends[ROWS] = 1
    if call is not None and call.prompts is not None:
        if call.mask is None:  # all rows are equally long
            ends[0] = 1 if call.prompt is None else call.prompt  # a decoder starts from one token
        elif call.prompts <= ROWS:
            ends[: call.prompts] = call.mask.sum(1).to(ends)
            ends[ROWS] = call.prompts
        elif is_compiled([model]):
            raise BadEdit(f"a compiled model has room for {ROWS} padded rows, got {call.prompts}; use a smaller batch")


def _generation(model: Any, args: tuple, kwargs: dict[str, Any]) -> Generation:
    """What `generate(*args, **kwargs)` was asked for."""
    given = dict(zip(ARGUMENTS, args, strict=False)) | kwargs
    config = given.get("generation_config") or model.generation_config
    asked = {**vars(config), **given}
    is_pair, mask = model.config.is_encoder_decoder, given.get("attention_mask")
    ids = given.get("input_ids", given.get("inputs"))
    main = ids if isinstance(ids, Tensor) and ids.shape[1:] != (0,) else given.get("inputs_embeds")
    if is_pair:
        prompt, mask = None, given.get("decoder_attention_mask")
    else:
        prompt = main.shape[1] if isinstance(main, Tensor) else 1
        if isinstance(mask, Tensor):
            prompt = max(prompt, mask.shape[1])
        elif (past := given.get("past_key_values")) is not None and prompt <= past.get_seq_length():
            prompt += int(past.get_seq_length())  # only the new part was given
        if mask is None and isinstance(ids, Tensor) and ids is main:
            mask = _inferred_mask(ids, asked)
    branches, has_asides = _guidance(model, asked)
    return Generation(
        model=model,
        prompt=prompt,
        prompts=_prompts(model, main, given),
        mask=mask if isinstance(mask, Tensor) and not mask.all() else None,
        branches=branches,
        has_asides=has_asides,
        refuse_twin="do='hold' cannot follow an encoder in generate()" if is_pair else _no_twin(asked),
    )


def _prompts(model: Any, main: Any, given: dict[str, Any]) -> int | None:
    """How many rows were asked for: by the tokens, else by whatever else the model mainly reads."""
    if main is None and (encoded := given.get("encoder_outputs")) is not None:
        main = encoded[0]
    main = given.get(model.main_input_name) if main is None else main
    return len(main) if isinstance(main, Tensor) else None


def _guidance(model: Any, asked: dict[str, Any]) -> tuple[tuple[Branch, ...] | None, bool]:
    """Halves in the passes of the loop itself, and whether a processor or a criterion may make passes of its own."""
    stacked, guided = entry_of(STACKED, model, Stacked()), asked.get("guidance_scale") not in (None, 1)
    own = any(asked.get(name) for name in ARGUMENTS[2:])
    if stacked.when(asked):
        return stacked.branches, own
    if guided and any(getattr(type(model), name).__module__ != GENERATE for name in LOOPS):
        return None, True
    return ("cond",) if guided or asked.get("logits_processor") else (), guided or own


def _inferred_mask(ids: Tensor, asked: dict[str, Any]) -> Tensor | None:
    """The mask that `generate()` infers where none is given: pads are pads unless they also end a text."""
    pad, eos = asked.get("pad_token_id"), asked.get("eos_token_id")
    if pad is None or pad in (eos if isinstance(eos, (list, tuple)) else [eos]) or ids.ndim != 2:
        return None
    return (ids != pad).long()


def _no_twin(asked: dict[str, Any]) -> str:
    """Why `do="hold"` cannot work in this call."""
    if (beams := asked.get("num_beams") or 1) > 1:
        return f"do='hold' cannot follow {beams} beams: their order changes between passes; use num_beams=1"
    if asked.get("assistant_model") is not None or asked.get("prompt_lookup_num_tokens"):
        return "do='hold' cannot follow assisted decoding, which takes tokens back; generate without an assistant"
    static = asked.get("cache_implementation")
    if static and "static" in static:
        return f"do='hold' cannot copy a {static} cache; use the default cache"
    return ""
