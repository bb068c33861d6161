"""Put recipes, and the prompts they read, beside a pipeline: `PYTHONPATH=scripts python -m figures.prompts FOLDER`."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np

from figures import world

COUNT = 3000
"""Prompts: 64 tokens of each picture are recorded."""
PAIRS = 68
"""Pairs of captions of each lever."""
PURPOSE = 71
"""Keeps them apart from other captions."""
LEVERS = (
    *("cat", "panda", "robot", "bee"),
    *("hood", "helmet", "grin", "jaw"),
    *("round ears", "slit eyes", "whiskers", "beak"),
)
"""Wholes, halves and parts that `levers.toml` makes concepts of."""


def write(folder: Path, count: int = COUNT, pairs_of_each: int = PAIRS) -> None:
    """`recipe.toml` with the captions of `count` figures, all of which say everything; `levers.toml` with pairs of captions."""
    said = world.captions(world.sample(count, seed=(0, PURPOSE)), seed=(0, PURPOSE))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"text": caption}) + "\n" for caption in said))
    (folder / "pairs").mkdir(exist_ok=True)
    for concept in LEVERS:
        lines = [json.dumps(dict(zip(("positive", "negative"), both, strict=True))) for both in pairs(concept, pairs_of_each)]
        (folder / "pairs" / f"{concept}.jsonl").write_text("\n".join(lines) + "\n")
    for name in ("recipe.toml", "levers.toml"):
        shutil.copy(Path(__file__).with_name(name), folder)


def pairs(concept: str, n: int) -> list[tuple[str, str]]:
    """Captions of figures with a concept, and of the same figures with what each had in its place."""
    own = (0, PURPOSE, 1 + world.CONCEPTS.index(concept))
    drawn = world.sample(40 * n, seed=own)
    shown = np.any([drawn[slot] > 0 for slot in world.parts_of(concept)], 0)  # something is there to be told apart from it
    rows = (~world.present(drawn, (concept,))[:, 0] & shown).nonzero()[0][:n]
    factors = {name: values[rows] for name, values in drawn.items()}
    both = (world.captions(each, seed=own) for each in (world.edited(factors, {concept: True}), factors))
    return [*zip(*both, strict=True)]


if __name__ == "__main__":
    write(Path(sys.argv[1]))
