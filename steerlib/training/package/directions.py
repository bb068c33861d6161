"""From a language model and example texts to a bank of directions: choose by measured effect, assemble, measure.

folder/activations.safetensors   of contrast pairs and ordinary text
folder/levers/, detectors/       what methods found
folder/search/, effects/         what was chosen for each concept, and what it does
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...bank.concept_bank import BaseModel, ConceptBank, SiteFacts
from ...bank.concepts import Concept, Gate, Part
from ...bank.effects import MeasuredEffects
from ...errors import BadRecipe, Unmeasured, UnsupportedTarget
from ...evaluation.report import picture
from ...evaluation.text import Judge, judge_for, trust
from ...graph.causal_graph import CausalGraph
from ...hosts import host_for
from ...text import called, is_pair, progress, stage
from ..calibrate.doses import Choice, Search, statistics, untried
from ..calibrate.measure import ANSWERING, measure
from ..directions.levers import DirectionRows, Lever
from ..directions.methods import METHODS
from ..directions.readouts import Readout
from ..directions.studio import PRESENT, Studio
from ..entries import ConceptRecipe
from ..recipe import DirectionRecipe
from ..store import remembered
from .card import PICTURE, card


def check_methods(recipe: DirectionRecipe) -> None:
    """Raise `BadRecipe` for a method that is not in the registry."""
    tried = {method for methods in (recipe.methods, *(concept.methods for concept in recipe.concepts)) for method in methods}
    if unknown := sorted(tried - set(METHODS)):
        raise BadRecipe(f"unknown methods {', '.join(unknown)}; known are {', '.join(METHODS)}")


def train_directions(model: Any, tokenizer: Any, recipe: DirectionRecipe, folder: Path) -> ConceptBank:
    """A concept for each entry of the recipe: its lever chosen by what it does to text, calibrated and measured."""
    sites = sites_to_try(model, recipe)
    for left_out, names in _left_out(recipe, sites).items():
        warnings.warn(f"{', '.join(names)}: {left_out}", Unmeasured, stacklevel=3)
    studio, judge = Studio(model, tokenizer, recipe, sites, folder), judge_for(recipe.scorers)
    with stage(1, 3, "reading the texts of all concepts"):
        studio.activations  # noqa: B018
    with stage(2, 3, f"choosing method, layer and strength of {len(recipe.concepts)} concepts by their effect on answers"):
        choices = {concept.name: choose(studio, judge, concept) for concept in progress(recipe.concepts, "concepts")}
    with stage(3, 3, "measuring on prompts used for nothing else"):
        bank = assemble(studio, choices)
        records = evaluate(model, tokenizer, bank, recipe, judge=judge, studio=studio, choices=choices, work=folder)
    if recipe.ship == "clearing":
        kept = [record["concept"] for record in records if all(record["passes"].values())]
        bank = assemble(studio, {name: choices[name] for name in kept})
    made = with_effects(bank, recipe, records)
    return with_answers(model, tokenizer, made, recipe, judge, folder) if recipe.answers else made


def with_answers(
    model: Any, tokenizer: Any, bank: ConceptBank, recipe: DirectionRecipe, judge: Judge, folder: Path
) -> ConceptBank:
    """The bank with edges from each concept with a useful amount to the answers that it moves, learned from the recipe's
    training prompts. Raises `BadRecipe` for a judge that only counts: it has no evidence to compare."""
    from ..discover.answered import answered, moved  # needs scipy
    from ..discover.concept_graph import Moved

    if not judge.classes:
        raise BadRecipe(f"recipe {recipe.name!r}: answers = {recipe.answers} needs concepts whose scorer learns from texts")
    names = [concept.name for concept in bank.concepts.values() if concept.useful is not None]
    prompts = recipe.read_prompts("train")[: recipe.answers]

    def learn() -> list[Any]:
        return [[*own[:2], own.d.tolist()] for own in moved(model, tokenizer, bank, names, prompts, judge)]

    found = remembered(folder / "answers" / f"{recipe.answers}.json", learn)
    edges = answered([Moved(name, amount, np.array(d)) for name, amount, d in found], judge.names[: judge.classes]).answers
    return bank.with_concepts([*bank.concepts.values()], graph=CausalGraph([*bank.graph.edges, *edges]))


def _left_out(recipe: DirectionRecipe, sites: Sequence[str]) -> dict[str, list[str]]:
    """What the budget does not reach, and for which concepts."""
    found: dict[str, list[str]] = {}
    for concept in recipe.concepts:
        if said := untried(recipe, concept, sites):
            found.setdefault(said, []).append(concept.name)
    return found


def sites_to_try(model: Any, recipe: DirectionRecipe) -> list[str]:
    """The recipe's layers, or six spread over the first two thirds of the model; in its decoder, beside an encoder."""
    if (reads := getattr(model, "main_input_name", "input_ids")) != "input_ids":
        writers = [name for name, part in model.named_children() if hasattr(part, "generate")]
        own = f"its text side is a model of its own: sl.train(model.{writers[-1]}, …)" if writers else "train a model of text"
        raise UnsupportedTarget(f"{type(model).__name__} answers to {reads}, and a recipe asks in words; {own}")
    where = "decoder.layers." if is_pair(model) else "layers."
    depth = sum(name.removeprefix(where).isdigit() for name in host_for(model).sites())
    layers = recipe.layers or tuple(sorted({round(depth * (0.2 + 0.1 * i)) for i in range(6)}))[:: 2 if recipe.is_quick else 1]
    found = dict.fromkeys(round(layer * depth) if isinstance(layer, float) else layer for layer in layers)
    numbers = [layer for layer in found if not isinstance(layer, str)]
    if not depth or numbers and (max(numbers) >= depth or min(numbers) < 0):
        raise BadRecipe(
            f"expected layers from 0 to {depth - 1}, got {layers}; leave them out, or give shares of the depth such as 0.4"
        )
    names = [layer if isinstance(layer, str) else f"{where}{layer}" for layer in found]
    return [host_for(model).site(name).name for name in dict.fromkeys(names)]


def choose(studio: Studio, judge: Judge, concept: ConceptRecipe) -> Choice:
    """The best method, site and strength for a concept, or what an earlier run chose."""

    def search() -> dict[str, Any]:
        choice = Search(studio, concept, judge).run()
        studio.control(concept, choice.method, choice.site)  # now, while what it needs is at hand
        studio.forget(concept)
        return choice.to_dict()

    path = studio.folder and studio.folder / "search" / f"{concept.name}.json"
    return Choice.from_dict(remembered(path, search))


def evaluate(
    model: Any,
    tokenizer: Any,
    bank: ConceptBank,
    recipe: DirectionRecipe,
    *,
    judge: Judge | None = None,
    studio: Studio | None = None,
    choices: Mapping[str, Choice] | None = None,
    work: Path | None = None,
    concepts: Sequence[str] | None = None,
) -> list[MeasuredEffects]:
    """Measure concepts of a bank, by default all that the recipe has too, on the recipe's evaluation prompts; one record each.

    `judge`, `studio` and `choices` are those of a training run: every method that it tried is measured beside what was chosen.
    `work` is a folder that keeps the records, from which the same call goes on.
    """
    known = {concept.name: concept for concept in recipe.concepts}
    scorer = judge or judge_for(recipe.scorers)
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
        for name in progress(names, "concepts measured")
    ]


def with_effects(bank: ConceptBank, recipe: DirectionRecipe, records: Sequence[MeasuredEffects]) -> ConceptBank:
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
    said = trust(recipe.scorers, *recipe.read_held_out())
    return measured.with_concepts(concepts, card=card(measured, recipe, records, said))


def assemble(studio: Studio, choices: Mapping[str, Choice]) -> ConceptBank:
    """The bank of what was chosen, with its gates: one encoder a site, units in standard deviations."""
    recipe, rows = studio.recipe, DirectionRows()
    known = {concept.name: concept for concept in recipe.concepts}

    def detecting(name: str, found: Readout, label: str, **facts: Any) -> Concept:
        site, index = rows.add(found.site, found.row, found.mean)
        return Concept(name=name, encoder=site, index=index, label=label, present=PRESENT, **facts)

    concepts, gates, source = [], [], "Fisher's discriminant of activations on ordinary text"
    for name, choice in choices.items():
        lever = studio.lever(known[name], known[name].asked[choice.prompt], choice.method, choice.site)
        concept = calibrated(known[name], choice, lever, studio.reference, rows)
        if lever.gate is not None:
            label = f"how much of “{name}” each token gets"
            gates.append(detecting(f"{name}.gate", lever.gate, label, source=concept.source))
            concept = replace(concept, gate=Gate(f"{name}.gate", above=0.0, full=1.0))
        concepts.append(concept)
        if (found := studio.detector(known[name])) is not None:
            label = f"tokens of texts with: {known[name].label}"
            gates.append(detecting(f"{name}.present", found.gate, label, source=source, effects=found.effects))
    answering = studio.answering()
    label = f"tokens of {called(studio.model, studio.tokenizer)}, whoever speaks, and not of prose"
    gates.append(detecting(ANSWERING, answering.gate, label, source=source, effects=answering.effects))
    host = host_for(studio.model)
    encoders = dict(sorted(rows.encoders().items(), key=lambda item: host.order(host.site(item[0]))))
    return ConceptBank(
        recipe.name,
        [*concepts, *gates],
        encoders,
        base=BaseModel.of(studio.model, id=recipe.base),
        sites={site: SiteFacts(width=e.decoder.shape[1], norm=round(studio.norms[site], 4)) for site, e in encoders.items()},
        license=recipe.license,
        provenance=recipe.provenance | {"chat": getattr(studio.tokenizer, "chat_template", None) is not None},
    )


def calibrated(
    recipe: ConceptRecipe, choice: Choice, lever: Lever, reference: Mapping[str, Tensor], rows: DirectionRows
) -> Concept:
    """A chosen lever as a concept, in `rows`. Its unit is the standard deviation of its reading at the first site."""
    (site, vector), *others = lever.moves.items()
    fact = statistics(vector / vector.norm(), reference[site])
    encoder, index = rows.add(site, vector / vector.norm(), torch.tensor(fact.mean))
    in_units = float(vector.norm()) / fact.std
    parts = []
    for other, moved in others:
        mean = statistics(moved / moved.norm(), reference[other]).mean
        there, row = rows.add(other, moved / moved.norm(), torch.tensor(mean))
        parts.append(Part(encoder=there, index=row, unit=float(moved.norm()) / in_units))
    return Concept(
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
        source=f"{choice.method}, chosen among {len(choice.trials)} settings by {choice.answers} answers"
        + (f"; {choice.untried}" if choice.untried else ""),
    )
