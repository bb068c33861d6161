"""Find the causal graph of a bank of text latents: `python scripts/graph_bank.py RECIPE BANK`. Run it again to go on.

It is the last stage of `steerlib train`, for a bank that was made before: the recipe's `[graph]` says how. With `--forecasts`
the graph stays; effects over two levels or more, and how well it foretells, are measured again.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from steerlib import ConceptBank, load
from steerlib.training.package.latents import with_forecasts_of, with_graph_of
from steerlib.training.recipe import TextEncoderRecipe


def main(
    recipe: Annotated[Path, typer.Argument(help="recipe.toml")],
    bank: Annotated[str, typer.Argument(help="the bank: a folder, or a name")],
    out: Annotated[Path, typer.Option(help="folder of the bank with its graph")] = Path("out/graphed"),
    work: Annotated[Path, typer.Option(help="where stages keep their results")] = Path("out/graph"),
    threads: Annotated[int, typer.Option(help="processor cores")] = 1,
    forecasts: Annotated[bool, typer.Option("--forecasts", help="keep the graph that is there")] = False,
) -> None:
    """Find, verify, foretell, and write it all down."""
    torch.set_num_threads(threads)
    read = TextEncoderRecipe.from_file(recipe)
    model, tokenizer = load(read.source)
    find = with_forecasts_of if forecasts else with_graph_of
    made = find(model.to(torch.bfloat16), tokenizer, ConceptBank.from_pretrained(bank), read, work)
    made.save_pretrained(out)
    print(json.dumps(made.provenance["graph"], indent=1))


if __name__ == "__main__":
    typer.run(main)
