"""Questions to a graph: what networkx answers beside the covariance of a linear system with the same edges, and all sets."""

from dataclasses import replace
from itertools import combinations

import networkx
import pytest
import torch
from test_graph import EDGES, MEASURED

import steerlib as sl
from steerlib.errors import BadBank, UnknownConcept
from steerlib.graph.exports import graphml
from steerlib.graph.questions import adjustment, blocking, from_networkx, paths, separator, smallest_edit, to_networkx

NAMES = "abcdef"


def drawn(seed):
    """A graph of six concepts, its total effects `[effect, cause]` and its covariance with unit noise."""
    g = torch.Generator().manual_seed(seed)
    w = torch.rand(6, 6, generator=g, dtype=torch.float64).add(0.5).tril(-1) * (torch.rand(6, 6, generator=g) < 0.45)
    total = torch.linalg.inv(torch.eye(6) - w)
    edges = [sl.Edge(src=NAMES[a], dst=NAMES[b], weight=float(w[b, a])) for a in range(6) for b in range(6) if w[b, a]]
    return sl.CausalGraph(edges), total, total @ total.T


def regressed(covariance, of, on):
    """Coefficients of a regression, from covariances."""
    x, y = [NAMES.index(n) for n in on], NAMES.index(of)
    return torch.linalg.solve(covariance[x][:, x], covariance[x, y])


@pytest.mark.parametrize("seed", range(4))
def test_separators_leave_no_partial_correlation_and_adjusted_regressions_give_total_effects(seed):
    graph, total, covariance = drawn(seed)
    some, found = sorted(graph.names), 0
    for x, y in combinations(some, 2):
        z = separator(graph, {x}, {y})
        if z is None:
            assert y in graph.children(x) or x in graph.children(y)
        else:
            assert regressed(covariance, y, [x, *sorted(z)])[0].abs() < 1e-9
            found += 1
        given = adjustment(graph, x, y)
        assert given is not None, "parents are always enough where all are seen"
        effect = float(total[NAMES.index(y), NAMES.index(x)])
        assert float(regressed(covariance, y, [x, *sorted(given)])[0]) == pytest.approx(effect, abs=1e-9)
    assert found > 3


def test_no_adjustment_is_told_where_the_common_cause_is_not_among_what_is_seen():
    graph = sl.CausalGraph(sl.Edge(src=a, dst=b, weight=1.0) for a, b in ("za", "zb", "ab"))
    assert adjustment(graph, "a", "b", among=[]) is None and separator(graph, {"a"}, {"b"}) is None
    with pytest.raises(UnknownConcept, match="'q'"):
        adjustment(graph, "a", "q")


@pytest.mark.parametrize("seed", range(4))
def test_what_blocks_is_the_smallest_set_that_does(seed):
    graph, *_ = drawn(seed)
    for x, y in combinations(sorted(graph.names), 2):
        others = [n for n in graph.names if n not in (x, y)]
        enough = [
            size
            for size in range(len(others) + 1)
            if any(y not in graph.descendants(x, fixed=some) for some in combinations(others, size))
        ]
        held = blocking(graph, x, y)
        assert (held is None) == (not enough)
        if held is not None:
            assert len(held) == enough[0] and y not in graph.forecast({x: 1.0}, fixed=held, unmeasured=True)


def test_the_smallest_edit_reaches_the_goal_and_fewer_concepts_do_not():
    edges = [("a", "x", 1.0), ("b", "x", 1.0), ("b", "y", 2.0), ("c", "y", 1.0), ("c", "z", 1.0), ("d", "z", 1.0)]
    graph = sl.CausalGraph(sl.Edge(src=s, dst=d, weight=w) for s, d, w in edges)
    assert smallest_edit(graph, {"x": 1.0, "y": 2.0}) == pytest.approx({"b": 1.0})
    found = smallest_edit(graph, {"x": 1.0}, still=["y", "z"])
    assert found == pytest.approx({"a": 1.0})
    found = smallest_edit(graph, {"y": 1.0}, still=["z", "x"], among="bcd")
    assert found == pytest.approx({"c": 1.0, "d": -1.0})
    assert found is not None and graph.forecast(found) == pytest.approx({"c": 1.0, "d": -1.0, "y": 1.0, "z": 0.0})
    assert smallest_edit(graph, {"y": 1.0}, still=["z", "x"], among="bcd", most=1) is None
    assert smallest_edit(graph, {"y": 1.0, "x": 3.0}, among="d") is None


def test_paths_and_children():
    graph = sl.CausalGraph(sl.Edge(src=s, dst=d, weight=w) for s, d, w in EDGES)
    assert paths(graph, "a", "d") == [("a", "c", "d"), ("a", "b", "c", "d")] and paths(graph, "d", "a") == []
    assert graph.children("a") == ("b", "c") and graph.children("d") == ()


def test_a_graph_comes_back_from_networkx_and_from_graphml_with_every_figure(tmp_path):
    edges = [
        MEASURED,
        replace(MEASURED, dst="c", relation="total", same=None, everywhere=True),
        sl.Edge(src="b", dst="c", weight=-1.0),
        sl.Edge(src="a", dst="b", weight=1.0, relation="selection", evidence="observed", necessity=0.0),
    ]
    graph = sl.CausalGraph(edges)
    assert from_networkx(to_networkx(graph)).edges == graph.edges
    networkx.write_graphml(to_networkx(graph), tmp_path / "there.graphml")
    assert from_networkx(networkx.read_graphml(tmp_path / "there.graphml")).edges == graph.edges
    with pytest.raises(BadBank, match="'p' -> 'q': expected a weight"):
        from_networkx(networkx.DiGraph([("p", "q")]))


def test_what_steerlib_graph_writes_is_read_again(bank):
    """`steerlib graph --out graph.graphml`, then networkx."""
    edge = replace(MEASURED, src="a", dst="b", everywhere=True)
    joined = bank.with_concepts(list(bank.concepts.values()), graph=sl.CausalGraph([edge]))
    assert from_networkx(networkx.parse_graphml(graphml(joined))).edges == (edge,)
