"""Figures: what is composed of what, pictures and words, how pictures are read, and measures whose values are known."""

from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from figures import control, measure, measures, prompts, reading, world
from figures.measures import Change
from figures.prompts import COUNT, write
from scenes.painting import noised
from scenes.pipeline import pipeline

import steerlib as sl
from steerlib.encoders import TopK
from steerlib.graph.causal_graph import CausalGraph, Edge
from steerlib.hosts import host_for
from steerlib.passes import DenoisingPass
from steerlib.training.package.pictures import TOKENS, bank_of, prompts_of
from steerlib.training.recipe import PipelineEncoderRecipe, Recipe
from steerlib.training.record.noised import at_levels

SEEN = world.draw(150, seed=3)


def with_(concepts, n=1, **factors):
    """Factors of figures with some concepts and nothing else."""
    plain = {name: np.zeros(n, np.int8) for name in world.VALUES} | {"x": np.full(n, 4, np.int8), "y": np.full(n, 4, np.int8)}
    plain |= {name: np.full(n, world.VALUES[name].index(value), np.int8) for name, value in factors.items()}
    return world.edited(plain, dict.fromkeys(concepts, True))


def test_every_part_is_of_two_halves_and_every_half_of_two_wholes():
    for level, of in ((world.PARTS, world.HALVES), ((*world.HALVES,), world.WHOLES)):
        for concept in level:
            mine = [{*made} for made in of.values() if concept in made]
            assert len(mine) == 2 and set.intersection(*mine) == {concept}  # so that each is told by what it makes up
    assert len({frozenset(world.parts_of(name).items()) for name in world.PARENTS}) == 36
    assert len(world.edges()) == 48


def test_a_whole_is_there_just_where_all_its_parts_are():
    there = dict(zip(world.CONCEPTS, world.present(SEEN.factors).T, strict=True))
    for whole, made in world.PARENTS.items():
        if made:
            assert (there[whole] == (there[made[0]] & there[made[1]])).all()
    assert all(0 < share.mean() < 0.45 for share in there.values())


def presence(n, seed=0):
    """By level, which concepts are there, and below the wholes what is only seen with them."""
    factors = world.sample(n, seed=seed)
    names = {level: world.LEVELS[level] if level == "wholes" else measures.below(level) for level in world.LEVELS}
    return {level: torch.from_numpy(world.present(factors, own)).float() for level, own in names.items()}


def test_what_occurs_together_is_not_what_is_composed():
    there = presence(4000)
    found = measures.edge_score(measures.correlated(there))
    assert 0.6 < found.f1 < 0.75
    given = {part: there["parts"][:, k][there["halves"][:, 0] > 0].mean() for k, part in enumerate(measures.below("parts"))}
    assert given["pointed ears"] == given["round eyes"] == 1 and given["whiskers"] > 0.7  # of a hood
    factors = world.sample(4000)
    for part, whole in world.edges():  # and a part is often there without what it makes up
        both = world.present(factors, (part, whole))
        assert both[both[:, 0]][:, 1].mean() < 0.75


def test_setting_and_taking_away_moves_just_the_parts_and_shows_where_they_are():
    for concept in world.PARENTS:
        for there in (True, False):
            after = world.redraw(SEEN, {concept: there})
            own = world.parts_of(concept)
            moved = {name for name in world.VALUES if (after.factors[name] != SEEN.factors[name]).any()}
            assert moved == {*own} and world.present(after.factors, (concept,)).all() == there
            shown = np.isin([SEEN.regions, after.regions], [world.REGIONS.index(slot) for slot in own]).any(0)
            assert not ((SEEN.pixels != after.pixels).any(-1) & ~shown).any()
    fox = world.edited(with_(["cat"]), {"fox": True, "cat": False})  # a swap: what is set is set last
    assert world.present(fox, ("fox", "hood", "cat")).tolist() == [[True, True, False]]


def test_a_concept_is_where_its_parts_are():
    cat = world.drawn(with_(["cat"]))
    inside = [world.places(cat, name)[0] for name in ("cat", "hood", "muzzle", "whiskers", "wolf")]
    assert (inside[0] == (inside[1] | inside[2])).all() and not (inside[1] & inside[2]).any() and not inside[4].any()
    assert inside[3].any() and not (inside[3] & ~inside[2]).any()
    assert (inside[0] == (cat.regions[0] > 0)).all() and ((cat.pixels[0] != (150, 150, 150)).any(-1) == inside[0]).all()


def test_the_same_seed_gives_the_same_pictures_and_words():
    one, same, other = (world.draw(40, seed=seed) for seed in (3, 3, 4))
    assert (one.pixels == same.pixels).all() and (one.pixels != other.pixels).any()
    assert world.captions(one.factors, drop=0.3) == world.captions(same.factors, drop=0.3)


def test_captions_name_wholes_parts_or_both_and_nothing_that_is_not_there():
    cat = with_(["cat"], 400, hue="red")
    said = {*world.captions(cat)}
    assert {"a red cat on grey", "a red hood and a muzzle on grey", "a red cat with whiskers on grey"} <= said
    assert any("cat" not in one and "round eyes" in one for one in said)
    assert {*world.captions(with_([], 3))} == {"nothing on grey"}
    assert {*world.captions(with_(["bolts", "beak"]), seed=1, drop=1.0)} <= {"a chin", "bolts and a beak"}
    known, words = {*world.vocabulary()}, {*" ".join(world.captions(SEEN.factors)).split()}
    assert words <= known
    there = world.present(SEEN.factors)
    for row, caption in zip(there, world.captions(SEEN.factors), strict=True):
        named = {name for name in world.PARENTS if f" {name} " in f" {caption} "}
        assert named <= {name for name, on in zip(world.CONCEPTS, row, strict=True) if on}


def test_pictures_are_read_exactly_and_through_noise():
    rng, told = np.random.default_rng(0), reading.told(SEEN.factors)
    noisy = np.clip(SEEN.pixels + rng.normal(0, 40, SEEN.pixels.shape), 0, 255).astype(np.uint8)
    exact, read = reading.read(SEEN.pixels), reading.read(noisy)
    for name, value in SEEN.factors.items():
        assert (exact.factors[name] == value)[told[name]].all() and (read.factors[name] == value)[told[name]].all()
    assert exact.error.max() == 0 and read.error.mean() == pytest.approx(36 / 255, rel=0.1)  # less than 40: bytes end at 255


# -- measures ----------------------------------------------------------------------------------------------------


def test_nodes_are_the_latents_that_go_with_concepts():
    there = presence(2000)["parts"][:, :12].bool()
    g = torch.Generator().manual_seed(0)
    order = torch.randperm(40, generator=g)[:12]
    z = torch.rand(2000, 40, generator=g)
    z[:, order] = there.float() * (torch.rand(there.shape, generator=g) < 0.5)  # misses half
    z[:, order[0]] = 1 - there[:, 0].float()  # fires where it is not
    found = measures.nodes(z, there, world.PARTS)
    assert found.latents == (*order.tolist(),) and found.correlation[0] == pytest.approx(-1)
    share = there[1::2, 1:].double().mean(0)
    expected = ((1 - share) / (2 - share)).sqrt()  # of a latent that fires in half of the cases, and nowhere else
    torch.testing.assert_close(found.correlation[1:], expected, atol=0.06, rtol=0)
    assert found.found == float((found.correlation >= 0.6).float().mean()) > 0.5 and found.mcc < float(expected.mean())
    by_chance = measures.nodes(torch.rand(2000, 400, generator=g), there, world.PARTS)
    assert by_chance.found == 0 and abs(by_chance.mcc) < 0.05  # measured on other pictures than chosen on
    with pytest.raises(ValueError, match="12 latents"):
        measures.nodes(z[:, :5], there, world.PARTS)


def test_edges_are_scored_by_the_concepts_of_their_latents():
    true, concepts = sorted(world.edges()), {name: f"latent {name}" for name in world.PARENTS}
    found = [Edge(src=concepts[part], dst=concepts[whole], weight=1.0, relation="selection") for part, whole in true[:24]]
    turned = Edge(src=concepts[true[24][1]], dst=concepts[true[24][0]], weight=1.0, relation="selection")
    other = [Edge(src=concepts["smile"], dst=f"latent {k}", weight=1.0, relation="selection") for k in range(3)]
    named = {latent: name for name, latent in concepts.items()} | {"latent 0": "red"}
    kept = measures.arrows(CausalGraph([*found, turned, *other]), named)
    assert kept == {*true[:24], true[24][::-1]}  # unknown latents and hues are no wholes
    scored = measures.edge_score(kept)
    assert scored == (24 / 25, 1 / 2, 2 * 24 / (25 + 48), 24 / 25)
    assert measures.edge_score(world.edges()) == (1, 1, 1, 1) and measures.edge_score([]) == (0, 0, 0, 0)


def test_graphs_without_minimality_and_shuffled_levels_are_worse():
    g = torch.Generator().manual_seed(0)
    there = {level: own * (0.5 + torch.rand(own.shape, generator=g)) for level, own in presence(4000).items()}
    everything = measures.edge_score(measures.dense(there))
    assert everything.recall == 1 and everything.f1 < 0.5
    apart = measures.shuffled(there)
    for level, own in there.items():
        assert torch.equal(apart[level].sort(0).values, own.sort(0).values) and not torch.equal(apart[level], own)
    assert measures.edge_score(measures.correlated(apart)).f1 < 0.3


CHANGES = (Change("set", "cat"), Change("remove", "hood"), Change("swap", "beak", "smile"))


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.kind)
def test_the_true_counterfactual_is_a_perfect_edit_and_nothing_is_none(change):
    due = world.redraw(SEEN, change.do)
    perfect, none = (measures.effect(change, SEEN.pixels, after) for after in (due.pixels, SEEN.pixels))
    assert perfect[:2] == (1, 1) and perfect.outside == 0 and perfect.cases == none.cases >= 3
    assert none[:2] == (0, 1) and none.outside is None
    gone = measures.effect(change, SEEN.pixels, world.redraw(SEEN, dict.fromkeys(world.PARTS, False)).pixels)
    assert gone.effect == (change.kind == "remove") and gone.preservation is not None and gone.preservation < 0.9


def test_what_an_edit_should_leave_alone_is_counted_one_by_one():
    hooded = world.drawn(with_(["cat"], 8, hue="red", background="sand"))
    due = world.edited(hooded.factors, {"mask": True})
    due["cheeks"][:2], due["hue"][:4] = 0, 3
    found = measures.effect(Change("set", "mask"), hooded.pixels, world.drawn(due).pixels)
    assert found.effect == 1 and found.cases == 8 and found.least == "hue"
    assert found.preservation == pytest.approx((0.75 + 1 + 0.5 + 1 + 1 + 1) / 6)  # cheeks, mouth, hue, background, x, y
    assert found.outside is not None and 0 < found.outside < 1
    assert measures.effect(Change("remove", "fox"), hooded.pixels, hooded.pixels) == (None, None, "", None, 0)


def test_a_whole_brings_its_parts_and_a_part_nothing():
    nothing = world.drawn(with_([], 4))
    rises = {
        name: measures.spread(nothing.pixels, world.redraw(nothing, {name: True}).pixels) for name in ("hood", *world.PARTS)
    }
    assert rises["hood"]["round eyes"] == rises["hood"]["hood"] == 1 and rises["hood"]["smile"] == 0
    hood = [(part, "hood") for part in world.HALVES["hood"]]
    assert measures.downward(hood, rises) == (1, 0, 1)
    mixed = {name: {other: 0.5 for other in world.CONCEPTS} for name in rises}
    assert measures.downward(hood, mixed) == (0.5, 0.5, 0)


def test_readings_are_means_over_the_tokens_of_a_picture():
    pipe, site = pipeline("toy", known=world.vocabulary()), "unet.mid_block.attentions.0.update"
    few, levels = world.draw(3, seed=1), [900, 100]
    seen = at_levels(pipe, [site], levels, lambda: noised(pipe, few.pixels, world.captions(few.factors), levels, seed=0))
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(5, seen[f"{site}@900"].shape[2], generator=g)
    encoder = TopK(encoder=rows, bias=torch.zeros(5), decoder=rows, decoder_bias=torch.zeros(rows.shape[1]), centred=False, k=2)
    bank = bank_of(pipe, "toy", "toy", [], {f"{site}@900": encoder, f"{site}@100": encoder}, seen)
    found = measures.readings(pipe, bank, few)
    assert {*found} == {f"{site}@900", f"{site}@100"}
    for id, z in found.items():
        assert z.shape == (3, 5)
        torch.testing.assert_close(z, torch.stack([encoder.encode(x).mean(0) for x in seen[id]]))
    assert not torch.equal(*found.values())


def test_the_recipe_asks_for_sites_that_the_pipeline_has_and_uses_no_labels(tmp_path):
    write(tmp_path, 30)
    recipe = Recipe.from_file(tmp_path / "recipe.toml")
    assert isinstance(recipe, PipelineEncoderRecipe) and recipe.levels == [899, 500, 100]
    assert recipe.source == "pipeline" and len(prompts_of(recipe)) == 30 and recipe.corpus == ("prompts.jsonl",)
    host = host_for(pipeline("toy", known=world.vocabulary()))
    assert [host.site(name).mean for name in recipe.encoder_sites] == [True, False]
    assert recipe.tokens == COUNT * TOKENS


# -- banks beside the truth --------------------------------------------------------------------------------------

LEVELS = dict(zip((899, 500, 100), world.LEVELS, strict=True))
SITE = "unet.mid_block.attentions.0.update"
NAMES = {level: world.LEVELS[level] if level == "wholes" else measures.below(level) for level in world.LEVELS}


@pytest.fixture(scope="module")
def toy_bank():
    """A pipeline that learned nothing, and a bank with as many latents at each level as there are things to be told."""
    pipe, few, g = pipeline("toy", known=world.vocabulary()), world.draw(3, seed=1), torch.Generator().manual_seed(0)
    said = world.captions(few.factors)
    seen = at_levels(pipe, [SITE], [*LEVELS], lambda: noised(pipe, few.pixels, said, [*LEVELS], seed=0))
    encoders = {}
    for key, level in LEVELS.items():
        rows, bias = torch.randn(len(NAMES[level]), seen[f"{SITE}@{key}"].shape[2], generator=g), torch.zeros(len(NAMES[level]))
        about = {"decoder_bias": torch.zeros(rows.shape[1]), "centred": False, "k": 2}
        encoders[f"{SITE}@{key}"] = TopK(encoder=rows, bias=bias, decoder=rows, **about)
    return pipe, bank_of(pipe, "toy", "toy", [], encoders, seen)


def told_truth():
    """Readings of figures at each level that tell everything, however strongly."""
    g = torch.Generator().manual_seed(0)
    at = zip(LEVELS, presence(1600, seed=3).values(), strict=True)
    return {f"{SITE}@{key}": there * (0.5 + torch.rand(there.shape, generator=g)) for key, there in at}


def test_readings_that_tell_the_truth_give_its_graph_and_shuffled_levels_none(toy_bank, monkeypatch, tmp_path):
    pipe, bank = toy_bank
    monkeypatch.setattr(measure.Bench, "__init__", lambda *_: None)
    bench = measure.Bench(tmp_path, 0, 0)
    bench.pipe, bench.renders = pipe, world.Figures(world.sample(1600, seed=3), *SEEN[1:])
    monkeypatch.setattr(bench, "opened", lambda _: (pipe, bank))
    monkeypatch.setattr(measures, "readings", lambda *_: told_truth())
    rows = bench.read(measure.OWN)
    assert [row["found"] for row in rows if "level" in row] == [1, 1, 1]
    graphs = {row["graph"]: row for row in rows if "graph" in row}
    for way in ("minimal, of renders", "the same among nodes alone"):
        assert graphs[way]["precision"] == 1 and graphs[way]["recall"] > 0.97
    assert graphs["correlation"]["f1"] < 0.75 and graphs["dense"]["f1"] < 0.35
    assert graphs["minimal, levels shuffled"]["arrows"] == graphs["among nodes alone, levels shuffled"]["arrows"] == 0
    assert graphs["correlation, levels shuffled"]["f1"] < 0.3
    named = bench._named()
    assert named["cat"][0] == f"{SITE}@899/0" and named["hood"][0] == f"{SITE}@500/0" and named["beak"][0] == f"{SITE}@100/11"
    assert named["beak"][1].startswith(f"{SITE}@899/") and all(len(own) == 3 for own in named.values())


def given(toy, bank, named):
    """What edits are measured with, of a bank whose latents are named."""
    pipe, own = toy
    width = own.encoder(f"{SITE}@899").decoder.shape[1]
    places, zero = {name: torch.randn(width) for name in prompts.LEVERS}, {"removal": "Set", "removal_amount": 0.0}
    levers = sl.ConceptBank.from_directions(places, site=SITE, base=pipe)
    known = [replace(own, effects={"edit": "Set", "amount": 1.5, **zero}) for own in levers.concepts.values()]
    return control.Given(pipe, bank, levers.with_concepts(known), named, 12)


def test_what_is_replaced_is_what_another_caption_would_have_added_to_the_same_picture(toy_bank):
    own = given(toy_bank, toy_bank[1], {})
    captions, others = (world.captions(world.draw(2, seed=seed).factors) for seed in (1, 2))
    plain = control.drawn(own, captions, None, {})
    assert (control.replaced(own, captions, captions, control.ALL_BLOCKS) == plain).all()
    some, every = (control.replaced(own, captions, others, way) for way in (control.OWN_BLOCK, control.ALL_BLOCKS))
    due = control.drawn(own, others, None, {})
    far = [np.abs(pictures.astype(float) - due).mean() for pictures in (plain, some, every)]
    assert far[2] < far[1] < far[0] and far[2] < 1  # all that reads the caption was replaced
    assert not own.pipe.unet._forward_pre_hooks


def test_along_all_directions_everything_is_replaced_along_none_nothing_and_those_of_a_concept_tell_its_captions(toy_bank):
    own = given(toy_bank, toy_bank[1], {})
    captions, others = (world.captions(world.draw(2, seed=seed).factors) for seed in (1, 2))
    found = control.directions(own, "cat")
    assert {key.rpartition("@")[0] for key in found} == {*control.blocks(own)} and len(found) == 3 * len(control.blocks(own))
    for rows in found.values():
        assert torch.allclose(rows @ rows.T, torch.eye(len(rows)), atol=1e-4)
    whole = {key: torch.eye(rows.shape[1]) for key, rows in found.items()}
    draw = lambda rows, rank: control.along(own, captions, others, [rows], rank).astype(float)  # noqa: E731
    every = control.replaced(own, captions, others, control.ALL_BLOCKS)
    assert np.abs(draw(whole, 10**6) - every).mean() < 0.2
    assert (draw(whole, 0) == control.drawn(own, captions, None, {})).all()
    far = [np.abs(draw(found, rank) - every).mean() for rank in (0, 1, 4, 16)]
    assert far[0] > far[1] > far[2] > far[3]
    alone = [control.along(own, captions, others, [whole], 10**6, [level]).astype(float) for level in control.LEVELS]
    assert all(np.abs(pictures - every).mean() > 0 for pictures in alone)
    assert not any((a == b).all() for a, b in combinations(alone, 2)), "each acts in its own stretch"
    random = {key: torch.linalg.qr(torch.randn(rows.shape[1], 4)).Q.T for key, rows in found.items()}
    assert far[2] < np.abs(draw(random, 4) - every).mean()


@pytest.mark.parametrize("order", [("100", "500", "899"), ("899", "500", "100")])
def test_a_pass_is_of_the_level_in_whose_stretch_it_is(order):
    ends = {"899": (0.0, 0.3), "500": (0.3, 0.7), "100": (0.7, 1.0)}
    bank: Any = SimpleNamespace(levels={level: sl.Window(*ends[level]) for level in order})
    own = control.Given(None, bank, bank, {}, 1)
    for progress, level in ((0.0, "899"), (0.29, "899"), (0.3, "500"), (0.69, "500"), (0.7, "100"), (1.0, "100")):
        assert control._span(own, DenoisingPass(progress)) == level


def test_directions_of_a_concept_are_beside_as_many_of_another_one(toy_bank, monkeypatch):
    change = Change("swap", "cat", "bee")
    own, factors = given(toy_bank, toy_bank[1], {}), control.asked(change, 12)
    asked = []

    def along(_, captions, due, rows, rank, levels=control.LEVELS):
        asked.append(({name for row in rows for name in row}, rank, levels))
        assert (captions, due) == control.said(change, 12)
        known = asked[-1][0] == {"cat", "bee"} and "100" in levels
        return world.drawn(world.edited(factors, change.do) if known else factors).pixels

    monkeypatch.setattr(control, "drawn", lambda *_: world.drawn(factors).pixels)
    monkeypatch.setattr(control, "along", along)
    ways = control.measured_along(own, change, lambda name: {name: torch.zeros(0)})
    late = {way: float("100" in levels) for way, levels in control.STRETCHES.items()}
    assert {way: told["effect"] for way, told in ways.items()} == dict.fromkeys(control.ALONG, 1.0) | {
        control.DEALT: 0.0
    } | late
    assert [rank for _, rank, _ in asked] == [1, 4, 16, 4, 16, 16, 16, 16] and not asked[3][0] & {"cat", "bee"}
    table = control.stretches([{"change": "swap", "concept": "cat", "other": "bee", "ways": ways}]).splitlines()
    assert (
        len(table) == 3
        and "| swap wholes (1) | 1.00, 1.00 (1) | 0.00, 1.00 (0) | 0.00, 1.00 (0) | 1.00, 1.00 (1) |" in table[2]
    )


def test_every_way_moves_what_it_says(toy_bank):
    graph = CausalGraph(
        [
            Edge(src="500/0", dst="899/0", weight=1.0, relation="selection"),
            Edge(src="100/0", dst="500/0", weight=1.0, relation="selection"),
            Edge(src="500/9", dst="899/0", weight=1.0, relation="compute"),
        ]
    )
    named = {"cat": ["899/0", "500/3"], "bee": ["899/1", "500/4"]}
    own = given(toy_bank, SimpleNamespace(graph=graph), named)
    put, out, swap = Change("set", "cat"), Change("remove", "cat"), Change("swap", "cat", "bee")
    assert [control.latents(own, "cat", way) for way in (control.ONE, control.ALL, control.GRAPH)] == [
        ["899/0"], ["899/0", "500/3"], ["899/0", "500/0", "100/0"]
    ]  # fmt: skip
    assert control.edits(own, put, control.ONE) == [{"899/0": sl.Set(amount)} for amount in control.AMOUNTS]
    assert control.edits(own, out, control.ALL) == [{"899/0": sl.Ablate(), "500/3": sl.Ablate()}]
    assert control.edits(own, swap, control.LEVER) == [{"cat": sl.Set(0.0), "bee": sl.Set(1.5)}]
    assert {change.kind for change in control.changes()} == {"set", "remove", "swap"}


def test_the_true_counterfactual_reaches_both_bars_and_what_does_nothing_none(toy_bank, monkeypatch):
    change, seen = Change("set", "cat"), []

    def drawn(_, captions, bank, do):
        seen.append((bank, do))
        factors = control.asked(change, 12)
        return world.drawn(world.edited(factors, change.do) if bank is None and len(seen) > 1 else factors).pixels

    monkeypatch.setattr(control, "drawn", drawn)
    own = given(toy_bank, SimpleNamespace(graph=None, sites={}), {"cat": ["899/0"]})
    monkeypatch.setattr(control, "_windows", lambda *_: iter([]))
    monkeypatch.setattr(control, "replaced", lambda *_: world.drawn(control.asked(change, 12)).pixels)
    row = control.measured(own, change)
    ways = row["ways"]
    few = {*control.ALONG, control.DEALT}
    assert {*ways} == {*control.WAYS} - few and (ways[control.PROMPT]["effect"], ways[control.PROMPT]["preservation"]) == (1, 1)
    assert all((ways[way]["effect"], ways[way]["preservation"]) == (0, 1) for way in ways if way != control.PROMPT)
    row["ways"] |= dict.fromkeys(few, ways[control.ONE])
    assert seen[2] == (own.levers, {"cat": sl.Set(1.5)}) and seen[3][0] not in (None, own.levers, own.bank)
    lines = control.table([row]).splitlines()
    assert "| the prompt rewritten | 1 of 1 | 1.00 | 1.00 |" in lines[2] and "| one latent | 0 of 1 | 0.00 |" in lines[11]
    assert control.each([row]).splitlines()[2].startswith("| set cat | 1.00, 1.00 | 0.00, 1.00 |")


@pytest.mark.parametrize("concept", ["cat", "hood", "whiskers"])
def test_pairs_of_a_lever_differ_in_its_parts_alone(concept):
    both = prompts.pairs(concept, 30)
    assert len(both) == 30 and all(positive != negative for positive, negative in both)
    hues = [[{*caption.split()} & {*world.SEEN_WITH} for caption in pair] for pair in both]
    assert all(own <= other or other <= own for own, other in hues)  # a hue is said where something has one
    own = world.parts_of(concept).items()
    names = {name for name in world.CONCEPTS if world.parts_of(name).items() & own}
    assert all(any(name in positive for name in names) for positive, _ in both)
    assert not any(f"a {concept} " in negative for _, negative in both)
