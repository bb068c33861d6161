"""What one concept of a bank does, beside everything it has to be compared with."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from ...bank.concept_bank import ConceptBank
from ...bank.concepts import Concept, Gate
from ...bank.effects import Example, MeasuredEffects
from ...evaluation import comparison
from ...evaluation.comparison import Condition, Response
from ...evaluation.score import Joint, Scores, joint, ratios, specificity
from ...evaluation.text import Judge
from ..directions.studio import Studio
from ..entries import ConceptRecipe
from .doses import Choice, Search

ANSWERING = "answering"
GATED, REVERSED = "steered, gated", "reversed"
"""The chosen lever with a gate that lets it act only in chats, and moved the other way."""
SHOWN = ("unsteered", "prompted", "steered", REVERSED)
"""Conditions of which greedy answers are measured and shown, beside the sampled ones of all."""
LEAST = ("steered", "random word", "random-1")
"""Conditions beside a plain and an asking prompt that are measured for a brief recipe."""
EXAMPLES = 3
FEW = 4
"""Prompts of a brief recipe's dose–response."""
DOSES = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
"""Multiples of the useful amount in the dose–response; for a brief recipe the ends and the middle."""


def measure(bank: ConceptBank, concept: ConceptRecipe, judge: Judge, studio: Studio, choice: Choice | None) -> MeasuredEffects:
    """Scores of a concept at its useful amount and of its controls, side effects, dose–response, examples: plain values."""
    recipe, fact, column = studio.recipe, bank[concept.name], judge.names.index(concept.name)
    which = choice.prompt if choice else Search(studio, concept, judge).prompt
    methods, same = _methods(studio, concept, choice) if not recipe.is_brief else ([], [])
    conditions = [
        Condition(name="unsteered"),
        Condition(name="prompted", instruction=concept.asked[which]),
        *_steered_and_controls(bank, fact, studio, concept, choice),
        *methods,
    ]
    prompts, seeds = recipe.read_prompts("evaluation"), range(recipe.seed, recipe.seed + recipe.seeds)
    scores, rows = studio.scored(conditions, prompts, judge, [*seeds]), {c.name: i for i, c in enumerate(conditions)}
    shown = [condition for condition in conditions if condition.name in SHOWN]
    greedy, lines = studio.scored(shown, prompts, judge, [None]), {c.name: i for i, c in enumerate(shown)}
    found, firm = joint(scores, column), joint(greedy, column)
    effects = _side_effects(studio, conditions)
    for name in same:  # what was steered, under another name
        rows[name], effects[name] = rows["steered"], effects["steered"]
    ratio = ratios({name: found.total[i].mean(0) for name, i in rows.items()})
    record: dict[str, Any] = {
        "concept": concept.name,
        "label": concept.label,
        "site": " ".join(bank.site_of(place) for place in fact.places),
        "method": choice.method if choice else fact.source.partition(",")[0],
        "amount": fact.useful,
        "least": _least(fact),
        "instruction": concept.asked[which],
        "answers": scores.nll[0].size,
        "moved": moved(scores.concepts[[rows["unsteered"], rows["steered"]], ..., column]),
        "conditions": {n: _line(scores, found, column, i) | ratio[n] | effects.get(n, {}) for n, i in rows.items()},
        "joint": {name: found.total[i].mean(0).tolist() for name, i in rows.items()},
        "before": {name: found.before[i].mean(0).tolist() for name, i in rows.items()},
        "greedy": {name: firm.total[i].mean(0).tolist() for name, i in lines.items()},
        "loops": {name: float(greedy.repeated[i].mean()) for name, i in lines.items()},
        "response": _response(bank, fact, studio, concept, prompts)._asdict(),
        "examples": _examples(prompts, greedy, lines),
        "tried": [[*trial] for trial in choice.trials] if choice else [],
    }
    return _rounded({**record, "passes": _passes(record), "also": _also(record)})


def _response(bank: ConceptBank, fact: Concept, studio: Studio, concept: ConceptRecipe, prompts: Sequence[str]) -> Response:
    """Dose and response, in words that tell the pairs' answers with the concept from those without it."""
    shown, brief = studio.recipe.read_shown(concept), studio.recipe.is_brief
    words = comparison.lexicon(*([text for _, text in side] for side in shown))
    doses = [round(dose * (fact.useful or 1.0), 4) for dose in (DOSES[::3] if brief else DOSES)]
    some = prompts[:FEW] if brief else prompts
    return comparison.dose_response(studio.model, studio.tokenizer, bank, concept.name, doses, some, words)


def _steered_and_controls(
    bank: ConceptBank, fact: Concept, studio: Studio, concept: ConceptRecipe, choice: Choice | None
) -> list[Condition]:
    amount = {fact.name: fact.useful or 0.0}
    controls = comparison.random_bank(fact, bank, seed=studio.recipe.seed)
    others = [c.name for c in bank.concepts.values() if c.useful is not None]
    wrong = others[(others.index(fact.name) + 1) % len(others)]
    if choice is None or all(trial.method != "difference-of-means" for trial in choice.trials):
        site, unit = bank.site_of(fact), fact.unit * float(bank.rows(fact).write.norm())
        strength = (fact.useful or 0.0) * unit / studio.norms[site]
    else:
        site, strength = choice.site, choice.best_of("difference-of-means").strength
    found = [
        Condition(name="steered", bank=bank, edits=amount),
        Condition(name="no-op", bank=bank, edits={fact.name: 0.0}),
        Condition(name="shuffled labels", bank=studio.shuffled(concept, site), edits={"lever": strength}),
    ]
    if choice is not None and (control := studio.control(concept, choice.method, choice.site)) is not None:
        found.append(Condition(name="random word", bank=control, edits={"lever": choice.strength}))
    if wrong != fact.name:
        found.append(Condition(name="wrong concept", bank=bank, edits={wrong: bank[wrong].useful or 0.0}))
    randoms = [name for name in controls if name.startswith("random-")]
    found += [Condition(name=name, bank=controls, edits={name: fact.useful or 0.0}) for name in randoms]
    if least := _least(fact):
        found.append(Condition(name=REVERSED, bank=bank, edits={fact.name: least}))
    found += [Condition(name=GATED, bank=bank, edits=amount, gate=Gate(ANSWERING))] * (ANSWERING in bank.concepts)
    return [condition for condition in found if not studio.recipe.is_brief or condition.name in LEAST]


def _least(fact: Concept) -> float:
    """The amount by which a concept is moved the other way: as far as it is moved, where its range allows."""
    return max(-(fact.useful or 0.0), fact.range[0] if fact.range else 0.0)


def _methods(studio: Studio, concept: ConceptRecipe, choice: Choice | None) -> tuple[list[Condition], list[str]]:
    """Every method at its best strength on the development prompts, and the names of those that are the chosen lever."""
    found, same = [], []
    if choice is None:
        return found, same
    for method in dict.fromkeys(trial.method for trial in choice.trials):
        best = choice.best_of(method)
        if best[:3] == (choice.method, choice.site, choice.strength):
            same.append(method)
        else:
            bank = studio.bank(concept, concept.asked[choice.prompt], method, best.site)
            found.append(Condition(name=method, bank=bank, edits={"lever": best.strength}))
    return found, same


def _side_effects(studio: Studio, conditions: Sequence[Condition]) -> dict[str, dict[str, float]]:
    """On ordinary text."""
    measured = [c for c in conditions if c.bank is not None and c.name not in ("no-op", "shuffled labels", "wrong concept")]
    measured = [c for c in measured if not c.name.startswith("random-") or c.name == "random-1"]
    return {c.name: studio.unrelated.side_effects(c)._asdict() for c in measured}


def _line(scores: Scores, found: Joint, column: int, i: int) -> dict[str, float]:
    return {
        "score": float(scores.concepts[i, ..., column].mean()),
        "concept": float(found.concept[i].mean()),
        "relevance": float(found.relevance[i].mean()),
        "fluency": float(found.fluency[i].mean()),
        "variety": float(found.variety[i].mean()),
        "language": float(found.language[i].mean()),
        "joint": float(found.total[i].mean()),
        "nll": float(scores.nll[i].mean()),
        "repeated": float(scores.repeated[i].mean()),
        "specificity": specificity(scores, column, i),
    }


def moved(concept: Float[np.ndarray, "2 seeds prompts"]) -> float:
    """The share of prompts on which the second condition has more of a concept than the first."""
    before, after = concept.mean(1)
    return float((after > before).mean())


def _passes(record: Mapping[str, Any]) -> dict[str, bool]:
    """The bars that a shipped concept has to clear."""
    table = record["conditions"]
    steered, prompted = table["steered"], table["prompted"]
    return {
        "raises the concept on at least 80 % of prompts": record["moved"] >= 0.8,
        "beats every random direction": all(
            steered["joint"] > table[name]["joint"] for name in table if name.startswith("random-")
        ),
        "at most 0.5 nats worse than prompting": steered["nll"] - prompted["nll"] <= 0.5,
        "at least half as good as prompting": _is_half_as_good(table),
        "repeats itself at most 0.05 more than unsteered, in greedy answers": record["loops"]["steered"]
        <= record["loops"]["unsteered"] + 0.05,
    }


def _is_half_as_good(table: Mapping[str, Mapping[str, float]]) -> bool:
    """By the ratio to prompting; where asking in words does not surely help, steering has to be as good as that."""
    steered = table["steered"]
    return steered["ratio"] >= 0.5 if "ratio" in steered else steered["joint"] >= table["prompted"]["joint"]


def _also(record: Mapping[str, Any]) -> dict[str, bool]:
    """Bars that are reported and not required."""
    table = record["conditions"]
    return {
        "specificity at least 0.7": table["steered"]["specificity"] >= 0.7,
        "at most 20 % of prompts anti-steerable": record["response"]["anti_steerable"] <= 0.2,
        "at most 0.35 nats per token on unrelated text": table["steered"]["kl"] <= 0.35,
        "at most 0.05 nats per token there when gated": table.get(GATED, table["steered"])["kl"] <= 0.05,
    }


def _examples(prompts: Sequence[str], greedy: Scores, rows: Mapping[str, int]) -> list[Example]:
    shown = {name: greedy.texts[row][0] for name, row in rows.items()}
    return [{"prompt": prompt, **{n: texts[k] for n, texts in shown.items()}} for k, prompt in enumerate(prompts[:EXAMPLES])]  # type: ignore[typeddict-item]


def _rounded(value: Any) -> Any:
    if isinstance(value, float | np.floating):
        return round(float(value), 4)
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list | tuple) else value
