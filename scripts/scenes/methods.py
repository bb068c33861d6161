"""One intervention by every method: levers, prompts, latents and random directions, on the same scenes."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from scenes import measures
from scenes.bank import GATES
from scenes.experiment import Case, Edits, Experiment, randomised, rounded, score
from scenes.measures import Cause, Natural
from steerlib.bank.concept_bank import ConceptBank
from steerlib.bank.concepts import Concept, Gate
from steerlib.schedules import Window
from steerlib.steering.interventions import Add, Intervention, Patch, Set
from steerlib.steering.recording import record
from steerlib.training.record.noised import Seen, at_levels

ALONE = "difference of means, one place"
"""A coordinate at one site and level, beside a latent."""
DOSES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""What is tried of a single coordinate, in units of its own."""
TRIED = 6
"""Latents, and places of a difference of means, of which one is chosen for the shipped bank."""
DRAWS = 3
"""Random directions, or latents, over which the mean is taken."""
REFERENCE = 50_000
"""Tokens that tell what is natural."""


class Comparison:
    """One intervention by every method, each at its best dose.

    Args:
        experiment: the pipeline, the bank and the judge.
        cause: the factor and the value that it is set to.
        dev: scenes on which doses, latents and places are chosen.
        test: other scenes, on which the methods are measured.
        tried: latents, and places of a difference of means, of which one is chosen by what it does.
    """

    def __init__(self, experiment: Experiment, cause: Cause, *, dev: int, test: int, tried: int = TRIED):
        self.experiment, self.bank, self.cause, self.tried = experiment, experiment.bank, cause, tried
        self.dev, self.test = experiment.case(cause, dev, 3), experiment.case(cause, test, 4)
        place = GATES.get(cause.factor)
        self.gate = Gate(place, above=0.25, full=0.75) if place else None
        self.pictures: dict[str, measures.Pictures] = {"unsteered": self.test.before}
        index = self.bank[cause.value].index  # of the lever, which is moved at several sites together
        self.alone = [
            Concept(name=f"{ALONE}: {c.encoder}", encoder=f"{c.encoder}#causes", index=index) for c in self.latents[:tried]
        ]
        self.bank = self.bank.with_concepts([*self.bank.concepts.values(), *self.alone])

    @property
    def label(self) -> str:
        """What latents that go with the value are called."""
        return f"{self.cause.factor}: {self.cause.value}"

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
        found = {"lever": self._at(self.experiment.lever(self.cause), "lever")}
        found |= {"prompt": self._prompt(), "random directions": self._random()}
        if self.latents:
            found |= self.single()
            found["replaced where detected"] = self._at(self._patch(), "replaced where detected", self.bank)
        return found

    def _at(self, edits: Edits, name: str, bank: ConceptBank | None = None) -> dict[str, Any]:
        drawn = self.experiment.draw(self.test.captions, edits, bank)
        self.pictures.setdefault(name, drawn)
        return self._of(drawn)

    def _of(self, drawn: measures.Pictures) -> dict[str, Any]:
        return rounded(measures.effect(self.cause, self.test.asked, self.test.before, drawn, self.experiment.judge))

    def _prompt(self) -> dict[str, Any]:
        """What a caption that says the value makes of the same noise."""
        self.pictures["prompt"] = self.experiment.draw(self.saying)
        return self._of(self.pictures["prompt"])

    @cached_property
    def saying(self) -> list[str]:
        """Captions that say the value."""
        return self.experiment.saying(self.test, 4)

    def _random(self) -> dict[str, Any]:
        """The lever with random directions of the same lengths in place of its own; the mean over draws."""
        lever, found = self.bank[self.cause.value], []
        edits = {lever.name: Add(lever.effects["amount"])}
        for seed in range(DRAWS):
            found.append(self._at(edits, "random directions", randomised(self.bank, lever, seed)))
        return _mean(found)

    def single(self) -> dict[str, dict[str, Any]]:
        """One latent, the difference of means at one place, a few latents, and random ones."""
        few = self.latents[:8]
        alone, dose, _ = self._best(self.alone)
        found = {ALONE: self._at({alone.name: self._set(alone, dose)}, ALONE, self.bank) | {"dose": dose}}
        first, dose, _ = self.one
        one = self._at({first.name: self._set(first, dose)}, "one latent")
        found["one latent"] = one | {"dose": dose, "latent": first.name}

        def together(dose: float) -> Edits:
            return {c.name: self._set(c, dose, everywhere=False) for c in few}

        of_few = max(DOSES, key=lambda dose: score(self.experiment.effect(self.dev, together(dose))))
        found["a few latents"] = self._at(together(of_few), "a few latents") | {"dose": of_few}
        rng = np.random.default_rng(self.experiment.seed + 17)
        others = [c for c in self.bank.concepts.values() if c.encoder == first.encoder and c.label != self.label]
        drawn = [others[int(i)] for i in rng.choice(len(others), DRAWS, replace=False)]
        found["random latents"] = _mean([self._at({c.name: self._set(c, dose)}, "random latents") for c in drawn])
        return found

    @cached_property
    def one(self) -> tuple[Concept, float, float]:
        """Of the latents that go with the value most, that which does most on the scenes for it; its dose and its score."""
        return self._best(self.latents[: self.tried])

    def _best(self, concepts: Sequence[Concept]) -> tuple[Concept, float, float]:
        """The coordinate, the dose of it, and the score."""
        tried = [
            (concept, dose, score(self.experiment.effect(self.dev, {concept.name: self._set(concept, dose)}, self.bank)))
            for concept in concepts
            for dose in DOSES
        ]
        return max(tried, key=lambda line: line[2])

    def _set(self, concept: Concept, dose: float, *, everywhere: bool = True) -> Intervention:
        """A coordinate at a multiple of its own: a latent's highest natural reading, or the mean of a value."""
        own = concept.natural[1] if concept.natural else 1.0
        return Set(dose * own, unit="raw", when=Window() if everywhere else None, gate=self.gate)

    def _patch(self) -> Edits:
        """Activations of a run with the other prompt, at the latent's site and where the place of the value is detected."""
        site = self.bank.site_of(self.one[0])
        with record(self.experiment.pipe, [site]) as tape:
            self.experiment.draw(self.saying)
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

        def run() -> None:
            self.experiment.draw(case.captions, edits, self.bank)

        return at_levels(self.experiment.pipe, [site], [int(level)], run)[key].flatten(0, 1).float()


def _mean(found: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: float(np.mean([line[key] for line in found])) for key in found[0] if isinstance(found[0][key], float)}


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
