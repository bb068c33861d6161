"""Scenes, and a few faces, as what a pipeline learns to draw."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from scenes import faces, judges, world
from scenes.painting import Batch, Look, PaintingRecipe, Subject, weighed
from scenes.pipeline import vocabulary
from scenes.wording import Course, Group, Lesson
from steerlib.evaluation.pictures import draw_as_told

ASKED: tuple[str, ...] = ("shape", "hue", "size", "scene")
"""Factors that decide when a model is good enough."""
GROUPS = {
    "scenes": Group(1, judges.KINDS["scenes"].whole),
    "faces": Group(1, judges.KINDS["faces"].whole),
    "cells": Group(len(world.CELLS), judges.KINDS["scenes"].cells),
}
"""Factors by what they are factors of."""


def scenes(judge: judges.PictureJudge) -> Subject:
    """The subject, whose pictures a judge reads."""

    def look(pipe: Any, n: int, seed: tuple[int, ...]) -> Look:
        asked = world.draw(n, seed=seed)
        drawn = draw_as_told(pipe, world.captions(asked.factors, seed=seed))
        return Look(asked.pixels, drawn, judges.accuracy(judge.read(drawn), judges.truth("scenes", asked.factors)))

    return Subject(vocabulary(), Course(GROUPS, lessons), batch_of, look, ASKED)


def batch_of(recipe: PaintingRecipe, n: int, *seed: int) -> Batch:
    """`n` pictures, the same for the same seed."""
    few, own = round(n * recipe.faces), (recipe.seed, *seed)
    drawn = world.draw(n - few, seed=own), faces.draw(few, seed=own)
    said = [
        maker.captions(pictures.factors, seed=own, drop=recipe.drop)
        for maker, pictures in zip((world, faces), drawn, strict=True)
    ]
    plain = [np.isin(drawn[0].regions, [world.REGIONS.index(name) for name in ("background", "ground")]), drawn[1].regions < 2]
    return weighed(sum(said, []), np.concatenate([d.pixels for d in drawn]), np.concatenate(plain), recipe, *seed)


def lessons(seed: tuple[int, ...], batch: int, drop: float) -> Iterator[Lesson]:
    """Captions of scenes, and an eighth as many of faces."""
    for kind, maker, n in (("scenes", world, batch - batch // 8), ("faces", faces, batch // 8)):
        factors = maker.solve(maker.noise(n, seed=seed), {})
        said = maker.captions(factors, seed=seed, drop=drop)
        yield Lesson(kind, said, judges.truth(kind, factors), ("scenes", "cells") if kind == "scenes" else (kind,))
