"""Where in a model an edit happens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import WrongWidth

Layout = Literal["BND", "NBD", "BD..."]
Swap = Callable[[Tensor], Tensor]


def _last(x: Tensor) -> Tensor:
    """Images and videos `[B, D, ...]` as tokens; one vector a row `[B, D]` as one token."""
    return x[:, None] if x.ndim == 2 else x if x.ndim == 3 else x.flatten(2).transpose(1, 2)


LAYOUTS: dict[Layout, Swap | None] = {"BND": None, "NBD": lambda x: x.transpose(0, 1), "BD...": _last}
"""Axis orders a module may use, and the change to `[B, N, D]` (None: nothing to do)."""


def _back(x: Tensor, layout: Layout, like: Tensor) -> Tensor:
    """`x[B, N, D]` in a module's own axis order, shape and, since kernels are chosen by them, strides."""
    if layout != "BD...":
        return x.transpose(0, 1) if layout == "NBD" else x
    x = (x.transpose(1, 2) if like.ndim > 3 else x).reshape(like.shape)
    return x if x.stride() == like.stride() else torch.empty_like(like).copy_(x)


@dataclass(frozen=True, kw_only=True)
class Site:
    """One tensor that flows through a model: `x[B, N, D]` (rows, tokens, width), whatever shape its module gives it.

    Args:
        name: what a user calls it: `layers.15`, `layers.15.attn.heads.3`.
        module: dotted path of the module, from the model that is steered.
        side: the module's `output`, its `input`, or the `update`, which is what a block adds to its input.
        element: which element, where the module gives a tuple; None: the only tensor in it.
        apart: whether it is one of several tensors, so that a module that gives a single one is refused.
        layout: order of the module's axes: `BND`, `NBD`, or `BD...` for images and videos.
        columns: first and last (excluded) column, for a part of the width: one head.
        reads_text: whether the tokens here are those of an image's prompt.
        argument: name of the module's input, if it is not the first that is given.

    >>> site = sl.Site(name="layers.0", module="model.layers.0")
    >>> site.read((torch.zeros(1, 2, 4),)).shape
    torch.Size([1, 2, 4])
    """

    name: str
    module: str
    side: Literal["output", "input", "update"] = "output"
    element: int | None = 0
    apart: bool = False
    layout: Layout = "BND"
    columns: tuple[int, int] | None = None
    reads_text: bool = False
    argument: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether a module that gives one tensor gives `x[B, N, D]` itself."""
        return self.columns is None and LAYOUTS[self.layout] is None

    def read(self, value: Any) -> Tensor:
        """The tensor `x[B, N, D]` inside a module's output or input; raises `WrongWidth` where there is none."""
        x = value if isinstance(value, Tensor) else value[self.element if self.element is not None else self._only(value)]
        fits = isinstance(x, Tensor) and (1 < x.ndim < 6 if self.layout == "BD..." else x.ndim == 3)
        if not fits:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise WrongWidth(
                f"site {self.name!r} (module {self.module!r}) gives {got}, expected a tensor of three axes "
                "(rows, tokens, width). Name a module whose output has them, such as a block"
            )
        if (swap := LAYOUTS[self.layout]) is not None:
            x = swap(x)
        return x if self.columns is None else x[..., self.columns[0] : self.columns[1]]

    def write(self, value: Any, x: Tensor) -> Any:
        """`value` with its tensor replaced; `value` itself is left alone."""
        at = self.element if self.element is not None else self._only(value)
        whole = value if isinstance(value, Tensor) else value[at]
        swap = LAYOUTS[self.layout]
        if self.columns is not None:
            first, last = self.columns
            full = whole if swap is None else swap(whole)
            x = torch.cat((full[..., :first], x, full[..., last:]), dim=-1)
        x = _back(x, self.layout, whole)
        if isinstance(value, Tensor):
            return x
        if isinstance(value, (tuple, list)):
            parts = (*value[:at], x, *value[at + 1 :])
            return type(value)(parts) if type(value) in (tuple, list) else type(value)(*parts)  # named tuples
        changed = dict(value)
        changed[list(changed)[at]] = x
        return type(value)(**changed)

    def _only(self, value: Any) -> int:
        """Where the only tensor in a tuple is; raises `WrongWidth` where there are several."""
        parts = [value] if isinstance(value, Tensor) else value if isinstance(value, (tuple, list)) else [*value.values()]
        tensors = [at for at, part in enumerate(parts) if isinstance(part, Tensor)]
        if len(tensors) > 1:
            raise WrongWidth(
                f"site {self.name!r}: {self.module!r} gives {len(tensors)} tensors, and its source does not show which one is "
                f"the stream; name one by its place, {' or '.join(f'{self.name}:{at}' for at in tensors)}"
            )
        return tensors[0] if tensors else 0
