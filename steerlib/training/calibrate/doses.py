"""Site, method and strength from measured effect; units from reference text; the range within which text stays sound."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from math import inf, isclose, sqrt
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ...bank.concept_bank import ConceptBank
from ...bank.concepts import Concept
from ...errors import BadRecipe
from ...evaluation.comparison import Condition, Unrelated, together
from ...evaluation.score import Scores, best_prompt, joint, specificity, stacked
from ...evaluation.text import Judge
from ...steering.lowering import SHARE
from ..directions.levers import bank_of
from ..directions.methods import is_everywhere
from ..directions.objectives import loss, shown
from ..directions.studio import Studio, fitted
from ..entries import ConceptRecipe
from ..recipe import DirectionRecipe

DOSES = (-1.5, -0.75, 1.5, 2.0)
"""Multiples of the chosen strength at which the text is looked at for its range; for a brief recipe, every second one."""
WORN = 1.0
"""Nats per token below prompted text at which steered text counts as damaged."""
DEV_SEEDS = (1001, None)
"""Seeds of answers to choose with, the second round greedy: that is how most people first try a concept, and where loops show.
The evaluation uses others."""
SPECIFIC = 0.9
"""Share of all gains that should be the concept's own; what has less counts for less."""
FINALISTS = 3
DISTURBANCE = 0.3
"""Nats per token by which a setting may change the model's predictions on ordinary text."""
ORDINARY = 20
"""Texts on which that is seen, half of them for a brief recipe; from the end of the reference, whose beginning gates learn to
leave alone."""
LOOKS = 4
"""Strengths at which it is seen, at most, to find the strongest."""
QUICK = 0.85
SHARES = (0.7, 1.0)
"""Of the strongest: where methods and sites are compared, and what is then tried of every method."""


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


def coarse_to_fine(sites: Sequence[str]) -> list[str]:
    """The middle one first, then the middles of what lies before and after it, and so on."""
    parts, found = [list(sites)], []
    while parts:
        part = parts.pop(0)
        middle = len(part) // 2
        found.append(part[middle])
        parts += [half for half in (part[:middle], part[middle + 1 :]) if half]
    return found


class Split(NamedTuple):
    """How many settings each step of the search tries."""

    methods: int
    """Methods at the middle site."""
    sites: int
    """Further sites of the best method."""
    strengths: int
    """Methods at the best site, at each of `SHARES`, the best methods first."""

    @classmethod
    def of(cls, room: int, methods: int, sites: int) -> "Split":
        """Methods first; of what is then left, further sites get at most half where not all fits."""
        first = min(methods, room)
        left = room - first
        last = min(len(SHARES) * methods, max(len(SHARES), left // 2))
        further = min(sites - 1, max(0, left - last))
        return cls(first, further, min(len(SHARES) * methods, left - further))


def untried(recipe: DirectionRecipe, concept: ConceptRecipe, sites: Sequence[str]) -> str:
    """What the budget leaves out for a concept, and the budget that would leave out nothing; empty if that is so already."""
    if recipe.is_brief:
        return ""
    methods, room = len(concept.methods or recipe.methods), room_for(recipe, concept)
    split, whole = Split.of(room, methods, len(sites)), Split(methods, len(sites) - 1, len(SHARES) * methods)
    if split == whole:
        return ""
    first, needed = coarse_to_fine(sites)[0], recipe.budget + (sum(whole) - room) * recipe.dev_prompts
    return (
        f"a budget of {recipe.budget} answers tries {split.methods} of {whole.methods} methods at {first}, the best of them at "
        f"{split.sites} of {whole.sites} further sites, and {split.strengths} of {whole.strengths} other strengths there; "
        f"budget = {needed} tries all"
    )


def room_for(recipe: DirectionRecipe, concept: ConceptRecipe) -> int:
    """Settings that the search may try for a concept, finalists and the range apart; one at least."""
    asked = (1 + len(concept.asked)) * len(DEV_SEEDS)
    return max(1, recipe.budget // recipe.dev_prompts - asked - FINALISTS - len(DOSES))


class Trial(NamedTuple):
    """A method, site and strength that was tried, and its joint score on the prompts used to choose, less where other concepts
    rise with this one."""

    method: str
    site: str
    strength: float
    joint: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the search chose, and all it tried.

    Text stays sound at strengths from `low` to `high`; `beyond` says what was seen beyond them. `prompt` is the index of the
    instruction that asks best for the concept, `answers` how many were generated, `untried` what the budget left out.
    """

    method: str
    site: str
    strength: float
    low: float
    high: float
    beyond: str
    prompt: int
    answers: int
    trials: tuple[Trial, ...]
    untried: str = ""

    def best_of(self, method: str) -> Trial:
        """The best trial of one method."""
        return max((trial for trial in self.trials if trial.method == method), key=lambda trial: trial.joint)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "trials": [trial._asdict() for trial in self.trials]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Choice":
        """From plain values; unknown ones, of other versions, are ignored."""
        trials = tuple(Trial(*(trial[name] for name in Trial._fields)) for trial in values["trials"])
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values and f.name != "trials"}, trials=trials)


class Search:
    """Choose a method, a site and a strength for one concept by what they do to answers to development prompts.

    First the best prompt; then every method at the middle site; then the best of them at further sites, coarse to fine (of
    those that act at one site; others do the same wherever they are tried); then the methods at the best site, the best first,
    at other strengths; then the best few once more on greedy answers; then the range of the best. For a brief recipe, sites
    and methods of one site are compared by likelihood instead. Best is the highest joint score, in proportion less where
    other concepts rise too. Strengths are shares of the strongest that leaves ordinary text nearly as it is, so sites and
    methods are compared where they disturb it alike. Enough of the budget is kept for the last two; `untried`: what is not.
    """

    def __init__(self, studio: Studio, concept: ConceptRecipe, judge: Judge):
        self.studio, self.concept, self.judge = studio, concept, judge
        self.prompts, self.column = studio.recipe.read_prompts("dev"), judge.names.index(concept.name)
        self.answers = 0
        self.trials: dict[tuple[str, str, float], Trial] = {}
        self.strongest: dict[tuple[str, str], float] = {}  # by method and site
        self.apart: dict[tuple[str, str], float] = {}
        words = [Condition(name="prompted", instruction=instruction) for instruction in concept.asked]
        plain = self._answers([Condition(name="unsteered"), *words], DEV_SEEDS)
        best = best_prompt(plain, self.column)
        self.prompt = best - 1
        self.anchors = [plain.of([0, best], slice(k, k + 1)) for k in range(len(DEV_SEEDS))]  # by seed: unsteered, prompted

    @cached_property
    def ordinary(self) -> Unrelated:
        """Ordinary text that should stay as it is."""
        recipe = self.studio.recipe
        texts = recipe.read_texts(recipe.reference)[-ORDINARY:]
        return Unrelated(self.studio.model, self.studio.tokenizer, texts[: len(texts) // 2] if recipe.is_brief else texts)

    def run(self) -> Choice:
        """Go through all steps."""
        recipe, sites = self.studio.recipe, coarse_to_fine(self.studio.sites)
        methods = self.concept.methods or recipe.methods
        self._screened(methods, sites) if recipe.is_brief else self._tried(methods, sites)
        best = self._final()
        low, high, beyond = self._sound_range(best)
        facts = {"low": low, "high": high, "beyond": beyond, "prompt": self.prompt, "answers": self.answers}
        return Choice(
            method=best.method, site=best.site, strength=best.strength, **facts, trials=tuple(self.trials.values()),
            untried=untried(recipe, self.concept, sites),
        )  # fmt: skip

    def _tried(self, methods: Sequence[str], sites: Sequence[str]) -> None:
        """Methods and sites by the answers that they give."""
        split = Split.of(room_for(self.studio.recipe, self.concept), len(methods), len(sites))
        first = self._try([(method, sites[0], QUICK) for method in methods[: split.methods]])
        order = [trial.method for trial in sorted(first, key=lambda trial: -trial.joint)]
        placed = [method for method in order if not is_everywhere(method)]
        further = self._try([(method, site, QUICK) for method in placed[:1] for site in sites[1 : 1 + split.sites]])
        found = [trial for trial in (*first, *further) if trial.method in placed] or first
        at = dict.fromkeys(placed, max(found, key=lambda trial: trial.joint).site)
        self._try([(method, at.get(method, sites[0]), share) for method in order for share in SHARES][: split.strengths])

    def _screened(self, methods: Sequence[str], sites: Sequence[str]) -> None:
        """Sites by the first method of one, then such methods there, by `_apart`; then strengths of the best, or that and
        methods of all sites, by answers."""
        placed = [name for name in methods if not is_everywhere(name)]
        site = max(sites, key=lambda site: self._apart(placed[0], site))
        method = max(placed, key=lambda method: self._apart(method, site))
        spread = [(name, sites[0], share) for name in methods if is_everywhere(name) for share in (1.0, QUICK)]
        self._try([(method, site, 1.0), *(spread or [(method, site, share) for share in (QUICK, SHARES[0])])])

    @torch.no_grad()
    def _apart(self, method: str, site: str) -> float:
        """By how many nats per token positive answers are likelier than negative ones, behind plain prompts, under a method's
        strongest lever: every second one of each, with a lever that was made from the others."""
        if (method, site) not in self.apart:
            task, model = self.studio.task(self.concept, self.concept.asked[self.prompt]), self.studio.model
            lever = bank_of(fitted(method, task.half(0).elsewhere(site)), self.studio.norms)
            steered = Condition(name=method, bank=lever, edits={"lever": self._strongest(method, site)})
            losses = []
            for side in ("negative", "positive"):
                lesson = shown(task.half(1), side)
                rows = torch.arange(len(lesson.said.ids))
                with together(model, [steered], len(rows)):
                    losses.append(float(loss(model, lesson, rows)))
            self.apart[method, site] = losses[0] - losses[1]
        return self.apart[method, site]

    def bank(self, method: str, site: str) -> ConceptBank:
        """A lever to try, fitted to the best prompt, as a bank whose one concept is `lever`."""
        return self.studio.bank(self.concept, self.concept.asked[self.prompt], method, site)

    def _condition(self, method: str, site: str, strength: float) -> Condition:
        return Condition(name=f"{method} {strength:g}", bank=self.bank(method, site), edits={"lever": strength})

    def _answers(self, conditions: Sequence[Condition], seeds: Sequence[int | None]) -> Scores:
        self.answers += len(conditions) * len(seeds) * len(self.prompts)
        return self.studio.scored(conditions, self.prompts, self.judge, seeds)

    def _try(self, shares: Sequence[tuple[str, str, float]]) -> list[Trial]:
        """Trials of methods at sites, at shares of their strongest strength."""
        tried = ((method, site, share * self._strongest(method, site)) for method, site, share in shares)
        settings = [(method, site, round(strength, 4)) for method, site, strength in tried]
        if not settings:
            return []
        found = self._scored(settings, seed=0)
        self.trials |= {trial[:3]: trial for trial in found}
        return found

    def _strongest(self, method: str, site: str) -> float:
        """The strength at which ordinary text changes by as much as it may, or at which the cap on lengths begins."""
        key = method, site
        if key not in self.strongest:
            made = self.bank(method, site)

            def change(strength: float) -> float:
                return self.ordinary.side_effects(self._condition(method, site, strength)).kl

            self.strongest[key] = strongest(longest(made, made["lever"]), change)
        return self.strongest[key]

    def _scored(self, settings: Sequence[tuple[str, str, float]], seed: int) -> list[Trial]:
        """Settings with their joint scores on answers of one seed."""
        scores = self._answers([self._condition(*setting) for setting in settings], DEV_SEEDS[seed : seed + 1])
        found = worth(stacked(self.anchors[seed], scores), self.column)
        return [Trial(*setting, joint=value) for setting, value in zip(settings, found, strict=True)]

    def _final(self) -> Trial:
        """The best of the first round's best, by both rounds together."""
        best = sorted(self.trials.values(), key=lambda trial: -trial.joint)[:FINALISTS]
        second = self._scored([trial[:3] for trial in best], seed=1)
        return max(zip(best, second, strict=True), key=lambda both: both[0].joint + both[1].joint)[0]

    def _sound_range(self, chosen: Trial) -> tuple[float, float, str]:
        """The strengths around 0 within which text stays likely, and what was seen just beyond."""
        doses = [round(dose * chosen.strength, 4) for dose in (DOSES[::2] if self.studio.recipe.is_brief else DOSES)]
        scores = self._answers([self._condition(chosen.method, chosen.site, dose) for dose in doses], DEV_SEEDS[:1])
        limit = float(self.anchors[0].nll.mean((1, 2)).max()) + WORN
        low, high, beyond = sound(dict(zip(doses, scores.nll.mean((1, 2)), strict=True)), limit, chosen.strength)
        if isclose(low, high):
            raise BadRecipe(f"no strength of {chosen.method} at {chosen.site} leaves the text sound; try other layers or pairs")
        return low, high, beyond


def worth(scores: Scores, concept: int) -> list[float]:
    """Joint scores of the conditions behind an unsteered and a prompted one, in proportion less where other concepts rise."""
    totals = joint(scores, concept).total.mean((1, 2))
    own = [min(1.0, specificity(scores, concept, k) / SPECIFIC) for k in range(len(totals))]
    return [float(total) * share for total, share in zip(totals, own, strict=True)][2:]


def longest(bank: ConceptBank, concept: Concept) -> float:
    """The amount at which the first of a concept's moves reaches the cap on lengths, in units."""
    lengths = ((place, place.unit * float(bank.rows(place).write.norm())) for place in concept.places)
    moves = ((bank.norm_of(place) or bank.sites[bank.site_of(place)].norm, length) for place, length in lengths)
    return min((SHARE * norm / length for norm, length in moves if norm is not None), default=inf)


def strongest(longest: float, change: Callable[[float], float]) -> float:
    """The largest amount up to `longest` at which the change of ordinary text, in nats per token, is what it may be.

    The change grows about with the square of the amount, so a few looks find it.
    """
    amount, best = longest / 2, 0.0
    for _ in range(LOOKS):
        kl = change(amount)
        best = max(best, amount) if kl <= DISTURBANCE else best
        closer = min(longest, amount * sqrt(0.95 * DISTURBANCE / max(kl, 1e-6)))  # a little less, to be within it
        if best and closer < 1.05 * best:
            break
        amount = closer
    return best or amount


def sound(worn: Mapping[float, float], limit: float, useful: float) -> tuple[float, float, str]:
    """Of amounts with the likelihood of their texts, in nats per token: the ends up to which texts stay within a limit, the
    useful amount at least, and what was seen just beyond."""
    ends, seen = [0.0, 0.0], []
    for end, sign in ((0, -1), (1, 1)):
        for dose in sorted((dose for dose in worn if dose * sign > 0), key=abs):
            if worn[dose] > limit:
                lost = worn[dose] - limit + WORN
                seen.append(f"text was {lost:.1f} nats per token less likely at {dose / useful:+.1f} × useful")
                break
            ends[end] = dose
    return ends[0], max(ends[1], useful), "; ".join(seen)
