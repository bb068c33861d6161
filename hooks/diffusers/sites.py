"""Where things are in the components of a pipeline: named sites, and how each denoiser is asked about a time."""

import re
from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal, NamedTuple

from torch import nn

from steerlib.errors import UnknownSite, nearest
from steerlib.sites import Site

from ..modules import arguments
from ..transformers.sites import named_sites

LISTS = ("blocks", "transformer_blocks", "single_transformer_blocks", "layers", "visual_transformer_blocks")
LISTS += ("temporal_transformer_blocks", "joint_transformer_blocks", "noise_refiner", "context_refiner")
"""Names that denoisers of tokens give the lists of their blocks."""
UNET = re.compile(r"(down_blocks\.\d+|up_blocks\.\d+|mid_block)(\.(attentions|resnets)\.\d+)?(\.transformer_blocks\.\d+)?")
PARTS = re.compile(r"(?P<path>.+?)(:(?P<stream>image|text))?(\.heads(\.(?P<head>\d+))?)?(\.(?P<side>in|update))?")
ATTENTION = ("attn", "attn1", "attn2")
TEXTUAL = re.compile(r"\.attn2\.to_[kv]$|\.add_[qkv]_proj$|\.to_add_out$|context_refiner")
"""Modules whose tokens are those of the prompt."""
OLD = re.compile(r"^(text_encoder(?:_\d)?)\.text_model\.")
"""Paths of CLIP text encoders before transformers 5."""


class Streams(NamedTuple):
    """Where a block that works on image and text together has which, in the tuple it gives."""

    image: int
    text: int


TEXT_FIRST, IMAGE_FIRST = Streams(1, 0), Streams(0, 1)
STREAMS = {
    "AuraFlowJointTransformerBlock": TEXT_FIRST,
    "ChromaTransformerBlock": TEXT_FIRST,
}
"""Blocks that diffusers' own table does not know."""

TIMES: dict[str, Callable[[Any, int], Any]] = {}
"""How denoisers are told the noise level, where it is not the scheduler's timestep."""
for _name in ("AuraFlow", "Bria", "Chroma", "Flux", "Flux2", "HunyuanImage", "Krea2", "LongCatImage", "OvisImage", "QwenImage"):
    TIMES[f"{_name}Transformer2DModel"] = lambda t, _: t
for _name in ("Lumina2Transformer2DModel", "LuminaNextDiT2DModel", "ZImageTransformer2DModel"):
    TIMES[_name] = lambda t, _: 1 - t
TIMES["MochiTransformer3DModel"] = lambda t, n: 1 - t / n
VIDEO_AXES = {
    "CogVideoXTransformer3DModel": (1, 3, 4),
    "Kandinsky5Transformer3DModel": (1, 2, 3),
    "UNetSpatioTemporalConditionModel": (1, 3, 4),
}
"""Axes of frames, height and width of the video that a denoiser is given, where that is not `[B, C, F, H, W]`."""
DROPS_PADS = ("Lumina2Transformer2DModel",)
"""Denoisers that put each prompt's own tokens, without pads, in front of the image's."""


def noise_level(denoiser: nn.Module, time: Any, train_steps: int) -> Any:
    """From 1, pure noise, to 0, by what a denoiser was asked about."""
    return TIMES.get(type(denoiser).__name__, lambda t, n: t / n)(time, train_steps)


def video_axes(denoiser: nn.Module) -> tuple[int, int, int]:
    """Where frames, height and width of its video lie."""
    return VIDEO_AXES.get(type(denoiser).__name__, (2, 3, 4))


def is_split(denoiser: nn.Module) -> bool:
    """Whether each process has only a part of the tokens (diffusers' context parallelism)."""
    return getattr(getattr(denoiser, "_parallel_config", None), "context_parallel_config", None) is not None


def drops_pads(denoiser: nn.Module) -> bool:
    """Whether rows keep only the real tokens of their prompts in front of the image."""
    return type(denoiser).__name__ in DROPS_PADS


class PipelineSites:
    """The sites of a pipeline, by name: what blocks give, take and add; their attention and its heads; text encoders."""

    def __init__(self, model: nn.Module, denoisers: tuple[str, ...]):
        self.model, self.denoisers, self.parts = model, denoisers, [*model.children()]

    def _has(self, path: str) -> bool:
        """Whether a path leads to a module."""
        inside: nn.Module | None = self.model
        for name in path.split("."):
            inside = None if inside is None else inside._modules.get(name)
        return inside is not None

    @cached_property
    def named(self) -> dict[str, Site]:
        """Every site that has a name of its own; any module path is one too."""
        names: list[str] = []
        for name in self.denoisers:
            names += [f"{name}.{path}{ending}" for path in self._blocks(name) for ending in self._endings(f"{name}.{path}")]
        for name, part in self.model.named_children():
            if name not in self.denoisers and hasattr(part, "decode"):
                names += [f"{name}.{path}" for path in self._stages(part)]
        return {**{name: self.find(name) for name in names}, **self._texts}

    @cached_property
    def _texts(self) -> dict[str, Site]:
        """Sites of text encoders, named as in any transformers model behind the component's name."""
        found: dict[str, Site] = {}
        for name, part in self.model.named_children():
            if type(part).__module__.startswith("transformers.") and "text_encoder" in name:
                for inner, site in named_sites(part).items():
                    full = {**vars(site), "name": f"{name}.{inner}", "module": f"{name}.{site.module}"}
                    found[f"{name}.{inner}"] = Site(**full)
        return found

    def find(self, name: str) -> Site:
        """A site by its name or path; raises `UnknownSite` with the nearest."""
        if "text_encoder" in name and name in self._texts:
            return self._texts[name]
        match = PARTS.fullmatch(name)
        path = match["path"] if match else name
        if not self._has(path):
            path = next((p for p in (OLD.sub(r"\1.", path), OLD.sub(r"\1.text_model.", path)) if self._has(p)), path)
        if match is None or not path or not self._has(path):
            raise UnknownSite(
                f"the pipeline has no site {name!r}; name one, or any module path whose output is an image [rows, channels, …] "
                f"or tokens [rows, tokens, width]: {nearest(name, self.named, filter(None, dict(self.model.named_modules())))}"
            )
        stream: Literal["image", "text"] = match["stream"] or "image"  # type: ignore[assignment]
        if ".heads" in name:
            return self._heads(name, path, stream, match["head"])
        streams, side = self._streams(path), match["side"] or "output"
        if match["stream"] and streams is None:
            raise UnknownSite(f"{path!r} gives one stream, not image and text apart; leave out ':{stream}'")
        return Site(
            name=name,
            module=path,
            side={"in": "input"}.get(side, side),  # type: ignore[arg-type]
            element=getattr(streams, stream) if streams else 0,
            layout="BD...",
            argument=_argument(self.model.get_submodule(path), stream),
            reads_text=stream == "text" or TEXTUAL.search(path) is not None,
        )

    def _streams(self, path: str) -> Streams | None:
        """Where a tuple holds image and text; the attention of a block on both gives the image first in any case."""
        block, _, part = path.rpartition(".")
        if part == "attn" and _streams(self.model.get_submodule(block)):
            return IMAGE_FIRST
        return _streams(self.model.get_submodule(path))

    def _heads(self, name: str, path: str, stream: str, head: str | None) -> Site:
        """What one head, or all, hand to the projection of the output."""
        where = f"{path}.to_add_out" if stream == "text" else f"{path}.to_out.0"
        attention: Any = self.model.get_submodule(path)
        if not self._has(where) or not hasattr(attention, "heads"):
            raise UnknownSite(f"{path!r} has no heads that {where.rpartition('.')[2]!r} joins; name its parts by module path")
        width = self.model.get_submodule(where).in_features // attention.heads  # type: ignore[operator]
        if head is not None and int(head) >= attention.heads:
            raise UnknownSite(f"{path!r} has {attention.heads} heads, counted from 0, got {head}")
        columns = None if head is None else (int(head) * width, (int(head) + 1) * width)
        return Site(name=name, module=where, side="input", columns=columns, reads_text=stream == "text")

    def _blocks(self, component: str) -> list[str]:
        """Paths of a denoiser's blocks, inside it, in the order of a pass."""
        part = self.model.get_submodule(component)
        found = [path for path, _ in part.named_modules() if UNET.fullmatch(path)]
        for name in LISTS:
            blocks = getattr(part, name, None)
            found += [f"{name}.{i}" for i in range(len(blocks))] if isinstance(blocks, nn.ModuleList) else []
        return sorted(found, key=lambda path: self.order(Site(name=path, module=f"{component}.{path}")))

    def _endings(self, path: str) -> list[str]:
        """What can follow a block's path."""
        module = self.model.get_submodule(path)
        whole = [""] if self._streams(path) is None else [":image", ":text"]
        ways = ("", ".update") if _keeps_shape(path, module) else ("",)
        found = [f"{stream}{side}" for stream in whole for side in ways]
        for name in ATTENTION:
            attention = getattr(module, name, None)
            if attention is not None:
                found.append(f".{name}")
                if hasattr(attention, "heads") and self._has(f"{path}.{name}.to_out.0"):
                    found += [f".{name}.heads", *(f".{name}.heads.{h}" for h in range(attention.heads))]
        return found

    def _stages(self, autoencoder: nn.Module) -> list[str]:
        """Where an autoencoder can be looked at: its two halves and their blocks."""
        found = []
        for half in ("encoder", "decoder"):
            for path, _ in autoencoder.named_modules():
                if re.fullmatch(rf"{half}(\.(mid_block|(down|up)_blocks\.\d+))?", path):
                    found += [path, *([f"{path}.in"] if path == half else [])]
        return found

    def order(self, site: Site) -> tuple[int, ...]:
        """Text encoders, denoisers, autoencoders; inside each the way down, the middle, the way up; then by number."""
        component, _, path = site.module.partition(".")
        rank = 1 if component in self.denoisers else 0 if "text" in component or "image" in component else 2
        names = [*dict(self.model.named_children())]
        stage = 0 if path.startswith(("down", "encoder")) else 1 if path.startswith("mid") else 2
        listed = next((k for k, name in enumerate(LISTS) if path.startswith(f"{name}.")), 0)
        numbers = [int(n) if n.isdigit() else PLACES.get(n, 0) for n in path.split(".")[1:]]
        return rank, names.index(component) if component in names else 0, stage, listed, *numbers


PLACES = {"resnets": 1, "attentions": 1, "attn": 1, "attn1": 1, "attn2": 2, "ff": 3}
"""Parts of a block in the order in which it runs them."""


def _keeps_shape(path: str, module: Any) -> bool:
    """Whether what a block gives can be compared with what it is given."""
    if re.search(r"(down|up)_blocks\.\d+$", path):
        return False
    return getattr(module, "in_channels", None) == getattr(module, "out_channels", None) or ".resnets." not in path


def _streams(module: nn.Module) -> Streams | None:
    """Where a block's tuple holds image and text; None for a block that gives one stream."""
    name = type(module).__name__
    if name in STREAMS:
        return STREAMS[name]
    from diffusers.hooks._helpers import TransformerBlockRegistry

    try:
        known = TransformerBlockRegistry.get(type(module))
    except ValueError:
        return None
    image, text = known.return_hidden_states_index, known.return_encoder_hidden_states_index
    return None if image is None or text is None else Streams(image, text)


def _argument(module: nn.Module, stream: str) -> str | None:
    """What a block calls the stream it is given."""
    wanted = ("encoder_hidden_states",) if stream == "text" else ("hidden_states", "x")
    return next((name for name in wanted if name in arguments(module)), None)
