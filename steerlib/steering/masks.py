"""Where an edit acts: by position in a text, by place in an image. A mask is one class here."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..devices import placed
from ..errors import BadEdit, RowMismatch, Unanswerable
from ..passes import Grid, StepState
from ..sites import Site


class Mask(ABC):
    """Where an edit acts. Your own mask is one subclass: `share` says how much each token gets."""

    reads: tuple[str, ...] = ()
    """Sites before the edited one whose activations it needs; it finds them in `state.notes["kept", site]`."""

    @abstractmethod
    def share(self, state: StepState, x: Float[Tensor, "B N D"], name: str) -> Float[Tensor, "B N"]:
        """How much of an edit of the concept `name` each token of `x` gets. `B` may be 1."""

    def check(self, moved: Site, is_before: Callable[[str], bool], name: str) -> None:
        """Raise `Unanswerable` where it cannot be laid over the site `moved`."""
        if moved.reads_text:
            raise Unanswerable(
                f"the mask of {name!r} is a part of an image, and the tokens of {moved.name!r} are the prompt's; "
                "mask at a site of image tokens"
            )
        if moved.mean:
            raise Unanswerable(
                f"the mask of {name!r} is a part of an image, and {moved.name!r} is the mean of all of it; mask at "
                f"{moved.name.removesuffix('.mean')!r}"
            )
        if late := next((site for site in self.reads if not is_before(site)), None):
            raise Unanswerable(
                f"the mask of {name!r} reads {late!r}, which is not before {moved.name!r}; name an attention of an "
                "earlier block"
            )


def mask_of(given: Any) -> Mask:
    """The mask that a tensor, a box or a mask means; raises `BadEdit` for anything else."""
    if isinstance(given, Mask):
        return given
    if isinstance(given, Tensor) or hasattr(given, "convert") or hasattr(given, "__array__") and np.shape(given) != (4,):
        return Weights(shares(given))
    try:
        left, top, right, bottom = (float(end) for end in given)
    except (TypeError, ValueError):
        raise BadEdit(
            f"expected a mask as a tensor, an array, a PIL image, a Word or a box (left, top, right, bottom), got {given!r:.60}"
        ) from None
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise BadEdit(f"expected a box of shares of the image, 0 <= left < right <= 1 and 0 <= top < bottom <= 1, got {given}")
    return Box(left, top, right, bottom)


def shares(given: Any) -> Tensor:
    """Shares of an edit, 0 to 1, from a tensor, an array or a PIL image; raises `BadEdit` for other values."""
    if hasattr(given, "convert"):
        if (mode := getattr(given, "mode", "")) not in ("1", "L", "RGB"):
            raise BadEdit(
                f"expected a mask in black and white, grey or RGB, got a picture of mode {mode!r}; give one.convert('L')"
            )
        given = np.asarray(given.convert("L"))
    if not isinstance(given, Tensor):
        given = np.asarray(given)
        if given.dtype.kind not in "bufi" or given.ndim == 3 and min(given.shape[:2]) > 4 >= given.shape[2]:
            raise BadEdit(
                f"expected a mask of numbers as [height, width] or [rows, height, width], got {given.dtype} {given.shape}; "
                "of an array with channels last give one channel, mask[..., 0]"
            )
        given = torch.from_numpy(np.array(given, given.dtype.newbyteorder("=")))
    if given.is_complex() or not given.numel():
        raise BadEdit(f"expected a mask of shares, got {given.dtype} {tuple(given.shape)}")
    low, high = (float(end) for end in given.detach().float().aminmax())
    if given.dtype == torch.uint8 and high > 1:
        return given.float() / 255
    if not -SLACK <= low <= high <= 1 + SLACK:
        raise BadEdit(
            f"expected shares from 0 to 1 in a mask, got {low:.4g} to {high:.4g} of {given.dtype}; divide by what means all of "
            "the edit, as mask / 255 (bytes, torch.uint8, count from 0 to 255 by themselves)"
        )
    return given.float().clamp(0, 1)


SLACK = 1e-3
"""By how much shares may be beyond 0 and 1, as those of a resized picture are; they are cut."""


@dataclass(frozen=True)
class Box(Mask):
    """A part of an image: 1 on tokens whose centre lies in it. Ends are shares of its width and height."""

    left: float
    top: float
    right: float
    bottom: float

    def share(self, state: StepState, x: Float[Tensor, "B N D"], name: str) -> Float[Tensor, "B N"]:
        front, grid = layout(state, x, name)
        across, down = ((torch.arange(n, device=x.device) + 0.5) / n for n in (grid.width, grid.height))
        inside = ((down >= self.top) & (down < self.bottom))[:, None] & ((across >= self.left) & (across < self.right))
        flat = inside.float().expand(grid.frames, -1, -1).reshape(1, -1)
        return F.pad(flat, (front, 0)).expand(len(x), -1)


@dataclass(frozen=True, eq=False)
class Weights(Mask):
    """The share of the edit at each position of a text, or at each place of an image of any size."""

    weights: Tensor

    def share(self, state: StepState, x: Float[Tensor, "B N D"], name: str) -> Float[Tensor, "B N"]:
        if state.progress is None:
            return self._by_position(state, x, name)
        front, grid = layout(state, x, name)
        weights, axes = placed(self.weights, x.device).float(), 3 + (grid.frames > 1)
        if weights.ndim == 1 and axes == 4:
            weights = weights[:, None, None]
        if axes == 3 and weights.ndim == 4 and weights.shape[1] == 1:  # one channel
            weights = weights[:, 0]
        if not 2 <= weights.ndim <= axes:
            raise BadEdit(
                f"expected the mask of {name!r} as [height, width], [rows, height, width], or, of a video, [frames] or "
                f"[(rows,) frames, height, width], got {list(weights.shape)}"
            )
        layers = weights[(None,) * (axes - weights.ndim)]
        if axes == 4:
            layers = _packed(layers, state, grid, name)
        sized = F.pad(_laid(layers[:, None], grid), (front, 0))
        return sized[_rows(len(sized), len(x), state, name).to(x.device)]

    def _by_position(self, state: StepState, x: Tensor, name: str) -> Tensor:
        """Positions beyond the mask get none."""
        if self.weights.ndim not in (1, 2):
            raise BadEdit(f"expected the mask of {name!r} as [L] or [rows, L] of a text, got {list(self.weights.shape)}")
        table = placed(self.weights, x.device).float()
        table = table if table.ndim == 2 else table[None]
        table = table[_rows(len(table), len(x), state, name).to(x.device)]
        position = state.positions.expand(len(x), -1).clamp(min=0)
        return table.gather(1, position.clamp(max=table.shape[1] - 1)) * (position < table.shape[1])


@dataclass(frozen=True)
class Word(Mask):
    """Where an image attends to a word of its prompt, in the half of guidance that reads the prompt.

    Args:
        text: the word, as it stands in the prompt.
        at: the cross-attention whose weights decide: a site before the edited one, such as `unet.down_blocks.1.….attn2`.
        above: share of the most attentive token's attention from which on a token counts, in (0, 1].

    Attention is the mean over heads of `softmax(q k^T / sqrt(d))`, summed over the word's tokens.

    >>> sl.Word("hat", at="unet.mid_block.attentions.0.transformer_blocks.0.attn2").above
    0.5
    """

    text: str
    at: str
    above: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.above <= 1:
            raise BadEdit(f"expected 0 < above <= 1, got {self.above}")

    @property
    def reads(self) -> tuple[str, str]:  # type: ignore[override]
        """Sites that hold the queries of the image and the keys of the text."""
        return f"{self.at}.to_q", f"{self.at}.to_k"

    def share(self, state: StepState, x: Float[Tensor, "B N D"], name: str) -> Float[Tensor, "B N"]:
        front, grid = layout(state, x, name)
        return F.pad(_laid(self._attended(state, name)[:, None], grid), (front, 0))

    def _attended(self, state: StepState, name: str) -> Float[Tensor, "B ..."]:
        """1 where a token of the image attends to the word, 0 elsewhere and in the half of guidance without the prompt."""
        q, k = (state.notes.get(("kept", site)) for site in self.reads)
        grid = None if q is None or state.grid is None else state.grid.of(q.shape[1])
        if q is None or k is None or grid is None or state.words is None or k.shape[1] != state.texts:
            raise Unanswerable(
                f"the mask of {name!r} needs the attention of {self.at!r} to {self.text!r}, which this pass did not go through "
                "before the edit, or which does not look at text; name a cross-attention (attn2) of an earlier block"
            )
        heads = state.words.heads(self.at)
        q, k = (x.float().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean(1)
        halves, found = state.branches or ("cond",), torch.zeros(weights.shape[:2], device=weights.device)
        each = len(weights) // len(halves)
        for row in (row for row in range(len(weights)) if halves[row // each] == "cond"):
            columns = state.words.columns(self.text, row % each, each)
            attention = torch.stack([weights[row, :, k] for k in columns], dim=-1).sum(-1)  # a list would be copied
            found[row] = (attention >= self.above * attention.max()).float()
        return found.unflatten(1, tuple(grid) if grid.frames > 1 else (grid.height, grid.width))


def layout(state: StepState, x: Float[Tensor, "B N D"], name: str) -> tuple[int, Grid]:
    """How many tokens of `x` stand in front of those of the image, and how the latter lie in it."""
    if state.progress is None:
        raise BadEdit(f"the mask of {name!r} is a part of an image, this is text; give a tensor of positions")
    front, grid = 0, _grid(state, len(x), x.shape[1])
    if grid is None and state.grid is not None and 0 < state.texts < x.shape[1]:
        front, grid = state.texts, state.grid.of(x.shape[1] - state.texts)
    if grid is None:
        latent = "unknown, or split over devices" if state.grid is None else f"{state.grid.height} × {state.grid.width}"
        raise Unanswerable(
            f"the mask of {name!r} cannot be laid over the {x.shape[1]} tokens of this site, because they are not those of the "
            f"image (latent: {latent}); mask at a site of image tokens"
        )
    return front, grid


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


def _packed(
    layers: Float[Tensor, "rows frames h w"], state: StepState, grid: Grid, name: str
) -> Float[Tensor, "rows tokens h w"]:
    """Shares of frames as shares of the tokens along time: a token's is the mean of the frames that it stands for.

    An autoencoder packs the first frame by itself and the others by equal numbers, `state.film` frames in all.
    """
    latent = 1 if state.grid is None else state.grid.frames
    if (frames := layers.shape[1]) not in (1, latent, state.film):
        wanted = (
            f"1 or {latent} frames" if state.film in (None, latent) else f"1, {latent} (of the latent) or {state.film} frames"
        )
        raise BadEdit(f"expected the mask of {name!r} to have {wanted}, got {frames}")
    if frames not in (1, latent):
        layers = _means(layers, [1] + [(frames - 1) // (latent - 1)] * (latent - 1))
    along = -(-latent // grid.frames)  # latent frames that a patch takes together
    return layers if frames == 1 else _means(layers, [min(along, latent - k) for k in range(0, latent, along)])


def _means(layers: Float[Tensor, "rows frames h w"], sizes: list[int]) -> Float[Tensor, "rows tokens h w"]:
    return torch.stack([part.mean(1) for part in layers.split(sizes, dim=1)], dim=1)


def _rows(count: int, rows: int, state: StepState, name: str) -> Tensor:
    if rows // state.copies % count:
        raise RowMismatch(f"the mask of {name!r} has {count} rows, the batch {rows}")
    return state.row(count, rows)
