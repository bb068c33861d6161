"""Modules that are put into a model while it is steered, such as adapters around hooked ones, or taken out of it again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

Link = tuple[dict[str, Any], str, Any]
"""A table of children, a name, and the child of that name when it was looked up."""


def links(model: nn.Module, path: str) -> Iterator[Link]:
    """The steps from a model along a path, as far as it leads."""
    now: Any = model
    for name in filter(None, path.split(".")):
        if (child := now._modules.get(name)) is None:
            return
        yield now._modules, name, child
        now = child


def in_place_of(module: nn.Module, model: nn.Module, path: str) -> nn.Module | None:
    """What stands at a path in place of a module: a wrapper around it, or what it was a wrapper of; the module itself where the
    path does not lead there any more and the model still has it. None: another one."""
    steps = [*links(model, path)]
    if len(steps) < len([*filter(None, path.split("."))]):
        return module if module in [*model.modules()] else None
    now = steps[-1][2] if steps else model
    if now is module or now in [*module.modules()] or (module in [*now.modules()] and not hasattr(now, "_orig_mod")):
        return now
    return None
