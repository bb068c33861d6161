"""Where things lie. What the host has is copied to a device once, since the host waits for the device at every copy.

Edits and readings are computed in float32, also where autocast computes a model in bfloat16 or float16.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_COPIES = WeakTensorKeyDictionary()
"""Copies by device, and the version of the tensor that they are of."""


def placed(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. The copy is kept as long as the tensor lives and is not changed."""
    if tensor.device == device:
        return tensor
    if tensor.requires_grad or tensor.is_inference():  # a copy has a graph of its own; a change would not be seen
        return tensor.to(device)
    known: Any = _COPIES.get(tensor)
    if known is None or known[0] != tensor._version:
        known = _COPIES[tensor] = tensor._version, {}
    copies = known[1]
    if device not in copies:
        with torch.inference_mode(False):  # it outlives this pass, whatever mode it runs in
            copies[device] = tensor.to(device)
    return copies[device]


def best_device() -> torch.device:
    """An accelerator where there is one."""
    return (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None) or torch.device("cpu")


@lru_cache(maxsize=256)
def numbers(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Some numbers as a tensor on a device."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device)


def unrounded(x: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast changes nothing on the device of x."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
