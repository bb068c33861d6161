"""Any `torch.nn.Module`: the user names the sites by module path, and every pass is a prompt."""

import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import FrameType
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from steerlib.errors import UnknownSite, nearest
from steerlib.hosts import Host
from steerlib.passes import StepState, TextPass, TracedPass
from steerlib.sites import Site

from .source import streams_of

SIDES: dict[str, Literal["input", "update", "output"]] = {".in": "input", ".update": "update", "": "output"}
"""The ending of a path -> the side."""
Entry = TypeVar("Entry")


class ModuleHost(Host):
    """A module whose outputs at the named paths are tokens `[B, N, D]`, or images `[B, D, ...]`."""

    has_progress = False

    def __init__(self, target: nn.Module):
        self.model = target

    def sites(self) -> dict[str, Site]:
        return {}

    def site(self, name: str) -> Site:
        path, _, which = name.partition(":")
        found = module_site(self.model, path)
        return replace(found, name=name, layout="BD...", **part_of(self.model.get_submodule(found.module), found.module, which))

    def clocks(self, site: Site) -> tuple[str, ...]:  # noqa: ARG002 - one clock for all
        return ("",)

    def state(self, clock: str, args: tuple, kwargs: dict[str, Any]) -> TextPass:  # noqa: ARG002
        first = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.ndim > 1), None)
        return TextPass(0 if first is None else first.shape[1], like=first)

    def traced_state(self, clock: str, args: tuple, kwargs: dict[str, Any]) -> StepState:
        plain = self.state(clock, args, kwargs)
        return TracedPass(plain.columns, plain.steps, None)

    def order(self, site: Site) -> tuple[int, ...]:
        return (list(dict(self.model.named_modules())).index(site.module),)

    def fingerprint(self) -> dict[str, Any]:
        return {"class": type(self.model).__name__}


def module_site(model: nn.Module, name: str, known: tuple[str, ...] = ()) -> Site:
    """The output of any module, by its path; a trailing `.in` means its input, `.update` what it adds to its input."""
    modules = dict(model.named_modules())
    for ending, side in SIDES.items():
        path = name.removesuffix(ending)
        if name.endswith(ending) and path and path in modules:
            return Site(name=name, module=path, side=side)
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


def arguments(module: nn.Module) -> tuple[str, ...]:
    """Names of what a module's forward takes."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
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
