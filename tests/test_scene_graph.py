"""What follows from what in scenes: the truth, marks beside it, and chance."""

from typing import Any

import pytest
import torch
from scenes import graph as scene_graph
from scenes import prompts
from scenes.graph import marked, shuffled, truth
from scenes.measures import Cause

import steerlib as sl
from steerlib.bank import SiteFacts
from steerlib.graph.causal_graph import CausalGraph, Edge


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


def test_graphs_of_banks_stand_beside_the_truth_however_they_were_found(true):
    found = CausalGraph([edge("night", "navy", 0.3), edge("day", "night", -0.5), edge("navy", "stone", 0.3)])
    concepts = [sl.Concept(name=name, encoder="a", index=i) for i, name in enumerate(("night", "navy", "day", "stone"))]
    facts: Any = {"base": sl.BaseModel(), "sites": {"a": SiteFacts(width=4)}, "graph": found}
    bank = sl.ConceptBank("some", concepts, {"a": sl.Directions(torch.eye(4))}, **facts)
    own = scene_graph.beside_truth(bank, true)
    assert (own["edges"], own["right"], own["of one factor"], own["wrong"]) == (2, 1, 1, ["navy → stone"])
    assert own["dealt"] < 0.3 and own["due"] == 23
    text = scene_graph.table([bank])
    assert "| some (not saved) | 2 | 1 | 50% |" in text and "| 23 | 4% | 1 |" in text and "navy → stone" in text


def test_bare_captions_leave_what_follows_to_the_model(tmp_path):
    said = prompts.bare(12)
    assert len({*said}) == 12 and prompts.unsaid(said, "background") == said != prompts.unsaid(said, "hue")
    prompts.write(tmp_path, [Cause("scene", "night")], 12)
    assert (tmp_path / "graph.txt").read_text().splitlines() == said
