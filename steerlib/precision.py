"""Edits and readings are computed in float32, also where autocast computes a model in bfloat16 or float16."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def unrounded(x: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast changes nothing on the device of x."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
