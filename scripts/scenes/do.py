"""What the graph of the scenes bank is good for: of all that follows a lever, one factor is let go and the others are held; and
a lever is moved together with what follows it, beside latents of a flat sparse encoder."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from scenes import scenes
from scenes.effects import Comparison, Studio, every, figures, randomised, score
from scenes.graph import share
from scenes.image import Do
from scenes.judges import Readings
from steerlib.bank.concept_bank import ConceptBank
from steerlib.evaluation.pictures import edit_of
from steerlib.steering.interventions import Add

HOLD_BARS = {"cut": 0.8, "kept": 0.5}
"""Of the changes without holding: how much of the others has to be gone, and how much of what was let go has to be left."""
HOLD_DOSES = (0.75, 1.0, 1.5, 2.0, 3.0)
"""What is tried, in doses of the lever: held, it is written at fewer tokens, and more of it does no harm."""
GUIDES = (0.0, 0.25, 0.5, 1.0, 2.0)
"""How much of what the graph foretells is added to what the model does by itself."""
GUIDED_DOSES = (0.5, 1.0, 1.5)
FACTOR = {do.value: do.factor for do in every()}


class Ground(NamedTuple):
    """Scenes, what the model draws of them, and how far each follower of one lever moves where nothing is held."""

    captions: list[str]
    before: Readings
    moved: Mapping[str, float]


def pairs(studio: Studio) -> Iterator[tuple[Do, str]]:
    """Every measured lever with every factor that follows it at once, if others follow it too."""
    for lever in _measured(studio):
        factors = {FACTOR[name] for name in studio.bank.graph.descendants(lever.value)}
        children = {FACTOR[edge.dst] for edge in studio.bank.graph.edges if edge.src == lever.value}
        yield from ((lever, factor) for factor in sorted(children) if len(factors) > 1)


def _measured(studio: Studio) -> list[Do]:
    known = studio.bank.concepts
    return [do for do in every() if do.value in known and "amount" in known[do.value].effects]


def holding(studio: Studio, *, dev: int = 32, test: int = 64) -> list[dict[str, Any]]:
    """For each of `pairs`: the lever moved with `do="hold"`, the factor free; its dose chosen on `dev` scenes, measured on
    `test` others, and beside it random directions held in the same places. Changes are of values' shares of pictures
    (`scene_graph.share`), absolute, the mean over values."""
    found, grounds = [], {}
    for lever, factor in tqdm([*pairs(studio)], desc="held apart"):
        if lever not in grounds:
            grounds[lever] = [_ground(studio, lever, n, purpose) for n, purpose in ((dev, 20), (test, 21))]
        tried = {dose: _held(studio, lever, factor, dose, grounds[lever][0]) for dose in HOLD_DOSES}
        dose = max(tried, key=lambda dose: min(tried[dose][name] - bar for name, bar in HOLD_BARS.items()))
        own = _held(studio, lever, factor, dose, grounds[lever][1])
        passes = all(own[name] >= bar for name, bar in HOLD_BARS.items())
        chance = _held(studio, lever, factor, dose, grounds[lever][1], _dealt(studio, lever))
        random = {f"random {name}": chance[name] for name in HOLD_BARS}
        found.append({"lever": lever.value, "free": factor, "dose": dose, **own, **random, "scenes": test, "passes": passes})
    return found


def _dealt(studio: Studio, lever: Do) -> ConceptBank:
    """The bank with random directions for all that follows a lever: what is held in their places is nothing in particular."""
    bank = studio.bank
    for seed, name in enumerate(studio.bank.graph.descendants(lever.value)):
        bank = randomised(bank, studio.bank[name], seed)
    return bank


def _ground(studio: Studio, lever: Do, n: int, purpose: int) -> Ground:
    seed = (studio.seed, 53, purpose)
    captions = scenes.captions(scenes.draw(n, seed=seed).factors, seed=seed)
    ground = Ground(captions, studio.judge.read(studio.draw(captions)), {})
    return ground._replace(moved=_moved(studio, lever, 1.0, ground))


def _moved(
    studio: Studio, lever: Do, dose: float, ground: Ground, bank: ConceptBank | None = None, **how: Any
) -> dict[str, float]:
    """By follower, how much more of the pictures shows it than without the lever."""
    best = studio.bank[lever.value].effects
    edits = {lever.value: edit_of(best["edit"], dose * best["amount"])}
    after = studio.judge.read(studio.draw(ground.captions, edits, bank, **how))
    followers = [Do(FACTOR[name], name) for name in studio.bank.graph.descendants(lever.value)]
    return {do.value: float((share(after, do) - share(ground.before, do)).mean()) for do in followers}


def _held(
    studio: Studio, lever: Do, factor: str, dose: float, ground: Ground, bank: ConceptBank | None = None
) -> dict[str, float]:
    """Changes without and with holding, of other factors' values and of the free one's."""
    free = [name for name in ground.moved if FACTOR[name] == factor]
    held = _moved(studio, lever, dose, ground, bank, do="hold", free=free)
    others, own = ([_size(moved, free, inside) for moved in (ground.moved, held)] for inside in (False, True))
    figures = {"others": others[0], "others held": others[1], "own": own[0], "own held": own[1]}
    figures |= {"cut": 1 - others[1] / max(others[0], 1e-9), "kept": own[1] / max(own[0], 1e-9)}
    return {name: round(value, 4) for name, value in figures.items()}


def _size(moved: Mapping[str, float], free: Sequence[str], inside: bool) -> float:
    return float(np.mean([abs(change) for name, change in moved.items() if (name in free) == inside]))


# -- guided by the graph -----------------------------------------------------------------------------------------


def guided(studio: Studio, *, dev: int = 16, test: int = 32) -> dict[str, dict[str, dict[str, Any]]]:
    """For each type of scene, chosen on `dev` scenes and measured on `test` others: latents of the flat sparse encoders, the
    lever alone, and the lever with its followers moved as the graph foretells."""
    found = {}
    for do in tqdm([do for do in _measured(studio) if do.factor == "scene"], desc="guided"):
        comparison = Comparison(studio, do, dev=dev, test=test)
        flat = {f"flat: {name}": line for name, line in comparison.single().items() if name in ("one latent", "a few latents")}
        found[do.value] = flat | {
            "lever alone": _best(comparison, [(dose, 0.0) for dose in GUIDED_DOSES]),
            "guided by the graph": _best(comparison, [(dose, by) for dose in GUIDED_DOSES for by in GUIDES if by]),
        }
    return found


def _best(comparison: Comparison, tried: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """The best on the scenes for choosing, as it does on the others."""
    studio, do = comparison.studio, comparison.do
    chosen = max(tried, key=lambda pair: score(studio.effect(comparison.dev, _followed(studio, do, *pair))))
    found = figures(studio.effect(comparison.test, _followed(studio, do, *chosen)))
    return found | {"dose": chosen[0], "by": chosen[1]}


def _followed(studio: Studio, do: Do, dose: float, by: float) -> dict[str, Any]:
    """The lever, and each value of what follows a scene as far as its share of pictures is to change."""
    best = studio.bank[do.value].effects
    edits: dict[str, Any] = {do.value: edit_of(best["edit"], dose * best["amount"])}
    for edge in studio.bank.graph.edges:
        if by and edge.src == do.value and FACTOR[edge.dst] in do.followers:
            own = studio.bank[edge.dst].effects["amount"]
            edits[edge.dst] = Add(by * edge.effect * dose * best["amount"] * own)
    return edits
