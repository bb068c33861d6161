"""`calibrate`: unit, useful amount and safe range of concepts that are there, whatever bank they are of, by any judge."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ...bank import wording
from ...bank.concept_bank import ConceptBank
from ...bank.concepts import Concept, Place
from ...bank.manifest import SiteFacts
from ...errors import BadEdit
from ...evaluation.comparison import Condition, Unrelated, answer
from ...evaluation.judges import Judge, judged
from ...evaluation.pictures import Pictures, edit_of
from ...evaluation.score import DRAWS, Scores, best_prompt, stacked
from ...evaluation.text import Asked, judge_for
from ...evaluation.text import Judge as Trained
from ...hosts import host_for
from ...passes import StepState
from ...schedules import Window
from ...steering.recording import conditional, observing, record
from ...text import progress, stage
from ..carry import recipe_in
from ..entries import TEMPLATES
from ..picture_recipe import PictureRecipe, PromptPair
from ..recipe import DirectionRecipe
from ..record.activations import tokens
from .doses import DEV_SEEDS, DOSES, ORDINARY, QUICK, SHARES, WORN, longest, sound, strongest, worth
from .prompted import HARM, Attempt, Choice, Drawing, Trials

AT_ONCE = 512
"""Tokens that are read at once."""
TAILS = 0.005, 0.995
LOOKS = 5
"""Amounts that are tried, at most, to find where pictures are harmed."""
PARTS = (0.25, 0.45, 0.7)
"""Further amounts, as shares of the largest that does no harm."""


def calibrate(
    target: Any, bank: ConceptBank, concepts: Sequence[str] | None = None, *, prompts: Sequence[Any] | None = None,
    judge: Judge | None = None, tokenizer: Any = None, texts: Sequence[str] | None = None, new_tokens: int | None = None,
    seed: int = 0, **drawing: Any,
) -> ConceptBank:  # fmt: skip
    """Measure unit, useful amount and safe range of concepts of any bank: own vectors, foreign files, latents.

    Of answers, the useful amount has the highest joint score of three that leave ordinary text nearly as it is: how much
    they show the concept, as the judge says, how much to the point and how likely they are; the range ends before answers
    become a nat per token less likely. Of pictures, it has the largest effect less a quarter of the damage. None is stored
    where nothing surely moved the judge. A unit that was not measured becomes the standard deviation of the reading on
    ordinary text or plain pictures, of a latent the median where it fires. Effects that were measured at other amounts go.

    Args:
        target: the model or pipeline.
        bank: stays as it is.
        concepts: those to measure (default: all that are no gates).
        prompts: requests, or what pictures are drawn of: texts, or pairs, with the concept and without it. Default: those of
            the bank's recipe, or some that come with steerlib.
        judge: as for `sl.sweep`. Default: the scorer of the bank's recipe; of a pipeline its own denoising error.
        tokenizer: the model's (default: that of `sl.load`).
        texts: ordinary text. Default: some that comes with steerlib.
        new_tokens, seed: tokens of an answer (default: those of the bank's recipe, or 32); of noise.
        drawing: of a pipeline `steps`, `guidance` and `batch`.

    Returns a new bank. Raises `BadEdit` without a judge, `NoScore`, and `MissingExtra` without `steerlib[eval]`.

    >>> mine = sl.calibrate(model, bank, ["polite"], prompts=prompts, judge=judge)                  # doctest: +SKIP
    """
    if wrong := [given for given in (concepts, prompts, texts) if isinstance(given, str)]:
        raise BadEdit(f"expected concepts, prompts and texts as lists, got {wrong[0]!r:.80}")
    names = [bank[name].name for name in concepts or [c.name for c in bank.concepts.values() if c.present is None]]
    if not names:
        raise BadEdit(f"bank {bank.name!r} lists no concept; name some, such as {next(iter(bank.encoder_facts), 'x')}/0")
    if host_for(target).has_progress:
        plan = plan_of(bank, PictureRecipe, seed=seed, **drawing)
        return _of_pictures(Drawing(target, plan), bank, names, prompts or plan.read_prompts()[: plan.dev_prompts], judge)
    plan, tokenizer = plan_of(bank, DirectionRecipe, **drawing), tokenizer or host_for(target).tokenizer()
    judges, asked = judge or own_judge(bank, plan, names), [*(prompts or plan.read_prompts("dev"))]
    return _of_texts(Asking(target, tokenizer, asked, judges, new_tokens or plan.new_tokens), bank, names, plan, texts)


def plan_of(bank: ConceptBank, kind: Any, **given: Any) -> Any:
    """The recipe that a bank carries, if it is of a kind, or one that names what comes with steerlib."""
    own: Any = recipe_in(bank)
    found = own if isinstance(own, kind) else kind(name="calibration", base="none", source="none")
    if strange := given.keys() - ({"seed", "steps", "guidance", "batch"} if kind is PictureRecipe else set()):
        raise BadEdit(f"{', '.join(sorted(strange))}: no argument of what is measured here")
    return replace(found, **given)


def own_judge(bank: ConceptBank, plan: DirectionRecipe, names: Sequence[str]) -> Trained:
    """The scorer of a bank's recipe; raises `BadEdit` where it has none of a concept."""
    known = plan.scorers
    if missing := [name for name in names if name not in known]:
        raise BadEdit(
            f"bank {bank.name!r} carries no recipe with a scorer of {missing[0]!r}; give judge=, a function of requests and "
            "answers that gives a number for each, or sl.Endpoint(url, model)"
        )
    return judge_for(known)


def _with_facts(bank: ConceptBank, facts: Mapping[str, Concept], **changes: Any) -> ConceptBank:
    """The bank with other facts of some concepts."""
    own = bank.contents()
    known = [facts.get(concept.name, concept) for concept in own["concepts"]]
    known += [concept for name, concept in facts.items() if name not in bank.concepts]
    return ConceptBank(**{**own, "concepts": known, **changes})


def _calibrated(bank: ConceptBank, facts: Mapping[str, Concept], judge: Judge | Trained | None, prompts: int) -> ConceptBank:
    """The same, with a card and a provenance that say so."""
    who = "the pipeline itself" if judge is None else getattr(judge, "__name__", type(judge).__name__)
    who = "the scorer of its recipe" if isinstance(judge, Trained) else who
    how = {**bank.provenance.get("calibrated", {}), **dict.fromkeys(facts, {"judge": who, "prompts": prompts})}
    said = f"amounts of {', '.join(f'“{name}”' for name in facts)} were measured later, by {who}; the text below has older ones"
    card = wording.noted(bank.card, said) if bank.card else ""
    return _with_facts(bank, facts, card=card, provenance={**bank.provenance, "calibrated": how})


# -- units -----------------------------------------------------------------------------------------------------------------


def unit_of(z: Float[Tensor, " tokens"], is_latent: bool) -> float | None:
    """The standard deviation of readings, of a latent the median where it fires; None where it does not vary."""
    known = z[z > 0] if is_latent else z
    if len(known) < 2 or not float(known.std()):
        return None
    return float(known.median() if is_latent else known.double().std())


def in_units(bank: ConceptBank, concept: Concept, z: Float[Tensor, " tokens"], is_latent: bool) -> Concept:
    """A concept with what is natural for it, by its readings on reference data, and with a unit, unless it has one that was
    measured or that a gate or the graph counts in."""
    if (unit := unit_of(z, is_latent)) is None:
        return concept
    natural = natural_of(z, is_latent)
    counted = {c.gate.concept for c in bank.concepts.values() if c.gate}
    counted |= {end for edge in bank.graph.edges for end in (edge.src, edge.dst)}
    if concept.natural is not None or concept.range is not None or concept.name in counted:
        return replace(concept, natural=concept.natural or natural)
    parts = tuple(replace(part, unit=part.unit * unit / concept.unit) for part in concept.parts)
    return replace(concept, unit=unit, natural=natural, parts=parts)


def natural_of(z: Float[Tensor, " tokens"], is_latent: bool) -> tuple[float, float]:
    """The 0.5 % and 99.5 % values of readings, of a latent 0 and the latter where it fires."""
    known = z[z > 0] if is_latent else z
    if not len(known):
        return 0.0, 0.0
    low, high = torch.quantile(_some(known).double(), torch.tensor(TAILS, dtype=torch.float64)).tolist()
    return (0.0, high) if is_latent else (low, high)


def _some(values: Float[Tensor, " n"], most: int = 1 << 22) -> Float[Tensor, " m"]:
    """Evenly spaced ones of many values."""
    return values[:: max(1, len(values) // most)]


Readings = dict[str, Float[Tensor, " tokens"]]
"""By concept."""


def readings(bank: ConceptBank, names: Sequence[str], x: Mapping[str, Tensor]) -> Readings:
    """What concepts read of the activations `[tokens, D]` at their sites, in raw coordinates."""
    by_encoder: dict[str, list[Concept]] = {}
    for name in names:
        by_encoder.setdefault(bank[name].encoder, []).append(bank[name])
    found = {}
    for id, own in by_encoder.items():
        encoder = bank.encoder(id)
        parts = x[bank.read_at(own[0])].split(AT_ONCE)
        z = torch.cat([encoder.readings(part, [concept.index for concept in own]) for part in parts])
        found |= {concept.name: z[:, k] for k, concept in enumerate(own)}
    return found


def _in_units(bank: ConceptBank, read: Readings) -> dict[str, Concept]:
    return {name: in_units(bank, bank[name], z, bank.rows(bank[name]).is_sparse) for name, z in read.items()}


def _sites(bank: ConceptBank, lengths: Mapping[str, float]) -> dict[str, SiteFacts]:
    """Sites with the median length of an activation, where it was not known."""
    return {
        name: replace(facts, norm=round(lengths[name], 4)) if facts.norm is None and name in lengths else facts
        for name, facts in bank.sites.items()
    }


# -- answers ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Asking:
    """A language model, prompts, and who judges its answers: a judge, or a recipe's scorer, which knows several concepts."""

    model: Any
    tokenizer: Any
    prompts: list[str]
    judge: Judge | Trained
    new_tokens: int

    def __call__(self, concept: str, conditions: Sequence[Condition], seeds: Sequence[int | None] = DEV_SEEDS) -> Scores:
        """Answers under some conditions, scored: first by the concept, then by what else is known."""
        known = self.judge if isinstance(self.judge, Trained) else None
        own = known or Trained((concept,), 0, None, {concept: Asked(self.judge, concept)}, {})
        how = {"seeds": seeds, "new_tokens": self.new_tokens}
        found = answer(self.model, self.tokenizer, conditions, self.prompts, own, **how)
        order = sorted(range(len(own.names)), key=lambda k: own.names[k] != concept)
        return found._replace(concepts=found.concepts[..., order], foreign=found.foreign[..., [*order, -1]])

    def knows(self, concept: str) -> bool:
        """Whether its answers can be scored by a concept."""
        return not isinstance(self.judge, Trained) or concept in self.judge.names


def sites_of(bank: ConceptBank, names: Sequence[str]) -> list[str]:
    """Where some concepts are moved or read."""
    places: list[Concept | Place] = [place for name in names for place in bank[name].places]
    return sorted({site for place in places for site in (bank.site_of(place), bank.read_at(place))})


def _of_texts(
    asking: Asking, bank: ConceptBank, names: Sequence[str], plan: DirectionRecipe, texts: Sequence[str] | None
) -> ConceptBank:
    read = list(texts or plan.read_texts(plan.reference))
    with stage(1, 2, f"reading {len(read)} ordinary texts"):
        places: list[Concept | Place] = [place for name in names for place in bank[name].places]
        sites = sorted({site for place in places for site in (bank.site_of(place), bank.read_at(place))})
        x = tokens(asking.model, asking.tokenizer, read, sites, what="ordinary texts")
        lengths = {site: float(own.norm(dim=-1).median()) for site, own in x.items()}
        known = _with_facts(bank, _in_units(bank, readings(bank, names, x)), sites=_sites(bank, lengths))
        ordinary = Unrelated(asking.model, asking.tokenizer, read[-ORDINARY:])
    asked, facts = {concept.name: concept.asked for concept in plan.concepts}, {}
    with stage(2, 2, f"trying amounts of {len(names)} concepts"):
        for concept in progress([known[name] for name in names], "concepts"):
            said = asked.get(concept.name) or _asked(concept)
            facts[concept.name] = _by_answers(asking, known, concept, said, ordinary)
    return _calibrated(known, facts, asking.judge, len(asking.prompts))


def _asked(concept: Concept) -> tuple[str, ...]:
    """How a prompt asks for a concept, if there is a word for it."""
    word = concept.label or (concept.name if concept.name != concept.id else "")
    return tuple(template.format(word) for template in TEMPLATES) if word else ()


def _by_answers(
    asking: Asking, bank: ConceptBank, concept: Concept, asked: Sequence[str], ordinary: Unrelated
) -> Concept:  # fmt: skip
    """A concept with its useful amount and range, chosen as training chooses them."""

    def steered(amount: float) -> Condition:
        return Condition(name=f"{amount:g}", bank=bank, edits={concept.name: amount})

    def change(amount: float) -> float:
        return ordinary.side_effects(steered(amount)).kl

    plain = asking(concept.name, [Condition(name="unsteered"), *(Condition(name="asked", instruction=said) for said in asked)])
    prompted = best_prompt(plain, 0) if asked else 0  # where it cannot be asked for, the spread of plain answers is the scale
    top = strongest(longest(bank, concept), change)
    amounts = [float(f"{share * top:.4g}") for share in (*SHARES, QUICK)]
    scores, totals = asking(concept.name, [steered(amount) for amount in amounts]), np.zeros(len(amounts))
    for k in range(len(DEV_SEEDS)):
        both = stacked(plain.of([0, prompted], slice(k, k + 1)), scores.of(range(len(amounts)), slice(k, k + 1)))
        totals += worth(both, 0)
    best = int(totals.argmax())
    doses = [float(f"{dose * amounts[best]:.4g}") for dose in DOSES]
    worn = asking(concept.name, [steered(dose) for dose in doses], DEV_SEEDS[:1]).nll.mean((1, 2))
    limit = float(plain.nll[[0, prompted], 0].mean(-1).max()) + WORN
    low, high, beyond = sound(dict(zip(doses, worn.tolist(), strict=True)), limit, amounts[best])
    is_moved = surely_more(plain.concepts[0, ..., 0].mean(0), scores.concepts[best, ..., 0].mean(0))
    return _with(concept, (low, high), amounts[best] if is_moved else None, "Add", beyond, "raised it surely")


def surely_more(before: Float[np.ndarray, " prompts"], after: Float[np.ndarray, " prompts"]) -> bool:
    """Whether a score rises by the same prompts' answers, at 95 % by bootstrap over prompts."""
    picks = np.random.default_rng(0).integers(0, len(before), (DRAWS, len(before)))
    return float(np.quantile((after - before)[picks].mean(1), 0.025)) > 0


def _with(concept: Concept, ends: tuple[float, float], useful: float | None, edit: str, beyond: str, what: str) -> Concept:
    """A concept with what was measured; effects of other amounts are left out."""
    said = beyond if useful is not None else "; ".join(filter(None, (f"no amount that was tried {what}", beyond)))
    effects = {key: value for key, value in concept.effects.items() if "conditions" not in concept.effects and key not in STALE}
    return replace(concept, range=ends, useful=useful, useful_as=edit, beyond=said, effects=effects)


STALE = ("edit", "amount", "effect", "damage", "told", "saturated", "removal", "removal_amount", "removed", "scorer")
"""Effects of a concept of pictures that are of an amount."""


# -- pictures --------------------------------------------------------------------------------------------------------------


def _of_pictures(
    drawing: Drawing, bank: ConceptBank, names: Sequence[str], prompts: Sequence[Any], judge: Judge | None
) -> ConceptBank:
    pairs, facts = {name: pairs_of(bank[name], prompts, drawing.recipe) for name in names}, {}
    with stage(1, 2, f"drawing {len(prompts)} plain pictures"):
        read, lengths = seen(drawing, bank, next(iter(pairs.values())), names)
        known = _with_facts(bank, _in_units(bank, read))
        lengthy = _with_facts(known, {}, sites=_sites(bank, lengths))  # what steers has no caps that it had not
    with stage(2, 2, f"trying amounts of {len(names)} concepts"):
        for name in progress(names, "concepts"):
            start = longest(lengthy, known[name])
            facts[name] = _by_pictures(drawing, known, known[name], pairs[name], judge, start)
    return _calibrated(known, facts, judge, len(prompts))


def pairs_of(concept: Concept, prompts: Sequence[Any], recipe: PictureRecipe) -> list[PromptPair]:
    """Each prompt with the concept and without it, and the seed of its noise."""
    found = []
    for k, prompt in enumerate(prompts):
        said, plain = (recipe.asked(prompt, concept.name), prompt) if isinstance(prompt, str) else prompt
        if not isinstance(said, str) or not isinstance(plain, str) or said == plain:
            raise BadEdit(f"expected a prompt, or two different ones, with the concept and without it, got {prompt!r:.80}")
        found.append(PromptPair(said, plain, recipe.seed + k))
    if not found:
        raise BadEdit("expected prompts, at least one")
    return found


def seen(
    drawing: Drawing, bank: ConceptBank, pairs: Sequence[PromptPair], names: Sequence[str]
) -> tuple[Readings, dict[str, float]]:
    """What concepts read while plain pictures are drawn, and median lengths of activations by site."""
    sites = sorted({bank.site_of(place) for name in names for place in bank[name].places})
    lengths: dict[str, list[Tensor]] = {site: [] for site in sites}

    def keeper(site: str) -> Callable[[Any, Any], None]:
        return lambda x, _: lengths[site].append(x.detach().float().norm(dim=-1).flatten().cpu())

    with observing(drawing.pipe, {site: keeper(site) for site in sites}), record(drawing.pipe, bank, names) as tape:
        drawing([pair.negative for pair in pairs], [pair.seed for pair in pairs])
    found = {}
    for name in names:
        when = bank.window_of(bank[name])
        read = [
            own.flatten().cpu()
            for state, z in tape[name]
            if _is_open(when, state) and (own := conditional(z, state)) is not None
        ]
        found[name] = torch.cat(read) if read else torch.zeros(0)
    return found, {site: float(torch.cat(own).median()) for site, own in lengths.items() if own}


def _is_open(when: Window | None, state: StepState) -> bool:
    return when is None or bool(torch.as_tensor(when.weight(state)).any())


def _by_pictures(
    drawing: Drawing, bank: ConceptBank, concept: Concept, pairs: Sequence[PromptPair], judge: Judge | None, start: float
) -> Concept:
    """A concept with its useful amount and range: amounts are doubled until they do harm or are capped, or halved until they
    do none."""

    def score(pictures: Pictures, name: str) -> Any:
        return judged(judge, [pair.negative for pair in pairs], pictures, name) if judge else None

    trials, tried = Trials(drawing, pairs, concept.name, score if judge else None), []

    def attempt(amount: float) -> Attempt:
        amount = float(f"{amount:.4g}")
        found = trials.of(bank, {concept.name: edit_of(concept.useful_as, amount)})
        tried.append(Attempt("", concept.useful_as, amount, *found))
        return tried[-1]

    cap = longest(bank, concept)
    amount = min(cap, start if start < inf else 1.0)
    while len(tried) < LOOKS:
        harms = attempt(amount).damage > HARM
        if len({line.damage > HARM for line in tried}) > 1 or (amount >= cap and not harms):
            break
        amount = amount / 2 if harms else min(cap, amount * 2)
    safe = max((line.amount for line in tried if line.damage <= HARM), default=min(line.amount for line in tried) / 2)
    for share in PARTS:
        attempt(share * safe)
    best = max(tried, key=lambda line: line.score)
    choice = Choice(best, tried, round(trials.told, 4))
    useful = best.amount if choice.is_useful else None
    made = _with(concept, choice.range, useful, concept.useful_as, "", "is useful")
    figures = {"edit": best.edit, "amount": best.amount, "effect": best.effect, "damage": best.damage, "told": choice.told}
    return replace(made, beyond=choice.beyond, effects={**made.effects, **figures})
