"""Copies and pickles of a hooked module are what they would be without steerlib."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from types import MethodType
from typing import Any

from torch import nn


class Ours:
    """What steerlib hooks to modules."""


class StandIn:
    """What takes the place of a method of one module; `plain` is that method, and what a copy gets."""

    plain: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return deepcopy(self.plain, memo)


class Hidden:
    """The `__reduce_ex__` of a hooked module: its copies and pickles are what they would be without steerlib."""

    def __init__(self, module: nn.Module):
        self.module, self.users, self.forward = module, 0, MethodType(type(module).forward, module)
        # torch compiles anew what it compiled before: it looks whether a module has a forward of its own, not at hooks
        vars(module).setdefault("forward", self.forward)

    def __call__(self, protocol: Any) -> Any:
        """What `copy` and `pickle` make the module anew from."""
        made = type(self.module).__reduce_ex__(self.module, protocol)
        if not isinstance(made, tuple) or len(made) < 3 or not isinstance(made[2], dict):
            return made
        state = {name: _plain(value) for name, value in made[2].items() if value is not self}
        state = {name: value for name, value in state.items() if not self._is_given(name, value)}
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            ours = [k for k, hook in state.get(name, {}).items() if isinstance(getattr(hook, "__self__", None), Ours)]
            for table in (name, f"{name}_with_kwargs", f"{name}_always_called") if ours else ():
                if (hooks := state.get(table)) is not None:
                    state[table] = type(hooks)((k, hook) for k, hook in hooks.items() if k not in ours)
        return (*made[:2], state, *made[3:])

    def _is_given(self, name: str, value: Any) -> bool:
        """Whether an attribute is the method that its class gives the module anyway."""
        mine, given = self.module, getattr(type(self.module), name, None)
        return isinstance(value, MethodType) and value.__self__ is mine and value.__func__ is given

    def leave(self) -> None:
        """One who hooked the module is gone."""
        self.users -= 1
        if not self.users:
            own = vars(self.module)
            own.pop("__reduce_ex__", None)
            if own.get("forward") is self.forward:
                del own["forward"]


def hide(module: nn.Module) -> Callable[[], None]:
    """Keep what is hooked to a module out of its copies and pickles. Returns what undoes it."""
    if (hidden := vars(module).get("__reduce_ex__")) is None:
        hidden = vars(module)["__reduce_ex__"] = Hidden(module)
    hidden.users += 1
    return hidden.leave


def _plain(value: Any) -> Any:
    while isinstance(value, StandIn):
        value = value.plain
    return value
