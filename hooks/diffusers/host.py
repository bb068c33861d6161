"""The host of diffusers pipelines: denoisers under every guidance layout, text encoders, autoencoders."""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from steerlib.errors import CompiledModel, MissingExtra, UnsupportedTarget
from steerlib.hosts import Host, digest, hub_id
from steerlib.passes import DenoisingPass, StepState, TextPass, TracedPass
from steerlib.sites import Site

from ..modules import arguments, entry_of, named
from ..transformers.sites import reads_text
from .calls import Words, asking, branches, first_of, running, turn_of
from .families import DENOISERS, Denoiser
from .moments import DenoiserCall, grid_of
from .outline import outline
from .sites import PipelineSites
from .sockets import Plugged

DTYPE = (0, 42)
"""The first version of diffusers that is known to load by `dtype`; older ones call it `torch_dtype`."""
_HOLDERS: WeakKeyDictionary[Any, nn.Module] = WeakKeyDictionary()


class PipelineHost(Host):
    """A `DiffusionPipeline` or `ModularPipeline`: paths begin with the name of a component."""

    has_progress, counts_compiled = True, False

    def __init__(self, target: Any):
        self.pipe = target
        self.model = _holder(target)
        for name, module in self.model.named_children():
            if hasattr(module, "_orig_mod"):
                raise CompiledModel(
                    f"{name} is a wrapper made by torch.compile; attach to the plain pipeline first, then call "
                    f"pipe.{name}.compile() or pipe.{name}.compile_repeated_blocks()"
                )
        facts = {name: (entry_of(DENOISERS, m, Denoiser()), arguments(m)) for name, m in self.model.named_children()}
        self.denoisers = {name: known for name, (known, takes) in facts.items() if {*known.time} & {*takes}}
        """What is special about each component that is given a time, control networks among them."""
        if not self.denoisers or not hasattr(target, "scheduler"):
            raise UnsupportedTarget(
                f"expected a pipeline with a denoiser and a scheduler, {type(target).__name__} has "
                f"{', '.join(facts) or 'no modules'}; load its components first, steer the pipelines it is made of, or the "
                "module: sl.steer(module, bank, ...)"
            )

    @classmethod
    def opens(cls, source: str) -> bool:
        """A folder or a repository of the Hub with a `model_index.json`."""
        if Path(source).exists() or source.startswith("package:"):
            return (Path(source) / "model_index.json").is_file()
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        with suppress(OSError, HfHubHTTPError, HFValidationError):  # not there, not reached, or no id at all
            return bool(hf_hub_download(source, "model_index.json"))
        return False

    @classmethod
    def load(cls, source: str, **kwargs: Any) -> tuple[Any, Any]:
        library = _diffusers()
        if tuple(map(int, library.__version__.split(".")[:2])) < DTYPE and "dtype" in kwargs:
            kwargs["torch_dtype"] = kwargs.pop("dtype")
        return library.DiffusionPipeline.from_pretrained(source, **kwargs), None

    @classmethod
    def outline(cls, source: str) -> tuple[Any, Counter[str]]:
        return outline(_diffusers(), source)

    @cached_property
    def _sites(self) -> PipelineSites:
        known = self.model.__dict__.get("_sites")  # on the holder itself, which it refers to
        if known is None or known.parts != [*self.model.children()]:
            known = self.model.__dict__["_sites"] = PipelineSites(self.model, self.denoisers)
        return known

    def sites(self) -> Mapping[str, Site]:
        return self._sites.named

    def site(self, name: str) -> Site:
        return self._sites.find(name)

    def clocks(self, site: Site) -> tuple[str, ...]:
        component, _, rest = site.module.partition(".")
        if not rest or not hasattr(self.model.get_submodule(component), "decode"):
            return (component,)
        part = rest.partition(".")[0]  # decode() calls the parts of an autoencoder, never the autoencoder itself
        return (f"{component}.{part}",) if part in ("encoder", "decoder") else (site.module,)

    def order(self, site: Site) -> tuple[int, ...]:
        return self._sites.order(site)

    def counts_tokens(self, site: Site) -> bool:
        return reads_text(self.model, site.module)  # diffusers' own modules name no main input

    def module(self, path: str) -> nn.Module | None:
        component, _, _ = path.partition(".")
        is_here = getattr(self.pipe, component, None) is self.model._modules.get(component)
        return super().module(path) if is_here else getattr(self.pipe, component, None)

    begins_text = counts_tokens

    def passes(self) -> tuple[str, ...]:
        return tuple(self.denoisers)

    def plug(self, module: nn.Module, socket: Any) -> Callable[[], None] | None:
        component, _, inside = socket.site.module.partition(".")
        # accelerate takes the hooks of a whole component away between two calls, and text encoders are transformers models
        ours = inside and type(self.model.get_submodule(component)).__module__.partition(".")[0] == "diffusers"
        return Plugged(module, socket).remove if ours else None

    def state(self, clock: str, args: tuple, kwargs: dict[str, Any]) -> StepState:
        module = self.model.get_submodule(clock)
        given = named(module, args, kwargs)
        if clock in self.denoisers:
            return self._denoising(clock, module, given)
        first = next((value for value in given.values() if isinstance(value, Tensor)), None)
        component, _, rest = clock.partition(".")
        if rest:  # inside an autoencoder: the finished image, or one tile of it
            autoencoder = self.model.get_submodule(component)
            (call, _), tiled = running(self.pipe, component, autoencoder), getattr(autoencoder, "use_tiling", False)
            known: dict[str, Any] = {"prompts": call.prompts, "images": call.images} if call else {}
            known["first"] = first_of(known.get("images"), 0 if first is None else len(first))
            return DenoisingPass(1.0, **known, grid=None if tiled else grid_of(first, Denoiser()), like=first)
        mask = given.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        length = 0 if first is None else first.shape[-1 if first.ndim < 3 else 1]
        return TextPass(length, mask=mask, branches=asking(self.pipe), like=first)

    def _denoising(self, clock: str, module: nn.Module, given: dict[str, Any]) -> DenoisingPass:
        call, chain = running(self.pipe, clock, module)
        asked = DenoiserCall((call or self).pipe, module, self.denoisers[clock], given, call.names if call else {})
        time, progress, step = asked.moment
        known: dict[str, Any] = {"branches": None}
        if call is not None and (images := call.images) is not None and len(asked.sample) % images == 0:
            turn = turn_of(call, time)
            known = {"branches": branches(call, chain, turn, clock, given, len(asked.sample) // images), "visit": turn.visit}
            known |= {"prompts": call.prompts, "images": images}
        words, grid = Words(call, self.model) if call else None, asked.grid
        known["film"] = call.film(grid.frames) if call and grid else None
        return DenoisingPass(progress, step=step, **known, grid=grid, texts=asked.texts, words=words, like=asked.first)

    def traced_state(self, clock: str, args: tuple, kwargs: dict[str, Any]) -> TracedPass:
        module = self.model.get_submodule(clock)
        asked = DenoiserCall(self.pipe, module, self.denoisers[clock], named(module, args, kwargs))
        device = asked.first.device
        steps = torch.zeros((1, 1), dtype=torch.long, device=device)
        progress = 1 - torch.as_tensor(asked.noise, dtype=torch.float32, device=device).reshape(-1)[0]
        return TracedPass(steps, steps, None, progress=progress, copies=0)  # how often the rows lie in the batch is unknown

    def refuse_twin(self) -> str:
        cached = [name for name in self.denoisers if getattr(self.model.get_submodule(name), "is_cache_enabled", False)]
        return f"do='hold' needs {cached[0]} without its cache; call pipe.{cached[0]}.disable_cache()" if cached else ""

    def name(self) -> str:
        return hub_id(getattr(self.pipe.config, "_name_or_path", ""))

    def fingerprint(self) -> dict[str, Any]:
        found = {}
        for name, facts in self.denoisers.items():
            if name.startswith("controlnet"):  # one may be added to a pipeline, or left out
                continue
            module = self.model.get_submodule(name)
            config = getattr(module, "config", {})
            sizes = {key: config[key] for key in facts.identity if config.get(key) is not None}
            found[name] = {"class": type(module).__name__}
            found[name] |= {key: list(value) if isinstance(value, tuple) else value for key, value in sizes.items()}
        return found

    def weights_digest(self) -> str | None:
        return digest(self.model.get_submodule(next(iter(self.denoisers))))


def _diffusers() -> Any:
    try:
        return import_module("diffusers")
    except ImportError:
        raise MissingExtra("image pipelines need diffusers: pip install 'steerlib[diffusers]'") from None


def _holder(pipe: Any) -> nn.Module:
    """The pipeline's modules as the children of one, the same for every session and for siblings that share all of them."""
    parts: dict[str, nn.Module | None] = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    holder = _HOLDERS.get(pipe)
    if holder is None or parts != holder._modules:
        holder = next((other for other in [*_HOLDERS.values()] if other._modules == parts), None) or nn.Module()
        holder.__dict__["_modules"] = parts
        _HOLDERS[pipe] = holder
    return holder
