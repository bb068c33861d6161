"""Captions for concepts that are made from captions alone: pairs for a recipe, and the same scenes in other words.

A pair asks for a scene with a value, and for the same scene with another one. They differ in the words for it alone, and leave
unsaid what follows from it: of a scene at night that is said to be under a pale sky the model draws the sky, and no night.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scenes import measures, world
from scenes.measures import Cause, every

PURPOSE = 61
"""Keeps these scenes apart from those that concepts are measured on."""
AROUND = ("ground", "background", "side")
"""What captions say of a scene beside its type and its things."""
NEVER_UNSAID = ("shape",)
"""Captions have no other word for a thing."""


def pairs(cause: Cause, n: int, *, seed: int = 0) -> list[tuple[str, str]]:
    """Captions that say a value, and the same that say another; of several words for a thing, always the first."""
    own = (seed, PURPOSE, every().index(cause))
    factors = measures.cases(cause, n, seed=own).factors
    own_value = {name: np.full_like(factors[name], world.VALUES[name].index(v)) for name, v in cause.sets.items()}
    both = [reworded(world.captions(each, seed=own), 0) for each in ({**factors, **own_value}, factors)]
    for factor in sorted(cause.followers & {*world.WORDS} - {*NEVER_UNSAID}):
        both = [unsaid(captions, factor) for captions in both]
    return [*zip(*both, strict=True)]


def bare(n: int, *, seed: int = 0) -> list[str]:
    """Captions that say things and the type of scene, and nothing of what is around: that is the model's to draw. With things
    unsaid as well, captions are like none that it learned from."""
    own = (seed, PURPOSE, len(every()))
    said = reworded(world.captions(world.draw(n, seed=own).factors, seed=own), 0)
    for factor in AROUND:
        said = unsaid(said, factor)
    return said


def write(folder: Path, causes: Sequence[Cause], n: int) -> None:
    """The pairs of some values, and bare captions, as the files that a recipe reads."""
    (folder / "pairs").mkdir(parents=True, exist_ok=True)
    for cause in causes:
        lines = [json.dumps({"positive": positive, "negative": negative}) + "\n" for positive, negative in pairs(cause, n)]
        (folder / "pairs" / f"{cause.value}.jsonl").write_text("".join(lines))
    (folder / "graph.txt").write_text("\n".join(bare(n)) + "\n")


def reworded(captions: Sequence[str], which: int) -> list[str]:
    """The same captions in the words that stand at a place of `world.WORDS`: the first (0) or the last (-1) of each kind."""
    instead = {phrase: phrases[which] for kinds in world.WORDS.values() for phrases in kinds.values() for phrase in phrases}
    return [_replaced(caption, instead) for caption in captions]


def unsaid(captions: Sequence[str], factor: str) -> list[str]:
    """The same captions without a word of a factor."""
    nothing = dict.fromkeys((phrase for phrases in world.WORDS[factor].values() for phrase in phrases), "")
    return [" ".join(_replaced(caption, nothing).split()) for caption in captions]


def phrase(cause: Cause) -> str:
    """How captions say a value."""
    return world.WORDS[cause.factor][cause.value][0]


def _replaced(caption: str, instead: dict[str, str]) -> str:
    known = "|".join(map(re.escape, sorted(instead, key=len, reverse=True)))
    return re.sub(rf"\b({known})\b", lambda m: instead[m[0]], caption)
