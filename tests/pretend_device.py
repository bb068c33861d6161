"""A pretend accelerator: CPU arithmetic behind devices of their own, `pretend:0` and `pretend:1`, which count waits.

It is torch's Python backend (`torch.utils.backend_registration`), so nothing is built. A tensor there keeps its numbers in
`raw`, a tensor of the CPU; what an operator is given and gives is unwrapped and wrapped around it. As on CUDA, an operator
refuses tensors of different devices, numbers of no axes from the host aside. As there, the host waits for the device where it
asks for numbers (`item`, `tolist`, a copy to the host), where a shape depends on numbers (boolean indices, `nonzero`), where an
operator checks its result (`linalg.solve`), and where it sends memory without `non_blocking` (a copy to the device, a list as
an index). `WAITS` counts them by the line of steerlib that asked. Gradients are computed on `pretend:0` only: torch's Python
backend knows one device there.

    python -m pytest tests/test_text.py --device pretend     # importing this file registers the device, once per process
"""

import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils import backend_registration

DEVICES = 2
WAITS: Counter[str] = Counter()
"""How often the host had to wait, by `file:line how` of ours; what a host library asked for itself counts as `elsewhere`."""
OURS = tuple(f"{Path(__file__).parents[1] / name}/" for name in ("steerlib", "hooks"))
THEIRS = tuple(f"/{name}/" for name in ("transformers", "diffusers", "accelerate", "peft"))
SHAPES = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"}
"""Operators whose result has a shape that depends on numbers."""
ASKS = {"_local_scalar_dense", "equal", "is_nonzero", "_linalg_check_errors"}
REPEAT = torch.ops.aten.repeat_interleave.Tensor
INDEXED = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
COPIES = {"copy_", "_copy_from", "_to_copy"}


class MixedDevices(RuntimeError):
    """An operator was given tensors of several devices."""


def line() -> str:
    """The line of ours that asked, or `elsewhere` if a host library did inside what we called."""
    frame = sys._getframe(1)
    while (frame := frame.f_back) is not None:
        file = frame.f_code.co_filename
        if file.startswith(OURS):
            return f"{file.removeprefix(str(Path(__file__).parents[1]) + '/')}:{frame.f_lineno}"
        if any(name in file for name in THEIRS):
            break
    return "elsewhere"


def wait(how: str) -> None:
    WAITS[f"{line()} {how}"] += 1


@contextmanager
def waits():
    """Count anew inside a `with` block: gives a counter that is filled at its end."""
    found: Counter[str] = Counter()
    WAITS.clear()
    yield found
    found.update(WAITS)


class Pretend(torch.Tensor):
    """A tensor on the pretend device; its numbers are in `raw`."""

    raw: torch.Tensor
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: torch.Tensor, device: torch.device) -> Any:
        self: Any = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=device
        )
        self.raw = raw
        return self

    def tolist(self) -> Any:
        wait("tolist")
        return self.raw.tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(op, args, kwargs or {})


def run(op: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the numbers behind its tensors."""
    name = op.overloadpacket.__name__
    given: list[torch.Tensor] = []
    raw_args, raw_kwargs = bare(args, given), bare(kwargs, given)
    ours = [x for x in given if type(x) is Pretend]
    asked = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    where = ours[0].device if ours and asked is None else asked
    if name in COPIES:
        copied(name, args, kwargs, asked)
        where = args[0].device if name == "copy_" else where
    elif name in INDEXED:
        indexed(name, args)
    else:
        unmixed(op, given)
    if name in ASKS | SHAPES or (op is REPEAT and kwargs.get("output_size") is None):
        wait(name)
    raw_kwargs.pop("pin_memory", None)
    out = op(*raw_args, **raw_kwargs)
    if where is None or where.type != "pretend":
        return same(out, given, None)
    return same(out, ours, placed(where))


def placed(device: torch.device) -> torch.device:
    """With its index."""
    if (index := device.index or 0) >= DEVICES:
        raise RuntimeError(f"there are {DEVICES} pretend devices, got {device}")
    return torch.device("pretend", index)


def bare(value: Any, given: list[torch.Tensor]) -> Any:
    """Arguments as the CPU takes them; the tensors among them are listed."""
    if isinstance(value, torch.Tensor):
        given.append(value)
        return value.raw if type(value) is Pretend else value
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if isinstance(value, (list, tuple)):
        return [bare(v, given) for v in value]
    if isinstance(value, dict):
        return {k: bare(v, given) for k, v in value.items()}
    return value


def same(out: Any, given: list[Any], device: torch.device | None) -> Any:
    """Results on a device; what an operator changed in place stays the object that it is."""
    if isinstance(out, torch.Tensor):
        known = next((x for x in given if x is out or getattr(x, "raw", None) is out), None)
        return known if known is not None else out if device is None else Pretend(out, device)
    return type(out)(same(v, given, device) for v in out) if isinstance(out, (list, tuple)) else out


def unmixed(op: Any, given: list[torch.Tensor]) -> None:
    found = {x.device for x in given if x.ndim or x.device.type == "pretend"}
    if len(found) > 1:
        shapes = ", ".join(f"{tuple(x.shape)} on {x.device}" for x in given)
        raise MixedDevices(f"{op}: {shapes}, at {line()}")


def copied(name: str, args: tuple, kwargs: dict[str, Any], asked: torch.device | None) -> None:
    """A copy between host and device is waited for, unless it goes to the device without blocking."""
    to, source = (args[0].device, args[1]) if name == "copy_" else (asked or args[0].device, args[0])
    if name == "copy_" and not isinstance(source, torch.Tensor):
        return
    if source.device.type == to.type:
        return
    if to.type == "cpu":
        wait("copy to the host")
    elif not (kwargs.get("non_blocking") or True in args[2:3]):
        wait("copy to the device")


def indexed(name: str, args: tuple) -> None:
    """Indices of booleans make a shape that depends on numbers; those of the host are copied."""
    here, (indices, *values) = args[0], args[1:]
    indices = [i for i in indices if i is not None]
    if here.device.type == "cpu" and any(type(i) is Pretend for i in indices):
        raise MixedDevices(f"{name}: indices on the device into a tensor of the host, at {line()}")
    unmixed(name, [here, *(v for v in values if isinstance(v, torch.Tensor)), *(i for i in indices if type(i) is Pretend)])
    if any(i.device.type == "cpu" for i in indices):
        wait("index from the host")
    fills = "put" in name and len(indices) == 1 and values[0].numel() == 1
    if any(i.dtype == torch.bool for i in indices) and not fills:
        wait("boolean index")


class Module:
    """What `torch.pretend` is."""

    at = 0

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return self.at

    def set_device(self, device: Any) -> None:
        self.at = torch.device("pretend", device).index if isinstance(device, int) else torch.device(device).index or 0

    def device_count(self) -> int:
        return DEVICES

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Its random numbers are the CPU's."""

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        """The CPU's is set beside it."""

    def synchronize(self, device: Any = None) -> None:
        wait("synchronize")

    def empty_cache(self) -> None:
        """Nothing is kept."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


def maker(op: Any) -> Any:
    """An operator that makes a tensor, on the device."""

    def made(*args: Any, device: torch.device, pin_memory: bool | None = None, **kwargs: Any) -> torch.Tensor:
        return Pretend(op(*args, **kwargs, device="cpu"), placed(device))

    return made


def copy_from(source: torch.Tensor, to: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    copied("copy_", (to, source, non_blocking), {}, None)
    with torch.no_grad():
        bare(to, []).copy_(bare(source, []))
    return to


MAKERS = ("empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step", "eye", "eye.m", "tril_indices")
"""Operators that make a tensor out of none, or would make it empty and enlarge it."""
backend_registration._setup_privateuseone_for_python_backend("pretend", Module())
torch.__future__.set_overwrite_module_params_on_conversion(True)
LIBRARY = torch.library.Library("aten", "IMPL")
LIBRARY.impl("_copy_from", copy_from, "PrivateUse1")
for name, _, overload in (name.partition(".") for name in MAKERS):
    op = getattr(getattr(torch.ops.aten, name), overload or "default")
    LIBRARY.impl(f"{name}.{overload}".rstrip("."), maker(op), "PrivateUse1")
