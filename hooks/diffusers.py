"""diffusers pipelines: denoisers under every guidance layout, text encoders, autoencoders."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from steerlib.errors import BadEdit, CompiledModel, Unanswerable, UnsupportedTarget
from steerlib.hosts import Host
from steerlib.schedules import Branch, Grid, StepState
from steerlib.sites import Site

from .attach import ASIDE
from .families import arguments
from .modules import digest
from .pipelines import PipelineSites, noise_level
from .registry import plug

TIMESTEP = ("timestep", "timesteps", "t")
"""What denoisers call the time they are asked about."""
SAMPLE = ("sample", "hidden_states", "x")
"""What they call the noisy image."""
IDENTITY = ("in_channels", "out_channels", "num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim")
IDENTITY += ("cross_attention_dim", "block_out_channels", "layers_per_block", "patch_size", "joint_attention_dim")
"""Fields of a denoiser's configuration that a bank must agree with."""


@dataclass
class Call:
    """The call of a pipeline that is running, as its own frame has it."""

    names: Mapping[str, Any]

    @cached_property
    def latents(self) -> Tensor | None:
        """What the denoiser is asked about in this turn of the loop, each image once."""
        block = getattr(self.names.get("block_state"), "latents", None)  # of modular pipelines
        return next((x for x in (self.names.get("latents"), self.names.get("image"), block) if isinstance(x, Tensor)), None)

    @property
    def images(self) -> int | None:
        """How many images are made at once."""
        return None if self.latents is None else len(self.latents)

    @property
    def prompts(self) -> int | None:
        """How many prompts they are made for."""
        images, each = self.images, self.names.get("num_images_per_prompt", self.names.get("num_videos_per_prompt")) or 1
        return images // each if images is not None and images % each == 0 else images


@dataclass
class Words:
    """Where the words of a call's prompts are."""

    pipe: Any
    model: nn.Module
    prompt: Any

    def heads(self, attention: str) -> int:
        """Of an attention, by its site."""
        return int(self.model.get_submodule(attention).heads)  # type: ignore[arg-type]

    def columns(self, word: str, row: int, rows: int) -> list[int]:
        """Tokens of a word in the prompt of one of so many images."""
        if self.prompt is None or getattr(self.pipe, "tokenizer", None) is None:
            raise Unanswerable(
                f"the pipeline was given no words to find {word!r} in; pass prompt=, or give the mask as a tensor"
            )
        prompts = _texts(self.prompt)
        prompt = prompts[row * len(prompts) // rows]
        ids = list(self.pipe.tokenizer(prompt).input_ids)
        wanted = list(self.pipe.tokenizer(word, add_special_tokens=False).input_ids)
        wanted = [i for i in wanted if i not in self.pipe.tokenizer.all_special_ids]
        found = [at for at in range(len(ids)) if wanted and ids[at : at + len(wanted)] == wanted]
        if not found:
            raise BadEdit(f"expected the prompt to hold {word!r}, got {prompt!r}")
        return [at + k for at in found for k in range(len(wanted))]


@dataclass
class Turn:
    """One turn of the denoising loop."""

    latents: Callable[[], Tensor | None] = lambda: None
    """A weak reference to what the turn began with."""
    calls: dict[str, int] = field(default_factory=dict)
    """Calls of each denoiser so far."""


_TURNS: WeakKeyDictionary[Any, Turn] = WeakKeyDictionary()
_HOLDERS: WeakKeyDictionary[Any, nn.Module] = WeakKeyDictionary()
_SITES: WeakKeyDictionary[nn.Module, PipelineSites] = WeakKeyDictionary()
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
        known = _SITES.get(self.model)
        if known is None or known.parts != [*self.model.children()]:
            known = _SITES[self.model] = PipelineSites(self.model, self.denoisers)
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
            return StepState.denoising(1.0, grid=None if tiled else self._grid(first, given), like=first)
        mask = given.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        length = 0 if first is None else first.shape[-1 if first.ndim < 3 else 1]
        return StepState(length, mask=mask, branches=self._asking(), like=first)

    def traced_state(self, clock: str, args: tuple, kwargs: dict[str, Any]) -> StepState:
        module = self.model.get_submodule(clock)
        given = {**dict(zip(arguments(module)[1:], args, strict=False)), **kwargs}
        sample = _sample(given)
        noise = noise_level(module, _time(given), self._train_steps)
        steps = torch.zeros((1, 1), dtype=torch.long, device=sample.device)
        state = StepState.traced(steps, steps, None)
        state.copies = 0  # nobody can be asked how often the rows lie in the batch
        state.progress = 1 - torch.as_tensor(noise, dtype=torch.float32, device=sample.device).reshape(-1)[0]
        return state

    def _denoising(self, clock: str, module: nn.Module, given: dict[str, Any]) -> StepState:
        sample, call = _sample(given), self._call()
        noise, step = self._moment(call, module, given)
        rows, images, first = len(sample), call.images if call else None, sample if isinstance(sample, Tensor) else sample[0]
        if call is None or images is None or rows % images:
            branches: tuple[Branch, ...] | None = None
        else:
            branches = self._branches(clock, call, rows // images)
        return StepState.denoising(
            1 - noise,
            step=step,
            prompts=call.prompts if call and branches is not None else None,
            images=images,
            branches=branches,
            grid=self._grid(first, given),
            words=Words(self.pipe, self.model, call.names.get("prompt")) if call else None,
            texts=text.shape[1] if isinstance(text := given.get("encoder_hidden_states"), Tensor) and text.ndim == 3 else 0,
            like=first,
        )

    @property
    def _train_steps(self) -> int:
        return int(getattr(getattr(self.pipe.scheduler, "config", None), "num_train_timesteps", 1000))

    def _moment(self, call: Call | None, module: nn.Module, given: dict[str, Any]) -> tuple[float, int]:
        """Noise level from 1 to 0, and which of the scheduler's noise levels that is."""
        run, index, t = (call.names.get(name) if call else None for name in ("timesteps", "i", "t"))
        counted = isinstance(run, Tensor) and isinstance(index, int) and index < len(run)
        times = self._once("times", run if counted else self.pipe.scheduler.timesteps, lambda x: [float(t) for t in x.tolist()])
        if counted and isinstance(t, Tensor):
            time = times[index]  # the list is on the CPU, t may not be
        elif isinstance(t, (Tensor, int, float)):
            time = float(t)
        else:
            noise = torch.as_tensor(noise_level(module, _time(given), self._train_steps))
            time = float(noise.reshape(-1)[0]) * self._train_steps
        levels = list(dict.fromkeys(times))
        step = min(range(len(levels)), key=lambda k: abs(levels[k] - time))
        if min(levels) < 0 or max(levels) > self._train_steps:  # schedulers of EDM count otherwise: by steps, then
            return 1 - step / len(levels), step
        return time / self._train_steps, step

    def _once(self, what: str, tensor: Tensor, numbers: Callable[[Tensor], Any]) -> Any:
        """Numbers of a tensor that stays the same during a run, read from its device once."""
        known = _NUMBERS.setdefault(self.pipe, {})
        if what not in known or known[what][0] is not tensor:
            known[what] = tensor, numbers(tensor)
        return known[what][1]

    def _grid(self, sample: Any, given: Mapping[str, Any]) -> Grid | None:
        """Sizes of the latent: an image `[B, C, H, W]`, a video `[B, C, F, H, W]`, or tokens and what is told beside them."""
        if isinstance(ids := given.get("img_ids"), Tensor):
            return self._once(
                "grid", ids, lambda ids: Grid(1, *(int(n) + 1 for n in ids.reshape(-1, ids.shape[-1])[:, 1:3].amax(0)))
            )
        if isinstance(shapes := given.get("img_shapes"), list):
            return Grid(*(shapes[0] if len(shapes[0]) == 3 else shapes[0][0]))
        if {"num_frames", "height", "width"} <= {*given}:
            return Grid(given["num_frames"], given["height"], given["width"])
        if not isinstance(sample, Tensor) or sample.ndim not in (4, 5):
            return None
        return Grid(*(1, *sample.shape[-2:]) if sample.ndim == 4 else sample.shape[-3:])

    def _branches(self, clock: str, call: Call, copies: int) -> tuple[Branch, ...]:
        """The halves of guidance in this call, one for each copy of the rows."""
        turn = _TURNS.setdefault(self.pipe, Turn())
        if turn.latents() is not call.latents:
            turn.latents, turn.calls = ref(call.latents), {}
        before = turn.calls.get(clock, 0)
        if not ASIDE.running:
            turn.calls[clock] = before + (1 if copies == 1 else 100)
        guider = getattr(self.pipe, "guider", None)
        if guider is not None and hasattr(guider, "is_conditional"):
            return ("cond" if guider.is_conditional else "uncond",) * copies
        if copies == 1:  # by turns: first with the prompt; what follows a stacked call repeats the prompt
            return ("uncond",) if before == 1 else ("cond",)
        layout = LAYOUTS.get(type(self.pipe).__name__, LAYOUTS["*"])
        if getattr(self.pipe, "do_perturbed_attention_guidance", False):
            layout = {2: ("cond", "cond"), 3: ("uncond", "cond", "cond")}
        return layout.get(copies, ("cond",) * copies)

    def _call(self) -> Call | None:
        """The running call of this pipeline; diffusers tells nobody, so the call stack has to."""
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_name == "__call__":
                names = frame.f_locals
                if names.get("self") is self.pipe or names.get("components") is self.pipe:
                    return Call(names)
            frame = frame.f_back  # type: ignore[assignment]
        return None

    def _asking(self) -> tuple[Branch, ...] | None:
        """Which prompt a text encoder reads: the one that is wanted, or the negative one."""
        frame, inner = sys._getframe(1), []
        while frame is not None:
            names = frame.f_locals if frame.f_code.co_varnames[:1] == ("self",) else {}
            if names.get("self") is self.pipe:
                if {"uncond_tokens", "uncond_input"} & {*names}:
                    return ("uncond",)
                if (prompt := names.get("prompt")) is not None:
                    inner.append(_texts(prompt))
                unwanted = [
                    _texts(v) for k, v in names.items() if k.startswith("negative_prompt") and isinstance(v, (str, list))
                ]
                if inner and inner[0] in unwanted:
                    return ("uncond",)
            frame = frame.f_back  # type: ignore[assignment]
        return ("cond",) if inner else None

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
            module = self.model.get_submodule(name)
            config = getattr(module, "config", {})
            sizes = {key: config[key] for key in IDENTITY if config.get(key) is not None}
            found[name] = {"class": type(module).__name__}
            found[name] |= {key: list(value) if isinstance(value, tuple) else value for key, value in sizes.items()}
        return found

    def weights_digest(self) -> str | None:
        return digest(self.model.get_submodule(self.denoisers[0]))


LAYOUTS: dict[str, dict[int, tuple[Branch, ...]]] = {
    "*": {2: ("uncond", "cond"), 3: ("cond", "uncond", "uncond")},
    "DiTPipeline": {2: ("cond", "uncond")},
    "LuminaPipeline": {2: ("cond", "uncond")},
    "ZImagePipeline": {2: ("cond", "uncond")},
    "StableCascadePriorPipeline": {2: ("cond", "uncond")},
    "StableCascadeDecoderPipeline": {2: ("cond", "uncond")},
    "WuerstchenPriorPipeline": {2: ("cond", "uncond")},
    "WuerstchenDecoderPipeline": {2: ("cond", "uncond")},
}
"""Pipelines that stack the halves of guidance in another order than most, by the number of copies; three: InstructPix2Pix."""


def _holder(pipe: Any) -> nn.Module:
    """The pipeline's modules as the children of one, the same for every session."""
    holder = _HOLDERS.get(pipe)
    if holder is None:
        holder = _HOLDERS[pipe] = nn.Module()
    holder._modules.clear()
    holder._modules.update({name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)})
    return holder


def _sample(given: Mapping[str, Any]) -> Any:
    return next(given[name] for name in SAMPLE if given.get(name) is not None)


def _time(given: Mapping[str, Any]) -> Any:
    return next(given[name] for name in TIMESTEP if given.get(name) is not None)


def _texts(prompt: Any) -> list[str]:
    return [prompt] if isinstance(prompt, str) else list(prompt)
