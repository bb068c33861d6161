"""Sockets as hooks of diffusers' own, nearest to the module's forward.

Caches of diffusers skip whole blocks, and offloading moves their weights, by hooks on the same modules. A socket inside all of
them is skipped with its block and finds the weights in place, whichever came first; and it leaves without disturbing them,
which `HookRegistry.remove_hook` does not manage for any hook but the last.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from ..attach import Socket


class SocketHook(ModelHook):
    """Runs a socket around a module's forward."""

    def __init__(self, socket: Socket):
        super().__init__()
        self.socket = socket

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, and the socket on one side of it."""
        socket, forward = self.socket, self.fn_ref.original_forward
        if socket.site.side == "input":
            changed = socket.on_input(module, args, kwargs)
            args, kwargs = (args, kwargs) if changed is None else changed
            return forward(*args, **kwargs)
        output = forward(*args, **kwargs)
        if socket.site.side == "update":
            changed = socket.on_update(module, args, kwargs, output)
        else:
            changed = socket.on_output(module, args, output)
        return output if changed is None else changed


def plug(module: nn.Module, socket: Socket) -> Callable[[], None]:
    """Hook a socket to a module, inside all other hooks; gives back what removes it."""
    registry, name = HookRegistry.check_if_exists_or_initialize(module), f"steerlib/{socket.site.name}/{id(socket)}"
    outer = module.forward
    registry.register_hook(SocketHook(socket), name)
    own = module.forward
    if len(registry._hook_order) > 1:  # registered last, which is outermost: go to the other end
        module.forward = outer
        ref, first = registry._fn_refs.pop(), registry._fn_refs[0]
        ref.original_forward = _below(first)
        _put_below(first, own)
        registry._fn_refs.insert(0, ref)
        registry._hook_order.insert(0, registry._hook_order.pop())

    def undo() -> None:
        at = registry._hook_order.index(name)
        below = registry._fn_refs[at].original_forward
        if at + 1 < len(registry._fn_refs):
            _put_below(registry._fn_refs[at + 1], below)
        elif module.forward is own:
            module.forward = below
        elif getattr(module, "_old_forward", None) is own:  # accelerate offloads around it
            module._old_forward = below
        for kept in (registry._fn_refs, registry._hook_order):
            del kept[at]
        del registry.hooks[name]
        _tidy(module, registry)

    return undo


def _below(ref: Any) -> Callable[..., Any]:
    """What a hook of diffusers calls as the forward beneath it."""
    return ref.forward if ref.original_forward is None else ref.original_forward


def _put_below(ref: Any, forward: Callable[..., Any]) -> None:
    setattr(ref, "forward" if ref.original_forward is None else "original_forward", forward)


def _tidy(module: nn.Module, registry: HookRegistry) -> None:
    """Leave no trace where no other hook is left."""
    forward = module.__dict__.get("forward")
    if isinstance(forward, MethodType) and forward.__func__ is type(module).forward:
        del module.__dict__["forward"]
    if not registry.hooks and module.__dict__.get("_diffusers_hook") is registry:
        del module.__dict__["_diffusers_hook"]
