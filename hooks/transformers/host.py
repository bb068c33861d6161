"""The host of transformers models, PEFT's around them included."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from steerlib.errors import BadEdit, MissingExtra, Unanswerable, UnknownSite, UnsupportedTarget
from steerlib.hosts import TOKENIZERS, Host, hub_id
from steerlib.passes import TextPass, TracedPass
from steerlib.sites import Layout, Site

from ..attach import modules_on
from ..modules import arguments, module_site
from .calls import Calls
from .generation import RUNNING, UNDER_WAY, prompt_positions, watch
from .packages import packaged
from .sites import (
    Stack,
    axes_at,
    is_block,
    is_fed_tokens,
    lists_of_blocks,
    named_sites,
    order,
    reads,
    reads_text,
    stacks,
    stream_width,
    tower,
)

_LAYOUTS: WeakKeyDictionary[nn.Module, tuple[dict[str, Site], tuple[Stack, ...], bool]] = WeakKeyDictionary()


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

    @classmethod
    def opens(cls, source: str) -> bool:  # noqa: ARG003
        """Whatever no other host opens."""
        return True

    @classmethod
    def load(cls, source: str, *, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
        try:
            from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
            from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
        except ImportError:
            raise MissingExtra("language models need transformers: pip install 'steerlib[transformers]'") from None
        where: dict[str, Any] = {"pretrained_model_name_or_path": source}
        if source.startswith("package:"):
            where = packaged(source.removeprefix("package:"))
        tokenizer, auto = AutoTokenizer.from_pretrained(**where), AutoModelForCausalLM
        if "gguf_file" not in where and (config := AutoConfig.from_pretrained(**where)).is_encoder_decoder:
            auto = AutoModelForSeq2SeqLM if config.model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES else auto
        return auto.from_pretrained(**where, dtype=dtype).eval(), tokenizer

    def tokenizer(self) -> Any:
        """The one that `load` gave with the model, else the one in its folder or repository."""
        return _beside(self.model) or super().tokenizer()

    @cached_property
    def _layout(self) -> tuple[dict[str, Site], tuple[Stack, ...], bool]:
        """Named sites, the stacks, and whether parts read no text; read off the model once."""
        if (known := _LAYOUTS.get(self.model)) is None:
            is_mixed = any(reads(module) is False for module in self.model.modules())
            known = _LAYOUTS[self.model] = named_sites(self.model), stacks(self.model), is_mixed
        return known

    def sites(self) -> Mapping[str, Site]:
        return self._layout[0]

    def site(self, name: str) -> Site:
        sites = self.sites()
        if name in sites:
            return sites[name]
        if is_block(name) and (blocks := [f"{path}.0" for path in lists_of_blocks(self.model)]) and not self._layout[1]:
            raise UnknownSite(
                f"{type(self.model).__name__} has no site {name!r}: nothing tells which of its lists are the text's blocks; "
                f"name one, or any module path: {', '.join(blocks)}"
            )
        return module_site(self.model, name, tuple(sites), self._layout_at)

    def _layout_at(self, path: str, side: str) -> Layout:
        """Axes at one side of the module at a path: as a named site's, else by its class or by what is around it."""
        known = (site for site in self.sites().values() if (site.module, site.side, site.columns) == (path, side, None))
        return next((site.layout for site in known), None) or axes_at(self.model, path, side, self._layout[1])

    def clocks(self, site: Site) -> tuple[str, ...]:
        paths = self._clocks(site)
        for path in paths:
            self._calls.arguments(path)
        return paths

    def _clocks(self, site: Site) -> tuple[str, ...]:
        """The stack a site lies in, and what calls it where only that is given the padding mask. Where no text is counted, the
        tower around it or, beside towers, its own module, which knows what it is given."""
        found = self._layout[1]
        if site.name == "embed" and len(found) > 1:
            return tuple(stack.path for stack in found)  # an encoder and a decoder may share it
        if not self.counts_tokens(site):
            return (tower(self.model, site.module) or site.module,)
        for stack in found:
            if inside := tuple(path for path in stack.clocks if site.module.startswith(path + ".") or not path):
                return inside
        steps = site.module.split(".")
        around = [(".".join(steps[:n]), m) for n, m in enumerate(modules_on(self.model, site.module)[:-1])]
        return tuple(path for path, m in around if {"input_ids", "inputs_embeds"} & {*arguments(m)}) or ("",)

    def order(self, site: Site) -> tuple[int, ...]:
        return order(site, self._layout[1], len(self.sites()))

    def counts_tokens(self, site: Site) -> bool:
        if not reads_text(self.model, site.module):
            return False
        sites, found, is_mixed = self._layout
        is_named = not is_mixed or any(known.module == site.module for known in sites.values())
        return is_named or is_fed_tokens(self.model, site.module, found)

    begins_text = counts_tokens

    def width(self, site: Site) -> int | None:
        if site.columns is None and ".layers." in f".{site.name}" and site.name in self.sites():
            return stream_width(self.model, site, self._layout[1])
        return super().width(site)

    @cached_property
    def _calls(self) -> Calls:
        encoder = next((stack.path for stack in self._layout[1] if stack.prefix == "encoder."), None)
        return Calls(self.model, encoder, prompt_positions(self.model))

    def state(self, clock: str, args: tuple, kwargs: dict[str, Any]) -> TextPass:
        return self._calls.state(clock, args, kwargs)

    def traced_state(self, clock: str, args: tuple, kwargs: dict[str, Any]) -> TracedPass:
        return self._calls.traced_state(clock, args, kwargs)

    def under_way(self) -> list[tuple[int, Any]]:
        return [(ident, entered) for model, ident, entered in [*UNDER_WAY.values()] if model is self.model]

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

    def name(self) -> str:
        return hub_id(getattr(self.model, "name_or_path", ""))

    def fingerprint(self) -> dict[str, Any]:
        config = self.model.config
        text = config.get_text_config(decoder=True)
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        return {"model_type": config.model_type, **{name: getattr(text, name, None) for name in sizes}}


def _beside(model: Any) -> Any:
    """The tokenizer where a model came from; None where `load` gave one, or none is found."""
    from transformers import AutoTokenizer

    if model in TOKENIZERS:
        return None
    with suppress(OSError, ValueError, TypeError, AttributeError):
        return AutoTokenizer.from_pretrained(model.name_or_path)
    return None
