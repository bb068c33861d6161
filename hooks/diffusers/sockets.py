"""Sockets inside all hooks that diffusers and accelerate put on a module.

Caches of diffusers skip whole blocks, and offloading moves their weights, by hooks on the same modules. A socket inside all of
them is skipped with its block and finds the weights in place, whichever came first; and it leaves without disturbing them.
"""

from functools import update_wrapper
from types import MethodType
from typing import Any

from torch import nn

from ..attach import Socket
from ..copies import StandIn


class Plugged(StandIn):
    """A module's forward with a socket on one side of it, put where the module or its innermost hook keeps the forward."""

    def __init__(self, module: nn.Module, socket: Socket):
        self.module, self.socket = module, socket
        holder, name = _places(module)[-1]
        self.plain = getattr(holder, name)
        update_wrapper(self, self.plain, updated=())  # diffusers inspects the signature
        setattr(holder, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module, socket = self.module, self.socket
        if socket.site.side == "input":
            changed = socket.on_input(module, args, kwargs)
            args, kwargs = (args, kwargs) if changed is None else changed
            return self.plain(*args, **kwargs)
        output = self.plain(*args, **kwargs)
        is_update = socket.site.side == "update"
        changed = socket.on_update(module, args, kwargs, output) if is_update else socket.on_output(module, args, output)
        return output if changed is None else changed

    def remove(self) -> None:
        """Leave the module, and whatever hooks came meanwhile, as they would be without this one."""
        for holder, name in _places(self.module):
            if getattr(holder, name) is self:
                setattr(holder, name, self.plain)
        forward = vars(self.module).get("forward")
        if isinstance(forward, MethodType) and forward.__func__ is type(self.module).forward:
            del self.module.__dict__["forward"]


def _places(module: nn.Module) -> list[tuple[Any, str]]:
    """Where the forwards beneath each other are kept, as objects and names of attributes, the innermost last."""
    refs = getattr(vars(module).get("_diffusers_hook"), "_fn_refs", ())
    found: list[tuple[Any, str]] = [(module, name) for name in ("forward", "_old_forward") if hasattr(module, name)]
    found += [(ref, "forward" if ref.original_forward is None else "original_forward") for ref in reversed(refs)]
    for holder, name in found:  # which grows meanwhile
        if isinstance(inner := getattr(holder, name), Plugged):
            found.append((inner, "plain"))
    return found
