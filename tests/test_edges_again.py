"""Edges of a shipped graph tested again beside false ones: which are chosen, which are planted, and how they are counted."""

from dataclasses import replace

import edges_again
import pytest

from steerlib.graph.causal_graph import CausalGraph, Edge
from steerlib.training.discover import verify

GRAPH = CausalGraph(
    [
        *(
            Edge(src=f"a/{p}", dst=f"b/{c}", weight=1.0, tau=1.0, tau_lo=0.8, tau_hi=1.2, evidence="verified", n_verify=20)
            for p in range(4)
            for c in range(3 * p, 3 * p + 3)
        ),
        Edge(src="a/0", dst="c/0", weight=1.0, relation="total"),
        Edge(src="b/0", dst="c/1", weight=1.0),
    ]
)


def test_all_edges_of_some_parents_are_chosen_and_total_effects_are_not():
    assert [len(edges_again.chosen(GRAPH, count)) for count in (0, 99)] == [0, 13]
    for seed in range(5):
        edges = edges_again.chosen(GRAPH, 2, seed)
        assert len({edge.src for edge in edges}) == 2 and {edge.relation for edge in edges} == {"compute"}
        assert all(edge in edges for edge in GRAPH.edges if edge.src == edges[0].src and edge.relation == "compute")


def test_planted_edges_are_of_the_same_parents_and_level_and_none_is_in_the_graph():
    edges = edges_again.chosen(GRAPH, 99)
    pairs = [*edges_again.planted(GRAPH, edges)]
    assert len(pairs) == len({*pairs}) == 12, "b/0 has no other child to be planted"
    assert not {*pairs} & {(edge.src, edge.dst) for edge in GRAPH.edges}
    assert {dst.partition("/")[0] for src, dst in pairs if src.startswith("a/")} == {"b"}
    assert {src for src, _ in pairs} == {f"a/{k}" for k in range(4)}


def test_what_is_inside_the_stored_interval_and_what_only_meets_it_is_counted():
    known = [*GRAPH.edges][:4]
    again = [replace(known[0], tau=1.1, tau_lo=1.0, tau_hi=1.2), replace(known[1], tau=1.3, tau_lo=1.1, tau_hi=1.5)]
    again += [replace(known[2], tau=2.0, tau_lo=1.9, tau_hi=2.1), known[3]]
    verdicts = ("verified", "verified", "refused", "too few contexts")
    found = edges_again.counted([verify.Tested(edge, verdict) for edge, verdict in zip(again, verdicts, strict=True)], known)
    assert found == {"verified": 2, "refused": 1, "too few contexts": 1, "inside": 1, "shared": 2, "tested": 3}
    null = edges_again.counted([verify.Tested(known[0], "refused")])
    assert null == {"verified": 0, "refused": 1, "too few contexts": 0}
    shown = edges_again.table({"shipped": found, "planted": null, "parents": 2, "texts": 9, "length": 8, "machine": "m"})
    assert "| shipped | 2 | 1 | 1 | 1 of 3 | 2 of 3 |" in shown and "| planted | 0 | 1 | 0 |  |  |" in shown
    with pytest.raises(ValueError, match="argument"):
        edges_again.counted([], known)
