"""Measures of edits of pictures, on true renders: a true counterfactual is perfect, and doing nothing does nothing."""

import numpy as np
import pytest
from scenes import judges, measures, world
from scenes.measures import Cause

from steerlib.errors import BadRecipe
from steerlib.evaluation.pictures import grid

CAUSES = [
    Cause("scene", "night"),
    Cause("background", "pale"),
    Cause("side", "left"),
    Cause("shape", "circle"),
    Cause("hue", "blue"),
]


@pytest.fixture(scope="module")
def judge():
    return judges.load("scenes")


@pytest.mark.parametrize("cause", CAUSES, ids=lambda cause: cause.value)
def test_a_true_counterfactual_is_perfect_and_nothing_is_none(judge, cause):
    asked = measures.cases(cause, 60, seed=1)
    true = world.redraw(asked, cause.sets)
    found = measures.effect(cause, asked, asked.pixels, true.pixels, judge)
    assert found.effectiveness > 0.98 and found.preservation > 0.99 and found.realism == 0 and found.outside == 0
    assert found.propagation > 0.98 if cause.followers else np.isnan(found.propagation)
    nothing = measures.effect(cause, asked, asked.pixels, asked.pixels, judge)
    assert nothing.effectiveness < 0.02 and nothing.preservation == 1 and nothing.realism == 1 and nothing.outside == 0


def test_cases_could_show_the_value_and_do_not():
    asked = measures.cases(Cause("ground", "sand"), 80, seed=2)
    assert set(asked.factors["scene"]) <= {world.SCENES.index(name) for name in ("day", "sunset")}
    assert (asked.factors["ground"] != world.VALUES["ground"].index("sand")).all()
    assert (world.redraw(asked, {}).pixels == asked.pixels).all()
    assert not (measures.cases(Cause("hue", "red"), 20, seed=2).factors["hue.0"] == 0).any()


def test_too_few_cases_are_an_error(monkeypatch):
    monkeypatch.setattr(world, "admissible", lambda name, factors, n: np.zeros((n, len(world.VALUES[name])), bool))
    with pytest.raises(BadRecipe, match="expected 3 scenes"):
        measures.cases(Cause("scene", "day"), 3, seed=0)


def test_what_changes_beside_the_factor_is_seen(judge):
    cause = Cause("hue", "blue")
    asked = measures.cases(cause, 60, seed=3)
    both = world.redraw(asked, cause.sets | {"ground": "stone"})
    found = measures.effect(cause, asked, asked.pixels, both.pixels, judge)
    assert found.effectiveness > 0.98 and found.preservation < 0.97 and found.least == "ground" and found.outside > 0.1
    empty = np.broadcast_to(asked.pixels[:1, :1, :1], asked.pixels.shape).copy()
    assert measures.effect(cause, asked, asked.pixels, empty, judge).preservation < 0.5


def test_the_wasserstein_distance_is_one_of_distributions():
    a, b = world.draw(100, seed=1).pixels, world.draw(100, seed=2).pixels
    night = world.draw(100, seed=3, do={"scene": "night"}).pixels
    same, like, unlike = (measures.sliced_wasserstein(a, other) for other in (a[::-1].copy(), b, night))
    assert same == 0 < like < 0.5 * unlike


def test_a_grid_is_a_picture():
    pixels = world.draw(3).pixels
    png = grid({"row": {"a": pixels, "b": pixels}}, title="t")
    assert png.startswith(b"\x89PNG") and len(png) > 1000
