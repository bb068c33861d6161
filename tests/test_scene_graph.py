"""What follows from what in scenes: marks beside the truth, circles, chance; effects of a pipeline that is no artist."""

import numpy as np
import pytest
import torch
from scenes import graph as scene_graph
from scenes import prompts
from scenes.graph import _joined, marked, share, shuffled, truth
from scenes.measures import Cause

from steerlib.graph.causal_graph import CausalGraph, Edge
from steerlib.training.discover.confirm import effects


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


def test_the_share_of_an_objects_value_is_of_the_objects_there():
    read = {"hue": torch.tensor([[0, 1], [0, 0]]), "shape": torch.tensor([[1, 2], [3, 0]]), "scene": torch.tensor([1, 0])}
    assert share(read, Cause("hue", "red")).tolist() == [0.5, 1.0]
    assert share(read, Cause("scene", "night")).tolist() == [1.0, 0.0]


def test_an_edge_has_to_be_large_and_sure_and_the_weaker_of_a_circle_is_left_out():
    night, navy, azure = Cause("scene", "night"), Cause("background", "navy"), Cause("background", "azure")
    rng = np.random.default_rng(0)
    changed = np.stack([rng.random(64) < 0.6, rng.random(64) < 0.1], 1).astype(float)
    back = (rng.random(64) < 0.4).astype(float)[:, None]
    found = [
        (night, [navy, azure], changed, effects(changed, np.full(64, 2.0))),
        (navy, [night], back, effects(back, np.full(64, 2.0))),
    ]
    made = _joined(found, 64)
    assert [(e.src, e.dst) for e in made.graph.edges] == [("night", "navy")] and made.circles == 1
    (kept,) = made.graph.edges
    assert kept.tau is not None and kept.tau_lo is not None and kept.tau_hi is not None
    assert kept.tau == pytest.approx(changed[:, 0].mean() / 2) and kept.tau_lo < kept.tau < kept.tau_hi and kept.n_verify == 64


def test_graphs_of_banks_stand_beside_the_truth_however_they_were_found(true):
    found = CausalGraph([edge("night", "navy", 0.3), edge("day", "night", -0.5), edge("navy", "stone", 0.3)])

    class Bank:
        name, graph = "some", found

    own = scene_graph.beside_truth(Bank, true)  # type: ignore[arg-type]
    assert (own["edges"], own["right"], own["of one factor"], own["wrong"]) == (2, 1, 1, ["navy → stone"])
    assert own["dealt"] < 0.3 and own["due"] == 23
    text = scene_graph.table([Bank])  # type: ignore[list-item]
    assert "| some | 2 | 1 | 50% |" in text and "| 23 | 4% | 1 |" in text and "navy → stone" in text


def test_bare_captions_leave_what_follows_to_the_model(tmp_path):
    said = prompts.bare(12)
    assert len({*said}) == 12 and prompts.unsaid(said, "background") == said != prompts.unsaid(said, "hue")
    prompts.write(tmp_path, [Cause("scene", "night")], 12)
    assert (tmp_path / "graph.txt").read_text().splitlines() == said
