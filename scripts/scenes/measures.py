"""How well edits of pictures do what they should, where every cause is known.

Judges read the unsteered and the steered picture from the same noise, *before* and *after*. An intervention sets one factor,
of objects that of all of them. `B` pictures.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scenes import world
from scenes.judges import ABSENT, OF_OBJECTS, Readings, truth
from steerlib.errors import BadRecipe
from steerlib.evaluation.pictures import Pictures

WHOLE = ("scene", "light", "side", "height", "background", "ground")
"""Factors that judges read once a picture."""
DIRECTIONS = 256
"""On which pictures are projected to compare their distributions."""
TOLD = ("scene", "side", "background", "ground", "shape", "hue", "size", "texture")
"""Factors that captions name and that have a place; the bank has a concept for each of their values. Light and height are the
scene's."""


def values(factor: str) -> tuple[str, ...]:
    """What a factor can be; those of objects go without a number."""
    return world.OBJECT[factor] if factor in world.OBJECT else world.VALUES[factor]


class Cause(NamedTuple):
    """An intervention."""

    factor: str
    value: str

    @property
    def index(self) -> int:
        """The value as judges write it."""
        return values(self.factor).index(self.value) + (self.factor == "shape")

    @property
    def sets(self) -> dict[str, str]:
        """Factors of `scenes` that it sets."""
        of_objects = self.factor in world.OBJECT
        return {f"{self.factor}.{k}" if of_objects else self.factor: self.value for k in range(world.MOST if of_objects else 1)}

    @property
    def followers(self) -> set[str]:
        """Factors that follow the one that is set, as judges name them."""
        return {name.partition(".")[0] for name in world.descendants(next(iter(self.sets)))} - {self.factor}


def every() -> list[Cause]:
    """All values of all factors that captions name."""
    return [Cause(factor, value) for factor in TOLD for value in values(factor)]


# -- from readings -----------------------------------------------------------------------------------------------


def effectiveness(before: Readings, after: Readings, cause: Cause) -> float:
    """Share of pictures, or of the objects that were there, that show the value afterwards."""
    shows = after[cause.factor] == cause.index
    return float((shows if cause.factor in WHOLE else shows[before["shape"] > 0]).float().mean())


def preservation(before: Readings, after: Readings, cause: Cause) -> dict[str, float]:
    """For each factor that should stay: share of pictures, or of objects still there, where it reads as before.

    `cells`: pictures with objects in the same places as before.
    """
    there = before["shape"] > 0
    still = there & (after["shape"] > 0)
    stay = [name for name in (*WHOLE, *OF_OBJECTS) if name != cause.factor and name not in cause.followers]
    same = {name: after[name] == before[name] for name in stay}
    found = {name: _share(s if name in WHOLE else s[still]) for name, s in same.items()}
    return found | {"cells": float(((after["shape"] > 0) == there).all(-1).float().mean())}


def _share(same: Tensor) -> float:
    """Nothing is kept of objects that are gone."""
    return float(same.float().mean()) if len(same) else 0.0


def propagation(after: Readings, cause: Cause, asked: world.Scenes) -> dict[str, float]:
    """For each factor that follows: share that reads as it would be, had the scene's cause been set (`world.redraw`)."""
    due = truth("scenes", world.redraw(asked, cause.sets).factors)
    found = {
        name: (after[name] == due[name])[due[name] != ABSENT if name in WHOLE else due["shape"] > 0] for name in cause.followers
    }
    return {name: float(share.float().mean()) for name, share in found.items() if len(share)}


# -- from pixels -------------------------------------------------------------------------------------------------


def sliced_wasserstein(a: Pictures, b: Pictures) -> float:
    """Mean distance of sorted projections on random directions (Rabin et al. 2011); pixels from 0 to 1, as many of each."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.from_numpy(p.reshape(len(p), -1)).float() / 255 for p in (a, b))
    rays = torch.nn.functional.normalize(torch.randn(x.shape[1], DIRECTIONS, generator=g), dim=0)
    return float(((x @ rays).sort(0).values - (y @ rays).sort(0).values).abs().mean())


def outside(before: Pictures, after: Pictures, cause: Cause, asked: world.Scenes) -> float:
    """Mean change of pixels where neither the true scene nor its counterfactual shows the factor, over that where one does."""
    inside = painted(cause, asked) | painted(cause, world.redraw(asked, cause.sets))
    change = np.abs(after.astype(np.float32) - before).mean(-1)
    if inside.all() or not change[inside].any():
        return 0.0
    return float(change[~inside].mean() / change[inside].mean())


def painted(cause: Cause, drawn: world.Scenes) -> NDArray[np.bool_]:
    """`[B, 32, 32]`: where a factor or one that follows it shows."""
    names = {*cause.sets}.union(*(world.descendants(name) for name in cause.sets))
    regions = {region for name in names for region in world.PAINTS[name]}
    return np.isin(drawn.regions, [world.REGIONS.index(region) for region in regions])


# -- one intervention --------------------------------------------------------------------------------------------


class Effect(NamedTuple):
    """What an edit did, shares from 0 to 1."""

    effectiveness: float
    preservation: float
    propagation: float
    """Not a number where nothing follows the factor."""
    outside: float
    realism: float
    """Sliced Wasserstein distance to the true counterfactuals, over that of the unsteered pictures."""
    least: str
    """The factor that was preserved least."""


def effect(cause: Cause, asked: world.Scenes, before: Pictures, after: Pictures, judge: Any) -> Effect:
    """All that the pictures tell of an edit."""
    was, now, true = judge.read(before), judge.read(after), world.redraw(asked, cause.sets).pixels
    kept, followed = preservation(was, now, cause), propagation(now, cause, asked)
    return Effect(
        effectiveness(was, now, cause),
        float(np.mean(list(kept.values()))),
        float(np.mean(list(followed.values()))) if followed else float("nan"),
        outside(before, after, cause, asked),
        sliced_wasserstein(after, true) / sliced_wasserstein(before, true),
        min(kept, key=lambda name: kept[name]),
    )


def cases(cause: Cause, n: int, *, seed: world.Seed) -> world.Scenes:
    """`n` scenes that do not show a value yet, though their causes admit it."""
    drawn = world.draw(n * 24, seed=seed)
    fits = np.ones(len(drawn.pixels), bool)
    for name, value in cause.sets.items():
        index = world.VALUES[name].index(value)
        fits &= world.admissible(name, drawn.factors, len(fits))[:, index] & (drawn.factors[name] != index)
    chosen = np.flatnonzero(fits)[:n]
    if len(chosen) < n:
        raise BadRecipe(
            f"expected {n} scenes in which {cause.factor} may become {cause.value}, found {len(chosen)} of {len(fits)}"
        )
    noise = {name: x[chosen] for name, x in drawn.noise.items()}
    factors = {name: x[chosen] for name, x in drawn.factors.items()}
    return world.Scenes(noise, factors, drawn.pixels[chosen], drawn.regions[chosen])
