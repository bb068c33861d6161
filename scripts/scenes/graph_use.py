"""What the graph of the scenes bank is good for.

Holding: a lever moves its factor and all that follows it; one follower is let go and the others are held where they were.
Guiding: a lever is moved together with its followers, as far as the graph foretells, beside latents of a flat sparse encoder.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from scenes import world
from scenes.experiment import Edits, Experiment, every, randomised, rounded, score
from scenes.graph import share
from scenes.judges import Readings
from scenes.measures import Cause
from scenes.methods import Comparison
from steerlib.bank.concept_bank import ConceptBank
from steerlib.evaluation.pictures import edit_of
from steerlib.steering.interventions import Add

HOLD_BARS = {"cut": 0.8, "kept": 0.5}
"""Of the changes without holding: how much of the others has to be gone, and how much of what was let go has to be left."""
HOLD_DOSES = (0.75, 1.0, 1.5, 2.0, 3.0)
"""What is tried, in doses of the lever: held, it is written at fewer tokens, and more of it does no harm."""
GUIDES = (0.25, 0.5, 1.0, 2.0)
"""How much of what the graph foretells is added to what the model does by itself."""
GUIDED_DOSES = (0.5, 1.0, 1.5)
FACTOR = {cause.value: cause.factor for cause in every()}


# -- one follower free, the others held --------------------------------------------------------------------------


class Baseline(NamedTuple):
    """Scenes, what judges see in the unsteered pictures of them, and how far each follower of one lever moves by itself."""

    captions: list[str]
    before: Readings
    moved: Mapping[str, float]


def pairs(bank: ConceptBank, levers: Sequence[Cause]) -> Iterator[tuple[Cause, str]]:
    """Every lever with every factor that follows it at once, where other factors follow it too."""
    for lever in levers:
        factors = {FACTOR[name] for name in bank.graph.descendants(lever.value)}
        children = {FACTOR[edge.dst] for edge in bank.graph.edges if edge.src == lever.value}
        yield from ((lever, factor) for factor in sorted(children) if len(factors) > 1)


def holding(experiment: Experiment, *, dev: int, test: int) -> list[dict[str, Any]]:
    """For each of `pairs`: the lever moved with `do="hold"` and the factor free.

    The dose is chosen on `dev` scenes, the figures are those of `test` others, with random directions held in the same places
    beside them. A change is that of the share of pictures that show a value (`graph.share`), absolute, the mean over values.
    """
    found: list[dict[str, Any]] = []
    baselines: dict[Cause, list[Baseline]] = {}
    for lever, factor in tqdm([*pairs(experiment.bank, experiment.levers())], desc="held apart"):
        if lever not in baselines:
            baselines[lever] = [baseline(experiment, lever, n, purpose) for n, purpose in ((dev, 20), (test, 21))]
        choosing, measuring = baselines[lever]
        dose = max(HOLD_DOSES, key=lambda dose: margin(held(experiment, lever, factor, dose, choosing)))
        own = held(experiment, lever, factor, dose, measuring)
        chance = held(experiment, lever, factor, dose, measuring, without_followers(experiment.bank, lever))
        random = {f"random {name}": chance[name] for name in HOLD_BARS}
        about = {"lever": lever.value, "free": factor, "dose": dose, "scenes": test, "passes": margin(own) >= 0}
        found.append({**about, **own, **random})
    return found


def margin(found: Mapping[str, float]) -> float:
    """By how much the bar that is hardest to reach is passed."""
    return min(found[name] - bar for name, bar in HOLD_BARS.items())


def without_followers(bank: ConceptBank, lever: Cause) -> ConceptBank:
    """The bank with random directions for all that follows a lever: what is held in their places is nothing in particular."""
    made = bank
    for seed, name in enumerate(bank.graph.descendants(lever.value)):
        made = randomised(made, bank[name], seed)
    return made


def baseline(experiment: Experiment, lever: Cause, n: int, purpose: int) -> Baseline:
    """`n` scenes; those of another purpose are others."""
    seed = (experiment.seed, 53, purpose)
    captions = world.captions(world.draw(n, seed=seed).factors, seed=seed)
    found = Baseline(captions, experiment.judge.read(experiment.draw(captions)), {})
    return found._replace(moved=moved(experiment, lever, 1.0, found))


def moved(
    experiment: Experiment, lever: Cause, dose: float, where: Baseline, bank: ConceptBank | None = None, **how: Any
) -> dict[str, float]:
    """By follower, how much more of the pictures shows it than without the lever; `how` goes to `steer`."""
    after = experiment.judge.read(experiment.draw(where.captions, experiment.lever(lever, dose), bank, **how))
    followers = [Cause(FACTOR[name], name) for name in experiment.bank.graph.descendants(lever.value)]
    return {cause.value: float((share(after, cause) - share(where.before, cause)).mean()) for cause in followers}


def held(
    experiment: Experiment, lever: Cause, factor: str, dose: float, where: Baseline, bank: ConceptBank | None = None
) -> dict[str, float]:
    """Changes of the others and of a free factor: by the lever alone at its own dose, and held at another dose."""
    free = [name for name in where.moved if FACTOR[name] == factor]
    return apart(where.moved, moved(experiment, lever, dose, where, bank, do="hold", free=free), free)


def apart(alone: Mapping[str, float], held: Mapping[str, float], free: Sequence[str]) -> dict[str, float]:
    """Mean absolute changes without and with holding, of what is not free and of what is; how much is cut and kept of them."""
    others, own = (
        [
            float(np.mean([abs(change) for name, change in changes.items() if (name in free) == inside]))
            for changes in (alone, held)
        ]
        for inside in (False, True)
    )
    found = {"others": others[0], "others held": others[1], "own": own[0], "own held": own[1]}
    found |= {"cut": 1 - others[1] / max(others[0], 1e-9), "kept": own[1] / max(own[0], 1e-9)}
    return {name: round(value, 4) for name, value in found.items()}


# -- guided by the graph -----------------------------------------------------------------------------------------


def guided(experiment: Experiment, *, dev: int, test: int) -> dict[str, dict[str, dict[str, Any]]]:
    """For each type of scene, chosen on `dev` scenes and measured on `test` others: latents of the flat sparse encoders, the
    lever alone, and the lever with its followers moved as the graph foretells."""
    found = {}
    for cause in tqdm([cause for cause in experiment.levers() if cause.factor == "scene"], desc="guided"):
        comparison = Comparison(experiment, cause, dev=dev, test=test)
        flat = {f"flat: {name}": line for name, line in comparison.single().items() if name in ("one latent", "a few latents")}
        found[cause.value] = flat | {
            "lever alone": _best(comparison, [(dose, 0.0) for dose in GUIDED_DOSES]),
            "guided by the graph": _best(comparison, [(dose, by) for dose in GUIDED_DOSES for by in GUIDES]),
        }
    return found


def _best(comparison: Comparison, tried: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """The best on the scenes for choosing, as it does on the others."""
    experiment, cause = comparison.experiment, comparison.cause
    dose, by = max(
        tried, key=lambda pair: score(experiment.effect(comparison.dev, with_forecast(experiment.bank, cause, *pair)))
    )
    found = rounded(experiment.effect(comparison.test, with_forecast(experiment.bank, cause, dose, by)))
    return found | {"dose": dose, "by": by}


def with_forecast(bank: ConceptBank, cause: Cause, dose: float, by: float) -> Edits:
    """The lever at a dose of its own and, times `by`, each value of what follows it as far as its share is to change."""
    own = bank[cause.value].effects
    edits: dict[str, Any] = {cause.value: edit_of(own["edit"], dose * own["amount"])}
    for edge in bank.graph.edges:
        if by and edge.src == cause.value and FACTOR[edge.dst] in cause.followers:
            edits[edge.dst] = Add(by * edge.effect * dose * own["amount"] * bank[edge.dst].effects["amount"])
    return edits
