"""What follows from what in scenes: the truth, marks beside it, and chance."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scenes import graph as scene_graph
from scenes import prompts, world
from scenes.graph import marked, shuffled, truth
from scenes.measures import Cause

import steerlib as sl
from steerlib.errors import SteeringWarning
from steerlib.graph.causal_graph import CausalGraph, Edge
from steerlib.training.carry import recipe_in


@pytest.fixture(scope="module")
def true():
    return truth()


def edge(src, dst, tau):
    return Edge(src=src, dst=dst, weight=tau, tau=tau)


def test_the_truth_is_what_scenes_admit(true):
    assert true["night", "navy"] > 0.25 > -0.1 > true["night", "azure"]
    assert true["indoor", "middle"] > 0.5 and true["night", "red"] == 0 == true["navy", "night"]
    assert ("night", "day") not in true, "values of one factor are no causes of each other"


def test_edges_are_marked_by_sign_and_recall_counts_what_is_due(true):
    found = marked(CausalGraph([edge("night", "navy", 0.3), edge("night", "azure", 0.3), edge("navy", "stone", 0.3)]), true)
    assert (found["edges"], found["right"], found["wrong"]) == (3, 1, ["navy → stone", "night → azure"])
    assert found["recall"] == pytest.approx(1 / found["due"], abs=1e-4) and found["due"] == sum(
        abs(effect) >= scene_graph.LEAST for effect in true.values()
    )
    assert shuffled(CausalGraph([edge("night", "navy", 0.3)] * 1), true) < 0.2


def test_graphs_stand_beside_the_truth_and_beside_that_of_judges(true):
    found = CausalGraph([edge("night", "navy", 0.3), edge("day", "night", -0.5), edge("navy", "stone", 0.3)])
    own = scene_graph.beside_truth(found, true)
    assert (own["edges"], own["right"], own["of one factor"], own["wrong"]) == (2, 1, 1, ["navy → stone"])
    assert own["dealt"] < 0.3 and own["due"] == 23
    seen = CausalGraph([edge("navy", "stone", 0.1), edge("night", "navy", -0.3)])  # the second of the other sign
    text = scene_graph.table({"some": found, "of judges": seen})
    assert "| some | 2 | 1 | 50% |" in text and "| 23 | 4% | 1 | 1 |" in text
    assert "Not in the truth, some: navy → stone." in text


def test_judges_see_what_follows_in_the_pictures_of_the_recipe(monkeypatch, tmp_path):
    """The bank's own pictures are drawn; what judges see in them is made up: `night` darkens all, and nothing else moves."""
    bank = sl.ConceptBank.from_pretrained("scenes-32")
    recipe: Any = recipe_in(bank)
    few = replace(recipe, steps=1, graph=replace(recipe.graph, contexts=16))
    kept = [own for own in bank.concepts.values() if own.name in ("night", "blue", "navy") or own.name.endswith(".where")]
    with pytest.warns(SteeringWarning, match="32 of 64 concepts"):
        bank = bank.with_concepts(kept, graph=CausalGraph(), card="")
    monkeypatch.setattr(scene_graph, "recipe_in", lambda _: few)
    drawn: list[Any] = []

    @contextmanager
    def steered(pipe, bank, edits):
        drawn.append([*(edits or {})])
        yield

    def read(pictures):
        dark = torch.full((len(pictures),), world.VALUES["background"].index("navy" if drawn[-1] == ["night"] else "pink"))
        other = {name: torch.zeros(len(pictures), 6) for name in ("hue", "shape")}
        return {"scene": torch.zeros(len(pictures)), "background": dark, **other}

    monkeypatch.setattr(scene_graph, "steered", steered)
    monkeypatch.setattr(scene_graph.judges, "load", lambda _: SimpleNamespace(read=read))
    (own,) = scene_graph.judged(bank, tmp_path).edges
    assert (own.src, own.dst) == ("night", "navy")
    assert own.effect * bank["night"].effects["amount"] == pytest.approx(1, abs=1e-3)
    assert drawn == [[], ["night"], ["navy"], ["blue"]]
    assert scene_graph.judged(bank, tmp_path).edges == (own,) and len(drawn) == 4, "read once"


def test_bare_captions_leave_what_follows_to_the_model(tmp_path):
    said = prompts.bare(12)
    assert len({*said}) == 12 and prompts.unsaid(said, "background") == said != prompts.unsaid(said, "hue")
    prompts.write(tmp_path, [Cause("scene", "night")], 12)
    assert (tmp_path / "graph.txt").read_text().splitlines() == said
