"""From a diffusers pipeline and pairs of prompts to a bank of concepts: find, choose without a judge, measure, show.

folder/sums/      by concept, sums over pairs of how activations differ
folder/chosen/    by concept, what was chosen for it and what it does
folder/removed/   by concept, how it is best removed and what that does
folder/graph-…/   what the denoiser makes of the pictures that the graph is found from
folder/saturated/ by concept, share of saturated pixels with it and without
folder/strips/    by concept, pictures of it
"""

from collections.abc import Mapping, Sequence
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ...bank.card import example_of_pictures, front
from ...bank.concept_bank import ConceptBank
from ...bank.concepts import Concept, signed
from ...bank.effects import PictureEffects
from ...errors import BadRecipe, UnsupportedTarget
from ...evaluation.clip import ClipScore
from ...evaluation.denoising import features
from ...evaluation.pictures import LABELS, asked, edit_of, grid, saturated
from ...evaluation.report import markdown
from ...hosts import host_for
from ...text import progress, stage
from ..calibrate.prompted import HARM, Attempt, Choice, Drawing, Score, Trial, Trials, chosen, removals, steered
from ..directions.prompted import METHODS, Lever, bank_of, found_by, reaches, usable
from ..entries import ConceptGraphRecipe, PictureConcept
from ..picture_recipe import PictureRecipe
from ..recipe_base import place_of
from ..record.contrasts import Sums, contrasts, given_to, places, texts
from ..store import recorded, remembered, whole
from .card import described, followed_section

SHOWN = 3
"""Seeds that a strip of pictures shows."""
SHARES = (-1.0, 0.5, 1.0, 1.5)
"""Amounts that it shows, as shares of the useful one."""


class Found(NamedTuple):
    """What was found for a concept: its lever, how it was chosen and is best removed, and what both do to pictures that
    nothing was chosen on."""

    lever: Lever
    choice: Choice
    moved: Trial
    told: float
    removal: Attempt
    removed: Trial
    saturated: tuple[float, float]


def check_methods(recipe: PictureRecipe) -> None:
    """Raise `BadRecipe` for a method that is not in the registry."""
    if unknown := sorted({*recipe.methods} - set(METHODS)):
        raise BadRecipe(f"unknown methods {', '.join(unknown)}; known are {', '.join(METHODS)}")


def train_prompted(pipe: Any, recipe: PictureRecipe, folder: Path, score: Score | None = None) -> ConceptBank:
    """A concept for each entry of the recipe, from prompts alone: its lever, amount and way of removal chosen by what the
    pipeline itself, or `score`, says of its pictures."""
    if score is None and recipe.score:
        score = ClipScore(place_of(recipe.score, recipe.folder))
    making, count = Making(pipe, recipe, folder, score), 3 + (recipe.graph is not None)
    pipe.set_progress_bar_config(disable=True)
    with stage(1, count, f"drawing pairs of prompts for {len(recipe.concepts)} concepts, at {len(making.sites)} sites"):
        for concept in recipe.concepts:
            making.sums(concept)
    with stage(2, count, "choosing methods and amounts by what they do to pictures, and measuring them on other prompts"):
        found = {concept.name: making.found(concept) for concept in progress(recipe.concepts, "concepts")}
    concepts = [making.concept(concept, found[concept.name]) for concept in recipe.concepts]
    levers = {name: own.lever for name, own in found.items()}
    bank = bank_of(pipe, recipe.name, levers, recipe.levels, base=recipe.base, concepts=concepts)
    bank.license, bank.provenance = recipe.license, recipe.provenance
    if recipe.graph is not None:
        with stage(3, count, f"moving concepts in {recipe.graph.contexts} pictures each, to see which others follow"):
            bank = making.graphed(bank, recipe.graph)
    with stage(count, count, "drawing what concepts do"):
        bank.pictures = making.strips(bank) if find_spec("matplotlib") else {}
    return bank.with_concepts([*bank.concepts.values()], card=prompted_card(bank, recipe, found, making.plain))


class Making:
    """A pipeline, a recipe, and the folder that keeps what is made on the way to a bank."""

    def __init__(self, pipe: Any, recipe: PictureRecipe, folder: Path, score: Score | None):
        if not (host := host_for(pipe)).has_progress or not {"prompt", LABELS} & {*signature(pipe.__call__).parameters}:
            raise UnsupportedTarget(f"recipe {recipe.name!r} is of a pipeline that draws what prompts say, not of {type(pipe)}")
        if getattr(pipe, "vae", host) is None:
            raise UnsupportedTarget(f"{type(pipe).__name__} has no autoencoder (vae), so it makes no pictures")
        self.pipe, self.recipe, self.folder, self.score = pipe, recipe, folder, score
        self.drawing, self.sites, self.texts = Drawing(pipe, recipe), [*recipe.sites] or places(host), texts(host)

    @property
    def scorer(self) -> str:
        """What tells how much of a concept there is."""
        return "the pipeline itself" if self.score is None else getattr(self.score, "__name__", type(self.score).__name__)

    @property
    def plain(self) -> Any:
        """What the pipeline's call takes to draw nothing of the first concept."""
        (said,) = asked(self.pipe, [self.recipe.plain])
        return said if isinstance(said, str) else [said]

    def sums(self, concept: PictureConcept) -> Sums:
        """What pairs of a concept differ by, or what an earlier run found."""
        pairs = self.recipe.read_splits(concept).train
        how: Any = {"sites": self.sites, "levels": self.recipe.levels, "batch": self.recipe.batch, "texts": self.texts}
        path = self.folder / "sums" / f"{concept.name}.safetensors"
        return recorded(path, lambda: contrasts(self.pipe, pairs, self.drawing, **how))

    def found(self, concept: PictureConcept) -> Found:
        """The best that was found for a concept, or what an earlier run found."""
        sums, name, splits = self.sums(concept), concept.name, self.recipe.read_splits(concept)
        place = self.sites, self.recipe.levels

        @cache
        def bank(method: str) -> ConceptBank:
            return bank_of(self.pipe, name, {name: found_by(method, sums, *place)}, self.recipe.levels)

        dev, test = (Trials(self.drawing, pairs, name, self.score) for pairs in splits[1:])

        def search() -> dict[str, Any]:
            methods = usable(self.recipe.methods, sums)
            choice = chosen(dev, bank, methods, lambda method, edit: reaches(method, edit, sums, *place))
            moved = test.of(bank(choice.best.method), {name: choice.best.setting})
            return {"choice": choice, "moved": moved, "told": round(test.told, 4)}

        kept = remembered(self._place("chosen", name), search)
        choice = Choice.from_json(kept["choice"])
        own, lever = bank(choice.best.method), found_by(choice.best.method, sums, *place)

        def lose() -> dict[str, Any]:
            best, *_ = tried = removals(dev, own, choice.best.method)
            return {"tried": tried, "removed": test.of(own, {name: best.setting}, remove=True)}

        lost = remembered(self._place("removed", name), lose)
        looked = remembered(self._place("saturated", name), lambda: self.saturated(concept, own, choice.best))
        moved, removal, removed = Trial(*kept["moved"]), Attempt(*lost["tried"][0]), Trial(*lost["removed"])
        return Found(lever, choice, moved, kept["told"], removal, removed, tuple(looked))

    def saturated(self, concept: PictureConcept, bank: ConceptBank, best: Attempt) -> list[float]:
        """Share of saturated pixels of the pictures that the card shows: as its useful amount draws them, and plain ones."""
        pairs, shares = self.recipe.read_splits(concept).evaluation[:SHOWN], []
        for edits in ({concept.name: best.setting}, None):
            with steered(self.pipe, bank, edits):
                drawn = self.drawing.shown([pair.negative for pair in pairs], [pair.seed for pair in pairs])
            shares.append(round(saturated(drawn[1]), 4))
        return shares

    def _place(self, what: str, name: str) -> Path:
        """Where is kept what a scorer chose for a concept."""
        return self.folder / (what if self.score is None else f"{what} by {self.scorer}") / f"{name}.json"

    def concept(self, concept: PictureConcept, found: Found) -> Concept:
        """A concept with what was measured of it; its places are those of its lever."""
        choice = found.choice
        effects: PictureEffects = {
            "edit": choice.best.edit,
            "amount": choice.best.amount,
            "effect": found.moved.effect,
            "damage": found.moved.damage,
            "told": found.told,
            "saturated": list(found.saturated),
            "removal": found.removal.edit,
            "removal_amount": found.removal.amount,
            "removed": found.removed.effect,
            "scorer": self.scorer,
        }
        return Concept(
            name=concept.name,
            encoder=next(iter(found.lever.moves)),
            index=0,
            label=concept.label or concept.name,
            source=f"{choice.best.method}, chosen among {len(choice.tried)} settings by {self.scorer}",
            useful=choice.best.amount if choice.is_useful else None,
            useful_as=choice.best.edit,
            range=choice.range,
            beyond=choice.beyond,
            effects=effects,
        )

    def graphed(self, bank: ConceptBank, graph: ConceptGraphRecipe) -> ConceptBank:
        """The bank with the graph of its concepts."""
        from ..discover.concept_graph import Studied, graphed  # needs scipy

        pairs = {concept.name: self.recipe.read_splits(concept) for concept in self.recipe.concepts}
        contexts = self.recipe.read_contexts(graph)
        key = sha256(repr((graph, contexts, self.scorer)).encode()).hexdigest()[:16]
        return graphed(Studied(bank, pairs, contexts, self.look, graph, self.folder / f"graph-{key}"))

    def look(self, prompts: Sequence[str], seeds: Sequence[int], bank: Any = None, edits: Any = None) -> Float[Tensor, "B F"]:
        """Features of pictures, steered or not: what the unsteered denoiser is given at the sites of concepts, without a
        prompt, or, of a pipeline of classes, with one that says nothing of the first concept."""
        with steered(self.pipe, bank, edits):
            latents = self.drawing(prompts, seeds)
        said = self.recipe.plain if LABELS in signature(self.pipe.__call__).parameters else ""
        sites, most = [given_to(site) for site in self.sites], self.recipe.batch
        return torch.cat([features(self.pipe, some, [said] * len(some), sites) for some in latents.split(most)])

    def strips(self, bank: ConceptBank) -> dict[str, bytes]:
        """For each concept a table of pictures as PNG, by file name."""
        found = {}
        for k, concept in enumerate(progress(self.recipe.concepts, "strips")):
            path = self.folder / "strips" / f"{concept.name}.png"
            if not path.is_file():
                with whole(path) as part:
                    part.write_bytes(self.strip(bank, concept))
            found[strip_name(k)] = path.read_bytes()
        return found

    def strip(self, bank: ConceptBank, concept: PictureConcept) -> bytes:
        """Pictures of the first prompts that it is measured on: seeds down; plain, amounts and prompted across."""
        pairs, known = self.recipe.read_splits(concept).evaluation[:SHOWN], bank[concept.name]
        seeds, plain = [pair.seed for pair in pairs], [pair.negative for pair in pairs]
        columns = {"plain": self.drawing.shown(plain, seeds)[1]}
        for share in SHARES:
            amount = share * known.effects["amount"]
            with steered(self.pipe, bank, {concept.name: edit_of(known.useful_as, amount)}):
                columns[f"{known.useful_as} {amount:+.2f}"] = self.drawing.shown(plain, seeds)[1]
        columns["prompted"] = self.drawing.shown([pair.positive for pair in pairs], seeds)[1]
        rows = {f"seed {seed}": {name: drawn[k : k + 1] for name, drawn in columns.items()} for k, seed in enumerate(seeds)}
        return grid(rows, title=concept.name)


# -- what a person looks at --------------------------------------------------------------------------------------


def strip_name(k: int) -> str:
    """The file of the strip of the k-th concept."""
    return f"strips/{k:03}.png"


SCORED = """No judge of pictures had a say. *Effect*: how far a steered picture has come from the plain one to the one whose
prompt says the concept, all from the same noise, by how much better that prompt explains it (denoising error of the
pipeline itself, or the scorer that the table names). *Damage*: by how much the error of the steered picture, under the
better of the two prompts, exceeds that of the pipeline's own pictures; 1 is twice as much. *Told*: the share of prompted
pictures that the scorer tells from plain ones; where it is low, the other figures say little. *Saturated*: the share of
pixels with a channel at its end, of the steered pictures below, then of the plain ones; it had no say in any choice.
*Removed*: effect and damage the other way, on pictures whose prompt says the concept, against the words that this prompt
shares with the one that does not. Figures are of {evaluation} pairs of prompts; amounts were chosen on {dev} others,
directions found on {train}. A safe range ends before the first amount whose damage is above {harm:g}."""


def prompted_card(bank: ConceptBank, recipe: PictureRecipe, found: Mapping[str, Found], plain: Any) -> str:
    """The card of a bank of concepts from prompts."""
    levers = [bank[concept.name] for concept in recipe.concepts]
    first = next((c for c in levers if c.useful is not None), levers[0])
    said = SCORED.format(evaluation=recipe.evaluation_prompts, dev=recipe.dev_prompts, train=recipe.train_prompts, harm=HARM)
    shown = [f"![{c.name}]({name})" for k, c in enumerate(levers) if (name := strip_name(k)) in bank.pictures]
    parts = [
        front(bank.name, bank.base.id, bank.license, levers, {"tags": ["diffusers"]}).strip(),
        f"# {bank.name}\n\n{described(recipe)}",
        _example(recipe, first, plain),
        "One unit of a concept is the mean difference that its prompts make.",
        f"## What was measured\n\n{said}\n\n{_table(levers, found)}",
        followed_section(bank),
        "## As it looks\n\nSeeds down; plain, amounts and prompted across.\n\n" + "\n\n".join(shown) if shown else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _example(recipe: PictureRecipe, concept: Concept, plain: Any) -> str:
    edit = f'{{"{concept.name}": sl.{concept.useful_as}({concept.effects["amount"]:g})}}'
    return example_of_pictures(recipe.name, "" if recipe.carry_model else recipe.source, edit, plain)


def _table(levers: Sequence[Concept], found: Mapping[str, Found]) -> str:
    rows = []
    for c in levers:
        own, figures = found[c.name], c.effects
        useful = f"{c.useful_as} {signed(c.useful)}" if c.useful is not None else c.beyond
        measured = (f"{number:.2f}" for number in (own.moved.effect, own.moved.damage, own.told))
        ends = " / ".join(f"{share:.2f}" for share in own.saturated)
        removal = f"{own.removal.edit} {signed(own.removal.amount)}: {own.removed.effect:.2f} / {own.removed.damage:.2f}"
        made = own.choice.best.method
        rows.append((c.name, c.label, made, useful, signed(*c.range or ()), *measured, ends, removal, figures["scorer"]))
    head = "concept | meaning | method | useful | safe range | effect | damage | told | saturated / plain | removed / damage"
    return markdown(f"{head} | scored by", rows)
