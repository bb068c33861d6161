"""Pairs of captions for a recipe of pictures: a scene that is asked for with a value, and the same scene with another one.

What follows a scene's type in the world of `scenes.world` follows in its captions too, as when a person rewrites a prompt.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from scenes import measures, world
from scenes.experiment import every
from scenes.measures import Cause

PURPOSE = 61
"""Keeps these scenes apart from those that levers are measured on."""


def pairs(cause: Cause, n: int, *, seed: int = 0) -> list[tuple[str, str]]:
    """Captions that say a value, and the same that say another."""
    own = (seed, PURPOSE, every().index(cause))
    asked = measures.cases(cause, n, seed=own)
    said = world.redraw(asked, cause.sets).factors
    return [*zip(world.captions(said, seed=own), world.captions(asked.factors, seed=own), strict=True)]


def write(folder: Path, causes: Sequence[Cause], n: int) -> None:
    """The pairs of some values as the files that a recipe reads."""
    (folder / "pairs").mkdir(parents=True, exist_ok=True)
    for cause in causes:
        lines = [json.dumps({"positive": positive, "negative": negative}) + "\n" for positive, negative in pairs(cause, n)]
        (folder / "pairs" / f"{cause.value}.jsonl").write_text("".join(lines))
