"""Any `torch.nn.Module`: the user names the sites by module path, and every pass is a prompt."""

import hashlib
import inspect
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from steerlib.errors import UnknownSite, nearest
from steerlib.hosts import Host
from steerlib.passes import StepState, TextPass, TracedPass
from steerlib.sites import Site

SIDES: dict[str, Literal["input", "update", "output"]] = {".in": "input", ".update": "update", "": "output"}
"""What a path's ending says of the side."""


class ModuleHost(Host):
    """A module whose outputs at the named paths are tokens `[B, N, D]`, or images `[B, D, ...]`."""

    has_progress = False

    def __init__(self, target: nn.Module):
        self.model = target

    def sites(self) -> dict[str, Site]:
        return {}

    def site(self, name: str) -> Site:
        return replace(module_site(self.model, name), layout="BD...")

    def clocks(self, site: Site) -> tuple[str, ...]:  # noqa: ARG002 - one clock for all
        return ("",)

    def state(self, clock: str, args: tuple, kwargs: dict[str, Any]) -> StepState:  # noqa: ARG002
        first = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.ndim > 1), None)
        return TextPass(0 if first is None else first.shape[1], like=first)

    def traced_state(self, clock: str, args: tuple, kwargs: dict[str, Any]) -> StepState:
        plain = self.state(clock, args, kwargs)
        return TracedPass(plain.columns, plain.steps, None)

    def order(self, site: Site) -> tuple[int, ...]:
        return (list(dict(self.model.named_modules())).index(site.module),)

    def fingerprint(self) -> dict[str, Any]:
        return {"class": type(self.model).__name__}

    def weights_digest(self) -> str | None:
        return digest(self.model)


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


def digest(model: nn.Module, values: int = 16) -> str | None:
    """A hash over evenly spaced values of every parameter, at bfloat16 precision so that loading in half precision
    does not change it. None for weights that are elsewhere, packed, or wrapped by adapters."""
    parameters = sorted(model.named_parameters())
    if any(p.is_meta or not p.is_floating_point() or "lora_" in name for name, p in parameters):
        return None
    sha = hashlib.sha256()
    for name, p in parameters:
        flat = p.detach().reshape(-1)
        chosen = flat[torch.arange(values, device=p.device) * (len(flat) - 1) // (values - 1)]
        sha.update(name.encode() + chosen.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes())
    return sha.hexdigest()


def arguments(module: nn.Module) -> tuple[str, ...]:
    """Names of what a module's forward takes."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount] if code else ()
