"""Any `torch.nn.Module`: the user names the sites by module path, and every pass is a prompt."""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import Any, Literal, TypeVar, cast

import torch
from torch import nn

from steerlib.errors import UnknownSite, nearest
from steerlib.hosts import Host
from steerlib.passes import StepState, TextPass, TracedPass
from steerlib.sites import LAYOUTS, SAY, Layout, Site

from .source import streams_of

SIDES: dict[str, Literal["input", "update", "output"]] = {".in": "input", ".update": "update", "": "output"}
"""The ending of a path -> the side."""
Entry = TypeVar("Entry")
CHANNELS_FIRST = ("_ConvNd", "_NormBase", "GroupNorm", "LocalResponseNorm", "Upsample", "PixelShuffle", "PixelUnshuffle") + (
    "_MaxPoolNd", "_AvgPoolNd", "_LPPoolNd", "_AdaptiveAvgPoolNd", "_AdaptiveMaxPoolNd",
)  # fmt: skip
CHANNELS_LAST = ("Linear", "LayerNorm", "RMSNorm", "Embedding", "Bilinear")
DECLARED: dict[str, Layout] = {**{name: "BDN" for name in CHANNELS_FIRST}, **{name: "B...D" for name in CHANNELS_LAST}}
"""Axes of what torch's own classes give, and those that inherit from them."""


class ModuleHost(Host):
    """A module whose outputs at the named paths are tokens `[B, N, D]`, images `[B, D, ...]`, or what a user says they are."""

    has_progress = False

    def __init__(self, target: nn.Module):
        self.model = target

    def sites(self) -> dict[str, Site]:
        return {}

    def site(self, name: str) -> Site:
        path, _, said = name.partition(":")
        which = "" if said in LAYOUTS else said
        found = module_site(self.model, path if which else name, layout=partial(layout_at, self.model))
        return replace(found, name=name, **part_of(self.model.get_submodule(found.module), found.module, which))

    def clocks(self, site: Site) -> tuple[str, ...]:  # noqa: ARG002 - one clock for all
        return ("",)

    def state(self, clock: str, args: tuple, kwargs: dict[str, Any]) -> TextPass:  # noqa: ARG002
        return beside_text(args, kwargs)

    def traced_state(self, clock: str, args: tuple, kwargs: dict[str, Any]) -> StepState:  # noqa: ARG002
        return traced_beside_text(args, kwargs)

    def order(self, site: Site) -> tuple[int, ...]:
        return (list(dict(self.model.named_modules())).index(site.module),)

    def fingerprint(self) -> dict[str, Any]:
        return {"class": type(self.model).__name__}


def beside_text(args: tuple, kwargs: Mapping[str, Any]) -> TextPass:
    """A pass of a module that counts no tokens of text: each site in it has as many as there are."""
    return TextPass(0, like=next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.ndim > 1), None))


def traced_beside_text(args: tuple, kwargs: Mapping[str, Any]) -> TracedPass:
    """The same in tensors alone; there the tokens are those of the first input."""
    first = beside_text(args, kwargs).like
    plain = TextPass(0 if first is None else first.shape[1], like=first)
    return TracedPass(plain.columns, plain.steps, None)


def module_site(
    model: nn.Module, name: str, known: tuple[str, ...] = (), layout: Callable[[str, str], Layout] | None = None
) -> Site:
    """The output of any module, by its path; a trailing `.in` means its input, `.update` what it adds to its input, and a
    suffix such as `:NBD` its layout, for which `layout(path, side)` is asked otherwise."""
    modules = dict(model.named_modules())
    where, _, said = name.partition(":")
    for ending, side in SIDES.items():
        path = where.removesuffix(ending)
        if where.endswith(ending) and path and path in modules and (not said or said in LAYOUTS):
            axes = cast(Layout, said) or (layout(path, side) if layout else "BND")
            return Site(name=name, module=path, side=side, layout=axes)
    raise UnknownSite(
        f"{type(model).__name__} has no site {name!r}; name one, or any module path whose output is [rows, tokens, width]: "
        f"{nearest(name, known or filter(None, modules), filter(None, modules))}"
    )


def part_of(module: nn.Module, path: str, which: str) -> dict[str, Any]:
    """The fields of a site that say which tensor of a tuple it is: "image", "text", a place, or "" for the stream there is.

    Raises `UnknownSite` where the module's source shows no such one.
    """
    streams = streams_of(module)
    if which.isdecimal():
        return {"element": int(which), "apart": True}
    found = streams and (streams.text if which == "text" else streams.image)
    if which and (which not in ("image", "text") or found is None):
        raise UnknownSite(
            f"{path!r} gives one stream as far as its source shows, not {which!r} apart; leave out ':{which}', or name the "
            f"place in its tuple, as in '{path}:0'"
        )
    return {"element": found, "apart": bool(which)}


def layout_of(module: nn.Module, side: str) -> Layout:
    """Axes at one side of a module, as far as its class tells: torch's own does, and a sequence begins and ends in one."""
    if isinstance(module, nn.Sequential):
        children = module if side == "input" else reversed(module)
        return next((axes for child in children if (axes := layout_of(child, side)) != "?"), "?")
    if (order := rows_first(module)) is not None:
        return "BND" if order else "NBD"
    return next((DECLARED[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in DECLARED), "?")


def layout_at(model: nn.Module, path: str, side: str) -> Layout:
    """Axes at one side of the module at a path; inside torch's own blocks, rows are where these have them. Raises `UnknownSite`
    beside blocks that have rows second, since nothing tells where it leaves them itself."""
    steps = path.split(".")
    inside = [model.get_submodule(".".join(steps[:n])) for n in range(len(steps) + 1)]
    axes = layout_of(inside[-1], side)
    if axes in ("BDN", "NBD", "BND"):
        return axes
    orders = [order for module in inside if (order := rows_first(module)) is not None]
    if orders:
        return axes if orders[-1] else "NBD"
    if any(rows_first(module) is False for module in model.modules()):
        raise UnknownSite(f"{path!r} lies in a model with modules of batch_first=False, and nothing tells its axes; {SAY}")
    return axes


def rows_first(module: nn.Module) -> bool | None:
    """Whether a recurrent or attending block of torch has rows first; None for any other module."""
    if isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)):
        return rows_first(module.layers[0])
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        return rows_first(module.self_attn)
    return bool(module.batch_first) if isinstance(module, (nn.RNNBase, nn.MultiheadAttention, nn.Transformer)) else None


def arguments(module: nn.Module) -> tuple[str, ...]:
    """Names of what a module's forward takes."""
    return taken_by(type(module).forward)


def taken_by(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of what a forward takes."""
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount] if code else ()


def named(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, also those given by place."""
    return {**dict(zip(arguments(module)[1:], args, strict=False)), **kwargs}


def frames() -> Iterator[FrameType]:
    """The calls that lead here, the innermost first: what a library does not pass on is read off its local variables."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def entry_of(table: Mapping[str, Entry], thing: object, default: Entry) -> Entry:
    """A registry's entry for the class of a thing, by name, or for the nearest class that it inherits from."""
    return next((table[cls.__name__] for cls in type(thing).__mro__ if cls.__name__ in table), default)
