"""Scenes and faces: regions, causes, counterfactuals, words."""

import hashlib

import numpy as np
import pytest
from scenes import faces, scenes

WORLDS = {"scenes": scenes, "faces": faces}


def bytes_of(pictures):
    return hashlib.sha256(pictures.pixels.tobytes() + pictures.regions.tobytes()).hexdigest()


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_the_same_seed_gives_the_same_bytes_and_another_others(world):
    assert bytes_of(world.draw(50, seed=3)) == bytes_of(world.draw(50, seed=3)) != bytes_of(world.draw(50, seed=4))
    assert world.captions(world.draw(50).factors, drop=0.3) == world.captions(world.draw(50).factors, drop=0.3)


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_regions_partition_every_picture_and_all_occur(world):
    pictures = world.draw(500)
    assert pictures.pixels.shape == (500, 32, 32, 3) and pictures.regions.shape == (500, 32, 32)
    assert set(np.unique(pictures.regions)) == set(range(len(world.REGIONS)))


def test_every_rule_of_the_hierarchy_holds():
    factors = scenes.solve(scenes.noise(10_000, seed=1), {})
    kinds = np.array(scenes.SCENES)[factors["scene"]]
    for name, values in scenes.VALUES.items():
        if (table := scenes.BY_SCENE.get(name.partition(".")[0])) is not None:
            for scene in scenes.SCENES:
                found = {values[i] for i in np.unique(factors[name][kinds == scene])}
                assert found == set(table[scene]), (name, scene)  # nothing else, and all of it
    assert (factors["cell.0"] != factors["cell.1"]).all()
    for free in ("count", "hue.0", "size.1", "texture.0", "cell.1"):
        assert set(factors[free]) == set(range(len(scenes.VALUES[free])))


@pytest.mark.parametrize(("world", "name", "value"), [
    (world, name, value)
    for world in WORLDS.values() for name, values in world.VALUES.items() for value in values
])  # fmt: skip
def test_setting_a_factor_moves_its_descendants_alone_and_shows_where_they_show(world, name, value):
    before = world.draw(300, seed=2)
    after = world.redraw(before, {name: value})
    follow = causes_of_a_whole(name) if world is faces else scenes.descendants(name)
    moved = {other for other in world.VALUES if (before.factors[other] != after.factors[other]).any()}
    assert moved <= {name} | follow
    shown = np.zeros((300, 32, 32), bool)
    for other in moved:
        changed = (before.factors[other] != after.factors[other])[:, None, None]
        painted = [world.REGIONS.index(region) for region in world.PAINTS[other]]
        shown |= changed & (np.isin(before.regions, painted) | np.isin(after.regions, painted))
    differs = (before.pixels != after.pixels).any(-1) | (before.regions != after.regions)
    assert not (differs & ~shown).any()


def causes_of_a_whole(name):
    """A whole can only be set through its parts, and a part can make or break it."""
    return set(faces.PARENTS["face"]) if name == "face" else {"face"} if name in faces.PARENTS["face"] else set()


def test_setting_a_factor_to_what_it_is_changes_nothing():
    before = scenes.draw(200)
    for name in ("scene", "side", "hue.0"):
        for i, value in enumerate(scenes.VALUES[name]):
            after, own = scenes.redraw(before, {name: value}), before.factors[name] == i
            assert own.any() and (after.pixels[own] == before.pixels[own]).all()


def test_shadows_follow_the_light():
    one = scenes.redraw(scenes.draw(300), {"count": "one", "cell.0": "back middle"})
    noise, x = one.noise, np.arange(32) + 0.5 - 16

    def shadow(**do):
        pictures = scenes.from_noise(noise, {"count": "one", "cell.0": "back middle", **do})
        mask = pictures.regions == scenes.REGIONS.index("shadow.0")
        return (mask * x).sum((1, 2)) / mask.sum((1, 2)), mask.any(-1).sum(-1)

    (left, short), (above, _), (right, _) = (shadow(side=side, height="high") for side in scenes.VALUES["side"])
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
    drawn = scenes.draw(500, seed=5)
    for i, caption in enumerate(scenes.captions(drawn.factors, seed=5)):
        at = {name: values[drawn.factors[name][i]] for name, values in scenes.VALUES.items()}
        there = [name for name in at if not name.endswith(".1") or at["count"] == "two"]
        for name in there:
            if (said := scenes.WORDS.get(name.partition(".")[0])) is not None:
                assert any(phrase in caption for phrase in said[at[name]]), (name, caption)
        assert caption.count(" and ") == (at["count"] == "two")


def test_captions_leave_things_unsaid_but_never_the_shape_or_the_scene():
    drawn = scenes.draw(300)
    shapes = {word for words in scenes.WORDS["shape"].values() for word in words}
    said = scenes.captions(drawn.factors, drop=1.0)
    counted = [sum(word in shapes for word in caption.split()) for caption in said]
    assert counted == (1 + drawn.factors["count"]).tolist()
    assert not any(hue in caption.split() for caption in said for hue in scenes.HUES)
    assert len({len(caption.split()) for caption in scenes.captions(drawn.factors, drop=0.5)}) > 5


def test_the_vocabulary_is_that_of_the_captions():
    for world in WORLDS.values():
        words = {word for caption in world.captions(world.draw(3000).factors, drop=0.3) for word in caption.split()}
        assert words == set(world.vocabulary())


def test_no_two_scenes_that_differ_in_what_is_shown_look_alike():
    drawn = scenes.draw(5000, seed=9)
    shown = [name for name in scenes.VALUES if name not in ("scene", "height", "count") and "." not in name]
    seen = {}
    for i in range(5000):
        objects = {
            tuple(int(drawn.factors[f"{n}.{k}"][i]) for n in scenes.OBJECT) for k in range(drawn.factors["count"][i] + 1)
        }
        what = (*(int(drawn.factors[name][i]) for name in shown), frozenset(objects))
        assert seen.setdefault(drawn.pixels[i].tobytes(), what) == what
