"""Scenes and faces: regions, causes, counterfactuals, words."""

import hashlib

import numpy as np
import pytest
from scenes import faces, prompts, world
from scenes.measures import Cause

MAKERS = {"scenes": world, "faces": faces}


def bytes_of(pictures):
    return hashlib.sha256(pictures.pixels.tobytes() + pictures.regions.tobytes()).hexdigest()


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_the_same_seed_gives_the_same_bytes_and_another_others(maker):
    assert bytes_of(maker.draw(50, seed=3)) == bytes_of(maker.draw(50, seed=3)) != bytes_of(maker.draw(50, seed=4))
    assert maker.captions(maker.draw(50).factors, drop=0.3) == maker.captions(maker.draw(50).factors, drop=0.3)


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_regions_partition_every_picture_and_all_occur(maker):
    pictures = maker.draw(500)
    assert pictures.pixels.shape == (500, 32, 32, 3) and pictures.regions.shape == (500, 32, 32)
    assert set(np.unique(pictures.regions)) == set(range(len(maker.REGIONS)))


def test_every_rule_of_the_hierarchy_holds():
    factors = world.solve(world.noise(10_000, seed=1), {})
    kinds = np.array(world.SCENES)[factors["scene"]]
    for name, values in world.VALUES.items():
        if (table := world.BY_SCENE.get(name.partition(".")[0])) is not None:
            for scene in world.SCENES:
                found = {values[i] for i in np.unique(factors[name][kinds == scene])}
                assert found == set(table[scene]), (name, scene)  # nothing else, and all of it
    assert (factors["cell.0"] != factors["cell.1"]).all()
    for free in ("count", "hue.0", "size.1", "texture.0", "cell.1"):
        assert set(factors[free]) == set(range(len(world.VALUES[free])))


@pytest.mark.parametrize(("maker", "name", "value"), [
    (maker, name, value)
    for maker in MAKERS.values() for name, values in maker.VALUES.items() for value in values
])  # fmt: skip
def test_setting_a_factor_moves_its_descendants_alone_and_shows_where_they_show(maker, name, value):
    before = maker.draw(300, seed=2)
    after = maker.redraw(before, {name: value})
    follow = causes_of_a_whole(name) if maker is faces else world.descendants(name)
    moved = {other for other in maker.VALUES if (before.factors[other] != after.factors[other]).any()}
    assert moved <= {name} | follow
    shown = np.zeros((300, 32, 32), bool)
    for other in moved:
        changed = (before.factors[other] != after.factors[other])[:, None, None]
        painted = [maker.REGIONS.index(region) for region in maker.PAINTS[other]]
        shown |= changed & (np.isin(before.regions, painted) | np.isin(after.regions, painted))
    differs = (before.pixels != after.pixels).any(-1) | (before.regions != after.regions)
    assert not (differs & ~shown).any()


def causes_of_a_whole(name):
    """A whole can only be set through its parts, and a part can make or break it."""
    return set(faces.PARENTS["face"]) if name == "face" else {"face"} if name in faces.PARENTS["face"] else set()


def test_setting_a_factor_to_what_it_is_changes_nothing():
    before = world.draw(200)
    for name in ("scene", "side", "hue.0"):
        for i, value in enumerate(world.VALUES[name]):
            after, own = world.redraw(before, {name: value}), before.factors[name] == i
            assert own.any() and (after.pixels[own] == before.pixels[own]).all()


def test_shadows_follow_the_light():
    one = world.redraw(world.draw(300), {"count": "one", "cell.0": "back middle"})
    noise, x = one.noise, np.arange(32) + 0.5 - 16

    def shadow(**do):
        pictures = world.from_noise(noise, {"count": "one", "cell.0": "back middle", **do})
        mask = pictures.regions == world.REGIONS.index("shadow.0")
        return (mask * x).sum((1, 2)) / mask.sum((1, 2)), mask.any(-1).sum(-1)

    (left, short), (above, _), (right, _) = (shadow(side=side, height="high") for side in world.VALUES["side"])
    assert (left > 0).all() and np.allclose(above, 0) and np.allclose(left, -right)
    further, long = shadow(side="left", height="low")
    assert (further > left).all() and (long > short).all()


def test_a_face_is_there_just_when_all_parts_are():
    drawn = faces.draw(2000)
    parts = np.stack([drawn.factors[name] > 0 for name in faces.PARENTS["face"]])
    assert ((drawn.factors["face"] == 1) == parts.all(0)).all() and 0.3 < drawn.factors["face"].mean() < 0.6
    assert (faces.redraw(drawn, {"face": "yes"}).factors["face"] == 1).all()
    without = faces.redraw(drawn, {"face": "no"}).factors
    assert not without["face"].any()
    lost = np.sum([without[name] != drawn.factors[name] for name in faces.PARENTS["face"]], 0)
    assert (lost == drawn.factors["face"]).all()  # one part of each face, and nothing else
    for name in faces.PARENTS["face"]:
        alone = faces.redraw(drawn, {"outline": "none", "eyes": "none", "mouth": "none"} | {name: faces.VALUES[name][1]})
        assert (np.isin(alone.regions, [0, faces.REGIONS.index(name)])).all()


def test_captions_name_the_factors():
    drawn = world.draw(500, seed=5)
    for i, caption in enumerate(world.captions(drawn.factors, seed=5)):
        at = {name: values[drawn.factors[name][i]] for name, values in world.VALUES.items()}
        there = [name for name in at if not name.endswith(".1") or at["count"] == "two"]
        for name in there:
            if (said := world.WORDS.get(name.partition(".")[0])) is not None:
                assert any(phrase in caption for phrase in said[at[name]]), (name, caption)
        assert caption.count(" and ") == (at["count"] == "two")


def test_captions_leave_things_unsaid_but_never_the_shape_or_the_scene():
    drawn = world.draw(300)
    shapes = {word for words in world.WORDS["shape"].values() for word in words}
    said = world.captions(drawn.factors, drop=1.0)
    counted = [sum(word in shapes for word in caption.split()) for caption in said]
    assert counted == (1 + drawn.factors["count"]).tolist()
    assert not any(hue in caption.split() for caption in said for hue in world.HUES)
    assert len({len(caption.split()) for caption in world.captions(drawn.factors, drop=0.5)}) > 5


def test_the_vocabulary_is_that_of_the_captions():
    for maker in MAKERS.values():
        words = {word for caption in maker.captions(maker.draw(3000).factors, drop=0.3) for word in caption.split()}
        assert words == set(maker.vocabulary())


def test_no_two_scenes_that_differ_in_what_is_shown_look_alike():
    drawn = world.draw(5000, seed=9)
    shown = [name for name in world.VALUES if name not in ("scene", "height", "count") and "." not in name]
    seen = {}
    for i in range(5000):
        objects = {tuple(int(drawn.factors[f"{n}.{k}"][i]) for n in world.OBJECT) for k in range(drawn.factors["count"][i] + 1)}
        what = (*(int(drawn.factors[name][i]) for name in shown), frozenset(objects))
        assert seen.setdefault(drawn.pixels[i].tobytes(), what) == what


# -- captions for concepts made from captions alone --------------------------------------------------------------


CAUSES = [Cause("scene", "night"), Cause("hue", "blue"), Cause("size", "large"), Cause("shape", "circle")]


@pytest.mark.parametrize("cause", CAUSES, ids=[cause.value for cause in CAUSES])
def test_pairs_of_captions_differ_in_the_value_and_say_nothing_of_what_follows(cause):
    said = {word for phrases in world.WORDS[cause.factor].values() for phrase in phrases for word in phrase.split()}
    for positive, negative in prompts.pairs(cause, 6):
        assert prompts.phrase(cause) in positive and prompts.phrase(cause) not in negative
        assert [w for w in positive.split() if w not in said] == [w for w in negative.split() if w not in said]
    assert (" on " in positive) == (" lit from " in positive) == (cause.factor != "scene")


def test_captions_in_other_words_say_the_same():
    captions = world.captions(world.draw(20, seed=3).factors, seed=3)
    first, last = (prompts.reworded(captions, which) for which in (0, -1))
    assert prompts.reworded(last, 0) == first != last
    assert prompts.unsaid(["a big blue ball on a lawn under a pale sky"], "ground") == ["a big blue ball under a pale sky"]
