"""Put the recipe of the encoders, and its prompts, beside a pipeline: `PYTHONPATH=scripts python -m figures.prompts FOLDER`."""

import json
import shutil
import sys
from pathlib import Path

from figures import world

COUNT = 4000
"""Prompts: 64 tokens of each picture are recorded."""
PURPOSE = 71
"""Keeps them apart from other captions."""


def write(folder: Path, count: int = COUNT) -> None:
    """`recipe.toml` and the captions of `count` figures, all of which say everything."""
    said = world.captions(world.sample(count, seed=(0, PURPOSE)), seed=(0, PURPOSE))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"text": caption}) + "\n" for caption in said))
    shutil.copy(Path(__file__).with_name("recipe.toml"), folder)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
