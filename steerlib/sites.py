"""Where in a model an edit happens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import WrongWidth

Layout = Literal["BND", "NBD", "B...D", "BDN", "BD...", "ND", "?"]
Swap = Callable[[Tensor], Tensor]


def _channels_first(x: Tensor) -> Tensor:
    """Sound, images and videos `[B, D, ...]` as tokens; one vector a row `[B, D]` as one token."""
    return x[:, None] if x.ndim == 2 else x.flatten(2).transpose(1, 2)


def _by_axes(x: Tensor) -> Tensor:
    """Tokens `[B, N, D]`; with fewer or more axes, channels first."""
    return x if x.ndim == 3 else _channels_first(x)


LAYOUTS: dict[Layout, tuple[int, int, Swap | None]] = {
    "BND": (3, 3, None),
    "NBD": (3, 3, lambda x: x.transpose(0, 1)),
    "B...D": (3, 5, lambda x: x.flatten(1, -2)),
    "BDN": (2, 5, _channels_first),
    "BD...": (2, 5, _by_axes),
    "ND": (2, 2, lambda x: x[None]),
    "?": (2, 5, _by_axes),
}
"""Axis orders a module may use: `B` rows, `N` tokens, `D` width, `...` the axes of an image or video. `BDN`: channels first,
whatever follows; `BD...`: an image with channels first, or tokens `[B, N, D]`; `ND`: the tokens of all rows in one axis; `?`:
`BD...` that nobody said. For each the least and the most axes, and the change to `[B, N, D]` (None: nothing to do)."""
SAY = "say which axis is which: path:BND, path:NBD (rows second), path:BDN (channels first), path:B...D, path:ND (no rows)"


def _joined(value: Any) -> Any:
    """Lists of rows, alone or in a tuple, as one tensor each."""
    if isinstance(value, list):
        return torch.stack(value)
    return tuple(map(_joined, value)) if type(value) is tuple and any(isinstance(part, list) for part in value) else value


def _parted(joined: Any, like: Any) -> Any:
    """The same as lists again, where `like` has them."""
    if type(like) is tuple:
        return tuple(map(_parted, joined, like))
    return [*joined] if isinstance(like, list) else joined


def _back(x: Tensor, layout: Layout, like: Tensor) -> Tensor:
    """`x[B, N, D]` in a module's own axis order, shape and, since kernels are chosen by them, strides."""
    if LAYOUTS[layout][2] is None:
        return x
    if layout == "NBD":
        return x.transpose(0, 1)
    channels_first = layout == "BDN" or (layout in ("BD...", "?") and like.ndim > 3)
    x = (x.transpose(1, 2) if channels_first and like.ndim > 2 else x).reshape(like.shape)
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
        layout: order of the module's axes, one of `LAYOUTS`.
        columns: first and last (excluded) column, for a part of the width: one head.
        reads_text: whether the tokens here are those of an image's prompt.
        argument: name of the module's input, if it is not the first that is given.
        listed: whether its rows may be a list of one tensor each.
        mean: whether it is the mean of the tokens, as one token; what is added to it is added to all of them.

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
    listed: bool = False
    mean: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether a module that gives one tensor of three axes gives `x[B, N, D]` itself."""
        return self.columns is None and self.layout in ("BND", "B...D")

    def read(self, value: Any) -> Tensor:
        """The tensor `x[B, N, D]` inside a module's output or input; raises `WrongWidth` where there is none."""
        if self.listed:
            value = _joined(value)
        x = value if isinstance(value, Tensor) else value[self.element if self.element is not None else self._only(value)]
        least, most, swap = LAYOUTS[self.layout]
        if not isinstance(x, Tensor) or not least <= x.ndim <= most:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise WrongWidth(
                f"site {self.name!r} (module {self.module!r}) gives {got}, expected a tensor of "
                f"{least if least == most else f'{least} to {most}'} axes (rows, tokens, width). "
                f"Name a module whose output has them, such as a block, or {SAY}"
            )
        if self.layout == "?" and x.ndim > 2 and x.shape[1] == x.shape[-1]:
            raise WrongWidth(
                f"site {self.name!r} gives {tuple(x.shape)}, and nothing tells tokens and width of {self.module!r} apart; {SAY}"
            )
        x = x if swap is None else swap(x)
        return x if self.columns is None else x[..., self.columns[0] : self.columns[1]]

    def write(self, value: Any, x: Tensor) -> Any:
        """`value` with its tensor replaced; `value` itself is left alone."""
        if self.listed and (whole := _joined(value)) is not value:
            return _parted(self.write(whole, x), value)
        at = self.element if self.element is not None else self._only(value)
        whole = value if isinstance(value, Tensor) else value[at]
        swap = LAYOUTS[self.layout][2]
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
