"""Runs tests on a device: models, pipelines, and whatever a test makes without saying where, lie there."""

import sys
from pathlib import Path
from typing import Any

import tiny_models
import tiny_pipelines
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_leaves, tree_map

ELSEWHERE = ("tiny_models.py", "pretend_device.py")
HERE = {str(path) for path in Path(__file__).parent.rglob("*.py") if path.name not in ELSEWHERE}
"""Files whose tensors are moved. Those of `tiny_models.py` meet models that are on the CPU still."""
MAKERS = _device_constructors()


class Placing(TorchFunctionMode):
    """Lines of tests make tensors on the CPU, so that numbers are the same everywhere, and get them on the device. Where a line
    of a test, not of the library, computes with tensors of both, those of the CPU are moved."""

    def __init__(self, device: str):
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if sys._getframe(1).f_code.co_filename not in HERE:
            return func(*args, **kwargs)
        if func in MAKERS:
            made = func(*args, **kwargs)
            return made if "device" in kwargs else made.to(self.device)
        if len({x.device for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}) > 1:
            args, kwargs = tree_map(lambda x: x.to(self.device) if isinstance(x, Tensor) else x, (args, kwargs))
        return func(*args, **kwargs)


def move(device: str) -> None:
    """Put tiny models and pipelines on a device from now on, and compare numbers wherever they are."""
    if device.startswith("pretend"):
        import pretend_device  # noqa: F401 - registers it
    built, build, close = tiny_models._built, tiny_pipelines.Tiny.build, torch.testing.assert_close
    tiny_models._built = lambda *args: built(*args).to(device)
    tiny_pipelines.Tiny.build = lambda self: build(self).to(device)
    Placing(device).__enter__()  # until the process ends
    torch.testing.assert_close = lambda *args, **kwargs: close(*args, **{"check_device": False, **kwargs})
