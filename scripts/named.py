"""Concepts from their names, beside prompting: `python scripts/named.py [MODEL] [--dtype bfloat16] [--out named.json]`.

Makes each concept of a recipe from nothing but its name, in a bank of its own, and measures it with the recipe's prompts and
scorer, which `sl.make` never sees: ratio to prompting, also of a random word's direction of the same length at the same place;
KL on unrelated text; share of repeated word trigrams of greedy answers. Goes on where it stopped. Minutes a concept.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer

import steerlib as sl
from steerlib.evaluation import comparison
from steerlib.evaluation.comparison import Condition, Unrelated
from steerlib.evaluation.report import UNDEFINED, markdown
from steerlib.evaluation.score import best_prompt, joint, ratios
from steerlib.evaluation.text import judge_for, repeated
from steerlib.training.directions.lens import word_directions
from steerlib.training.directions.levers import Lever, bank_of
from steerlib.training.directions.methods.word import random_word
from steerlib.training.recipe import DirectionRecipe
from steerlib.training.store import remembered

RECIPE = Path(__file__).parent.parent / "concept_banks" / "recipes" / "named" / "test" / "recipe.toml"
SHOWN: tuple[str, ...] = ("unsteered", "prompted", "steered", "random word")
GREEDY = 60
"""New tokens of greedy answers, in which loops show."""
TEXTS = 24
"""Ordinary texts for the direction of a random word."""


class Bench:
    """A model, and what every concept of a recipe is measured with."""

    def __init__(self, recipe: DirectionRecipe, source: str, work: Path, dtype: torch.dtype):
        self.recipe, self.source, self.work = recipe, source, work
        self.model, self.tokenizer = sl.load(source, dtype=dtype)
        self.judge = judge_for(recipe.scorers)
        self.unrelated = Unrelated(self.model, self.tokenizer, recipe.read_texts(recipe.unrelated))

    def made(self, name: str) -> tuple[sl.ConceptBank, float]:
        """A bank of one concept, and the seconds it took; from the work folder where it is there already."""
        folder = self.work / "banks" / name
        if not (folder / "bank.json").is_file():
            begun = time.monotonic()
            bank = sl.make(self.model, [name], tokenizer=self.tokenizer, source=self.source, seed=self.recipe.seed)
            bank.save_pretrained(folder)
            (folder.parent / f"{name}.seconds").write_text(f"{time.monotonic() - begun:.1f}")
        return sl.ConceptBank.from_pretrained(folder), float((folder.parent / f"{name}.seconds").read_text())

    def random_word(self, bank: sl.ConceptBank, name: str) -> Condition:
        """The direction of a random word, as long as what the concept adds at its useful amount, at its first site."""
        concept, site = bank[name], bank.site_of(bank[name])
        length = abs(concept.useful or 0.0) * concept.unit * float(bank.rows(concept).write.norm())
        word = random_word(self.tokenizer, seed=[c.name for c in self.recipe.concepts].index(name) + 1)
        texts = self.recipe.read_texts(self.recipe.reference)[:TEXTS]
        found = word_directions(self.model, self.tokenizer, [word], texts, sites=[site])[word][site]
        norms = {site: bank.sites[site].norm or length}
        return Condition(
            name=f"random word: {word}",
            bank=bank_of(Lever(moves={site: found / found.norm() * length}), norms),
            edits={"lever": 1.0},
        )

    def measured(self, name: str) -> dict[str, Any]:
        """All figures of a concept."""
        bank, seconds = self.made(name)
        concept = next(entry for entry in self.recipe.concepts if entry.name == name)
        column, prompts = self.judge.names.index(name), self.recipe.read_prompts("evaluation")
        words = [Condition(name="prompted", instruction=asked) for asked in concept.asked]
        steered = Condition(name="steered", bank=bank, edits={name: bank[name].useful or 0.0})
        conditions = [Condition(name="unsteered"), *words, steered, self.random_word(bank, name)]
        how: Any = {"new_tokens": self.recipe.new_tokens, "seeds": range(self.recipe.seeds)}
        scores = comparison.answer(self.model, self.tokenizer, conditions, prompts, self.judge, **how)
        best = best_prompt(scores.of(range(1 + len(words))), column)
        shown = scores.of([0, best, len(words) + 1, len(words) + 2])
        cells = dict(zip(SHOWN, joint(shown, column).total.mean(1), strict=True))
        kinds = [conditions[0], conditions[best], steered]
        greedy = comparison.answer(self.model, self.tokenizer, kinds, prompts, self.judge, seeds=(None,), new_tokens=GREEDY)
        loops = [float(np.mean([repeated(text) for text in texts[0]])) for texts in greedy.texts]
        return {
            "concept": name,
            "site": bank.site_of(bank[name]),
            "method": bank[name].source,
            "amount": bank[name].useful,
            "seconds": seconds,
            "word": conditions[-1].name,
            "ratio": ratios(cells),
            "joint": {kind: values.tolist() for kind, values in cells.items()},
            "concept score": [float(each) for each in shown.concepts[..., column].mean((1, 2))],
            "kl": self.unrelated.side_effects(steered).kl,
            "repeated": dict(zip(SHOWN, loops, strict=False)),
            "examples": [list(texts[0][:3]) for texts in greedy.texts],
        }


def table(figures: Mapping[str, Any]) -> str:
    """A line a concept, all of them together, and how they were measured."""

    def line(name: str, several: list[Mapping[str, Any]]) -> tuple[str, ...]:
        found = ratios({kind: np.concatenate([record["joint"][kind] for record in several]) for kind in SHOWN})
        said = [f"{found[kind]['ratio']:.2f}" if found[kind] else UNDEFINED for kind in SHOWN[2:]]
        kl, seconds = (np.mean([record[key] for record in several]) for key in ("kl", "seconds"))
        loops = [np.mean([record["repeated"][kind] for record in several]) for kind in SHOWN[:3]]
        return name, *said, f"{kl:.2f}", ", ".join(f"{each:.2f}" for each in loops), f"{seconds:.0f}"

    records, scorer = figures["concepts"], figures["scorer"]
    head = "concept | ratio to prompting | random word | KL | repeated trigrams: unsteered, prompted, steered | seconds"
    lines = [line(record["concept"], [record]) for record in records] + [line("**together**", records)]
    how = "{model} in {dtype}, threads: {threads}, {answers} answers to each condition".format_map(figures)
    said = f"the scorer names the concept of {scorer['accuracy']:.0%} of {scorer['texts']} texts that it never saw"
    return f"{markdown(head, lines)}\n\n{how}; {said}."


def main(
    model: Annotated[str, typer.Argument(help="folder, Hub id or package: (default: the recipe's)")] = "",
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="of the model's weights")] = "float32",
    recipe: Annotated[Path, typer.Option(help="names, prompts that ask for them, texts for the scorer")] = RECIPE,
    work: Annotated[Path, typer.Option(help="where a run that stops goes on")] = Path("out/named"),
    out: Annotated[Path | None, typer.Option(help="write the figures here as JSON")] = None,
) -> None:
    """Make and measure."""
    read = DirectionRecipe.from_file(recipe, to_train=False)
    bench = Bench(read, model or read.source, work, getattr(torch, dtype))
    names, (texts, labels) = [concept.name for concept in read.concepts], read.read_held_out()
    figures = {
        "model": Path(bench.source).stem,
        "dtype": dtype,
        "answers": len(read.read_prompts("evaluation")) * read.seeds,
        "threads": torch.get_num_threads(),
        "scorer": {"accuracy": bench.judge.accuracy(texts, labels), "texts": len(texts)},
        "concepts": [remembered(work / f"{name}.json", lambda name=name: bench.measured(name)) for name in names],
    }
    print(table(figures))
    if out is not None:
        out.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
