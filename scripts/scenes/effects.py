"""What every lever of the scenes bank does: its edit is chosen on some scenes and measured on others."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from scenes import measures, places
from scenes.experiment import BARS, TESTED, Case, Experiment, every, randomised, rounded, score
from scenes.measures import Cause
from steerlib.bank.concept_bank import ConceptBank
from steerlib.encoders import Directions
from steerlib.evaluation.mediation import mediation
from steerlib.evaluation.pictures import edit_of
from steerlib.schedules import Window
from steerlib.steering.interventions import Add
from steerlib.steering.session import steer
from steerlib.training.store import remembered

DOSES = {"Set": (1.5, 2.0, 3.0), "Add": (1.5, 2.5, 5.0)}
"""What is tried: readings that a lever is set to, amounts that are added."""
WINDOWS = {"high noise": Window(0.0, 0.3), "middle": Window(0.3, 0.7), "low noise": Window(0.7, 1.0)}


def tried(experiment: Experiment, case: Case) -> list[dict[str, Any]]:
    """How a lever responds to every dose of both kinds of edit."""
    found = []
    for kind, amounts in DOSES.items():
        for amount in amounts:
            effect = experiment.effect(case, {case.cause.value: edit_of(kind, amount)})
            found.append({"edit": kind, "amount": amount, **rounded(effect), "score": score(effect)})
    return found


def measured(
    experiment: Experiment, *, dev: int = 16, test: int = 32, work: Path | None = None, only: Sequence[str] = ()
) -> ConceptBank:
    """The bank with the effect of every lever: its edit chosen on `dev` scenes, measured on `test` others; of all factors,
    or of some `only`.

    `work` keeps what was measured, so that a run that stops goes on.
    """
    concepts = dict(experiment.bank.concepts)
    for cause in tqdm([cause for cause in every() if not only or cause.factor in only], desc="levers"):
        path = work and work / "levers" / f"{cause.value}.json"
        own = remembered(path, lambda cause=cause: _measured(experiment, cause, dev, test))
        concepts[cause.value] = replace(concepts[cause.value], effects=own, **amounts(own))
    return experiment.bank.with_concepts([*concepts.values()])


def amounts(own: Mapping[str, Any]) -> dict[str, Any]:
    """The least useful amount of a lever, its kind of edit, and the range up to which other factors stay: of additions, or of
    settings where no addition in the safe range moves the lever clearly. `own` is what was measured of it.

    A dose is safe where all smaller ones are; that of the edit that was chosen also counts as what other scenes said of it.
    """
    none: dict[str, Any] = {}
    for kind in ("Add", "Set"):
        doses = [line for line in own["doses"] if line["edit"] == kind]
        safe = [*takewhile(lambda line: line["preservation"] >= BARS["preservation"] - 0.05, doses)]
        useful = [line["amount"] for line in safe if line["effectiveness"] >= BARS["effectiveness"] or _held(own, line)]
        beyond = "other factors change" if len(safe) < len(doses) else ""
        found = {"useful": min(useful, default=None), "useful_as": kind, "beyond": beyond}
        found["range"] = (0.0, safe[-1]["amount"]) if safe else None
        if useful:
            return found
        none = none or found
    return none | {"beyond": "; ".join(filter(None, ("no amount in the range moves it clearly", none["beyond"])))}


def _held(own: Mapping[str, Any], line: Mapping[str, Any]) -> bool:
    """Whether a dose is the chosen one, and cleared both bars on the scenes it was measured on."""
    return (line["edit"], line["amount"]) == (own["edit"], own["amount"]) and all(own["passes"].values())


def _measured(experiment: Experiment, cause: Cause, dev: int, test: int) -> dict[str, Any]:
    doses = tried(experiment, experiment.case(cause, dev, 1))
    best = max(doses, key=lambda line: line["score"])
    effect = experiment.effect(experiment.case(cause, test, 2), {cause.value: edit_of(best["edit"], best["amount"])})
    own = {"edit": best["edit"], "amount": best["amount"], "scenes": test, **rounded(effect)}
    return own | {"doses": doses, "passes": {name: own[name] >= bar for name, bar in BARS.items()}}


def mediated(experiment: Experiment, cause: Cause, n: int) -> dict[str, dict[str, float]]:
    """What a caption that says a value does to pictures, by way of the lever of that value, of the levers of its
    factor, of another factor's, and of a random direction in the lever's place."""
    case, judge = experiment.case(cause, n, 8), experiment.judge
    said, there = experiment.saying(case, 8), judge.read(case.before)["shape"] > 0

    def run(captions: list[str]) -> Tensor:
        shows = (judge.read(experiment.draw(captions))[cause.factor] == cause.index).float()
        return shows[:, None] if cause.factor in measures.WHOLE else shows[there][:, None]

    stranger = next(value for factor, value in TESTED.items() if factor not in (cause.factor, "scene"))
    random = randomised(experiment.bank, experiment.bank[cause.value], 0)
    ways: dict[str, tuple[ConceptBank, list[str]]] = {
        "its lever": (experiment.bank, [cause.value]),
        "levers of its factor": (experiment.bank, independent(experiment.bank, cause)),
        "lever of another factor": (experiment.bank, [stranger]),
        "random direction": (random, [cause.value]),
    }
    found = {}
    for name, (bank, concepts) in ways.items():
        e = mediation(experiment.pipe, bank, concepts, run, value=said, reference=case.captions, branch="cond")
        found[name] = {key: round(float(value), 4) for key, value in e._asdict().items() if value is not None}
    return found


def independent(bank: ConceptBank, cause: Cause) -> list[str]:
    """The levers of a factor, this one first, without those that others add up to: over all values, differences cancel."""
    kept: list[str] = []
    rows: list[Tensor] = []
    for value in [cause.value, *(value for value in places.values(cause.factor) if value != cause.value)]:
        own = bank.encoder(bank[value].encoder)
        assert isinstance(own, Directions)
        tried = [*rows, own.decoder[bank[value].index].float()]
        if int(torch.linalg.matrix_rank(torch.stack(tried))) == len(tried):
            kept, rows = [*kept, value], tried
    return kept


def by_window(experiment: Experiment, cause: Cause, n: int) -> dict[str, dict[str, Any]]:
    """The lever at its own dose, in one window of noise alone."""
    case, edit = experiment.case(cause, n, 5), experiment.lever(cause)[cause.value]
    return {
        name: rounded(experiment.effect(case, {cause.value: replace(edit, when=window)})) for name, window in WINDOWS.items()
    }


def laws(experiment: Experiment, cause: Cause, n: int) -> dict[str, float]:
    """Mean change of bytes of pictures: by an edit of nothing (composition), by the lever, and by the lever added and taken
    away again (reversibility)."""
    case, amount = experiment.case(cause, n, 7), experiment.bank[cause.value].effects["amount"]
    add, remove = ({cause.value: Add(sign * amount)} for sign in (1.0, -1.0))
    with catch_warnings():
        simplefilter("ignore")
        with steer(experiment.pipe, experiment.bank, remove, branch="cond", allow_ood=True):
            undone = experiment.draw(case.captions, add)
    nothing, moved = (experiment.draw(case.captions, edits) for edits in ({cause.value: Add(0.0)}, add))
    drawn = {"composition": nothing, "lever": moved, "reversibility": undone}
    return {name: round(float(np.abs(d.astype(int) - case.before).mean()), 4) for name, d in drawn.items()}
