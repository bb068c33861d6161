"""Measures of edits of pictures, on true renders: a true counterfactual is perfect, and doing nothing does nothing."""

import numpy as np
import pytest
import torch
from scenes import contrast, judges, measures, places, world
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


def test_natural_activations_are_told_from_others():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 8, generator=g) @ torch.randn(8, 8, generator=g)
    natural = measures.Natural.of(x)
    assert natural.off(x) == pytest.approx(0.005, abs=0.001)
    assert natural.off(x + 10 * x.std()) > 0.9


def test_a_grid_is_a_picture():
    pixels = world.draw(3).pixels
    png = grid({"row": {"a": pixels, "b": pixels}}, title="t")
    assert png.startswith(b"\x89PNG") and len(png) > 1000


# -- where things are, and directions to them --------------------------------------------------------------------


@pytest.mark.parametrize("count", [64, 256])
def test_places_follow_exact_regions(count):
    drawn = world.draw(40, seed=7)
    hue = places.where("hue", drawn, count)
    assert ((hue != places.NOWHERE) == places.objects(drawn, count)).all()
    ground = places.where("ground", drawn, count)
    assert not ((ground >= 0) & (hue >= 0)).any() and (ground[ground >= 0].unique().numel() == 4)
    one = world.present(drawn.factors, 1) == 0
    first = torch.from_numpy(drawn.factors["hue.0"]).long()[:, None].expand_as(hue)
    assert (hue[one] == first[one])[hue[one] >= 0].all()
    assert (places.where("scene", drawn, count) >= 0).all()


def test_differences_read_nothing_at_the_others_and_one_at_their_own():
    g = torch.Generator().manual_seed(1)
    means = torch.randn(3, 6, generator=g)
    value = torch.arange(900) % 3
    x = means[value] + 0.01 * torch.randn(900, 6, generator=g)
    found = contrast.differences(x, value, 3).encode(x)
    for v in range(3):
        assert found[value == v, v].mean() == pytest.approx(1, abs=1e-3)
        assert found[value != v, v].mean() == pytest.approx(0, abs=1e-3)
    there = contrast.presence(x, value == 0).encode(x)[:, 0]
    assert there[value == 0].mean() == pytest.approx(1, abs=1e-3) and there[value > 0].mean() == pytest.approx(0, abs=1e-3)


def test_a_common_cause_is_taken_out_of_a_difference():
    g = torch.Generator().manual_seed(2)
    cause = torch.randint(2, (4000,), generator=g)
    value = (torch.rand(4000, generator=g) < 0.2 + 0.6 * cause).long()
    x = torch.zeros(4000, 4) + 0.01 * torch.randn(4000, 4, generator=g)
    x[:, 0] += value
    x[:, 1] += 3.0 * cause
    plain, adjusted = (contrast.differences(x, value, 2, within=w).decoder[1] for w in (None, cause))
    assert plain[1] > 1 and adjusted[1].abs() < 0.05 and adjusted[0] == pytest.approx(1, abs=0.02)
