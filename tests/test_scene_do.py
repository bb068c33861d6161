"""Holding and guiding in scenes: what is counted, what is chosen, on which scenes; a studio that is told what to answer."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scenes import do as scene_do
from scenes import effects as scene_effects
from scenes.card import guided_table, holding_table
from scenes.image import Do

import steerlib as sl
from steerlib.bank.concept_bank import SiteFacts

NIGHT = Do("scene", "night")
VALUES = ("night", "violet", "stone", "pink", "day")


def bank():
    """Night is followed by a sky, by which day is, and by a ground; pink by nothing of another factor but day."""
    facts: Any = {"edit": "Add", "amount": 2.0}
    concepts = [sl.Concept(name=name, encoder="a", index=i, effects=facts) for i, name in enumerate(VALUES)]
    encoders, sites = {"a": sl.Directions(torch.eye(8)[: len(VALUES)])}, {"a": SiteFacts(width=8)}
    edges = [("night", "violet", 0.3), ("night", "stone", 0.2), ("night", "pink", -0.1), ("pink", "day", -0.1)]
    graph = sl.CausalGraph([sl.Edge(src=src, dst=dst, weight=w, tau=w) for src, dst, w in edges])
    return sl.ConceptBank("told", concepts, encoders, base=sl.BaseModel(), sites=sites, graph=graph)


class Told(scene_effects.Studio):
    """Draws nothing."""

    def __init__(self) -> None:
        self.bank, self.seed, self.judge = bank(), 0, SimpleNamespace(read=lambda pictures: {})

    def draw(self, *_: Any, **__: Any) -> Any:
        return None


def test_pairs_are_levers_with_a_factor_that_follows_beside_others():
    assert [*scene_do.pairs(Told())] == [(NIGHT, "background"), (NIGHT, "ground")]


def test_a_dose_is_chosen_on_some_scenes_and_measured_on_others(monkeypatch):
    """Told: more of the lever moves the free factor further, and from a dose of 2 on what is held gives way."""
    asked = []

    def moved(studio, lever, dose, ground, bank=None, **how):
        asked.append((len(ground.captions), dose, bank is not None))
        if not how:
            return {"violet": 0.5, "stone": 0.4, "pink": -0.1, "day": 0.0}
        assert how["do"] == "hold" and set(how["free"]) in ({"stone"}, {"violet", "pink"})
        held = 0.02 * dose if dose < 2 else 0.4
        own = 0.1 * dose if bank is None else 0.0
        return {name: own if name in how["free"] else held for name in ("violet", "stone", "pink", "day")}

    monkeypatch.setattr(scene_do, "_moved", moved)
    found = {line["free"]: line for line in scene_do.holding(Told(), dev=3, test=5)}
    ground = found["ground"]
    assert ground["dose"] == 1.5 and ground["own"] == pytest.approx(0.4) and ground["own held"] == pytest.approx(0.15)
    assert ground["cut"] == pytest.approx(1 - 0.03 / 0.2) and ground["kept"] == pytest.approx(0.375) and not ground["passes"]
    assert found["background"]["kept"] == pytest.approx(0.5) and found["background"]["random kept"] == 0
    assert found["background"]["passes"] == (found["background"]["cut"] >= 0.8)
    assert {dose for n, dose, _ in asked if n == 3} == {*scene_do.HOLD_DOSES}
    assert {(dose, random) for n, dose, random in asked if n == 5} == {(1.0, False), (1.5, False), (1.5, True)}
    assert "| night | ground | 1.5 | 85% | 38% | 85% | 0% | no |" in holding_table([*found.values()])


def test_followers_of_a_scene_are_moved_as_far_as_their_share_is_to_change():
    edits = scene_do._followed(Told(), NIGHT, 0.5, 2.0)
    assert edits["night"] == sl.Add(1.0) and edits["violet"] == sl.Add(2.0 * 0.3 * 1.0 * 2.0)
    assert {*edits} == {"night", "violet", "stone", "pink"} and edits["pink"].amount < 0
    assert scene_do._followed(Told(), NIGHT, 0.5, 0.0) == {"night": sl.Add(1.0)}


def test_the_table_of_ways_has_their_means():
    line = {"effectiveness": 1.0, "preservation": 0.9, "propagation": 0.5}
    table = guided_table({"day": {"flat": line}, "night": {"flat": {**line, "effectiveness": 0.5}}})
    assert table.splitlines()[-1] == "| flat | 1.00 / 0.90 / 0.50 | 0.50 / 0.90 / 0.50 | 0.75 / 0.90 / 0.50 |"
