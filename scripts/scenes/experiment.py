"""Experiments on the scenes bank: pictures of the same noise before and after an edit, and what judges see in them."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple
from warnings import catch_warnings, simplefilter

import numpy as np

from scenes import measures, world
from scenes.judges import PictureJudge
from scenes.measures import Cause, every
from steerlib.bank.concept_bank import ConceptBank
from steerlib.evaluation.pictures import draw_as_told, edit_of
from steerlib.steering.interventions import Intervention
from steerlib.steering.session import steer

BARS = {"effectiveness": 0.9, "preservation": 0.95}
"""What a lever has to reach."""
Edits = Mapping[str, Any]


class Case(NamedTuple):
    """Scenes that could show a value and do not, and what the model draws of them."""

    cause: Cause
    asked: world.Scenes
    captions: list[str]
    before: measures.Pictures


class Experiment:
    """A pipeline, a bank and a judge: draws cases and measures edits."""

    def __init__(self, pipe: Any, bank: ConceptBank, judge: PictureJudge, *, steps: int = 10, seed: int = 0):
        self.pipe, self.bank, self.judge, self.steps, self.seed = pipe, bank, judge, steps, seed

    def of(self, bank: ConceptBank) -> "Experiment":
        """The same with another bank."""
        return Experiment(self.pipe, bank, self.judge, steps=self.steps, seed=self.seed)

    def case(self, cause: Cause, n: int, purpose: int) -> Case:
        """`n` scenes; those of another purpose are others."""
        asked = measures.cases(cause, n, seed=(self.seed, 53, purpose))
        captions = world.captions(asked.factors, seed=(self.seed, 53, purpose))
        return Case(cause, asked, captions, self.draw(captions))

    def draw(
        self, captions: list[str], edits: Edits | None = None, bank: ConceptBank | None = None, **how: Any
    ) -> measures.Pictures:
        """Pictures of captions, always from the same noise; edits act on the half of guidance that reads the prompt, and `how`
        goes to `steer`."""
        how |= {"branch": "cond", "allow_ood": True}
        with catch_warnings():
            simplefilter("ignore")  # cases go beyond safe ranges on purpose
            with steer(self.pipe, bank or self.bank, edits, **how) if edits else nullcontext():
                return draw_as_told(self.pipe, captions, steps=self.steps, seed=self.seed)

    def lever(self, cause: Cause, share: float = 1.0) -> dict[str, Intervention]:
        """The edit that was chosen for a lever, at a share of its dose."""
        chosen = self.bank[cause.value].effects
        return {cause.value: edit_of(chosen["edit"], share * chosen["amount"])}

    def levers(self) -> list[Cause]:
        """All levers for which an edit was chosen."""
        known = self.bank.concepts
        return [cause for cause in every() if cause.value in known and "amount" in known[cause.value].effects]

    def saying(self, case: Case, purpose: int) -> list[str]:
        """The captions of a case, changed to say the value."""
        factors = {**case.asked.factors}
        for name, value in case.cause.sets.items():
            factors[name] = np.full_like(factors[name], world.VALUES[name].index(value))
        return world.captions(factors, seed=(self.seed, 53, purpose))

    def effect(self, case: Case, edits: Edits, bank: ConceptBank | None = None) -> measures.Effect:
        """What edits do to the pictures of a case."""
        return measures.effect(case.cause, case.asked, case.before, self.draw(case.captions, edits, bank), self.judge)


def score(effect: measures.Effect) -> float:
    """By how much the bar that is hardest to reach is passed."""
    return min(effect.effectiveness - BARS["effectiveness"], effect.preservation - BARS["preservation"])
