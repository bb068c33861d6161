"""Train a bank from a recipe: `python scripts/train_bank.py recipe.toml`. The same as `steerlib train`."""

import typer

from steerlib.cli import train

if __name__ == "__main__":
    typer.run(train)
