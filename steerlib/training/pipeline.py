"""The stages of training, in order. Each writes a file, so a run that stops goes on where it was."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ..bank.concept_bank import BaseModel, ConceptBank, SiteFacts
from ..bank.concepts import Concept, Gate, Part
from ..encoders import Directions
from ..errors import BadRecipe
from ..evaluation.report import picture
from ..evaluation.text import Judge, counting
from ..hosts import host_for, load
from ..text import progress
from .calibrate.doses import Choice, Search, statistics
from .calibrate.measure import ANSWERING, measure
from .directions.levers import Lever, TokenGate
from .directions.methods import METHODS
from .directions.studio import PRESENT, Detector, Studio, remembered
from .package.card import PICTURE, card
from .package.latents import train_latents
from .package.pictures import train_pictures
from .recipe import ConceptRecipe, Recipe

FEW = 8
"""With fewer concepts than this, a scorer learns ordinary texts as a class of their own."""


def train(target: Any, recipe: Recipe, *, tokenizer: Any = None, work: str | os.PathLike[str] | None = None) -> ConceptBank:
    """Make a bank for a model: read, fit, choose by measured effect, calibrate, evaluate.

    `target` is a language model, a diffusers pipeline for a recipe with levels, or None to load `recipe.source`. `work` keeps
    what each stage made; with the same recipe a second run goes on from there. Raises `BadRecipe` before any model is loaded
    if the recipe cannot work.
    """
    recipe.check()
    tried = {method for methods in (recipe.methods, *(concept.methods for concept in recipe.concepts)) for method in methods}
    if unknown := sorted(tried - set(METHODS)):
        raise BadRecipe(f"unknown methods {', '.join(unknown)}; known are {', '.join(METHODS)}")
    folder = _work_folder(work, recipe)
    if recipe.has_levels:
        pipe = load(recipe.source)[0].to(best_device()) if target is None else target
        return _in_folder(folder, lambda place: train_pictures(pipe, recipe, place))
    if target is None or tokenizer is None:
        loaded, tokenizer = load(recipe.source)
        target = loaded.to(best_device()) if target is None else target
    if recipe.encoders:
        return _in_folder(folder, lambda place: train_latents(target, tokenizer, recipe, place))
    sites = [f"layers.{layer}" for layer in layers_to_try(target, recipe)]
    studio, judge = Studio(target, tokenizer, recipe, sites, folder), judge_for(recipe)
    choices = {concept.name: choose(studio, judge, concept) for concept in progress(recipe.concepts, "concepts")}
    bank = assemble(studio, choices)
    records = evaluate(target, tokenizer, bank, recipe, judge=judge, studio=studio, choices=choices, work=folder)
    if recipe.ship == "clearing":
        kept = [record["concept"] for record in records if clears(record)]
        bank = assemble(studio, {name: choices[name] for name in kept})
    return with_effects(bank, recipe, records)


def choose(studio: Studio, judge: Judge, concept: ConceptRecipe) -> Choice:
    """The best method, site and strength for a concept, or what an earlier run chose."""

    def search() -> dict[str, Any]:
        run = Search(studio.model, studio.tokenizer, concept, judge, studio.recipe)
        instruction = concept.asked[run.prompt]
        choice = run.run(studio.sites, lambda method, site: studio.bank(concept, instruction, method, site))
        studio.forget(concept)
        return choice.to_dict()

    path = studio.folder and studio.folder / "search" / f"{concept.name}.json"
    return Choice.from_dict(remembered(path, search))


def clears(record: dict[str, Any]) -> bool:
    """Whether a concept clears every bar that a shipped one has to."""
    return all(record["passes"].values())


def judge_for(recipe: Recipe, *, shuffle: bool = False) -> Judge:
    """The scorer of a recipe's concepts; with `shuffle`, one that learned nothing."""
    counted = {concept.name: counting(concept.scorer) for concept in recipe.concepts if concept.scorer is not None}
    read = {concept.name: recipe.read_scoring(concept) for concept in recipe.concepts if concept.name not in counted}
    few = len(read) < FEW
    return Judge.fit(
        {name: positive for name, (positive, _, _) in read.items()},
        ordinary=[text for _, negative, _ in read.values() for text in negative] if few else (),
        counters=counted,
        shuffle=shuffle,
    )


def best_device() -> torch.device:
    """An accelerator where there is one."""
    return (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None) or torch.device("cpu")


def layers_to_try(model: Any, recipe: Recipe) -> tuple[int, ...]:
    """The recipe's layers, or six spread over the first two thirds of the model."""
    depth = sum(name.removeprefix("layers.").isdigit() for name in host_for(model).sites())
    layers = recipe.layers or tuple(sorted({round(depth * (0.2 + 0.1 * i)) for i in range(6)}))
    if not depth or max(layers) >= depth or min(layers) < 0:
        raise BadRecipe(f"expected layers from 0 to {depth - 1}, got {layers}")
    return layers


def evaluate(
    model: Any,
    tokenizer: Any,
    bank: ConceptBank,
    recipe: Recipe,
    *,
    judge: Judge | None = None,
    studio: Studio | None = None,
    choices: dict[str, Choice] | None = None,
    work: Path | None = None,
    concepts: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Measure concepts of a bank on the recipe's evaluation prompts; one record a concept.

    With the `studio` and the `choices` of a training run, every method that was tried is measured beside what was chosen.
    """
    known = {concept.name: concept for concept in recipe.concepts}
    scorer = judge or judge_for(recipe)
    names = list(concepts or [name for name in known if name in bank.concepts])
    if strange := [name for name in names if name not in known]:
        raise BadRecipe(f"recipe {recipe.name!r} has no prompts for {', '.join(strange)}")
    chosen = replace(recipe, concepts=tuple(known[name] for name in names))
    place = studio or Studio(model, tokenizer, chosen, sorted({bank.site_of(bank[name]) for name in names}))
    return [
        remembered(
            work and work / "effects" / f"{name}.json",
            lambda name=name: measure(bank, known[name], scorer, place, choices[name] if choices else None),
        )
        for name in progress(names, "measuring on prompts used for nothing else")
    ]


def with_effects(bank: ConceptBank, recipe: Recipe, records: Sequence[dict[str, Any]]) -> ConceptBank:
    """The bank with measured effects and examples in its concepts and its card."""
    by_name = {record["concept"]: record for record in records}
    concepts = []
    for concept in bank.concepts.values():
        if (record := by_name.get(concept.name)) is not None:
            examples = tuple(f"{example['prompt']} → {example['steered']}" for example in record["examples"])
            concept = replace(concept, examples=examples, effects=record)
        concepts.append(concept)
    measured = bank.with_concepts(concepts)
    shown = [record for record in records if record["concept"] in bank.concepts]
    measured.pictures = {PICTURE: picture(shown)} if shown and find_spec("matplotlib") else {}
    return measured.with_concepts(concepts, card=card(measured, recipe, records, trust(recipe)))


def trust(recipe: Recipe) -> str:
    """How far the scorer can be trusted: what it makes of texts it never saw, beside one that learned shuffled labels."""
    texts, names = recipe.read_held_out()
    counted = [concept.name for concept in recipe.concepts if concept.scorer is not None]
    said = [f"{', '.join(counted)}: scored by counting."] if counted else []
    own = [concept.name for concept in recipe.concepts if concept.scorer is None and not recipe.read_scoring(concept)[2]]
    if own:
        said.append(f"{', '.join(own)}: scored by a classifier of the very examples it was made from, for want of others.")
    if texts:
        right, shuffled = (judge_for(recipe, shuffle=dealt).accuracy(texts, names) for dealt in (False, True))
        said.append(
            f"The scorer (all-MiniLM-L6-v2 and logistic regression) names the concept of {right:.1%} of {len(texts)} texts it "
            f"never saw; after learning shuffled labels, of {shuffled:.1%}."
        )
    return " ".join(said)


# -- stages --------------------------------------------------------------------------------------------------


def _in_folder(folder: Path | None, make: Callable[[Path], ConceptBank]) -> ConceptBank:
    """Make a bank in a folder, or in one that is gone afterwards."""
    if folder is not None:
        return make(folder)
    with TemporaryDirectory() as place:
        return make(Path(place))


def _work_folder(work: str | os.PathLike[str] | None, recipe: Recipe) -> Path | None:
    """The folder of this very recipe, so that results of another are never mixed in."""
    if work is None:
        return None
    return Path(work) / recipe.digest[:16]


def assemble(studio: Studio, choices: dict[str, Choice]) -> ConceptBank:
    """The bank of what was chosen, with its gates: one encoder a site, units in standard deviations."""
    recipe, known = studio.recipe, {concept.name: concept for concept in studio.recipe.concepts}
    rows: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def place(site: str, direction: Tensor, mean: Tensor) -> tuple[str, int]:
        rows.setdefault(site, []).append((direction, mean))
        return site, len(rows[site]) - 1

    def gate(name: str, found: TokenGate, label: str, **facts: Any) -> Concept:
        # a direction d reads <x, d> / |d|^2 - mean, so this one reads x @ read + bias
        site, index = place(found.site, found.read / found.read.square().sum(), -found.bias)
        source = "Fisher's discriminant of activations on ordinary text"
        return Concept(name=name, encoder=site, index=index, label=label, present=PRESENT, source=source, **facts)

    concepts, gates = [], []
    for name, choice in choices.items():
        concept, lever = _concept(studio, known[name], choice, place)
        if lever.gate is not None:
            own = gate(f"{name}.gate", lever.gate, f"how much of “{name}” each token gets")
            gates.append(replace(own, source=concept.source))
            concept = replace(concept, gate=Gate(f"{name}.gate", above=0.0, full=1.0))
        concepts.append(concept)
        if (found := studio.detector(known[name])) is not None:
            label = f"tokens of texts with: {known[name].label}"
            gates.append(gate(f"{name}.present", found.gate, label, effects=_told_apart(found)))
    answering = studio.answering()
    gates.append(gate(ANSWERING, answering.gate, "tokens of an answer in a chat", effects=_told_apart(answering)))
    order = sorted(rows, key=lambda site: int(site.partition(".")[2]))
    return ConceptBank(
        recipe.name,
        [*concepts, *gates],
        {site: Directions(*map(torch.stack, zip(*rows[site], strict=True))) for site in order},
        base=BaseModel.of(studio.model, id=recipe.base),
        sites={site: SiteFacts(width=len(rows[site][0][0]), norm=round(studio.norms[site], 4)) for site in order},
        license=recipe.license,
        provenance={"recipe": recipe.name, "recipe_sha256": recipe.digest, "seed": recipe.seed},
    )


def _told_apart(detector: Detector) -> dict[str, Any]:
    return {"precision": round(detector.precision, 3), "recall": round(detector.recall, 3), "tokens": detector.tokens}


def _concept(
    studio: Studio, recipe: ConceptRecipe, choice: Choice, place: Callable[[str, Tensor, Tensor], tuple[str, int]]
) -> tuple[Concept, Lever]:
    """A chosen lever as a concept whose unit is the standard deviation of its reading at the first site."""
    lever = studio.lever(recipe, recipe.asked[choice.prompt], choice.method, choice.site)
    (site, vector), *others = lever.moves.items()
    fact = statistics(vector / vector.norm(), studio.reference[site])
    encoder, index = place(site, vector / vector.norm(), torch.tensor(fact.mean))
    in_units = float(vector.norm()) / fact.std
    parts = []
    for other, moved in others:
        mean = statistics(moved / moved.norm(), studio.reference[other]).mean
        there, row = place(other, moved / moved.norm(), torch.tensor(mean))
        parts.append(Part(encoder=there, index=row, unit=float(moved.norm()) / in_units))
    concept = Concept(
        name=recipe.name,
        encoder=encoder,
        index=index,
        unit=fact.std,
        natural=(fact.low, fact.high),
        range=(round(choice.low * in_units, 3), round(choice.high * in_units, 3)),
        useful=round(choice.strength * in_units, 3),
        beyond=choice.beyond,
        parts=tuple(parts),
        match_norm=lever.norm is not None,
        label=recipe.label,
        source=f"{choice.method}, chosen among {len(choice.trials)} settings by {choice.answers} answers",
    )
    return concept, lever
