"""Where the named sites of a pipeline are: in denoisers, text encoders and autoencoders."""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import nn

from steerlib.errors import UnknownSite, nearest
from steerlib.sites import Site

from ..modules import arguments, part_of
from ..source import streams_of
from ..transformers.sites import named_sites
from .families import Denoiser

UNET = re.compile(r"(down_blocks\.\d+|up_blocks\.\d+|mid_block)(\.(attentions|resnets)\.\d+)?(\.transformer_blocks\.\d+)?")
PARTS = re.compile(
    r"(?P<path>.+?)(:(?P<stream>image|text|\d+))?(\.heads(\.(?P<head>\d+))?)?(\.(?P<side>in|update))?(?P<mean>\.mean)?"
)
ATTENTION = ("attn", "attn1", "attn2")
TEXTUAL = re.compile(r"\.attn2\.to_[kv]$|\.add_[qkv]_proj$|\.to_add_out$|context_refiner")
"""Modules whose tokens are those of the prompt."""
OLD = re.compile(r"^(text_encoder(?:_\d)?)\.text_model\.")
"""Paths of CLIP text encoders before transformers 5."""


class PipelineSites:
    """The sites of a pipeline, by name: what blocks give, take and add; their attention and its heads; text encoders."""

    def __init__(self, model: nn.Module, denoisers: Mapping[str, Denoiser]):
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
        found: list[Site] = []
        for name, part in self.model.named_children():
            if type(part).__module__.startswith("transformers.") and "text_encoder" in name:
                inside = named_sites(part).values()
                found += [replace(site, name=f"{name}.{site.name}", module=f"{name}.{site.module}") for site in inside]
        return {site.name: site for site in found}

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
        stream, side, module = match["stream"] or "", match["side"] or "output", self.model.get_submodule(path)
        part, streams = part_of(module, path, stream), streams_of(module)
        reads_text = TEXTUAL.search(path) is not None or (streams is not None and part["element"] == streams.text is not None)
        if match["mean"] and (".heads" in name or reads_text or path.partition(".")[0] not in self.denoisers):
            raise UnknownSite(f"{name!r}: only the tokens of an image that a denoiser works on have a mean; leave out '.mean'")
        if ".heads" in name:
            return self._heads(name, path, stream, match["head"])
        return Site(
            name=name,
            module=path,
            side={"in": "input"}.get(side, side),  # type: ignore[arg-type]
            layout="BD...",
            argument=_argument(module, stream),
            listed=path in self.denoisers,
            reads_text=reads_text,
            mean=match["mean"] is not None,
            **part,
        )

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
        for name in self.denoisers[component].lists:
            blocks = getattr(part, name, None)
            found += [f"{name}.{i}" for i in range(len(blocks))] if isinstance(blocks, nn.ModuleList) else []
        return sorted(found, key=lambda path: self.order(Site(name=path, module=f"{component}.{path}")))

    def _endings(self, path: str) -> list[str]:
        """What can follow a block's path."""
        module = self.model.get_submodule(path)
        streams = streams_of(module)
        apart = streams is not None and streams.always and None not in (streams.image, streams.text)
        whole = [":image", ":text"] if apart else [""]
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
        """Paths of an autoencoder's two halves and of their blocks."""
        stages, whole = r"(encoder|decoder)(\.(mid_block|(down|up)_blocks\.\d+))?", ("encoder", "decoder")
        found = [path for path, _ in autoencoder.named_modules() if re.fullmatch(stages, path)]
        return [f"{path}{ending}" for path in found for ending in (("", ".in") if path in whole else ("",))]

    def order(self, site: Site) -> tuple[int, ...]:
        """Text encoders, denoisers, autoencoders; inside each the way down, the middle, the way up; then by number."""
        component, _, path = site.module.partition(".")
        facts = self.denoisers.get(component)
        rank = 1 if facts else 0 if "text" in component or "image" in component else 2
        names = [*dict(self.model.named_children())]
        stage = 0 if path.startswith(("down", "encoder")) else 1 if path.startswith("mid") else 2
        listed = next((k for k, name in enumerate(facts.lists if facts else ()) if path.startswith(f"{name}.")), 0)
        numbers = [int(n) if n.isdigit() else PLACES.get(n, 0) for n in path.split(".")[1:]]
        return rank, names.index(component) if component in names else 0, stage, listed, *numbers


PLACES = {"resnets": 1, "attentions": 1, "attn": 1, "attn1": 1, "attn2": 2, "ff": 3}
"""Parts of a block in the order in which it runs them."""


def _keeps_shape(path: str, module: Any) -> bool:
    """Whether what a block gives can be compared with what it is given."""
    if re.search(r"(down|up)_blocks\.\d+$", path):
        return False
    return getattr(module, "in_channels", None) == getattr(module, "out_channels", None) or ".resnets." not in path


def _argument(module: nn.Module, stream: str) -> str | None:
    """What a block calls the stream it is given."""
    wanted = ("encoder_hidden_states",) if stream == "text" else ("hidden_states", "x")
    return next((name for name in wanted if name in arguments(module)), None)
