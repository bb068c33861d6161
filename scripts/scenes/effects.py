"""What the levers of the scenes bank do, each chosen on some scenes and measured on others: beside prompts and chance."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from scenes import image, places, scenes
from scenes.bank import GATES
from scenes.image import Do, Natural
from scenes.judges import Judge
from steerlib.bank.concept_bank import ConceptBank
from steerlib.bank.concepts import Concept, Gate
from steerlib.encoders import Directions
from steerlib.evaluation.mediation import mediation
from steerlib.evaluation.pictures import draw_as_told, edit_of
from steerlib.schedules import Window
from steerlib.steering.interventions import Add, Intervention, Patch, Set
from steerlib.steering.recording import record
from steerlib.steering.session import steer
from steerlib.training.record.noised import Seen, at_levels
from steerlib.training.store import remembered

ALONE = "difference of means, one place"
"""A coordinate at one site and level, beside a latent."""
BARS = {"effectiveness": 0.9, "preservation": 0.95}
"""What a lever has to reach."""
DOSES = {"Set": (1.5, 2.0, 3.0), "Add": (1.5, 2.5, 5.0)}
"""What is tried: readings that a lever is set to, amounts that are added."""
ONE_DOSES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""For a single coordinate, in units of its own."""
TRIED = 6
"""Latents, and places of a difference of means, of which one is chosen by what it does."""
TESTED = {
    "scene": "sunset", "side": "left", "background": "pale", "ground": "stone", "shape": "circle", "hue": "blue",
    "size": "large", "texture": "striped",
}  # fmt: skip
"""The value of each factor on which methods are compared."""
REFERENCE = 50_000
"""Tokens that tell what is natural."""
WINDOWS = {"high noise": Window(0.0, 0.3), "middle": Window(0.3, 0.7), "low noise": Window(0.7, 1.0)}
Edits = Mapping[str, Any]


class Case(NamedTuple):
    """Scenes that could show a value and do not, and what the model draws of them."""

    do: Do
    asked: scenes.Scenes
    captions: list[str]
    before: image.Pictures


class Studio:
    """A pipeline, a bank and a judge: draws cases and measures edits."""

    def __init__(self, pipe: Any, bank: ConceptBank, judge: Judge, *, steps: int = 10, seed: int = 0):
        self.pipe, self.bank, self.judge, self.steps, self.seed = pipe, bank, judge, steps, seed

    def case(self, do: Do, n: int, purpose: int) -> Case:
        """`n` scenes; those of another purpose are others."""
        asked = image.cases(do, n, seed=(self.seed, 53, purpose))
        captions = scenes.captions(asked.factors, seed=(self.seed, 53, purpose))
        return Case(do, asked, captions, self.draw(captions))

    def draw(
        self, captions: list[str], edits: Edits | None = None, bank: ConceptBank | None = None, **how: Any
    ) -> image.Pictures:
        """Pictures of captions, always from the same noise; edits act on the half of guidance that reads the prompt, and `how`
        goes to `steer`."""
        with catch_warnings():
            simplefilter("ignore")  # cases go beyond safe ranges on purpose
            edited = (
                steer(self.pipe, bank or self.bank, edits, branch="cond", allow_ood=True, **how) if edits else nullcontext()
            )
            with edited:
                return draw_as_told(self.pipe, captions, steps=self.steps, seed=self.seed)

    def told(self, case: Case, purpose: int) -> list[str]:
        """The captions of a case, but saying the value."""
        factors = {**case.asked.factors}
        for name, value in case.do.sets.items():
            factors[name] = np.full_like(factors[name], scenes.VALUES[name].index(value))
        return scenes.captions(factors, seed=(self.seed, 53, purpose))

    def effect(self, case: Case, edits: Edits, bank: ConceptBank | None = None) -> image.Effect:
        """What edits do to the pictures of a case."""
        return image.effect(case.do, case.asked, case.before, self.draw(case.captions, edits, bank), self.judge)


# -- every lever -------------------------------------------------------------------------------------------------


def score(effect: image.Effect) -> float:
    """By how much the bar that is hardest to reach is passed."""
    return min(effect.effectiveness - BARS["effectiveness"], effect.preservation - BARS["preservation"])


def chosen(studio: Studio, case: Case) -> dict[str, Any]:
    """The best edit of a lever, and how it responds to every dose."""
    tried = []
    for kind, amounts in DOSES.items():
        for amount in amounts:
            found = studio.effect(case, {case.do.value: edit_of(kind, amount)})
            tried.append({"edit": kind, "amount": amount, **figures(found)} | {"score": score(found)})
    return {"best": max(tried, key=lambda line: line["score"]), "doses": tried}


def measured(
    studio: Studio, *, dev: int = 16, test: int = 32, work: Path | None = None, only: Sequence[str] = ()
) -> ConceptBank:
    """The bank with the effect of every lever: its edit chosen on `dev` scenes, measured on `test` others; of all factors,
    or of some `only`.

    `work` keeps what was measured, so that a run that stops goes on.
    """
    concepts = dict(studio.bank.concepts)
    for do in tqdm([do for do in every() if not only or do.factor in only], desc="levers"):
        path = work and work / "levers" / f"{do.value}.json"
        own = remembered(path, lambda do=do: _measured(studio, do, dev, test))
        added = [line for line in own["doses"] if line["edit"] == "Add"]
        useful = [line["amount"] for line in added if line["effectiveness"] >= BARS["effectiveness"]]
        safe = [line["amount"] for line in added if line["preservation"] >= BARS["preservation"] - 0.05]
        concepts[do.value] = replace(
            concepts[do.value],
            effects=own,
            useful=min(useful) if useful else None,
            range=(0.0, max(safe)) if safe else None,
            beyond="other factors change" if len(safe) < len(added) else "",
        )
    return studio.bank.with_concepts([*concepts.values()])


def _measured(studio: Studio, do: Do, dev: int, test: int) -> dict[str, Any]:
    found = chosen(studio, studio.case(do, dev, 1))
    best = found["best"]
    effect = studio.effect(studio.case(do, test, 2), {do.value: edit_of(best["edit"], best["amount"])})
    own = {"edit": best["edit"], "amount": best["amount"], "scenes": test, **figures(effect)}
    return own | {"doses": found["doses"], "passes": {name: own[name] >= bar for name, bar in BARS.items()}}


def every() -> list[Do]:
    """All values of all levers."""
    return [Do(factor, value) for factor in places.LEVERS for value in places.values(factor)]


def figures(effect: image.Effect) -> dict[str, Any]:
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in effect._asdict().items() if v == v}


# -- methods, compared -------------------------------------------------------------------------------------------


class Comparison:
    """One intervention by every method."""

    def __init__(self, studio: Studio, do: Do, *, dev: int = 16, test: int = 32):
        self.studio, self.bank, self.do = studio, studio.bank, do
        self.dev, self.test = studio.case(do, dev, 3), studio.case(do, test, 4)
        place = GATES.get(do.factor)
        self.gate = Gate(place, above=0.25, full=0.75) if place else None
        self.pictures: dict[str, image.Pictures] = {"unsteered": self.test.before}
        index = self.bank[do.value].index  # of the lever, which is moved at several sites together
        self.alone = [
            Concept(name=f"{ALONE}: {c.encoder}", encoder=f"{c.encoder}#causes", index=index) for c in self.latents[:TRIED]
        ]
        self.bank = self.bank.with_concepts([*self.bank.concepts.values(), *self.alone])

    @property
    def label(self) -> str:
        """What latents that go with the value are called."""
        return f"{self.do.factor}: {self.do.value}"

    @cached_property
    def latents(self) -> list[Concept]:
        """Those that go with the value, the most alike first; in each encoder the best."""
        found: dict[str, Concept] = {}
        for concept in self.bank.concepts.values():
            if concept.label == self.label and "correlation" in concept.effects:
                best = found.setdefault(concept.encoder, concept)
                if concept.effects["correlation"] > best.effects["correlation"]:
                    found[concept.encoder] = concept
        return sorted(found.values(), key=lambda concept: -concept.effects["correlation"])

    def run(self) -> dict[str, dict[str, Any]]:
        """Every method at the best of its doses on other scenes."""
        best = self.bank[self.do.value].effects
        found = {"lever": self._at({self.do.value: edit_of(best["edit"], best["amount"])}, "lever")}
        found |= {"prompt": self._prompt(), "random directions": self._random(best)}
        if self.latents:
            found |= self.single()
            found["replaced where detected"] = self._at(self._patch(), "replaced where detected", self.bank)
        return found

    def _at(self, edits: Edits, name: str, bank: ConceptBank | None = None) -> dict[str, Any]:
        drawn = self.studio.draw(self.test.captions, edits, bank)
        self.pictures.setdefault(name, drawn)
        return self._of(drawn)

    def _of(self, drawn: image.Pictures) -> dict[str, Any]:
        return figures(image.effect(self.do, self.test.asked, self.test.before, drawn, self.studio.judge))

    def _prompt(self) -> dict[str, Any]:
        """What a caption that says the value makes of the same noise."""
        self.pictures["prompt"] = self.studio.draw(self.told)
        return self._of(self.pictures["prompt"])

    @cached_property
    def told(self) -> list[str]:
        """Captions that say the value."""
        return self.studio.told(self.test, 4)

    def _random(self, best: Mapping[str, Any], draws: int = 3) -> dict[str, Any]:
        """The lever with random directions of the same lengths in place of its own; the mean over draws."""
        found = []
        for seed in range(draws):
            bank = randomised(self.bank, self.bank[self.do.value], seed)
            found.append(self._at({self.do.value: Add(best["amount"])}, "random directions", bank))
        return _mean(found)

    def single(self) -> dict[str, dict[str, Any]]:
        """One latent, the difference of means at one place, a few latents, and random ones."""
        few = self.latents[:8]
        alone, dose, _ = self._best(self.alone)
        found = {ALONE: self._at({alone.name: self._set(alone, dose)}, ALONE, self.bank) | {"dose": dose}}
        first, dose, _ = self.one
        found["one latent"] = self._at({first.name: self._set(first, dose)}, "one latent") | {
            "dose": dose,
            "latent": first.name,
        }
        together: Callable[[float], Edits] = lambda dose: {c.name: self._set(c, dose, everywhere=False) for c in few}  # noqa: E731
        of_few = max(ONE_DOSES, key=lambda dose: score(self.studio.effect(self.dev, together(dose))))
        found["a few latents"] = self._at(together(of_few), "a few latents") | {"dose": of_few}
        rng = np.random.default_rng(self.studio.seed + 17)
        others = [c for c in self.bank.concepts.values() if c.encoder == first.encoder and c.label != self.label]
        drawn = [others[int(i)] for i in rng.choice(len(others), 3, replace=False)]
        found["random latents"] = _mean([self._at({c.name: self._set(c, dose)}, "random latents") for c in drawn])
        return found

    @cached_property
    def one(self) -> tuple[Concept, float, float]:
        """Of the latents that go with the value most, that which does most on the scenes for it; its dose and its score."""
        return self._best(self.latents[:TRIED])

    def _best(self, concepts: Sequence[Concept]) -> tuple[Concept, float, float]:
        """The coordinate, the dose of it, and the score."""
        tried = [
            (concept, dose, score(self.studio.effect(self.dev, {concept.name: self._set(concept, dose)}, self.bank)))
            for concept in concepts
            for dose in ONE_DOSES
        ]
        return max(tried, key=lambda line: line[2])

    def _set(self, concept: Concept, dose: float, *, everywhere: bool = True) -> Intervention:
        """A coordinate at a multiple of its own: a latent's highest natural reading, or the mean of a value."""
        own = concept.natural[1] if concept.natural else 1.0
        return Set(dose * own, unit="raw", when=Window() if everywhere else None, gate=self.gate)

    def _patch(self) -> Edits:
        """Activations of a run with the other prompt, at the latent's site and where the place of the value is detected."""
        site = self.bank.site_of(self.one[0])
        with record(self.studio.pipe, [site]) as tape:
            self.studio.draw(self.told)
        alone = next(c for c in self.alone if c.encoder == f"{self.one[0].encoder}#causes")
        return {alone.name: Patch(tape, when=Window(), gate=self.gate)}

    @property
    def ways(self) -> dict[str, Edits | None]:
        """What may lead activations off their natural range."""
        latent, dose, _ = self.one
        one = {latent.name: self._set(latent, dose)}
        return {"unsteered": None, "one latent": one, "replaced where detected": self._patch()}

    def seen(self, case: Case, edits: Edits | None) -> Float[Tensor, "T D"]:
        """What passes at the site and level of the latent, behind the edit."""
        site, _, level = (key := self.one[0].encoder).partition("@")
        run = lambda: self.studio.draw(case.captions, edits, self.bank)  # noqa: E731
        return at_levels(self.studio.pipe, [site], [int(level)], run)[key].flatten(0, 1).float()


def _mean(found: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: float(np.mean([line[key] for line in found])) for key in found[0] if isinstance(found[0][key], float)}


def randomised(bank: ConceptBank, concept: Concept, seed: int) -> ConceptBank:
    """The bank with random directions, as long as its own, for one concept."""
    encoders: dict[str, Directions] = {}
    g = torch.Generator().manual_seed(seed + 997)
    for place in concept.places:
        own = encoders.get(place.encoder) or bank.encoder(place.encoder)
        assert isinstance(own, Directions)
        rows, drawn = own.decoder.clone(), torch.randn(own.decoder.shape[1], generator=g)
        rows[place.index] = drawn / drawn.norm() * rows[place.index].norm()
        encoders[place.encoder] = Directions(rows, own.mean)
    return bank.with_concepts(encoders=encoders)


# -- through what a prompt acts ----------------------------------------------------------------------------------


def mediated(studio: Studio, do: Do, n: int) -> dict[str, dict[str, float]]:
    """What a caption that says a value does to pictures, by way of the lever of that value, of the levers of its
    factor, of another factor's, and of a random direction in the lever's place."""
    case, judge = studio.case(do, n, 8), studio.judge
    told, there = studio.told(case, 8), judge.read(case.before)["shape"] > 0

    def run(captions: list[str]) -> Tensor:
        shows = (judge.read(studio.draw(captions))[do.factor] == do.index).float()
        return shows[:, None] if do.factor in image.WHOLE else shows[there][:, None]

    stranger = next(value for factor, value in TESTED.items() if factor not in (do.factor, "scene"))
    random = randomised(studio.bank, studio.bank[do.value], 0)
    ways: dict[str, tuple[ConceptBank, list[str]]] = {
        "its lever": (studio.bank, [do.value]),
        "levers of its factor": (studio.bank, independent(studio.bank, do)),
        "lever of another factor": (studio.bank, [stranger]),
        "random direction": (random, [do.value]),
    }
    found = {}
    for name, (bank, concepts) in ways.items():
        e = mediation(studio.pipe, bank, concepts, run, value=told, reference=case.captions, branch="cond")
        found[name] = {key: round(float(value), 4) for key, value in e._asdict().items() if value is not None}
    return found


def independent(bank: ConceptBank, do: Do) -> list[str]:
    """The levers of a factor, this one first, without those that others add up to: over all values, differences cancel."""
    kept: list[str] = []
    rows: list[Tensor] = []
    for value in [do.value, *(value for value in places.values(do.factor) if value != do.value)]:
        own = bank.encoder(bank[value].encoder)
        assert isinstance(own, Directions)
        tried = [*rows, own.decoder[bank[value].index].float()]
        if int(torch.linalg.matrix_rank(torch.stack(tried))) == len(tried):
            kept, rows = [*kept, value], tried
    return kept


# -- when, and how far off ---------------------------------------------------------------------------------------


def by_window(studio: Studio, do: Do, n: int) -> dict[str, dict[str, Any]]:
    """The lever at its own dose, in one window of noise alone."""
    case, best = studio.case(do, n, 5), studio.bank[do.value].effects
    found = {}
    for name, window in WINDOWS.items():
        edit = replace(edit_of(best["edit"], best["amount"]), when=window)
        found[name] = figures(studio.effect(case, {do.value: edit}))
    return found


def laws(studio: Studio, do: Do, n: int) -> dict[str, float]:
    """Mean change of bytes of pictures: by an edit of nothing (composition), by the lever, and by the lever added and taken
    away again (reversibility)."""
    case, amount = studio.case(do, n, 7), studio.bank[do.value].effects["amount"]
    add, remove = ({do.value: Add(sign * amount)} for sign in (1.0, -1.0))
    with catch_warnings():
        simplefilter("ignore")
        with steer(studio.pipe, studio.bank, remove, branch="cond", allow_ood=True):
            undone = studio.draw(case.captions, add)
    drawn = {"composition": studio.draw(case.captions, {do.value: Add(0.0)}), "lever": studio.draw(case.captions, add)}
    drawn["reversibility"] = undone
    return {name: round(float(np.abs(d.astype(int) - case.before).mean()), 4) for name, d in drawn.items()}


def off_distribution(compared: Mapping[str, Comparison], reference: Seen) -> dict[str, dict[str, float]]:
    """Share of activations, at the site and level of each factor's latent, that are further from the mean (Mahalanobis
    distance) than 99.5 % of those that encoders learned from: where nothing is done, where the latent is set, and where it only
    detects what to replace."""
    found = {}
    for factor, comparison in compared.items():
        if comparison.latents:
            x = reference[comparison.one[0].encoder].flatten(0, 1)
            chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:REFERENCE]
            natural = Natural.of(x[chosen].float())
            ways = comparison.ways.items()
            found[factor] = {name: natural.off(comparison.seen(comparison.test, edits)) for name, edits in ways}
    return found
