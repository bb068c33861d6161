"""Figures as what a pipeline learns to draw."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scenes.judges import ABSENT
from scenes.painting import Batch, Look, PaintingRecipe, Subject, weighed
from scenes.wording import Course, Group, Lesson

from figures import reading, world
from steerlib.evaluation.pictures import draw_as_told

SAID = (*world.SLOTS, "hue", "background")
"""Factors that captions speak of; where a figure is, they never say."""
GROUPS = {"figures": Group(1, {name: len(world.VALUES[name]) for name in SAID})}


def figures() -> Subject:
    """The subject, whose pictures are read by the nearest render."""
    return Subject(world.vocabulary(), Course(GROUPS, lessons), batch_of, look, SAID)


def batch_of(recipe: PaintingRecipe, n: int, *seed: int) -> Batch:
    """`n` pictures, the same for the same seed."""
    drawn = world.draw(n, seed=(recipe.seed, *seed))
    said = world.captions(drawn.factors, seed=(recipe.seed, *seed), drop=recipe.drop)
    return weighed(said, drawn.pixels, drawn.regions == 0, recipe, *seed)


def lessons(seed: tuple[int, ...], batch: int, drop: float) -> Iterator[Lesson]:
    """Captions, and what is there; a hue only where something has one."""
    factors = world.sample(batch, seed=seed)
    told = reading.told(factors)
    truth = {name: torch.from_numpy(factors[name]).long() for name in SAID}
    truth = {name: value.masked_fill(~torch.from_numpy(told[name]), ABSENT) for name, value in truth.items()}
    yield Lesson("figures", world.captions(factors, seed=seed, drop=drop), truth, ("figures",))


def look(pipe: Any, n: int, seed: tuple[int, ...]) -> Look:
    """Pictures for captions that say everything, and the share of each factor that is drawn as asked, where it shows; `all` is
    the share of pictures where everything is, `off` how far they are from renders."""
    asked = world.draw(n, seed=seed)
    drawn = draw_as_told(pipe, world.captions(asked.factors, seed=seed))
    seen, told = reading.read(drawn), reading.told(asked.factors)
    right = {name: (seen.factors[name] == asked.factors[name]) | ~told[name] for name in SAID}
    found = {name: float(right[name][told[name]].mean()) for name in SAID}
    every = np.all([*right.values()], 0)
    return Look(asked.pixels, drawn, found | {"all": float(every.mean()), "off": float(seen.error.mean())})
