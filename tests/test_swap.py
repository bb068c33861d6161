"""One concept for another: readings after a swap, against closed forms."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_beside import bank_for
from test_pipelines import PIPELINES, site_of
from tiny_pipelines import run
from torch import nn

import steerlib as sl
from steerlib import errors
from steerlib.bank import SiteFacts
from steerlib.encoders import ReLU, TopK

D = 12
UNITS = {"old": 0.5, "new": 2.0, "third": 0.8}
IDS = torch.randint(3, 100, (2, 6), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def chain():
    """Three modules that pass their input on."""
    return nn.Sequential(*(nn.Identity() for _ in range(3)))


@pytest.fixture
def x():
    return torch.randn(2, 5, D, generator=torch.Generator().manual_seed(0))


def dependent(model, site="0", width=D, **changes):
    """Three directions of which each has a part in the others, with units and means."""
    drawn = torch.randn(3, width, generator=torch.Generator().manual_seed(1))
    encoder = sl.Directions(drawn + 0.7 * drawn[0] - 0.4 * drawn[1], torch.tensor([0.3, -0.2, 0.1]))
    concepts = [sl.Concept(name=n, encoder=site, index=k, unit=u) for k, (n, u) in enumerate(UNITS.items())]
    return sl.ConceptBank(
        "three", concepts, {site: encoder}, base=sl.BaseModel.of(model), sites={site: SiteFacts(width=width)}, **changes
    )


def swapped(model, bank, x, edits: Any, **options):
    """What became of x, and readings in units before and after."""
    with sl.steer(model, bank, edits, **options):
        y = model(x)
    units = torch.tensor([*UNITS.values()])
    return y, *(bank.encoder("0").encode(each) / units for each in (x, y))


SWAPS = {
    "one": ({"old": sl.Swap("new")}, [[0, 0], [1, 1]]),
    "exchange": ({"old": sl.Swap("new"), "new": sl.Swap("old")}, [[0, 1], [1, 0]]),
    "two for one": ({"old": sl.Swap("new"), "third": sl.Swap("new")}, [[0, 0, 0], [1, 1, 1], [0, 0, 0]]),
    "handed on": ({"old": sl.Swap("new"), "new": sl.Swap("third")}, [[0, 0, 0], [1, 0, 0], [0, 1, 1]]),
    "circle": (
        {"old": sl.Swap("new"), "new": sl.Swap("third"), "third": sl.Swap("old")},
        [[0, 0, 1], [1, 0, 0], [0, 1, 0]],
    ),
}
"""Swaps, and the matrix that readings before are multiplied by."""


@pytest.mark.parametrize("name", SWAPS)
def test_readings_afterwards_are_a_matrix_times_those_before_by_the_shortest_change(chain, x, name):
    edits, matrix = SWAPS[name]
    bank = dependent(chain)
    y, before, after = swapped(chain, bank, x, edits)
    many = len(matrix)
    wanted = before[..., :many] @ torch.tensor(matrix).float().T
    torch.testing.assert_close(after[..., :many], wanted, atol=1e-5, rtol=1e-5)
    rows = bank.encoder("0").rows(range(many)).read
    miss = (wanted - before[..., :many]) * torch.tensor([*UNITS.values()])[:many]
    torch.testing.assert_close(y - x, miss @ torch.linalg.pinv(rows).T, atol=1e-5, rtol=1e-5)


def test_raw_readings_are_exchanged_where_the_edit_says_so(chain, x):
    bank = dependent(chain)
    _, before, after = swapped(chain, bank, x, {"old": sl.Swap("new", unit="raw")})
    torch.testing.assert_close(after[..., 1], before[..., 1] + before[..., 0] * UNITS["old"] / UNITS["new"])


def test_where_there_is_nothing_of_the_old_nothing_changes(chain, x):
    """A vector of powers of 2, so that a reading of 0 is exactly 0."""
    old, new = torch.zeros(2, D)
    old[:2], new[1:3] = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 4.0])
    bank = sl.ConceptBank.from_directions({"old": old, "new": new}, site="0", base=chain)
    x[0, :, :2] = torch.tensor([-1.0, 2.0])
    with sl.steer(chain, bank, {"old": sl.Swap("new")}):
        y = chain(x)
    assert torch.equal(y[0], x[0]) and not torch.equal(y[1], x[1])


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_a_part_of_a_swap_takes_and_gives_the_same_part(chain, x, share):
    y, before, after = swapped(chain, dependent(chain), x, {"old": sl.Swap("new", when=sl.Ramp(sl.Steps(0, 8), share, share))})
    torch.testing.assert_close(after[..., 0], (1 - share) * before[..., 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after[..., 1], before[..., 1] + share * before[..., 0], atol=1e-5, rtol=1e-5)
    assert share or torch.equal(y, x)


def test_additions_beside_a_swap_come_first_and_its_targets_hold(chain, x):
    """As for `Set`: what others add along the swapped concepts is taken off again."""
    _, before, after = swapped(chain, dependent(chain), x, {"old": sl.Swap("new"), "third": 3.0})
    torch.testing.assert_close(after[..., 0], torch.zeros(2, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(after[..., 1], before[..., 1] + before[..., 0], atol=1e-5, rtol=1e-5)


# -- latents -----------------------------------------------------------------------------------------------------


def latents(model, kind: Any = ReLU, **settings):
    g = torch.Generator().manual_seed(2)
    tensors = {name: torch.randn(4, D, generator=g) for name in ("encoder", "decoder")}
    encoder = kind(**tensors, bias=torch.zeros(4), **settings)
    concepts = [sl.Concept(name=n, encoder="0", index=k, unit=u) for k, (n, u) in enumerate({"old": 0.5, "new": 2.0}.items())]
    return encoder, sl.ConceptBank.from_encoder(encoder, site="0", base=model, concepts=concepts)


@pytest.mark.parametrize(("kind", "settings"), [(ReLU, {}), (TopK, {"k": 2})])
def test_latents_are_swapped_in_the_code(chain, x, kind, settings):
    encoder, bank = latents(chain, kind, **settings)
    z = encoder.encode(x)
    with sl.steer(chain, bank, {"old": sl.Swap("new")}):
        y = chain(x)
    code = z[..., :1] * (2.0 / 0.5 * encoder.decoder[1] - encoder.decoder[0])
    torch.testing.assert_close(y, x + code, atol=1e-5, rtol=1e-5)
    silent = z[..., 0] == 0
    assert silent.any() and not silent.all() and torch.equal(y[silent], x[silent])
    with sl.steer(chain, bank, {"old": sl.Swap("new"), "new": sl.Swap("old")}):
        both = chain(x)
    exchanged = z[..., 1:2] * (0.25 * encoder.decoder[0] - encoder.decoder[1])
    torch.testing.assert_close(both, x + code + exchanged, atol=1e-5, rtol=1e-5)


# -- sites -------------------------------------------------------------------------------------------------------


def at(model, **places):
    """A concept a name, each at the sites given, with equal vectors at all."""
    drawn = torch.randn(len(places), D, generator=torch.Generator().manual_seed(4))
    vectors = {n: dict.fromkeys(sites, v) for (n, sites), v in zip(places.items(), drawn, strict=True)}
    return sl.ConceptBank.from_directions(vectors, base=model), drawn / drawn.square().sum(-1, keepdim=True)


def observed(model, bank, edits: Any, **options):
    """What the concepts of a bank read in a pass."""
    with sl.steer(model, bank, edits, **options), sl.record(model, bank) as tape:
        model(IDS)
    return {name: passes[0][1] for name, passes in tape.items()}


def test_a_concept_of_an_earlier_site_is_read_there_before_it_is_taken_away(llama):
    """The oracle: what the new concept reads where the old one is taken away alone, and the old one's plain reading."""
    g = torch.Generator().manual_seed(3)
    old, new = torch.randn(2, 32, generator=g)
    bank = sl.ConceptBank.from_directions({"old": {0: old}, "new": {1: new}}, base=llama)
    plain, without = observed(llama, bank, {}), observed(llama, bank, {"old": sl.Ablate()})
    found = observed(llama, bank, {"old": sl.Swap("new", tokens="all")})
    torch.testing.assert_close(found["old"], torch.zeros(2, 6), atol=1e-5, rtol=0)
    torch.testing.assert_close(found["new"], without["new"] + plain["old"], atol=1e-5, rtol=1e-5)


def test_of_several_sites_each_gives_what_is_read_there(chain, x):
    """At the second site nothing of the old concept is left to give, since the chain passes on what the first made."""
    bank, rows = at(chain, old=["0", "2"], new=["0", "2"])
    with sl.steer(chain, bank, {"old": sl.Swap("new")}) as session:
        y = chain(x)
    torch.testing.assert_close(y @ rows[1], x @ rows.sum(0), atol=1e-5, rtol=1e-5)
    assert {line.site for line in session.report().lines} == {"0", "2"}


@pytest.mark.parametrize("places", [{"old": ["2"], "new": ["0"]}, {"old": ["2"], "new": ["1", "2"]}])
def test_what_is_read_after_the_new_one_is_moved_is_refused(chain, places):
    bank, _ = at(chain, **places)
    with pytest.raises(errors.Unanswerable, match="'old' is read at '2', which is not before '[01]', where 'new' takes"):
        sl.steer(chain, bank, {"old": sl.Swap("new")})


# -- where it acts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "moved"),
    [
        ({}, [0, 1, 1, 1, 1, 1]),
        ({"tokens": "all"}, [1] * 6),
        ({"tokens": slice(2, 4)}, [0, 0, 1, 1, 0, 0]),
        ({"tokens": "generated"}, [0] * 6),
        ({"mask": torch.tensor([0, 0, 0, 1, 1, 1])}, [0, 0, 0, 1, 1, 1]),
        ({"gate": sl.Gate("third", above=-0.12), "tokens": "all"}, None),
    ],
)
def test_both_concepts_are_moved_on_the_same_tokens(llama, scope, moved):
    bank = dependent(llama, "layers.0", 32)
    with sl.record(llama, bank) as plain:
        llama(IDS)
    with sl.steer(llama, bank, {"old": sl.Swap("new", **scope)}) as session, sl.record(llama, bank) as tape:
        llama(IDS)
    (before, after) = ({n: t[n][0][1] / UNITS[n] for n in UNITS} for t in (plain, tape))
    on = (before["third"] > -0.12).float() if moved is None else torch.tensor(moved).float()
    assert moved is not None or 0 < on.mean() < 1
    taken = before["old"] * on
    torch.testing.assert_close(after["old"], before["old"] - taken, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after["new"], before["new"] + taken, atol=1e-4, rtol=1e-4)
    lines = session.report().lines
    assert [line.concept for line in lines] == ["old", "new"] and lines[0].tokens == lines[1].tokens
    assert lines[0].left is None or lines[0].left < 1e-3


def test_held_concepts_are_those_that_follow_either(llama):
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
    bank = sl.ConceptBank.from_directions(
        {"old": {0: vectors[0]}, "new": {0: vectors[1]}, "effect": {1: vectors[2]}}, base=llama
    ).with_concepts(graph=sl.CausalGraph([sl.Edge(src="new", dst="effect", weight=0.7)]))

    edits = {"old": sl.Swap("new", tokens="all")}
    plain, held, free = (observed(llama, bank, e, do=do) for e, do in (({}, "model"), (edits, "hold"), (edits, "model")))
    torch.testing.assert_close(held["effect"], plain["effect"], atol=1e-5, rtol=0)
    torch.testing.assert_close(held["new"], plain["new"] + plain["old"], atol=1e-5, rtol=0)
    assert (free["effect"] - plain["effect"]).abs().max() > 1e-3


@pytest.fixture(scope="module")
def pipe():
    return PIPELINES["sd1"].build()


def test_in_images_concepts_are_swapped_in_the_half_and_the_window_of_the_edit(pipe):
    site = site_of("sd1")
    bank, scope = bank_for(pipe, site, 16), {"when": sl.Window(0.4, 1.0), "branch": "cond"}

    def read(edits: Any):
        with sl.steer(pipe, bank, edits), sl.record(pipe, bank) as tape:
            run(pipe, steps=4)
        return tape

    plain, found = read({}), read({"a": sl.Swap("b", **scope)})
    late = next(k for k, (state, _) in enumerate(plain["a"]) if state.progress >= 0.4)
    for k in range(late + 1):  # further on the image itself has changed
        before, after = ({n: tape[n][k][1] for n in "ab"} for tape in (plain, found))
        on = torch.tensor([half == "cond" for half in plain["a"][k][0].branches or ()]).float()[:, None] * (k == late)
        taken = before["a"] * on.repeat_interleave(len(before["a"]) // len(on), 0)
        torch.testing.assert_close(after["a"], before["a"] - taken, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(after["b"], before["b"] + taken, atol=1e-4, rtol=1e-4)


def test_concepts_of_other_noise_levels_are_refused(pipe):
    site, levels = site_of("sd1"), {"high": sl.Window(0.0, 0.5), "low": sl.Window(0.5, 1.0)}
    drawn = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))
    encoders = {f"{site}@{level}": sl.Directions(drawn[k : k + 1]) for k, level in enumerate(levels)}
    concepts = [sl.Concept(name=level, encoder=f"{site}@{level}", index=0) for level in levels]
    sites = {site: SiteFacts(width=16)}
    bank = sl.ConceptBank("levels", concepts, encoders, base=sl.BaseModel.of(pipe), sites=sites, levels=levels)
    with pytest.raises(errors.Unanswerable, match="'high' and 'low' are moved at other noise levels"):
        sl.steer(pipe, bank, {"high": sl.Swap("low")})


# -- refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edits", "said"),
    [
        ({"old": sl.Swap("old")}, "'old' cannot take its own place"),
        ({"old": sl.Swap("0/0")}, "'old' cannot take its own place"),
        ({"old": sl.Swap("new"), "new": 2.0}, "'new' takes the place of another concept and is edited otherwise"),
        ({"new": sl.Set(1.0), "old": sl.Swap("new")}, "'new' takes the place of another concept and is edited otherwise"),
        ({"old": sl.Swap("new"), "third": sl.Swap("new", tokens="prompt")}, "'new' takes the place"),
    ],
)
def test_what_cannot_be_told_is_refused(chain, edits, said):
    with pytest.raises(errors.BadEdit, match=said):
        sl.steer(chain, dependent(chain), edits)


def test_an_unknown_concept_is_refused_with_the_nearest_name(chain):
    with pytest.raises(errors.UnknownConcept, match="no concept 'newt'; did you mean 'new'"):
        sl.steer(chain, dependent(chain), {"old": sl.Swap("newt")})


def test_a_concept_that_an_outer_session_sets_is_not_swapped(chain):
    bank = dependent(chain)
    with sl.steer(chain, bank, {"new": sl.Set(1.0)}), pytest.raises(errors.ConflictingEdits, match="'new' is set by an outer"):
        sl.steer(chain, bank, {"old": sl.Swap("new")}).__enter__()


def test_concepts_that_act_on_other_tokens_are_refused_until_their_gates_are_lifted(chain, x):
    bank = dependent(chain)
    gated = replace(bank["new"], gate=sl.Gate("third", above=1e9))
    bank = bank.with_concepts([bank["old"], gated, bank["third"]])
    with pytest.raises(errors.Unanswerable, match="lift both with gate='open'"):
        sl.steer(chain, bank, {"old": sl.Swap("new")})
    _, before, after = swapped(chain, bank, x, {"old": sl.Swap("new", gate="open")})
    torch.testing.assert_close(after[..., 1], before[..., 1] + before[..., 0], atol=1e-5, rtol=1e-5)
