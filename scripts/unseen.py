"""Concepts that no code was made with: `python scripts/unseen.py [FOLDER] [--work FOLDER] [--out measured.json]`.

Trains each concept of a recipe from its ten and ten sentences, with every default, in a bank of its own, and measures it with
the scorer and prompts of the recipe in `test/`, which training never sees. About ten minutes a concept.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import steerlib as sl
from steerlib.evaluation.text import judge_for
from steerlib.training.directions.studio import Studio
from steerlib.training.package.directions import assemble, choose, evaluate, sites_to_try
from steerlib.training.recipe import DirectionRecipe

RECIPES = Path(__file__).parent.parent / "concept_banks" / "recipes"
KEPT = ("concept", "label", "method", "site", "amount", "moved", "answers", "conditions", "response", "also", "passes")
"""What is kept of each record."""


def validity(test: DirectionRecipe) -> dict[str, Any]:
    """On how many texts it never saw the scorer names the concept; calling one ordinary is an error too."""
    texts, concepts = test.read_held_out()
    return {"scorer": {"accuracy": round(judge_for(test.scorers).accuracy(texts, concepts), 4), "texts": len(texts)}}


def main(
    recipes: Annotated[Path, typer.Argument(help="a folder with recipe.toml and test/recipe.toml")] = RECIPES / "fresh",
    work: Annotated[Path, typer.Option(help="where a run that stops goes on")] = Path("out/unseen"),
    out: Annotated[Path | None, typer.Option(help="write the figures here; default: measured.json in the folder")] = None,
) -> None:
    """Train and measure."""
    recipe, test = (DirectionRecipe.from_file(recipes / name) for name in ("recipe.toml", "test/recipe.toml"))
    model, tokenizer = sl.load(recipe.source)
    folder = work / recipe.digest[:16]
    studio, judge = Studio(model, tokenizer, recipe, sites_to_try(model, recipe), folder), judge_for(recipe.scorers)
    scorer = validity(test)
    records: list[Any] = []
    for concept in recipe.concepts:
        bank = assemble(studio, {concept.name: choose(studio, judge, concept)})
        records += evaluate(model, tokenizer, bank, test, work=folder, concepts=[concept.name])
    (out or recipes / "measured.json").write_text(
        json.dumps([{key: record[key] for key in KEPT} | scorer for record in records], indent=1, sort_keys=True) + "\n"
    )


if __name__ == "__main__":
    typer.run(main)
