"""What a mask leaves of an edit at each token: by position in a text, by place in an image."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .errors import BadEdit, RowMismatch, Unanswerable
from .schedules import Grid, StepState

Box = tuple[float, float, float, float]
"""Left, top, right, bottom of a part of an image, each a share of its width or height."""


def check(mask: Any) -> Tensor | Box | None:
    """A mask as it is kept; raises `BadEdit` for what is none."""
    if mask is None or isinstance(mask, Tensor):
        return mask
    try:
        left, top, right, bottom = (float(end) for end in mask)
    except (TypeError, ValueError):
        raise BadEdit(f"expected a mask as a tensor or a box (left, top, right, bottom), got {mask!r:.60}") from None
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise BadEdit(f"expected a box of shares of the image, 0 <= left < right <= 1 and 0 <= top < bottom <= 1, got {mask}")
    return left, top, right, bottom


def share(mask: Tensor | Box, state: StepState, x: Float[Tensor, "B N D"], name: str) -> Float[Tensor, "B N"]:
    """How much of an edit of the concept `name` each token gets."""
    if state.progress is None:
        return _by_position(mask, state, x, name)
    front, grid = 0, state.grid and state.grid.of(x.shape[1])
    if grid is None and state.grid is not None and 0 < state.texts < x.shape[1]:
        front, grid = state.texts, state.grid.of(x.shape[1] - state.texts)
    if grid is None:
        latent = "unknown" if state.grid is None else f"{state.grid.height} × {state.grid.width}"
        raise Unanswerable(
            f"the mask of {name!r} cannot be laid over the {x.shape[1]} tokens of this site, because they are not those of the "
            f"image (latent: {latent}); mask at a site of image tokens"
        )
    if isinstance(mask, tuple):
        return F.pad(_box(mask, grid, x.device), (front, 0)).expand(len(x), -1)
    layers = mask.to(x.device, torch.float32)[(None,) * (3 + (grid.frames > 1) - mask.ndim)]
    if layers.ndim != 3 + (grid.frames > 1):
        raise BadEdit(f"expected the mask of {name!r} as [height, width] or [rows, height, width], got {list(mask.shape)}")
    sized = F.interpolate(layers[:, None], size=tuple(grid) if grid.frames > 1 else grid[1:], mode="area").flatten(1)
    return F.pad(sized, (front, 0))[_rows(len(sized), len(x), state, name).to(x.device)]


def _by_position(mask: Tensor | Box, state: StepState, x: Tensor, name: str) -> Tensor:
    """Positions beyond the mask get none."""
    if isinstance(mask, tuple):
        raise BadEdit(f"the mask of {name!r} is a part of an image, this is text; give a tensor of positions")
    table = mask.to(x.device, torch.float32)
    table = table if table.ndim == 2 else table[None]
    table = table[_rows(len(table), len(x), state, name).to(x.device)]
    position = state.positions.expand(len(x), -1).clamp(min=0)
    return table.gather(1, position.clamp(max=table.shape[1] - 1)) * (position < table.shape[1])


def _box(box: Box, grid: Grid, device: torch.device) -> Float[Tensor, "1 N"]:
    """1 on tokens whose centre lies in the box."""
    left, top, right, bottom = box
    across, down = ((torch.arange(n, device=device) + 0.5) / n for n in (grid.width, grid.height))
    inside = ((down >= top) & (down < bottom))[:, None] & ((across >= left) & (across < right))
    return inside.float().expand(grid.frames, -1, -1).reshape(1, -1)


def _rows(count: int, rows: int, state: StepState, name: str) -> Tensor:
    if rows // state.copies % count:
        raise RowMismatch(f"the mask of {name!r} has {count} rows, the batch {rows}")
    return state.row(count, rows)
