"""Site, method and strength from measured effect; units from reference text; the range within which text stays sound."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from math import isclose, sqrt
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ...bank.concept_bank import ConceptBank
from ...errors import BadRecipe
from ...evaluation.comparison import Condition, Scores, Unrelated, answer, best_prompt, joint, stacked
from ...evaluation.text import Judge
from ...steering.plan import SHARE
from ..entries import ConceptRecipe
from ..recipe import DirectionRecipe

DOSES = (-1.5, -0.75, 1.5, 2.0)
"""Multiples of the chosen strength at which the text is looked at for its range."""
WORN = 1.0
"""Nats per token below prompted text at which steered text counts as damaged."""
DEV_SEEDS = (1001, 1002)
"""Seeds of answers to choose with; the evaluation uses others."""
FINALISTS = 3
DISTURBANCE = 0.3
"""Nats per token by which a setting may change the model's predictions on ordinary text."""
ORDINARY = 20
"""Texts on which that is seen; from the end of the reference, whose beginning gates learn to leave alone."""
LOOKS = 4
"""Strengths at which it is seen, at most, to find the strongest."""
QUICK = 0.85
SHARES = (0.7, 1.0)
"""Of the strongest: where sites are compared, and what is tried of every method."""


Banks = Callable[[str, str], ConceptBank]


class Statistics(NamedTuple):
    """How a direction reads on reference text, in raw coordinates."""

    mean: float
    std: float
    low: float
    high: float


def statistics(direction: Float[Tensor, " D"], x: Float[Tensor, "tokens D"]) -> Statistics:
    """Mean, standard deviation, and the 0.5 % and 99.5 % values around that mean."""
    d = direction.double()  # and float at the end: the same bits wherever x lies in memory
    z = x.double() @ d / d.square().sum()
    low, high = torch.quantile(z - z.mean(), torch.tensor([0.005, 0.995], dtype=z.dtype))
    return Statistics(*torch.stack((z.mean(), z.std(), low, high)).float().tolist())


class Setting(NamedTuple):
    """A lever to try at a strength."""

    method: str
    site: str
    strength: float


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One setting that was tried, on the prompts used to choose; scores as in `evaluation.comparison`."""

    method: str
    site: str
    strength: float
    joint: float
    concept: float
    relevance: float
    fluency: float
    nll: float

    @property
    def setting(self) -> Setting:
        """What was tried."""
        return Setting(self.method, self.site, self.strength)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the search chose, and all it tried.

    Args:
        method, site, strength: The setting.
        low, high: Strengths between which text stays sound.
        beyond: What was seen beyond them.
        prompt: Index of the instruction that asks best for the concept.
        answers: Answers generated in the search.
        unsteered, prompted: Joint scores of the anchors.
        trials: Every setting that was tried.
    """

    method: str
    site: str
    strength: float
    low: float
    high: float
    beyond: str
    prompt: int
    answers: int
    unsteered: float
    prompted: float
    trials: tuple[Trial, ...]

    def best_of(self, method: str) -> Trial:
        """The best setting of one method."""
        return max((trial for trial in self.trials if trial.method == method), key=lambda trial: trial.joint)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Choice":
        return cls(**{**values, "trials": tuple(Trial(**trial) for trial in values["trials"])})


class Search:
    """Choose a method, a site and a strength for one concept by what they do to answers to development prompts.

    First the best prompt; then the site, by difference of means; then every method there; then the best few once more on other
    answers; then the range of the best. Best is the highest joint score. Strengths are shares of the strongest that leaves
    ordinary text nearly as it is, so sites and methods are compared where they disturb it alike. Of the recipe's budget,
    enough is kept for the last two; when the rest is used up, no more is tried.
    """

    def __init__(self, model: Any, tokenizer: Any, concept: ConceptRecipe, judge: Judge, recipe: DirectionRecipe):
        self.model, self.tokenizer, self.concept, self.recipe, self.judge = model, tokenizer, concept, recipe, judge
        self.prompts, self.column = recipe.read_prompts("dev"), judge.names.index(concept.name)
        self.answers = 0
        self.trials: dict[Setting, Trial] = {}
        self.strongest: dict[tuple[str, str], float] = {}
        """By method and site."""
        words = [Condition(name="prompted", instruction=instruction) for instruction in concept.asked]
        plain = self._answers([Condition(name="unsteered"), *words], DEV_SEEDS)
        best = best_prompt(plain, self.column)
        self.prompt = best - 1
        self.anchors = [plain.of([0, best], slice(k, k + 1)) for k in range(len(DEV_SEEDS))]
        """Unsteered and prompted answers, by seed."""

    @cached_property
    def ordinary(self) -> Unrelated:
        """Ordinary text that should stay as it is."""
        return Unrelated(self.model, self.tokenizer, self.recipe.read_texts(self.recipe.reference)[-ORDINARY:])

    def run(self, sites: Sequence[str], bank: Banks) -> Choice:
        """`bank(method, site)` fits what is to be tried, as a bank whose one concept is `lever`."""
        methods = self.concept.methods or self.recipe.methods
        found = self._try([(methods[0], site, QUICK) for site in sites], bank)
        site = max(found, key=lambda trial: trial.joint).site
        self._try([(method, site, share) for method in methods for share in SHARES], bank)
        best = self._final(bank)
        low, high, beyond = self._sound_range(best.setting, bank)
        scores = joint(self.anchors[0], self.column).total.mean((1, 2))
        return Choice(
            **best.setting._asdict(),
            low=low,
            high=high,
            beyond=beyond,
            prompt=self.prompt,
            answers=self.answers,
            unsteered=float(scores[0]),
            prompted=float(scores[1]),
            trials=tuple(self.trials.values()),
        )

    def _answers(self, conditions: Sequence[Condition], seeds: Sequence[int]) -> Scores:
        self.answers += len(conditions) * len(seeds) * len(self.prompts)
        new = self.recipe.new_tokens
        return answer(
            self.model, self.tokenizer, conditions, self.prompts, self.judge, seeds=seeds, new_tokens=new, what="answers"
        )

    def _try(self, shares: Sequence[tuple[str, str, float]], bank: Banks) -> list[Trial]:
        """Trials of methods at sites, at shares of their strongest strength, as far as the budget goes."""
        later = FINALISTS + len(DOSES)
        room = max(0 if self.trials else 1, (self.recipe.budget - self.answers) // len(self.prompts) - later)
        tried = ((method, site, share * self._strongest(method, site, bank)) for method, site, share in shares[:room])
        settings = [Setting(method, site, round(strength, 4)) for method, site, strength in tried]
        if not settings:
            return []
        scores = self._answers([condition(setting, bank) for setting in settings], DEV_SEEDS[:1])
        found = self._trials(settings, scores, self.anchors[0])
        self.trials |= {trial.setting: trial for trial in found}
        return found

    def _strongest(self, method: str, site: str, bank: Banks) -> float:
        """The strength at which ordinary text changes by as much as it may, or at which the cap on lengths begins.

        The change grows about with the square of the strength, so a few looks find it.
        """
        key = method, site
        if key not in self.strongest:
            longest = _longest(bank(method, site))
            strength, best = longest / 2, 0.0
            for _ in range(LOOKS):
                kl = self.ordinary.side_effects(condition(Setting(method, site, strength), bank)).kl
                best = max(best, strength) if kl <= DISTURBANCE else best
                closer = min(longest, strength * sqrt(0.95 * DISTURBANCE / max(kl, 1e-6)))  # a little less, to be within it
                if best and closer < 1.05 * best:
                    break
                strength = closer
            self.strongest[key] = best or strength
        return self.strongest[key]

    def _trials(self, settings: Sequence[Setting], scores: Scores, anchors: Scores) -> list[Trial]:
        j = joint(stacked(anchors, scores), self.column)
        return [
            Trial(
                **setting._asdict(),
                joint=float(j.total[2 + i].mean()),
                concept=float(j.concept[2 + i].mean()),
                relevance=float(j.relevance[2 + i].mean()),
                fluency=float(j.fluency[2 + i].mean()),
                nll=float(scores.nll[i].mean()),
            )
            for i, setting in enumerate(settings)
        ]

    def _final(self, bank: Banks) -> Trial:
        """The best of the first round's best, by both rounds together."""
        best = sorted(self.trials.values(), key=lambda trial: -trial.joint)[:FINALISTS]
        scores = self._answers([condition(trial.setting, bank) for trial in best], DEV_SEEDS[1:])
        second = self._trials([trial.setting for trial in best], scores, self.anchors[1])
        return max(zip(best, second, strict=True), key=lambda both: both[0].joint + both[1].joint)[0]

    def _sound_range(self, chosen: Setting, bank: Banks) -> tuple[float, float, str]:
        """The strengths around 0 within which text stays likely, and what was seen just beyond."""
        doses = [round(dose * chosen.strength, 4) for dose in DOSES]
        scores = self._answers([condition(chosen._replace(strength=dose), bank) for dose in doses], DEV_SEEDS[:1])
        limit = float(self.anchors[0].nll.mean((1, 2)).max()) + WORN
        worn = dict(zip(doses, scores.nll.mean((1, 2)), strict=True))
        ends, seen = [0.0, 0.0], []
        for end, sign in ((0, -1), (1, 1)):
            for dose in sorted((dose for dose in doses if dose * sign > 0), key=abs):
                if worn[dose] > limit:
                    times = dose / chosen.strength
                    seen.append(f"text was {worn[dose] - limit + WORN:.1f} nats per token less likely at {times:+.1f} × useful")
                    break
                ends[end] = dose
        ends[1] = max(ends[1], chosen.strength)
        if isclose(ends[0], ends[1]):
            raise BadRecipe(f"no strength of {chosen.method} at {chosen.site} leaves the text sound; try other layers or pairs")
        return ends[0], ends[1], "; ".join(seen)


def _longest(bank: ConceptBank) -> float:
    """The strength at which the first of a lever's moves reaches the cap on lengths."""
    moves = ((bank.sites[bank.site_of(place)].norm, bank.rows(place).write.norm()) for place in bank["lever"].places)
    return min(SHARE * norm / float(length) for norm, length in moves if norm is not None)


def condition(setting: Setting, bank: Banks) -> Condition:
    """A setting as one way to answer."""
    name = f"{setting.method} {setting.strength:g}"
    return Condition(name=name, bank=bank(setting.method, setting.site), edits={"lever": setting.strength})
