"""Register and remove: the only file that touches a module's hooks.

A *socket* is a permanent hook at one site; what it does is a program that can be swapped without touching the hook. A
*clock* is a hook on the module whose arguments show where the pass stands. Both are removed when the last user detaches.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling

from steerlib.contexts import ENTERED
from steerlib.errors import CompiledModel, Unanswerable, UnknownSite, WrongWidth
from steerlib.hosts import Host
from steerlib.passes import DenoisingPass, StepState, TextPass
from steerlib.sites import Site

from .changes import Link, in_place_of, links
from .checkpoints import Act, backward_now, is_repeated, steered
from .copies import Ours, hide
from .modules import arguments
from .parallel import why_split


class Moment(threading.local):
    """Where the pass of this thread stands at a group of sites, and the path of the clock that ticked last."""

    state: StepState | None = None
    clock: str | None = None
    task: int = -1
    """The backward pass in which the model was called; -1: in none."""


class Aside(threading.local):
    """Whether this thread is running a pass on the side, such as an unsteered twin, which is neither edited nor observed."""

    running: bool = False


ASIDE = Aside()


class Clock(Ours):
    """A pre-hook that reads where the pass stands."""

    def __init__(self, host: Host, path: str):
        self.path, self.host = path, host
        self.moments: list[Moment] = []
        self.outer: set[str] = set()
        """Paths of the clocks around this one. If one of them ticked last, its answer stands."""
        self.traced: Any = None
        self.passes: dict[Any, int] = defaultdict(int)  # which counts faster than a Counter
        """Passes so far, by what was entered in their context."""
        self.links: tuple[Link, ...] = ()
        """The steps to the modules of its sockets."""
        self.follow: Callable[[], None] = lambda: None
        """Called where one of them leads elsewhere now."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Clock:  # noqa: ARG002
        """Deep copies carry no sessions."""
        return Clock(self.host, self.path)

    def on_call(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        """A forward pre-hook. Every microsecond here is paid at every token."""
        if is_compiling():
            self.traced = self.host.traced_state(self.path, args, kwargs)
            return
        if (task := backward_now()) != -1 and is_repeated():
            return
        for table, name, child in self.links:
            if table.get(name) is not child:
                self.follow()
                break
        entered = ENTERED.get()
        self.passes[entered] += 1
        state = None
        for moment in self.moments:
            if not self.outer or moment.clock not in self.outer:
                if state is None:
                    state = self.host.state(self.path, args, kwargs)
                    state.learns = is_grad_enabled() or (state.like is not None and state.like.requires_grad)
                moment.state, moment.task = state, task
            moment.clock = self.path
        if type(state) is DenoisingPass:  # blocks may be compiled where what calls them is not
            self.traced = state.into_tensors(self.traced)


class Socket(Ours):
    """A hook at one site whose contents can be swapped while it stays.

    Attributes:
        module: what it is hooked to; owners: who acts here, in the order of coming.
        edit: what all of them do; None: nothing.
        traced: what compiled code runs: its contents are tensors changed in place.
    """

    def __init__(self, model: nn.Module, site: Site, clocks: tuple[Clock, ...], moment: Moment):
        self.model, self.site, self.clocks, self.moment = model, site, clocks, moment
        self.is_plain, self.module = site.is_plain, modules_on(model, site.module)[-1]
        self.key, self.is_in_stream = (model, site.name), ".layers." in f".{site.name}"
        self.owners: list[Any] = []
        self.edit: Any = None
        self.traced: Act | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Socket:  # noqa: ARG002
        """Deep copies carry no sessions."""
        return type(self)(self.model, self.site, self.clocks, self.moment)

    @property
    def turn(self) -> tuple[bool, bool]:
        """When it comes at its module: an output includes what was done to the update, and a mean what was done to tokens."""
        return self.site.side == "output", self.site.mean

    def on_output(self, module: nn.Module, args: tuple, output: Any) -> Any:  # noqa: ARG002 - torch's signature
        """A forward hook. Every microsecond here is paid at every site of every token."""
        edit = None if (compiling := is_compiling()) else self.edit  # compiled code must not depend on what is edited
        if edit is None and not compiling:
            return None
        if self.is_plain and type(output) is Tensor and output.ndim == 3:
            return self._act(edit, output)
        x = self._read(output)
        y = self._act(edit, x) if self.site.layout != "ND" else self._act_by_rows(edit, x)
        return None if y is x else self.site.write(output, y)

    def on_update(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """A forward hook of a block: the tensor is its output minus its input."""
        edit = None if (compiling := is_compiling()) else self.edit
        if edit is None and not compiling:
            return None
        whole, before = self._read(output), self.site.read(self._given(module, args, kwargs)[1])
        if before.shape != whole.shape:
            raise WrongWidth(
                f"site {self.site.name!r}: {self.site.module!r} is given {tuple(before.shape)} and gives {tuple(whole.shape)}; "
                "it does not add to its input, so steer its output"
            )
        x = whole - before
        y = self._act(edit, x)
        return None if y is x else self.site.write(output, whole + (y - x))

    def _read(self, output: Any) -> Tensor:
        """The site's tensor in what its module gives."""
        if self.site.apart and isinstance(output, Tensor):
            raise WrongWidth(
                f"site {self.site.name!r}: {self.site.module!r} gives one tensor here, not several; leave out "
                f"':{self.site.name.rpartition(':')[2]}'"
            )
        return self.site.read(output)

    def on_input(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A forward pre-hook on one argument."""
        edit = None if (compiling := is_compiling()) else self.edit
        if edit is None and not compiling:
            return None
        at, value = self._given(module, args, kwargs)
        x = self.site.read(value)
        y = self._act(edit, x) if self.site.layout != "ND" else self._act_by_rows(edit, x)
        value = value if y is x else self.site.write(value, y)
        return ((*args[:at], value, *args[at + 1 :]), kwargs) if isinstance(at, int) else (args, {**kwargs, at: value})

    def _given(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[int | str, Any]:
        """Place and value of the input: by its name; else the first positional argument, or the first keyword with a tensor."""
        name = self.site.argument
        if name in kwargs:
            return name, kwargs[name]
        if name is None and not args:
            if (found := next((n for n, value in kwargs.items() if isinstance(value, Tensor)), None)) is None:
                raise WrongWidth(f"site {self.site.name!r}: {self.site.module!r} is given no tensor; name a module that is")
            return found, kwargs[found]
        at = 0 if name is None else arguments(module).index(name) - 1
        return at, args[at]

    def _act(self, edit: Act | None, x: Tensor) -> Tensor:
        """What an edit makes of `x[B, N, D]`; None: what compiled code runs instead."""
        if edit is None:
            return self._traced(x)
        state = self.moment.state
        if state is None:  # called by hand, outside the model's own forward
            state = TextPass(x.shape[1], like=x)
            learns = True
        else:
            learns = state.learns
            if state.length != (length := x.shape[1]):
                state = state.beside(length) if self.is_in_stream and length > state.length else state.at(length)
        if (learns or is_grad_enabled()) and not is_compiling():  # a function around the model may be
            return steered(self.key, edit, x, state, self.moment.task)
        return edit(x, state)

    def _act_by_rows(self, edit: Act | None, x: Tensor) -> Tensor:
        """`_act` on `x[1, B * N, D]`, the tokens of all rows one after the other, where the pass tells rows and tokens."""
        state = self.moment.state
        if edit is None:
            raise CompiledModel(f"site {self.site.name!r} has no axis of rows, which compiled code needs; do not compile it")
        if backward_now() != -1:
            return steered(self.key, edit, x, state or TextPass(x.shape[1], like=x), self.moment.task, has_rows=False)
        if state is None or not state.length or state.like is None:
            return self._act(edit, x)
        rows = len(state.like)
        if rows * state.length != x.shape[1]:
            raise WrongWidth(
                f"site {self.site.name!r} gives {x.shape[1]} tokens, and the pass has {rows} rows of {state.length}: some are "
                "missing, and nothing tells which; steer a module that gives them all"
            )
        return self._act(edit, x.unflatten(1, (rows, -1))[0]).flatten(0, 1)[None]

    def _traced(self, x: Tensor) -> Tensor:
        state = next((clock.traced for clock in reversed(self.clocks) if clock.traced is not None), None)
        if self.traced is None or state is None:
            raise CompiledModel(
                f"site {self.site.name!r} is being compiled with a passing steer(); call "
                "steering = sl.attach(model, bank) first, then compile, then steering.set(...)"
            )
        return self.traced(x, state.at(x.shape[1]))


class MeanSocket(Socket):
    """One whose contents act on the mean of the tokens, `[B, 1, D]`: what they add to it is added to every token."""

    def _act(self, edit: Act | None, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        y = super()._act(edit, mean)
        return x if y is mean else x + (y - mean)


class Attachment:
    """All sockets and clocks of one model, shared by every session that steers or records it."""

    def __init__(self, host: Host):
        self.model = host.model
        self.sockets: dict[str, Socket] = {}
        self.clocks: dict[str, Clock] = {}
        self.present: list[Any] = []
        """Who was entered here."""
        self.kin: list[Attachment] = [self]
        """Attachments of models and pipelines that share modules, this among them."""
        self._uses: Counter[str] = Counter()
        self._moments: dict[tuple[str, ...], Moment] = {}
        self._undo: dict[str, Callable[[], None]] = {}

    def require(self, host: Host, sites: Iterable[Site]) -> None:
        """Put a socket at every site: at all of them, or, if one fails, at none."""
        with ExitStack() as stack:
            for site in sites:
                stack.callback(self.release, host, [site])
                self._uses[site.name] += 1
                if site.name not in self.sockets:
                    self._plug(host, site)
            stack.pop_all()
        self._link()

    def release(self, host: Host, sites: Iterable[Site]) -> None:
        """Remove the sockets and clocks that no session needs any more, and after the last one everything else."""
        for site in sites:
            if site.name in self._uses:  # else all was cleared meanwhile
                self._uses[site.name] -= 1
            if not self._uses[site.name]:
                del self._uses[site.name]
                if self.sockets.pop(site.name, None) is not None:
                    self._undo.pop(f"site {site.name}")()
        needed = {path for socket in self.sockets.values() for path in host.clocks(socket.site)}
        for path in self.clocks.keys() - needed:
            del self.clocks[path]
            self._undo.pop(f"clock {path}")()
            self._moments = {paths: moment for paths, moment in self._moments.items() if path not in paths}
        if not self.sockets:
            self._undo.pop("watch", lambda: None)()
            if not self.present:
                self._forget()

    def clear(self) -> None:
        """Remove whatever is here, whoever needs it."""
        for undo in reversed(self._undo.values()):
            undo()
        for table in (self._undo, self.sockets, self.clocks, self._uses, self._moments, self.present):
            table.clear()
        self._forget()

    def _forget(self) -> None:
        if _ATTACHED.get(self.model) is self:
            del _ATTACHED[self.model]
            self.kin.remove(self)

    def follow(self) -> None:
        """Move sockets to modules that wrap theirs now, or were inside of them."""
        for name, socket in sorted(self.sockets.items(), key=lambda item: item[1].turn, reverse=True):
            now = in_place_of(socket.module, self.model, socket.site.module)
            if now is not None and now is not socket.module:
                self._undo[f"site {name}"]()
                socket.module = now
                self._undo[f"site {name}"] = _hook(socket.clocks[0].host, now, socket)
        self._link()

    def _link(self) -> None:
        """Let clocks see where a module is put in place of one of theirs."""
        for clock in self.clocks.values():
            paths = {socket.site.module for socket in self.sockets.values() if clock in socket.clocks}
            steps = {(id(link[0]), link[1]): link for path in paths for link in links(self.model, path)}
            clock.links = tuple(steps.values())

    def uses(self, site: Site) -> int:
        """How many sessions need the socket at a site."""
        return self._uses[site.name]

    def _plug(self, host: Host, site: Site) -> None:
        inside = modules_on(self.model, site.module)
        if why := why_split(inside, site):
            raise Unanswerable(why)
        if is_compiled(inside):
            raise CompiledModel(
                f"{type(self.model).__name__} is compiled already, and torch would ignore a hook added now at "
                f"{site.name!r}. Load it anew (or call torch.compiler.reset()), then sl.attach(model, bank), then compile"
            )
        if "watch" not in self._undo:
            self._undo["watch"] = _both(host.watch(), hide(self.model))
        paths = host.clocks(site)
        for path in paths:
            if path not in self.clocks:
                clock = self.clocks[path] = Clock(host, path)
                clock.follow = self.follow
                # last among the pre-hooks, after all that change the inputs
                module = self.model.get_submodule(path)
                handle = module.register_forward_pre_hook(clock.on_call, with_kwargs=True)
                self._undo[f"clock {path}"] = _both(handle.remove, hide(module))
            self.clocks[path].outer |= {outer for outer in paths if path.startswith(f"{outer}.") or (path and not outer)}
        clocks = tuple(self.clocks[path] for path in paths)
        if (moment := self._moments.get(paths)) is None:
            moment = self._moments[paths] = Moment()
            for clock in clocks:
                clock.moments.append(moment)
        socket = (MeanSocket if site.mean else Socket)(self.model, site, clocks, moment)
        self._undo[f"site {site.name}"] = _hook(host, inside[-1], socket)
        self.sockets[site.name] = socket
        for other in sorted(self.sockets.values(), key=lambda other: other.turn, reverse=True):  # the last is hooked first
            if other.turn < socket.turn and other.site.module == site.module:
                self._undo[f"site {other.site.name}"]()
                self._undo[f"site {other.site.name}"] = _hook(host, inside[-1], other)


def _hook(host: Host, module: nn.Module, socket: Socket) -> Callable[[], None]:
    """Register a socket, first among the hooks, so that every observer sees what flows on. Returns what removes it."""
    show = hide(module)
    if (undo := host.plug(module, socket)) is None:
        if socket.site.side == "input":
            undo = module.register_forward_pre_hook(socket.on_input, with_kwargs=True).remove
        elif socket.site.side == "update":
            undo = module.register_forward_hook(socket.on_update, prepend=True, with_kwargs=True).remove
        else:
            undo = module.register_forward_hook(socket.on_output, prepend=True).remove
    return _both(undo, show)


def _both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def undo() -> None:
        first()
        second()

    return undo


class Before(Ours):
    """A pre-hook that does something before every pass of a module."""

    def __init__(self, action: Callable[[tuple, dict[str, Any]], None]):
        self.action = action

    def on_call(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:  # noqa: ARG002 - torch's signature
        self.action(args, kwargs)


def before_forward(model: nn.Module, action: Callable[[tuple, dict[str, Any]], None]) -> Callable[[], None]:
    """Do something before every pass of the whole model. Returns what undoes it."""
    handle = model.register_forward_pre_hook(Before(action).on_call, with_kwargs=True, prepend=True)
    return _both(handle.remove, hide(model))


_ATTACHED: WeakKeyDictionary[nn.Module, Attachment] = WeakKeyDictionary()
LOCK = threading.RLock()
"""Held while a session comes or goes, so that two threads never make two attachments of one model."""


def attachment(host: Host) -> Attachment:
    """The one attachment of a model. Call it, and `require` what is needed, under `LOCK`."""
    if (known := _ATTACHED.get(host.model)) is None:
        known = Attachment(host)
        for other in related(host.model):
            if other not in known.kin:
                other.kin += known.kin
                for one in other.kin:
                    one.kin = other.kin
        _ATTACHED[host.model] = known
    return known


def related(model: nn.Module) -> list[Attachment]:
    """Attachments of this model and of those that share modules with it."""
    if not _ATTACHED:
        return []
    mine = {*model.modules()}
    return [place for place in list(_ATTACHED.values()) if not mine.isdisjoint(place.model.modules())]


def modules_on(model: nn.Module, path: str) -> list[nn.Module]:
    """The modules that a path leads through, the model first."""
    inside = [model]
    for name in filter(None, path.split(".")):
        if (child := inside[-1]._modules.get(name)) is None:  # getattr would take ten times as long
            raise UnknownSite(f"{type(model).__name__} has no module {path!r} any more; name what stands there now by its path")
        inside.append(child)
    return inside


def is_compiled(modules: Sequence[nn.Module]) -> bool:
    """Whether torch has compiled one of these modules in place; the first is the whole model."""
    return "_compiled_call" in modules[0].__dict__ or any(  # the attribute that transformers' generate() sets
        m._compiled_call_impl is not None or hasattr(m.__dict__.get("forward"), "_torchdynamo_orig_callable") for m in modules
    )
