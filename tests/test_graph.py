"""The causal graph, against the full matrix."""

import pytest
import torch

import steerlib as sl
from steerlib.errors import CorruptBank

EDGES = [("a", "b", 0.5), ("a", "c", -1.0), ("b", "c", 2.0), ("c", "d", 0.1), ("e", "d", 3.0)]


@pytest.fixture
def graph():
    return sl.CausalGraph(sl.Edge(src=s, dst=d, weight=w) for s, d, w in EDGES)


def test_forecast_equals_the_solution_of_the_linear_system(graph):
    names = "abcde"
    w = torch.zeros(5, 5)
    for src, dst, weight in EDGES:
        w[names.index(dst), names.index(src)] = weight
    change = torch.tensor([1.0, 0, 0.5, 0, -2.0])
    solved = torch.linalg.solve(torch.eye(5) - w, change)
    forecast = graph.forecast({n: float(v) for n, v in zip(names, change, strict=True) if v})
    torch.testing.assert_close(torch.tensor([forecast.get(n, 0.0) for n in names]), solved)


def test_a_fixed_concept_passes_on_its_own_change_and_receives_none(graph):
    forecast = graph.forecast({"a": 1.0, "c": 4.0}, fixed={"c"})
    assert forecast == pytest.approx({"a": 1.0, "b": 0.5, "c": 4.0, "d": 0.4})


def test_descendants(graph):
    assert set(graph.descendants("a")) == {"b", "c", "d"} and graph.descendants("d") == ()


def test_cycles_and_doubled_edges_are_refused():
    with pytest.raises(CorruptBank, match="cycle"):
        sl.CausalGraph([sl.Edge(src="a", dst="b", weight=1), sl.Edge(src="b", dst="a", weight=1)])
    with pytest.raises(CorruptBank, match="two"):
        sl.CausalGraph([sl.Edge(src="a", dst="b", weight=1), sl.Edge(src="a", dst="b", weight=2)])
