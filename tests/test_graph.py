"""The causal graph, against the full matrix."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import steerlib as sl
from steerlib.bank.concept_bank import SiteFacts
from steerlib.encoders import Directions
from steerlib.errors import BadBank, CorruptBank
from steerlib.training.discover.discovery import with_graph

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
    forecast = graph.forecast({n: float(v) for n, v in zip(names, change, strict=True) if v}, unmeasured=True)
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


def test_relations_are_kept_apart():
    """Parts and wholes neither pass changes on nor make a cycle with what moves them."""
    edges = [sl.Edge(src="a", dst="b", weight=2.0), sl.Edge(src="b", dst="a", weight=1.0, relation="selection")]
    graph = sl.CausalGraph(edges)
    assert graph.forecast({"a": 1.0}) == {"a": 1.0, "b": 2.0} and graph.descendants("b") == () and len(graph) == 2
    with pytest.raises(CorruptBank, match="cycle"):
        sl.CausalGraph([*edges, sl.Edge(src="a", dst="b", weight=1.0, relation="selection")])


NAMES = ["a", "b", "c"]
MEASURED = sl.Edge(
    src="a",
    dst="b",
    weight=0.5,
    evidence="verified",
    tau=0.25,
    tau_lo=0.0,
    tau_hi=0.5,
    necessity=0.75,
    sufficiency=-0.5,
    p_adj=0.0,
    n_verify=64,
    same=0.5,
    everywhere=False,
)


def test_an_edge_is_verified_only_with_what_verified_it():
    assert sl.Edge(src="a", dst="b", weight=9.0).evidence == "asserted"
    lackings: list[dict[str, Any]] = [{}, {"tau": 1.0}, {"n_verify": 3}]
    for lacking in lackings:
        with pytest.raises(BadBank, match="'a' -> 'b': a verified edge needs tau and n_verify"):
            sl.Edge(src="a", dst="b", weight=9.0, evidence="verified", **lacking)


def test_effects_along_all_paths_add_up_to_the_totals_that_were_measured():
    """With W the effects past all others and T = (I - W)^-1 the totals, the graph of some edges and all totals is that of W."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(6, 6, generator=g, dtype=torch.float64).tril(-1)  # [effect, cause]
    totals, names = torch.linalg.inv(torch.eye(6) - w), "abcdef"
    pairs = [(a, b) for b in range(6) for a in range(b)]
    edges = [sl.Edge(src=names[a], dst=names[b], weight=float(w[b, a])) for a, b in pairs if (a + b) % 2]
    for a, b in pairs:
        if b > a + 1 or not (a + b) % 2:
            tau = float(totals[b, a])
            known: Any = {"evidence": "verified", "n_verify": 9, "tau": tau, "tau_lo": tau - 0.5, "tau_hi": tau + 0.5}
            edges.append(sl.Edge(src=names[a], dst=names[b], weight=9.0, relation="total", **known))
    graph = sl.CausalGraph(edges)
    for a, b in pairs:
        assert graph.parents(names[b])[names[a]] == pytest.approx(float(w[b, a]))
    cut, change = w.clone(), torch.tensor([1.0, 0, -2.0, 0, 0, 0], dtype=torch.float64)
    cut[3] = 0
    solved = torch.linalg.solve(torch.eye(6) - cut, change)
    found = graph.forecast({"a": 1.0, "c": -2.0}, fixed={"d"}, unmeasured=True)
    assert found == pytest.approx({n: float(v) for n, v in zip(names, solved, strict=True) if v})
    assert found.unmeasured == ("e", "f"), "a total goes through what is held"
    free = graph.forecast({"a": 1.0, "c": -2.0})
    middle = float(totals[5, 0] - 2 * totals[5, 2])
    assert free.unmeasured == () and free["f"] == pytest.approx(middle)
    assert free.intervals["f"] == pytest.approx((middle - 1.5, middle + 1.5))
    assert "b" not in free.intervals, "stated by hand"


def test_a_latent_that_reads_0_moves_nothing_down_and_none_falls_below_0():
    edges = [("a", "b", 2.0), ("b", "c", 1.0), ("a", "d", -1.0)]
    graph = sl.CausalGraph(sl.Edge(src=s, dst=d, weight=w) for s, d, w in edges)
    assert graph.forecast({"a": -5.0}, given={"a": 0.0}, unmeasured=True) == {"a": 0.0}
    found = graph.forecast({"a": -5.0}, given={"a": 1.0, "b": 0.5, "d": 0.25}, unmeasured=True)
    assert found == {"a": -1.0, "b": -0.5, "c": -0.5, "d": 1.0}
    assert graph.forecast({"a": 5.0}, given={"a": 0.0, "d": 2.0})["d"] == -2.0
    readings = {"a": torch.tensor([[0.0, 1.0, 4.0]]), "b": torch.tensor([[9.0, 9.0, 3.0]])}
    by_token = graph.forecast({"a": -2.0}, given=readings)
    assert {name: by_token[name].tolist() for name in "abd"} == {"a": [[0, -1, -2]], "b": [[0, -2, -3]], "d": [[0, 1, 2]]}


def test_a_forecast_says_what_it_multiplied_along_a_path():
    edges = [("a", "b"), ("b", "c"), ("a", "c"), ("c", "d")]
    graph = sl.CausalGraph(sl.Edge(src=s, dst=d, weight=2.0) for s, d in edges)
    assert graph.forecast({"c": 1.0}).unmeasured == () and graph.forecast({"b": 1.0}).unmeasured == ("d",)
    assert graph.forecast({"a": 1.0}).unmeasured == ("c", "d")
    assert graph.forecast({"a": 1.0}, fixed={"b", "c"}).unmeasured == ()
    assert graph.forecast({"a": 1.0, "b": 1.0}, fixed={"b"}).unmeasured == ("d",)
    assert "which nothing measured: d" in repr(graph.forecast({"b": 1.0}))


def test_every_figure_of_an_edge_comes_back_and_what_is_not_known_stays_so():
    edges = (
        MEASURED,
        sl.Edge(src="b", dst="c", weight=-1.0, evidence="randomised"),
        sl.Edge(src="c", dst="a", weight=1.0, relation="selection", evidence="observed", necessity=0.0),
    )
    columns = sl.CausalGraph(edges).to_tensors(NAMES)
    assert sl.CausalGraph.from_tensors(columns, NAMES).edges == edges
    assert {len(column) for column in columns.values()} == {3}


def test_a_graph_of_weights_alone_still_loads():
    columns = {"src": torch.tensor([0]), "dst": torch.tensor([2]), "weight": torch.tensor([0.5])}
    assert sl.CausalGraph.from_tensors(columns, NAMES).edges == (sl.Edge(src="a", dst="c", weight=0.5),)


@pytest.mark.parametrize(
    ("column", "value"),
    [("src", torch.tensor([3])), ("dst", torch.tensor([-1])), ("relation", torch.tensor([4])), ("evidence", torch.tensor([9])),
     ("weight", torch.tensor([1.0, 2.0]))],
)  # fmt: skip
def test_a_file_that_cannot_be_is_refused(column, value):
    columns = sl.CausalGraph([MEASURED]).to_tensors(NAMES)
    with pytest.raises(CorruptBank):
        sl.CausalGraph.from_tensors({**columns, column: value}, NAMES)
    with pytest.raises(CorruptBank):
        sl.CausalGraph.from_tensors({key: kept for key, kept in columns.items() if key != "weight"}, NAMES)


def test_a_graph_over_latents_becomes_the_banks_in_units_of_its_concepts(tmp_path):
    encoders = {"low": Directions(torch.eye(3)), "high": Directions(torch.eye(3))}
    named = sl.Concept(name="royal", encoder="high", index=2, unit=4.0)
    sites = {id: SiteFacts(width=3) for id in encoders}
    bank = sl.ConceptBank("toy", [named], encoders, base=sl.BaseModel(), sites=sites)
    edge = replace(MEASURED, src="low/1", dst="high/2")
    made = with_graph(bank, sl.CausalGraph([edge]))
    opened = sl.ConceptBank.from_pretrained(made.save_pretrained(tmp_path / "toy"))
    wanted = replace(edge, dst="royal", weight=0.125, tau=0.0625, tau_lo=0.0, tau_hi=0.125)
    assert opened.graph.edges == made.graph.edges == (wanted,) and set(opened) == {"royal", "low/1"}
    assert {"tau", "known", "evidence"} <= load_file(tmp_path / "toy" / "graph.safetensors").keys()
    opened.verify()
    with pytest.raises(BadBank, match="none of the bank's concepts"):
        bank.with_concepts([named], graph=made.graph).save_pretrained(tmp_path / "other")


@pytest.mark.parametrize(
    "column",
    [
        {"src": torch.tensor([0.0])},
        {"weight": torch.tensor([1])},
        {"weight": torch.ones(1, 1)},
        {"n_verify": torch.tensor([0.5])},
    ],
    ids=str,
)
def test_columns_of_the_wrong_kind_are_refused(column):
    sound = {"src": torch.tensor([0]), "dst": torch.tensor([1]), "weight": torch.tensor([1.0])}
    assert len(sl.CausalGraph.from_tensors({**sound, "later": torch.ones(2, 2)}, ["a", "b"])) == 1
    with pytest.raises(CorruptBank, match="columns of numbers"):
        sl.CausalGraph.from_tensors({**sound, **column}, ["a", "b"])
