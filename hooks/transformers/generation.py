"""What a call of `generate()` was asked for: the prompt, its pads, beams, guidance."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import update_wrapper
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from steerlib.contexts import ENTERED
from steerlib.errors import BadEdit
from steerlib.passes import Branch, TextPass

from ..attach import ASIDE, is_compiled
from ..copies import StandIn
from ..modules import frames

ROWS = 64
"""Rows for which a compiled model has room."""
NEVER = 2**31
"""A prompt that does not end: a bare forward."""
_PROMPT_POSITIONS: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()


@dataclass(eq=False)
class Generation:
    """One call of `generate()`, and how far it has come.

    Args:
        model: whose method was called.
        prompt: columns of the prompt, pads included; None until a decoder's first pass.
        prompts: rows, before beams repeat them; None where unknown.
        mask: `[prompts, columns]`, 1 on real tokens of the prompt; None without pads.
        guided: whether each step has a second pass, without the prompt.
        refuse_twin: why no unsteered twin can run beside it, or "".
        uncond_prompt: columns of that second pass's prompt.
        ends: columns read so far, by clock, for models that do not count them.
    """

    model: nn.Module
    prompt: int | None
    prompts: int | None
    mask: Tensor | None
    guided: bool
    refuse_twin: str
    uncond_prompt: int | None = None
    ends: dict[str, int] = field(default_factory=dict)

    def at(
        self, clock: str, tokens: Tensor, length: int, start: int | None, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> TextPass:
        """Where a pass of this call over `tokens` `[B, length, ...]` stands; `start` and `mask` are known together."""
        branch = _half() if self.guided else None
        if start is None:
            start = self._start(branch, clock, length, kwargs)
        end = start + length
        if branch == "uncond":
            self.uncond_prompt = prompt = self.uncond_prompt or end
        else:
            if not ASIDE.running:
                self.ends[clock] = end
            if (prompt := self.prompt) is None:
                prompt = self.prompt = end
            if mask is None and self.mask is not None:
                mask = self.mask.repeat_interleave(len(tokens) // len(self.mask), dim=0)
        # arguments by place, since by name this call takes twice as long
        return TextPass(length, start, prompt, mask, self.prompts, () if branch is None else (branch,), tokens)

    def _start(self, branch: Branch | None, clock: str, length: int, kwargs: dict[str, Any]) -> int:
        """The column of the first token of a pass that was given no mask."""
        if (cache := kwargs.get("past_key_values")) is not None:
            try:
                read = cache.get_seq_length()
            except (ValueError, AttributeError):  # caches of models without attention do not count
                read = None
            if isinstance(read, Tensor) and branch != "uncond" and clock in self.ends:
                return self.ends[clock]  # a static cache counts on the device, which would be waited for
            if read is not None:
                return int(read)
        if branch == "uncond":
            return 0 if self.uncond_prompt is None or length > 1 else self.uncond_prompt
        end = self.ends.get(clock, 0)
        return 0 if length == end + 1 and length > 1 else end  # without a cache all is read anew


class _Running(threading.local):
    """The `generate()` call of this thread."""

    call: Generation | None = None


RUNNING = _Running()


class Watched(StandIn):
    """`generate()` of one model, whose calls are followed; it takes the place of the attribute."""

    def __init__(self, model: Any):
        self.model, self.plain, self.is_open = model, model.generate, True
        update_wrapper(self, self.plain)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.is_open:  # someone kept it
            return self.plain(*args, **kwargs)
        entered = ENTERED.get()  # noqa: F841 - read off this frame where the call outlives its session
        outer, RUNNING.call = RUNNING.call, _generation(self.model, args, kwargs)
        _write_prompt_positions(self.model, RUNNING.call)
        try:
            return self.plain(*args, **kwargs)
        finally:
            RUNNING.call = outer
            _write_prompt_positions(self.model, outer)

    def __reduce__(self) -> Any:
        return getattr, (self.model, "generate")


def watch(model: Any) -> Callable[[], None]:
    """Follow `generate()` of this one object, by an attribute of it. Returns the function that undoes it."""
    if not hasattr(type(model), "generate"):
        return lambda: None
    own, before, watched = vars(model), vars(model).get("generate"), Watched(model)
    own["generate"] = watched

    def undo() -> None:
        watched.is_open = False
        if own.get("generate") is watched:  # else the user has put another one there meanwhile
            del own["generate"]
            if before is not None:
                own["generate"] = before

    return undo


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


def _half() -> Branch:
    """The half of guidance that is computed; only the call stack shows it."""
    return "uncond" if any(frame.f_code.co_name == "get_unconditional_logits" for frame in frames()) else "cond"


def _generation(model: Any, args: tuple, kwargs: dict[str, Any]) -> Generation:
    """What `generate(*args, **kwargs)` was asked for."""
    given = dict(zip(("inputs", "generation_config"), args, strict=False)) | kwargs
    config = given.get("generation_config") or model.generation_config
    asked = {**vars(config), **given}
    is_pair, mask = model.config.is_encoder_decoder, given.get("attention_mask")
    ids = given.get("input_ids", given.get("inputs"))
    main = ids if isinstance(ids, Tensor) and ids.shape[1:] != (0,) else given.get("inputs_embeds")
    if is_pair:
        prompt, mask = None, given.get("decoder_attention_mask")
        if main is None and (encoded := given.get("encoder_outputs")) is not None:
            main = encoded[0]
    else:
        prompt = main.shape[1] if isinstance(main, Tensor) else 1
        if isinstance(mask, Tensor):
            prompt = max(prompt, mask.shape[1])
        elif (past := given.get("past_key_values")) is not None and prompt <= past.get_seq_length():
            prompt += int(past.get_seq_length())  # only the new part was given
        if mask is None and isinstance(ids, Tensor) and ids is main:
            mask = _inferred_mask(ids, asked)
    return Generation(
        model=model,
        prompt=prompt,
        prompts=len(main) if isinstance(main, Tensor) else None,
        mask=mask if isinstance(mask, Tensor) and not mask.all() else None,
        guided=asked.get("guidance_scale") not in (None, 1),
        refuse_twin="do='hold' cannot follow an encoder in generate()" if is_pair else _no_twin(asked),
    )


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
