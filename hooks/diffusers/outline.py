"""A pipeline without weights: components as their configurations say, which run for their shapes alone.

Its networks are on the meta device, where nothing is stored or computed; what they give is zeros on the processor, so that the
pipeline's own loop runs as it always does.
"""

from collections import Counter
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from steerlib.errors import UnsupportedTarget

LONGEST = 512
"""Tokens of a prompt, where neither the pipeline nor the text encoder says how many there are at most."""


def outline(diffusers: Any, source: str) -> tuple[Any, Counter[str]]:
    """The pipeline that a folder or a repository describes by `model_index.json` and the configurations of its components, and
    what its networks do from now on: calls of each by its name, and `flops`.

    Raises `UnsupportedTarget` for components that cannot be made from their configuration alone.
    """
    index = diffusers.DiffusionPipeline.load_config(source)
    if (kind := getattr(diffusers, str(index["_class_name"]), None)) is None:
        raise UnsupportedTarget(f"{source!r} is of a {index['_class_name']}, which is no pipeline of diffusers itself")
    takes = signature(kind.__init__).parameters
    given = {name: value for name, value in index.items() if name in takes and not isinstance(value, list)}
    parts = {name: value for name, value in index.items() if name in takes and isinstance(value, list)}
    made = {name: _component(source, name, *part) for name, part in parts.items()}
    for name, (_, part) in parts.items():
        if "Tokenizer" in str(part):
            made[name] = Tokens(made.get(name.replace("tokenizer", "text_encoder")))
    cpu = torch.device("cpu")
    pipe = type(kind.__name__, (kind,), {"_execution_device": cpu, "device": cpu})(**{**given, **made})
    pipe.set_progress_bar_config(disable=True)
    done: Counter[str] = Counter()
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            part.eval().forward = _counted(name, part.forward, done)  # type: ignore[method-assign]
    return pipe, done


def _component(source: str, name: str, library: str | None, kind: str | None) -> Any:
    """A component: a network, or a scheduler; None for what prepares texts, and prepares and checks pictures."""
    if library is None or kind is None or "SafetyChecker" in kind:
        return None
    made: Any = getattr(import_module(library), kind, None) if library in ("diffusers", "transformers") else None
    if made is None:
        raise UnsupportedTarget(
            f"component {name!r} of {source!r} is a {kind} of {library}, which its configuration may not describe"
        )
    if nn.Module not in made.__mro__:
        return made.from_config(made.load_config(source, subfolder=name)) if hasattr(made, "load_config") else None
    with torch.device("meta"):
        if library == "diffusers":
            return made.from_config(made.load_config(source, subfolder=name))
        return made(made.config_class.from_pretrained(source, subfolder=name))


def _counted(name: str, forward: Callable[..., Any], done: Counter[str]) -> Callable[..., Any]:
    """A forward that is run on the meta device, once for inputs of the same shapes, and gives zeros."""
    from torch.utils._pytree import tree_flatten, tree_map_only

    known: dict[Any, tuple[int, Any]] = {}
    takes = signature(forward)

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = takes.bind(*args, **kwargs)
        given.arguments.pop("attention_mask", None)  # whose values would be asked for
        flat, form = tree_flatten((given.args, given.kwargs))
        key = form, *((x.shape, x.dtype) if isinstance(x, Tensor) else repr(x) for x in flat)
        if key not in known:
            args, kwargs = tree_map_only(Tensor, lambda x: x.to("meta"), (given.args, given.kwargs))
            with FlopCounterMode(display=False) as counter, torch.device("meta"):
                made = forward(*args, **kwargs)
            known[key] = counter.get_total_flops(), made
        flops, made = known[key]
        done.update({name: 1, "flops": flops})
        return tree_map_only(Tensor, lambda x: torch.zeros(x.shape, dtype=x.dtype), made)

    return run


class Tokens:
    """A tokenizer that makes of every text as many tokens as a text encoder takes at most."""

    added_tokens_encoder: ClassVar[dict[str, int]] = {}

    def __init__(self, encoder: Any):
        config = getattr(encoder, "config", None)
        self.model_max_length = min(LONGEST, getattr(config, "max_position_embeddings", LONGEST))

    def __call__(self, text: Any, *_: Any, max_length: int | None = None, padding: Any = False, **__: Any) -> Any:
        from transformers import BatchEncoding

        count = 1 if padding == "longest" else max_length or self.model_max_length  # nothing is cut
        ids = torch.zeros(1 if isinstance(text, str) else len(text), count, dtype=torch.long)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def tokenize(self, text: str) -> list[str]:
        """Its words: none of them is a token that stands for others."""
        return text.split()

    def batch_decode(self, ids: Any, **_: Any) -> list[str]:
        """A text for each row."""
        return [""] * len(ids)
