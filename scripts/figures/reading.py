"""What a picture shows: the factors of the render that is nearest to it, found by trying all of them. Nothing is learned.

A render is four slots and a place, in colours that are found first. Its squared error is a sum over pixels, so that all 256
figures at all 81 places are compared by one convolution. `B` pictures.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import conv2d

from figures import world

BATCH = 64
"""Pictures that are read together."""
EDGE = world.OFF
"""Pixels around a figure in the middle: it can be off by as many."""


class Readings(NamedTuple):
    """Factors, and how far pictures are from the renders of these."""

    factors: dict[str, NDArray[np.int8]]
    """As `world.Figures.factors`. Where there is nothing to tell it by (a hue without ears and mouth, a place without any part)
    a factor is one of its values all the same; `told` says where."""
    error: NDArray[np.float32]
    """`[B]`: root mean square difference, pixels from 0 to 1."""


def read(pixels: NDArray[np.uint8]) -> Readings:
    """The nearest render of each picture."""
    parts = [_nearest(pixels[start : start + BATCH]) for start in range(0, len(pixels), BATCH)]
    factors = {name: np.concatenate([part[name] for part in parts]) for name in world.VALUES}
    off = (world.render(factors)[0].astype(np.float32) - pixels) / 255
    return Readings(factors, np.sqrt(np.square(off).mean((1, 2, 3))))


def told(factors: world.Factors) -> dict[str, NDArray[np.bool_]]:
    """By factor, the pictures `[B]` that show it."""
    there = {slot: factors[slot] > 0 for slot in world.SLOTS}
    everywhere, somewhere = np.ones(len(factors["x"]), bool), np.any([*there.values()], 0)
    coloured = there["ears"] | there["mouth"]
    own = {"hue": coloured, "x": somewhere, "y": somewhere}
    return {name: own.get(name, everywhere) for name in world.VALUES}


def _nearest(pixels: NDArray[np.uint8]) -> dict[str, NDArray[np.int8]]:
    hue, ground, cost = _colours(torch.from_numpy(pixels).float() / 255)
    gain = cost[:, 1:] - cost[:, :1]
    best = conv2d(gain, _templates()).flatten(1).argmin(1).numpy()
    places = 2 * world.OFF + 1
    figure, y, x = np.unravel_index(best, (4**4, places, places))
    found = dict(zip(world.SLOTS, np.unravel_index(figure, (4,) * 4), strict=True))
    found |= {"hue": hue.numpy(), "background": ground.numpy(), "x": x, "y": y}
    return {name: np.asarray(found[name], np.int8) for name in world.VALUES}


def _colours(x: Float[Tensor, "B 32 32 3"]) -> tuple[Tensor, Tensor, Float[Tensor, "B 5 32 32"]]:
    """Hue and background with which paints come nearest to all pixels, and the squared error of each paint at each pixel."""
    count = len(world.HUES), len(world.BACKGROUNDS)
    hue, ground = (np.ravel(z).astype(np.int8) for z in np.indices(count))
    paints = torch.from_numpy(world.palette({"hue": hue, "background": ground, "x": hue})).float() / 255
    kinds = torch.unique(paints.flatten(0, 1), dim=0)
    cost = (x[:, :, :, None] - kinds).square().sum(-1).movedim(-1, 1)  # [B, kinds, 32, 32]
    own = torch.stack([torch.stack([(kinds == paint).all(-1).nonzero()[0, 0] for paint in some]) for some in paints])
    least = torch.stack([cost[:, some].amin(1).sum((1, 2)) for some in own], 1).argmin(1)
    chosen = cost.gather(1, own[least][:, :, None, None].expand(-1, -1, *cost.shape[2:]))
    return least // count[1], least % count[1], chosen


@cache
def _templates() -> Any:
    """`[figures, paints - 1, h, w]`: which pixels every figure paints with what, in the middle of a picture."""
    slots = dict(zip(world.SLOTS, np.indices((4,) * 4).reshape(4, -1).astype(np.int8), strict=True))
    middle = np.full(4**4, world.OFF, np.int8)
    paint = world.layers(slots | {"x": middle, "y": middle})[0][:, EDGE:-EDGE, EDGE:-EDGE]
    kinds = np.arange(1, len(world.PAINTS), dtype=np.uint8)
    return torch.from_numpy((paint[:, None] == kinds[:, None, None]).astype(np.float32))
