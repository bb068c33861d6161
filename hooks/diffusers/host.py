"""diffusers pipelines: denoisers under every guidance layout, text encoders, autoencoders."""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from steerlib.errors import CompiledModel, UnsupportedTarget
from steerlib.hosts import Host
from steerlib.passes import DenoisingPass, Grid, StepState, TextPass, TracedPass
from steerlib.sites import Site

from ..modules import arguments, digest
from .calls import Call, Words, asking, branches, running, turn_of
from .sites import PipelineSites, drops_pads, is_split, noise_level, video_axes
from .sockets import plug

TIMESTEP = ("timestep", "timesteps", "t")
"""What denoisers call the time they are asked about."""
SAMPLE = ("sample", "hidden_states", "x")
"""What they call the noisy image."""
IDENTITY = ("in_channels", "out_channels", "num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim")
IDENTITY += ("cross_attention_dim", "block_out_channels", "layers_per_block", "patch_size", "joint_attention_dim")
"""Fields of a denoiser's configuration that a bank must agree with."""


_HOLDERS: WeakKeyDictionary[Any, nn.Module] = WeakKeyDictionary()
_NUMBERS: WeakKeyDictionary[Any, dict[str, tuple[Tensor, Any]]] = WeakKeyDictionary()


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
        if not self.denoisers or not hasattr(target, "scheduler"):
            parts = ", ".join(dict(self.model.named_children()))
            raise UnsupportedTarget(
                f"expected a pipeline with a denoiser and a scheduler, {type(target).__name__} has {parts or 'no modules'}; "
                "load its components first, steer the pipelines it is made of, or the module: sl.steer(module, bank, ...)"
            )

    @cached_property
    def denoisers(self) -> tuple[str, ...]:
        """Components that are asked about a time; control networks among them."""
        return tuple(name for name, m in self.model.named_children() if {*TIMESTEP} & {*arguments(m)})

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
        part = rest.partition(".")[0]  # decode() calls the parts of an autoencoder, and nobody the autoencoder itself
        return (f"{component}.{part}",) if part in ("encoder", "decoder") else (site.module,)

    def order(self, site: Site) -> tuple[int, ...]:
        return self._sites.order(site)

    def passes(self) -> tuple[str, ...]:
        return self.denoisers

    def plug(self, module: nn.Module, socket: Any) -> Callable[[], None] | None:
        component, _, inside = socket.site.module.partition(".")
        # accelerate takes the hooks of a whole component away between two calls, and text encoders are transformers models
        ours = inside and type(self.model.get_submodule(component)).__module__.partition(".")[0] == "diffusers"
        return plug(module, socket) if ours else None

    # -- where a pass stands ---------------------------------------------------------------------------------

    def state(self, clock: str, args: tuple, kwargs: dict[str, Any]) -> StepState:
        module = self.model.get_submodule(clock)
        given = {**dict(zip(arguments(module)[1:], args, strict=False)), **kwargs}
        if clock in self.denoisers:
            return self._denoising(clock, module, given)
        first = next((value for value in given.values() if isinstance(value, Tensor)), None)
        component, _, rest = clock.partition(".")
        if rest:  # inside an autoencoder: the finished image, or one tile of it
            tiled = getattr(self.model.get_submodule(component), "use_tiling", False)
            call = running(self.pipe, component, self.model.get_submodule(component))
            return DenoisingPass(
                1.0,
                prompts=call.prompts if call else None,
                images=call.images if call else None,
                grid=None if tiled else self._grid(module, first, given),
                like=first,
            )
        mask = given.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        length = 0 if first is None else first.shape[-1 if first.ndim < 3 else 1]
        return TextPass(length, mask=mask, branches=asking(self.pipe), like=first)

    def traced_state(self, clock: str, args: tuple, kwargs: dict[str, Any]) -> StepState:
        module = self.model.get_submodule(clock)
        given = {**dict(zip(arguments(module)[1:], args, strict=False)), **kwargs}
        sample = _sample(given)
        noise = noise_level(module, _time(given), self._train_steps)
        steps = torch.zeros((1, 1), dtype=torch.long, device=sample.device)
        progress = 1 - torch.as_tensor(noise, dtype=torch.float32, device=sample.device).reshape(-1)[0]
        return TracedPass(steps, steps, None, progress=progress, copies=0)  # how often the rows lie in the batch is unknown

    def _denoising(self, clock: str, module: nn.Module, given: dict[str, Any]) -> StepState:
        sample, call = _sample(given), running(self.pipe, clock, module)
        time, progress, step = self._moment(call, module, given)
        rows, images, first = len(sample), call.images if call else None, sample if isinstance(sample, Tensor) else sample[0]
        known = call is not None and images is not None and rows % images == 0
        turn = turn_of(call, time) if known else None
        return DenoisingPass(
            progress,
            step=step,
            visit=turn.visit if turn else 0,
            prompts=call.prompts if known else None,
            images=images if known else None,
            branches=branches(call, turn, clock, rows // images) if known else None,
            grid=self._grid(module, first, given),
            texts=self._texts(module, given),
            words=Words(call, self.model) if call else None,
            like=first,
        )

    @property
    def _train_steps(self) -> int:
        return int(getattr(getattr(self.pipe.scheduler, "config", None), "num_train_timesteps", 1000))

    def _moment(self, call: Call | None, module: nn.Module, given: dict[str, Any]) -> tuple[float, float, int]:
        """The time a denoiser is asked about, the progress it means, and which of the scheduler's noise levels it is."""
        scheduler = (call or self).pipe.scheduler
        run, index, t = (call.names.get(name) if call else None for name in ("timesteps", "i", "t"))
        counted = isinstance(run, Tensor) and isinstance(index, int) and index < len(run)
        times, whole = (self._times(name, x) for name, x in (("run", run if counted else None), ("all", scheduler.timesteps)))
        if counted and isinstance(t, Tensor):
            time = times[index]  # the list is on the CPU, t may not be
        elif isinstance(t, (Tensor, int, float)):
            time = float(t)
        else:
            noise = torch.as_tensor(noise_level(module, _time(given), self._train_steps))
            time = float(noise.reshape(-1)[0]) * self._train_steps
        levels = list(dict.fromkeys(times or whole)) or [time]
        step = min(range(len(levels)), key=lambda k: abs(levels[k] - time))
        if whole and not (
            min(whole) >= 0 and 2 < max(whole) <= self._train_steps
        ):  # counts otherwise, as EDM does: by steps, then
            return time, min(range(len(whole)), key=lambda k: abs(whole[k] - time)) / len(whole), step
        return time, 1 - time / self._train_steps, step

    def _times(self, what: str, times: Tensor | None) -> list[float]:
        return [] if times is None else self._once(what, times, lambda x: [float(t) for t in x.tolist()])

    def _once(self, what: str, tensor: Tensor, numbers: Callable[[Tensor], Any]) -> Any:
        """Numbers of a tensor that stays the same during a run, read from its device once."""
        known = _NUMBERS.setdefault(self.pipe, {})
        if what not in known or known[what][0] is not tensor:
            known[what] = tensor, numbers(tensor)
        return known[what][1]

    def _grid(self, module: nn.Module, sample: Any, given: Mapping[str, Any]) -> Grid | None:
        """Sizes of the latent: an image `[B, C, H, W]`, a video, or tokens and what is told beside; None where it is split."""
        if is_split(module):
            return None
        if isinstance(ids := given.get("img_ids"), Tensor):
            return self._once("grid", ids, lambda x: Grid(1, *(int(n) + 1 for n in x.reshape(-1, x.shape[-1])[:, 1:3].amax(0))))
        if isinstance(shapes := given.get("img_shapes"), list):
            return Grid(*(shapes[0] if len(shapes[0]) == 3 else shapes[0][0]))
        if {"num_frames", "height", "width"} <= {*given}:
            return Grid(given["num_frames"], given["height"], given["width"])
        if not isinstance(sample, Tensor) or sample.ndim not in (4, 5):
            return None
        return Grid(1, *sample.shape[-2:]) if sample.ndim == 4 else Grid(*(sample.shape[axis] for axis in video_axes(module)))

    def _texts(self, module: nn.Module, given: Mapping[str, Any]) -> int:
        """Tokens of text, which some blocks keep in front of those of the image; -1 where rows differ."""
        text, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
        if not isinstance(text, Tensor) or text.ndim != 3:
            return 0
        if not isinstance(mask, Tensor) or not drops_pads(module):
            return text.shape[1]
        counts = self._once("texts", mask, lambda x: x.sum(-1).tolist())
        return int(counts[0]) if len({*counts}) == 1 else -1

    # -- the unsteered twin ----------------------------------------------------------------------------------

    def refuse_twin(self) -> str:
        cached = [name for name in self.denoisers if getattr(self.model.get_submodule(name), "is_cache_enabled", False)]
        return f"do='hold' needs {cached[0]} without its cache; call pipe.{cached[0]}.disable_cache()" if cached else ""

    def run_twin(self, path: str, args: tuple, kwargs: dict[str, Any], caches: Any) -> None:  # noqa: ARG002
        with torch.no_grad():
            self.model.get_submodule(path)(*args, **kwargs)

    # -- identity --------------------------------------------------------------------------------------------

    def fingerprint(self) -> dict[str, Any]:
        found = {}
        for name in self.denoisers:
            if name.startswith("controlnet"):  # one may be added to a pipeline, or left out
                continue
            module = self.model.get_submodule(name)
            config = getattr(module, "config", {})
            sizes = {key: config[key] for key in IDENTITY if config.get(key) is not None}
            found[name] = {"class": type(module).__name__}
            found[name] |= {key: list(value) if isinstance(value, tuple) else value for key, value in sizes.items()}
        return found

    def weights_digest(self) -> str | None:
        return digest(self.model.get_submodule(self.denoisers[0]))


def _holder(pipe: Any) -> nn.Module:
    """The pipeline's modules as the children of one, the same for every session."""
    holder = _HOLDERS.get(pipe)
    if holder is None:
        holder = _HOLDERS[pipe] = nn.Module()
    parts: dict[str, nn.Module | None] = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    if parts != holder._modules:
        holder.__dict__["_modules"] = parts  # in one step: another thread may be running through it
    return holder


def _sample(given: Mapping[str, Any]) -> Any:
    return next(given[name] for name in SAMPLE if given.get(name) is not None)


def _time(given: Mapping[str, Any]) -> Any:
    return next(given[name] for name in TIMESTEP if given.get(name) is not None)


def _texts(prompt: Any) -> list[str]:
    return [prompt] if isinstance(prompt, str) else list(prompt)


def load(source: str, **kwargs: Any) -> Any:
    """A pipeline from a folder."""
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(source, **kwargs)
