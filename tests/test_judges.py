"""Judges read true renders; where shipped, nearly always right."""

import numpy as np
import pytest
import torch
from scenes import faces, judges, world

DRAW = {"scenes": world.draw, "faces": faces.draw}


def test_the_truth_of_cells_is_that_of_the_objects_in_them():
    factors = {name: np.zeros(1, np.int8) for name in world.VALUES}
    factors |= {"count": np.array([1], np.int8), "cell.0": np.array([4], np.int8), "cell.1": np.array([2], np.int8)}
    factors |= {"shape.0": np.array([3], np.int8), "hue.1": np.array([5], np.int8)}
    found = judges.truth("scenes", factors)
    absent = judges.ABSENT
    assert found["shape"].tolist() == [[0, 0, 1, 0, 4, 0]]
    assert found["hue"].tolist() == [[absent, absent, 5, absent, 0, absent]]
    factors["count"][0] = 0
    assert judges.truth("scenes", factors)["shape"].tolist() == [[0, 0, 0, 0, 4, 0]]


def test_accuracy_counts_objects_that_should_be_there():
    true = judges.truth("scenes", world.draw(40).factors)
    assert set(judges.accuracy(true, true).values()) == {1.0}
    read = {name: value.clone() for name, value in true.items()}
    k = int((true["shape"][0] > 0).nonzero()[0])
    read["shape"][0, k], read["hue"][0, k] = 0, (read["hue"][0, k] + 1) % 6
    objects = int((true["shape"] > 0).sum())
    found = judges.accuracy(read, true)
    assert found["shape"] == found["hue"] == pytest.approx(1 - 1 / objects) and found["cells"] == pytest.approx(1 - 1 / 40)
    assert found["size"] == found["scene"] == 1.0


def test_windows_hold_the_whole_of_what_stands_in_a_cell():
    drawn = world.redraw(world.draw(200), {"size.0": "large"})
    objects = torch.from_numpy(drawn.regions == world.REGIONS.index("object.0")).float()[:, None].expand(-1, 3, -1, -1)
    cells = judges.windows(objects)
    assert cells.shape == (200, 6, 3, *judges.WINDOW)
    inside = cells[torch.arange(200), torch.from_numpy(drawn.factors["cell.0"]).long()]
    assert torch.equal(inside.sum((1, 2, 3)), objects.sum((1, 2, 3)))


@pytest.mark.parametrize("kind", judges.KINDS)
def test_a_judge_learns_and_is_the_same_when_loaded(kind, tmp_path):
    torch.manual_seed(0)
    judge, generator = judges.PictureJudge(kind), torch.Generator().manual_seed(0)
    adam, drawn, losses = torch.optim.Adam(judge.parameters(), 3e-3), DRAW[kind](64), []
    for _ in range(12):
        losses.append(judges.loss(judge, drawn.pixels, judges.truth(kind, drawn.factors), generator))
        adam.zero_grad()
        losses[-1].backward()
        adam.step()
    assert losses[-1] < 0.8 * losses[0]
    judges.save({kind: judge.half().float()}, tmp_path / "judges.safetensors")
    again = judges.load(kind, tmp_path / "judges.safetensors")
    assert all(torch.equal(a, again.read(drawn.pixels)[name]) for name, a in judge.read(drawn.pixels).items())


@pytest.mark.parametrize("kind", judges.KINDS)
def test_the_shipped_judges_are_right_on_renders_they_never_saw(kind):
    judge, drawn = judges.load(kind), DRAW[kind](1000, seed=(77, 10**9 + 7))
    found = judges.accuracy(judge.read(drawn.pixels), judges.truth(kind, drawn.factors))
    assert min(found.values()) >= 0.98, found
    assert judges.shipped().stat().st_size < 2**20
