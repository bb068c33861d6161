"""Holding and guiding in scenes: counts in closed form, and pictures of a toy pipeline as the shipped judge reads them."""

from typing import Any

import numpy as np
import pytest
import torch
from scenes import graph_use, judges
from scenes.card import guided_table, holding_table
from scenes.experiment import Experiment
from scenes.graph import share
from scenes.measures import Cause
from scenes.pipeline import pipeline

import steerlib as sl
from steerlib.bank import SiteFacts
from steerlib.evaluation.pictures import draw_as_told

NIGHT, SITE = Cause("scene", "night"), "unet.conv_out"
VALUES = ("night", "violet", "stone", "pink", "day")


@pytest.fixture(scope="module")
def bank():
    """Night is followed by a sky, by which day is, and by a ground; pink by nothing of another factor but day."""
    facts: Any = {"edit": "Add", "amount": 2.0}
    concepts = [sl.Concept(name=name, encoder=SITE, index=i, effects=facts) for i, name in enumerate(VALUES)]
    rows = 0.3 * torch.randn(len(VALUES), 3, generator=torch.Generator().manual_seed(0))  # colours, added to every pixel
    edges = [("night", "violet", 0.3), ("night", "stone", 0.2), ("night", "pink", -0.1), ("pink", "day", -0.1)]
    graph = sl.CausalGraph([sl.Edge(src=src, dst=dst, weight=w, tau=w) for src, dst, w in edges])
    sites = {SITE: SiteFacts(width=3)}
    return sl.ConceptBank("toy", concepts, {SITE: sl.Directions(rows)}, base=sl.BaseModel(), sites=sites, graph=graph)


@pytest.fixture(scope="module")
def experiment(bank):
    return Experiment(pipeline("toy"), bank, judges.load("scenes"), steps=3)


# -- closed forms ------------------------------------------------------------------------------------------------


def test_pairs_are_levers_with_a_factor_that_follows_beside_others(bank):
    levers = [Cause("scene", "night"), Cause("background", "pink"), Cause("ground", "stone")]
    assert [*graph_use.pairs(bank, levers)] == [(NIGHT, "background"), (NIGHT, "ground")]


def test_what_holding_cuts_and_keeps_are_shares_of_the_changes_without_it():
    alone, held = {"violet": 0.5, "pink": -0.1, "stone": 0.4}, {"violet": -0.03, "pink": 0.03, "stone": 0.15}
    found = graph_use.apart(alone, held, ["stone"])
    assert found == {"others": 0.3, "others held": 0.03, "own": 0.4, "own held": 0.15, "cut": 0.9, "kept": 0.375}
    assert graph_use.margin(found) == pytest.approx(0.375 - 0.5), "the bar that is hardest to reach"
    assert graph_use.margin({"cut": 0.8, "kept": 0.5}) == 0


def test_followers_of_a_scene_are_moved_as_far_as_their_share_is_to_change(bank):
    edits = graph_use.with_forecast(bank, NIGHT, 0.5, 2.0)
    assert edits["night"] == sl.Add(1.0) and edits["violet"] == sl.Add(2.0 * 0.3 * 1.0 * 2.0)
    assert {*edits} == {"night", "violet", "stone", "pink"} and edits["pink"].amount < 0
    assert graph_use.with_forecast(bank, NIGHT, 0.5, 0.0) == {"night": sl.Add(1.0)}


def test_the_table_of_ways_has_their_means():
    line = {"effectiveness": 1.0, "preservation": 0.9, "propagation": 0.5}
    table = guided_table({"day": {"flat": line}, "night": {"flat": {**line, "effectiveness": 0.5}}})
    assert table.splitlines()[-1] == "| flat | 1.00 / 0.90 / 0.50 | 0.50 / 0.90 / 0.50 | 0.75 / 0.90 / 0.50 |"


# -- drawn and read ----------------------------------------------------------------------------------------------


def test_what_a_lever_moves_is_the_change_of_what_a_judge_reads(experiment, bank):
    where = graph_use.baseline(experiment, NIGHT, 4, 20)
    with sl.steer(experiment.pipe, bank, {"night": sl.Add(2.0)}, branch="cond", allow_ood=True):
        steered = experiment.judge.read(draw_as_told(experiment.pipe, where.captions, steps=3))
    plain = experiment.judge.read(draw_as_told(experiment.pipe, where.captions, steps=3))
    causes = [Cause("background", "violet"), Cause("ground", "stone"), Cause("background", "pink"), Cause("scene", "day")]
    assert where.moved == {c.value: pytest.approx(float(np.mean(share(steered, c) - share(plain, c)))) for c in causes}
    assert any(where.moved.values())


def test_a_lever_that_is_not_moved_leaves_every_follower_where_it_was(experiment):
    where = graph_use.baseline(experiment, NIGHT, 4, 20)
    found = graph_use.held(experiment, NIGHT, "background", 0.0, where)
    assert found["others held"] == found["own held"] == found["kept"] == 0 and found["others"] > 0 and found["cut"] == 1


def test_a_dose_is_chosen_on_some_scenes_and_measured_on_others(experiment):
    choosing, measuring = (graph_use.baseline(experiment, NIGHT, n, purpose) for n, purpose in ((3, 20), (4, 21)))
    assert not {*choosing.captions} & {*measuring.captions}
    found = graph_use.holding(experiment, dev=3, test=4)
    assert [(line["lever"], line["free"]) for line in found] == [("night", "background"), ("night", "ground")]
    for line in found:
        margins = {
            d: graph_use.margin(graph_use.held(experiment, NIGHT, line["free"], d, choosing)) for d in graph_use.HOLD_DOSES
        }
        assert margins[line["dose"]] == max(margins.values())
        measured = graph_use.held(experiment, NIGHT, line["free"], line["dose"], measuring)
        assert {name: line[name] for name in measured} == measured
    rows = [row for row in holding_table(found).splitlines() if row.startswith("| night")]
    assert [row.endswith("| yes |") for row in rows] == [min(v["cut"] - 0.8, v["kept"] - 0.5) >= 0 for v in found]
