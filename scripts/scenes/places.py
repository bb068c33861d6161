"""What is where: the factors of scenes by token of a site, from exact regions. `B` pictures, `N` tokens, a square of them."""

from collections.abc import Sequence
from math import isqrt

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from scenes import world

LEVERS = ("scene", "side", "background", "ground", "shape", "hue", "size", "texture")
"""Factors that captions name and that have a place: each is one lever of the scenes bank. Light and height are the scene's."""
NOWHERE = -1
"""In tables of values: the factor does not show at this token."""
SHARE = 0.5
"""Of a token's pixels , more than which have to belong to a region for the token to count as its own."""


def covered(regions: NDArray[np.uint8], names: Sequence[str], count: int) -> Float[Tensor, "B N"]:
    """Share of the pixels of each of `count` tokens that belong to some regions."""
    inside = np.isin(regions, [world.REGIONS.index(name) for name in names]).astype(np.float32)
    edge = isqrt(count)
    pixels = world.SIDE // edge
    return torch.from_numpy(inside.reshape(-1, edge, pixels, edge, pixels).mean((2, 4)).reshape(len(regions), count))


def objects(drawn: world.Scenes, count: int) -> Bool[Tensor, "B N"]:
    """Tokens on an object."""
    return where("hue", drawn, count) != NOWHERE


def values(factor: str) -> tuple[str, ...]:
    """What a factor can be; those of objects go without a number."""
    return world.OBJECT[factor] if factor in world.OBJECT else world.VALUES[factor]


def where(factor: str, drawn: world.Scenes, count: int) -> Int[Tensor, "B N"]:
    """The value of a factor at each token, `NOWHERE` where it does not show."""
    if factor in world.OBJECT:
        found = torch.full((len(drawn.regions), count), NOWHERE)
        for k in range(world.MOST):
            own = covered(drawn.regions, [f"object.{k}"], count) > SHARE
            found = torch.where(own, _whole(drawn.factors[f"{factor}.{k}"], count), found)
        return found
    region = [factor] if factor in world.REGIONS else list(world.REGIONS)
    own = covered(drawn.regions, region, count) > SHARE
    return torch.where(own, _whole(drawn.factors[factor], count), torch.full_like(own, NOWHERE, dtype=torch.long))


def _whole(factor: NDArray[np.int8], count: int) -> Int[Tensor, "B N"]:
    return torch.from_numpy(factor).long()[:, None].expand(-1, count)
