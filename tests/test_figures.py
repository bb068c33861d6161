"""Figures: what is composed of what, pictures and words, how pictures are read, and measures whose values are known."""

import numpy as np
import pytest
from figures import reading, world

SEEN = world.draw(400, seed=3)


def with_(concepts, n=1, **factors):
    """Factors of figures with some concepts and nothing else."""
    plain = {name: np.zeros(n, np.int8) for name in world.VALUES} | {"x": np.full(n, 4, np.int8), "y": np.full(n, 4, np.int8)}
    plain |= {name: np.full(n, world.VALUES[name].index(value), np.int8) for name, value in factors.items()}
    return world.edited(plain, dict.fromkeys(concepts, True))


def test_every_part_is_of_two_halves_and_every_half_of_two_wholes():
    for level, of in ((world.PARTS, world.HALVES), (world.HALVES, world.WHOLES)):
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
    assert all(0.02 < share.mean() < 0.4 for share in there.values())


def test_what_occurs_together_is_not_what_is_composed():
    there = dict(zip(world.CONCEPTS, world.present(world.sample(20_000)).T, strict=True))
    given = {whole: np.mean(there["whiskers"][there[whole]]) for whole in ("mask", "hood", "muzzle")}
    assert given["muzzle"] == 1 and given["mask"] > 0.75 > 0.15 > given["hood"]
    for whole, made in world.PARENTS.items():
        for part in made:  # a part is often there without each thing that it makes up
            assert there[whole][there[part]].mean() < 0.6


def test_setting_and_taking_away_moves_just_the_parts_and_shows_where_they_are():
    for concept in world.PARENTS:
        for there in (True, False):
            after = world.redraw(SEEN, {concept: there})
            own = world.parts_of(concept)
            moved = {name for name in world.VALUES if (after.factors[name] != SEEN.factors[name]).any()}
            assert moved == {*own} and world.present(after.factors, (concept,)).all() == there
            shown = np.isin([SEEN.regions, after.regions], [world.REGIONS.index(slot) for slot in own]).any(0)
            assert not ((SEEN.pixels != after.pixels).any(-1) & ~shown).any()
    gone = world.edited(with_(["wolf"]), {"mask": False, "smile": True})  # a swap: what stays is set last
    assert world.present(gone, ("muzzle", "mask")).tolist() == [[True, False]]


def test_a_concept_is_where_its_parts_are():
    cat = world.drawn(with_(["cat"]))
    inside = [world.places(cat, name)[0] for name in ("cat", "mask", "muzzle", "whiskers", "wolf")]
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
    assert {"a red cat on grey", "a red mask and a muzzle on grey", "a red cat with whiskers on grey"} <= said
    assert any("cat" not in one and "slit eyes" in one for one in said)
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
