"""A concept without what it shares with another, or only that: closed forms, and what is refused."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import steerlib as sl
from steerlib import errors
from steerlib.bank import SiteFacts
from steerlib.encoders import ReLU

D = 12
UNITS = {"a": 0.5, "b": 2.0, "c": 0.8}
X = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(0))
REFERENCE = torch.randn(40, D, generator=torch.Generator().manual_seed(5)) + 0.7


@pytest.fixture
def chain():
    """Three modules that pass their input on."""
    return nn.Sequential(*(nn.Identity() for _ in range(3)))


def three(model, **changes):
    """Three directions that share something, with units and the means of a reference."""
    drawn = torch.randn(3, D, generator=torch.Generator().manual_seed(1))
    drawn = drawn + 0.7 * drawn[0] - 0.4 * drawn[1]
    encoder = sl.Directions(drawn, (REFERENCE @ sl.Directions(drawn).encoder.T).mean(0))
    concepts = [sl.Concept(name=n, encoder="0", index=k, unit=u) for k, (n, u) in enumerate(UNITS.items())]
    bank = sl.ConceptBank(
        "three", concepts, {"0": encoder}, base=sl.BaseModel.of(model), sites={"0": SiteFacts(width=D)}, **changes
    )
    return bank, drawn


def moved(model, bank, edits: Any, x=X, **options):
    with sl.steer(model, bank, edits, **options):
        return model(x) - x


def test_the_rest_is_at_right_angles_and_both_parts_make_up_the_concept(chain):
    bank, (_, b, _) = three(chain)
    a, other = bank["a"], bank["b"]
    rest, shared = (moved(chain, bank, {made: 3.0}) for made in (a - other, a & other))
    torch.testing.assert_close(rest @ b, torch.zeros(2, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(rest + shared, moved(chain, bank, {"a": 3.0}), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moved(chain, bank, {a - other: 3.0, a & other: 3.0}), rest + shared, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("order", [*itertools.permutations("bc")])
def test_of_several_the_rest_is_at_right_angles_to_all_in_any_order(chain, order):
    bank, (a, b, c) = three(chain)
    found = moved(chain, bank, {bank["a"] - bank[order[0]] - bank[order[1]]: 1.0})[0, 0]
    others = torch.stack((b, c))
    wanted = a - torch.linalg.lstsq(others.T, a[:, None]).solution[:, 0] @ others
    torch.testing.assert_close(found, 0.5 * wanted, atol=1e-5, rtol=1e-5)


def test_combinations_combine(chain):
    bank, (a, b, c) = three(chain)
    made = bank["a"] & (bank["b"] - bank["c"])
    along = b - (b @ c) / (c @ c) * c
    torch.testing.assert_close(moved(chain, bank, {made: 1.0})[0, 0], 0.5 * (a @ along) / (along @ along) * along)
    assert made.name == "a & (b - c)" and made.id == "0/0 & (0/1 - 0/2)"


@pytest.mark.parametrize("make", [lambda a, b: a - b, lambda a, b: a & b])
def test_readings_are_0_on_average_over_the_reference_of_the_bank(chain, make):
    """The average follows from those of the two; a second way reads the reference itself."""
    bank, _ = three(chain)
    made = make(bank["a"], bank["b"])
    with sl.record(chain, bank, [made]) as tape:
        chain(REFERENCE[None])
    z, d = tape[made.name][0][1][0], bank.rows(made).write[0]
    torch.testing.assert_close(z, REFERENCE @ d / (d @ d) - (REFERENCE @ d / (d @ d)).mean(), atol=1e-5, rtol=1e-5)
    with sl.steer(chain, bank, {made: sl.Set(1.5)}), sl.record(chain, bank, [made]) as tape:
        chain(X)
    torch.testing.assert_close(tape[made.name][0][1], torch.full((2, 5), 1.5 * UNITS["a"]))


def test_a_combination_keeps_where_its_concept_acts_and_none_of_what_was_measured(chain):
    bank, _ = three(chain)
    gate = sl.Gate("c", above=0.0)
    a = replace(bank["a"], gate=gate, range=(-2.0, 2.0), useful=1.5, natural=(-3.0, 3.0), match_norm=True)
    bank = bank.with_concepts([a, bank["b"], bank["c"]])
    made = bank["a"] - bank["b"]
    assert (made.gate, made.match_norm, made.unit) == (gate, True, 0.5)
    assert (made.range, made.useful, made.natural, made.effects) == (None, None, None, {})
    with pytest.warns(errors.Unmeasured, match="of 'a - b', whose unit is what is left of one of 'a': it has no range"):
        sl.steer(chain, bank, {made: sl.Set(2.0)})


def test_a_plain_concept_is_a_key_too(chain):
    bank, _ = three(chain)
    assert torch.equal(moved(chain, bank, {bank["a"]: 2.0}), moved(chain, bank, {"a": 2.0}))
    with pytest.raises(errors.ConflictingEdits, match="named twice among 'a', 'a'"):
        sl.steer(chain, bank, {bank["a"]: 2.0, "a": 1.0})


def test_a_combination_takes_the_place_of_another_concept(chain):
    bank, _ = three(chain)
    made = bank["a"] - bank["b"]
    with sl.steer(chain, bank, {"c": sl.Swap(made)}), sl.record(chain, bank, ["c", made]) as after:
        chain(X)
    with sl.record(chain, bank, ["c", made]) as before:
        chain(X)
    read = {name: (before[name][0][1] / unit, after[name][0][1] / unit) for name, unit in (("c", 0.8), ("a - b", 0.5))}
    torch.testing.assert_close(read["c"][1], torch.zeros(2, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(read["a - b"][1], read["a - b"][0] + read["c"][0], atol=1e-5, rtol=1e-5)


def test_a_named_combination_is_a_concept_like_any_other(chain, tmp_path):
    """It gates, is saved, and moves what the expression moves."""
    bank, _ = three(chain)
    named = bank.with_concepts({**bank.concepts, "mere a": bank["a"] - bank["b"]})
    opened = sl.ConceptBank.from_pretrained(named.save_pretrained(tmp_path / "bank"))
    opened.verify()
    expected = moved(chain, bank, {bank["a"] - bank["b"]: 2.0})
    torch.testing.assert_close(moved(chain, opened, {"mere a": 2.0}), expected)
    gated = moved(chain, opened, {"c": sl.Add(1.0, gate=sl.Gate("mere a", above=0.0))})
    read = opened.encoder("0#combined").encode(X)[..., 0]
    assert torch.equal(gated.norm(dim=-1) > 0, read > 0) and (read > 0).any()
    assert opened["mere a"].label == "'a' without what it shares with 'b'" and [*opened] == ["a", "b", "c", "mere a"]


def test_at_several_sites_each_is_combined_with_what_is_there(chain):
    drawn = torch.randn(3, D, generator=torch.Generator().manual_seed(2))
    bank = sl.ConceptBank.from_directions(
        {"a": {"0": drawn[0], "2": drawn[1]}, "b": {"0": drawn[2], "2": drawn[0] + drawn[1]}}, base=chain
    )
    first, second = drawn[2], drawn[0] + drawn[1]
    wanted = drawn[0] - (drawn[0] @ first) / (first @ first) * first
    wanted = wanted + drawn[1] - (drawn[1] @ second) / (second @ second) * second
    torch.testing.assert_close(moved(chain, bank, {bank["a"] - bank["b"]: 1.0})[0, 0], wanted, atol=1e-5, rtol=1e-5)
    named = bank.with_concepts({**bank.concepts, "mere a": bank["a"] - bank["b"]})
    torch.testing.assert_close(moved(chain, named, {"mere a": 1.0})[0, 0], wanted, atol=1e-5, rtol=1e-5)


def test_gradients_reach_the_directions_that_it_is_made_of(chain):
    a, b = (torch.randn(D, generator=torch.Generator().manual_seed(k), requires_grad=True) for k in (1, 2))
    bank = sl.ConceptBank.from_directions({"a": a, "b": b}, site="0", base=chain)
    g = torch.ones(D)
    (moved(chain, bank, {bank["a"] - bank["b"]: 1.0}, torch.zeros(1, 1, D)) @ g).sum().backward()
    plain, other = (leaf.detach().requires_grad_() for leaf in (a, b))
    ((plain - (plain @ other) / (other @ other) * other) @ g).backward()
    torch.testing.assert_close(a.grad, plain.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(b.grad, other.grad, atol=1e-5, rtol=1e-5)


# -- refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("do", ["hold", "graph"])
def test_the_graph_knows_nothing_of_a_combination(chain, do):
    bank, _ = three(chain)
    with pytest.raises(errors.Unanswerable, match="the graph knows nothing of a combination"):
        sl.steer(chain, bank, {bank["a"] - bank["b"]: 1.0}, do=do)


def test_concepts_of_other_sites_or_levels_share_nothing_that_could_be_told(chain):
    drawn = torch.randn(3, D, generator=torch.Generator().manual_seed(2))
    bank = sl.ConceptBank.from_directions(
        {"a": {"0": drawn[0]}, "b": {"2": drawn[1]}, "both": {"0": drawn[1], "2": drawn[2]}}, base=chain
    )
    for made, where in ((bank["a"] - bank["b"], "0"), (bank["both"] & bank["a"], "2")):
        with pytest.raises(errors.BadEdit, match=f"not moved at '{where}'.*combine concepts of the same sites"):
            sl.steer(chain, bank, {made: 1.0})
    assert moved(chain, bank, {bank["a"] - bank["both"]: 1.0}).any()  # it has a part there
    levels = {"high": sl.Window(0.0, 0.5), "low": sl.Window(0.5, 1.0)}
    encoders = {f"0@{level}": sl.Directions(drawn[k : k + 1]) for k, level in enumerate(levels)}
    concepts = [sl.Concept(name=level, encoder=f"0@{level}", index=0) for level in levels]
    sites = {"0": SiteFacts(width=D)}
    noisy = sl.ConceptBank("levels", concepts, encoders, base=sl.BaseModel.of(chain), sites=sites, levels=levels)
    with pytest.raises(errors.BadEdit, match="combine concepts of the same sites"):
        _ = noisy[noisy["high"] - noisy["low"]]


def test_latents_are_refused(chain):
    drawn = torch.randn(2, D)
    bank = sl.ConceptBank.from_encoder(ReLU(encoder=drawn, bias=torch.zeros(2), decoder=drawn), site="0", base=chain)
    with pytest.raises(errors.BadEdit, match="'0/0' is of an encoder of kind 'relu'"):
        sl.steer(chain, bank, {bank["0/0"] - bank["0/1"]: 1.0})


def test_concepts_of_another_bank_are_refused_even_where_they_look_the_same(chain):
    (bank, _), (other, _) = three(chain), three(chain)
    for made in (bank["a"] - other["b"], other["a"] - other["b"], other["a"]):
        with pytest.raises(errors.UnknownConcept, match="of another bank, or a changed one; take that of bank 'three'"):
            sl.steer(chain, bank, {made: 1.0})


def test_where_nothing_is_left_there_is_nothing_to_steer(chain):
    one, other = torch.eye(D)[:2]
    bank = sl.ConceptBank.from_directions({"a": one, "b": other, "twice": 2 * one}, site="0", base=chain)
    with pytest.raises(errors.BadEdit, match="'a' is nothing without what it shares with 'twice' at '0'"):
        sl.steer(chain, bank, {bank["a"] - bank["twice"]: 1.0})
    with pytest.raises(errors.BadEdit, match="'a' shares nothing with 'b' at '0'"):
        sl.steer(chain, bank, {bank["a"] & bank["b"]: 1.0})
    torch.testing.assert_close(moved(chain, bank, {bank["a"] - bank["b"] - bank["b"]: 1.0})[0, 0], one)
