"""What a mask leaves of an edit at each token: by position in a text, by place in an image."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..errors import BadEdit, RowMismatch, Unanswerable
from ..passes import Grid, StepState

Box = tuple[float, float, float, float]
"""Left, top, right, bottom of a part of an image, each a share of its width or height."""


@dataclass(frozen=True)
class Word:
    """Where an image attends to a word of its prompt, in the half of guidance that reads the prompt."""

    text: str
    at: str
    """The cross-attention that is asked: a site before the edited one, such as `unet.down_blocks.1.….attn2`."""
    above: float = 0.5
    """Share of the most attentive token's attention from which on a token counts."""

    def __post_init__(self) -> None:
        if not 0 < self.above <= 1:
            raise BadEdit(f"expected 0 < above <= 1, got {self.above}")

    @property
    def asked(self) -> tuple[str, str]:
        """Sites that hold the queries of the image and the keys of the text."""
        return f"{self.at}.to_q", f"{self.at}.to_k"


Mask = Tensor | Box | Word


def check(mask: Any) -> Mask | None:
    """A mask as it is kept; raises `BadEdit` for what is none."""
    if mask is None or isinstance(mask, Tensor | Word):
        return mask
    try:
        left, top, right, bottom = (float(end) for end in mask)
    except (TypeError, ValueError):
        raise BadEdit(f"expected a mask as a tensor, a Word or a box (left, top, right, bottom), got {mask!r:.60}") from None
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise BadEdit(f"expected a box of shares of the image, 0 <= left < right <= 1 and 0 <= top < bottom <= 1, got {mask}")
    return left, top, right, bottom


def share(mask: Mask, state: StepState, x: Float[Tensor, "B N D"], name: str) -> Float[Tensor, "B N"]:
    """How much of an edit of the concept `name` each token gets."""
    if state.progress is None:
        return _by_position(mask, state, x, name)
    front, grid = 0, _grid(state, len(x), x.shape[1])
    if grid is None and state.grid is not None and 0 < state.texts < x.shape[1]:
        front, grid = state.texts, state.grid.of(x.shape[1] - state.texts)
    if grid is None:
        latent = "unknown, or split over devices" if state.grid is None else f"{state.grid.height} × {state.grid.width}"
        raise Unanswerable(
            f"the mask of {name!r} cannot be laid over the {x.shape[1]} tokens of this site, because they are not those of the "
            f"image (latent: {latent}); mask at a site of image tokens"
        )
    if isinstance(mask, tuple):
        return F.pad(_box(mask, grid, x.device), (front, 0)).expand(len(x), -1)
    if isinstance(mask, Word):
        sized = _laid(_attended(mask, state, name)[:, None], grid)
        return F.pad(sized, (front, 0))
    layers = mask.to(x.device, torch.float32)[(None,) * (3 + (grid.frames > 1) - mask.ndim)]
    if layers.ndim != 3 + (grid.frames > 1):
        raise BadEdit(f"expected the mask of {name!r} as [height, width] or [rows, height, width], got {list(mask.shape)}")
    sized = _laid(layers[:, None], grid)
    return F.pad(sized, (front, 0))[_rows(len(sized), len(x), state, name).to(x.device)]


def _grid(state: StepState, rows: int, count: int) -> Grid | None:
    """How the tokens of a site lie in the image; a video may be looked at frame by frame, as rows."""
    if state.grid is None:
        return None
    images = (state.images or 0) * state.copies
    if state.grid.frames == 1 or rows in (0, images) or not images:
        return state.grid.of(count)
    return state.grid._replace(frames=1).of(count) if rows == images * state.grid.frames else None


def _laid(layers: Float[Tensor, "rows 1 ..."], grid: Grid) -> Float[Tensor, "rows N"]:
    """Shares of any size as shares of tokens."""
    return F.interpolate(layers, size=tuple(grid) if grid.frames > 1 else grid[1:], mode="area").flatten(1)


def _attended(word: Word, state: StepState, name: str) -> Float[Tensor, "B ..."]:
    """1 where a token of the image attends to the word, 0 elsewhere and in the half of guidance that does not read it.

    Attention is the mean over heads of `softmax(q k^T / sqrt(d))`, summed over the word's tokens.
    """
    q, k = (state.notes.get(("kept", site)) for site in word.asked)
    grid = None if q is None or state.grid is None else state.grid.of(q.shape[1])
    if q is None or k is None or grid is None or state.words is None or k.shape[1] != state.texts:
        raise Unanswerable(
            f"the mask of {name!r} asks {word.at!r} for the attention to {word.text!r}, which this pass did not go through "
            "before the edit, or which does not look at text; name a cross-attention (attn2) of an earlier block"
        )
    heads = state.words.heads(word.at)
    q, k = (x.float().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean(1)
    halves = state.branches or ("cond",)
    found = torch.zeros(weights.shape[:2], device=weights.device)
    for row in range(len(weights)):
        each = len(weights) // len(halves)
        if halves[row // each] == "cond":
            columns = state.words.columns(word.text, row % each, each)
            attention = weights[row, :, columns].sum(-1)
            found[row] = (attention >= word.above * attention.max()).float()
    return found.unflatten(1, tuple(grid) if grid.frames > 1 else (grid.height, grid.width))


def _by_position(mask: Mask, state: StepState, x: Tensor, name: str) -> Tensor:
    """Positions beyond the mask get none."""
    if not isinstance(mask, Tensor):
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
