"""Banks of latents by noise level from a diffusers pipeline."""

import filecmp
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scenes import world

import steerlib as sl
from steerlib.errors import BadRecipe, SiteNotReached
from steerlib.evaluation.quality import used
from steerlib.training.entries import SiteEncoder
from steerlib.training.fit.encoder_recipe import EncoderRecipe
from steerlib.training.package import pictures
from steerlib.training.package.card import pictures_card
from steerlib.training.recipe import PipelineEncoderRecipe
from steerlib.training.record import noised

SITE = "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn2"
RECIPE = """
name = "toy"
base = "toy"
source = "{source}"
corpus = ["prompts.txt"]
tokens = 1600
epochs = 40

[[encoders]]
site = "{site}"
level = 899
kind = "topk"
latents = 32
k = 4
batch = 128
seeds = 2

[[encoders]]
site = "{site}"
level = 100
kind = "batchtopk"
latents = 32
k = 4
batch = 128
"""


@pytest.fixture
def recipe(tmp_path):
    said = world.captions(world.draw(25).factors)
    (tmp_path / "prompts.txt").write_text("\n\n".join(said))
    (tmp_path / "recipe.toml").write_text(RECIPE.format(source=tmp_path / "pipe", site=SITE))
    return PipelineEncoderRecipe.from_file(tmp_path / "recipe.toml")


def test_a_pipeline_gets_a_bank_of_latents_by_level(toy, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "STEPS", 4)
    bank = sl.train(toy, recipe, work=tmp_path / "work")
    assert set(bank.encoders) == {f"{SITE}@899", f"{SITE}@100"} and set(bank.levels) == {"899", "100"}
    found = bank.provenance["quality"][f"{SITE}@899"]
    assert found["explained"] > found["control"] and 0 < found["used"] <= 1 and found["stability"] > 0
    labels = {concept.label for concept in bank.concepts.values()}
    words = set(re.findall(r"\w+", " ".join((tmp_path / "prompts.txt").read_text().split())))
    assert labels <= words and len(labels) > 3
    opened = sl.ConceptBank.from_pretrained(bank.save_pretrained(tmp_path / "bank"))
    opened.verify()
    name = next(concept.name for concept in opened.concepts.values() if concept.encoder.endswith("@899"))

    def drawn(edits):
        with sl.steer(toy, opened, edits, allow_ood=True):
            return toy(
                "a red square", num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np"
            ).images

    assert not np.array_equal(drawn({name: sl.Set(20.0)}), drawn({}))
    # a second run draws nothing again
    monkeypatch.setattr(pictures, "at_levels", lambda *_: pytest.fail("drawn again"))
    again = sl.train(toy, recipe, work=tmp_path / "work")
    assert all(
        torch.equal(again.encoder(id).to_tensors()["encoder"], bank.encoder(id).to_tensors()["encoder"]) for id in bank.encoders
    )


def test_an_encoder_of_the_mean_of_a_picture_sees_it_as_often_as_it_says(toy, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "STEPS", 2)
    first, second = recipe.encoders
    mean = replace(first, site=f"{SITE}.mean", recipe=replace(first.recipe, batch=8), epochs=7)
    fit, seen = pictures.trained, []

    def trained(specs, source, folder, *, epochs):
        seen.append((specs[0].id, len(source), epochs))
        return fit(specs, source, folder, epochs=epochs)

    monkeypatch.setattr(pictures, "trained", trained)
    bank = sl.train(toy, replace(recipe, encoders=(mean, second), epochs=2), work=tmp_path / "work")
    tokens = {id: count for id, count, _ in seen}
    assert [(id, epochs) for id, _, epochs in seen] == [(f"{SITE}.mean@899", 7), (f"{SITE}@100", 2)]
    assert tokens[f"{SITE}.mean@899"] == pictures.held_from(25) and tokens[f"{SITE}@100"] > 10 * tokens[f"{SITE}.mean@899"]
    assert {*bank.sites} == {f"{SITE}.mean", SITE} and bank.provenance["quality"][f"{SITE}.mean@899"]["explained"] > 0
    first, *others = bank.concepts.values()
    with_new = bank.with_concepts([replace(first, effects={}), *others], card="")  # as those are that a graph adds
    assert f"| {first.name} |" not in pictures_card(with_new, recipe)
    for wrong, level in ((0, 899), (3, None)):
        with pytest.raises(BadRecipe, match=f"epochs of 1 or more, and a level, got {wrong} and {level}"):
            replace(mean, epochs=wrong, level=level).check()


def test_drawing_goes_on_and_keeps_of_a_level_what_its_encoders_need(toy, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "STEPS", 2)
    monkeypatch.setattr(pictures, "FACTS", 600)
    first, second = recipe.encoders
    recipe = replace(recipe, encoders=(first, replace(second, site="unet.mid_block.attentions.0")), epochs=1)
    paint, done = pictures.painted, []

    def painted(pipe, prompts, seeds):
        if done == [0, 8]:
            raise KeyboardInterrupt
        done.append(seeds.start)
        paint(pipe, prompts, seeds)

    monkeypatch.setattr(pictures, "painted", painted)
    with pytest.raises(KeyboardInterrupt):
        sl.train(toy, recipe, work=tmp_path / "work")
    done.append("stopped")
    bank = sl.train(toy, recipe, work=tmp_path / "work").save_pretrained(tmp_path / "bank")
    assert done == [0, 8, "stopped", 16, 24], "no batch is drawn twice"
    kept = [len(load_file(path)) for path in sorted((tmp_path / "work").glob("*/seen/*"))]
    assert kept == [4, 4, 2, 2], "from 600 tokens on, two of four: each site at the level of its encoder"
    every = [f"{site}@{level}" for site in recipe.encoder_sites for level in recipe.levels]
    monkeypatch.setattr(PipelineEncoderRecipe, "encoder_places", every)
    whole = sl.train(toy, recipe).save_pretrained(tmp_path / "whole")
    assert filecmp.cmpfiles(bank, whole, [path.relative_to(bank) for path in bank.rglob("*") if path.is_file()], False)[1:] == (
        [],
        [],
    )


def test_a_pipeline_is_loaded_from_the_recipe(toy, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "STEPS", 2)
    toy.save_pretrained(tmp_path / "pipe")
    assert set(sl.train(None, recipe).levels) == {"899", "100"}


def test_levels_are_for_all_encoders_or_for_none():
    own = EncoderRecipe(latents=8, k=2)
    with pytest.raises(BadRecipe, match="timestep from 0"):
        SiteEncoder(site="a", level=-1, recipe=own).check()
    mixed = (SiteEncoder(site="a", level=1, recipe=own), SiteEncoder(site="b", recipe=own))
    with pytest.raises(BadRecipe, match="for every encoder"):
        PipelineEncoderRecipe(name="x", base="x", source="x", encoders=mixed, corpus=("a.txt",)).check(to_train=False)


def test_passes_nearest_a_level_are_kept_of_the_conditional_half(toy):
    own = []

    def run():
        with sl.record(toy, [SITE]) as tape:
            toy("a red square", num_inference_steps=10, generator=torch.Generator().manual_seed(0), output_type="latent")
        own.append(tape[SITE])

    seen = noised.at_levels(toy, [SITE], (899, 500), run)
    for level in (899, 500):
        state, x = min(own[0], key=lambda entry: abs(float(entry[0].progress) - (1 - level / 1000)))
        assert state.branches == ("uncond", "cond") and torch.equal(seen[f"{SITE}@{level}"], x[1:])
    with pytest.raises(SiteNotReached, match="did not reach"):
        noised.at_levels(toy, [SITE], (899,), lambda: None)


def test_labels_are_what_readings_go_with_most():
    named = {"a": torch.arange(40) % 2 == 0, "b": torch.arange(40) % 4 < 2}
    z = torch.stack([named["b"].float(), 0.5 * named["a"].float(), torch.zeros(40)], 1)
    labels, likeness = pictures.best(z, named)
    assert labels[:2] == ["b", "a"] and likeness[:2].tolist() == pytest.approx([1, 1]) and likeness[2] == 0
    assert used(torch.ones(10, 5)) == pytest.approx(1) and used(torch.eye(5)[:1].repeat(9, 1)) == pytest.approx(0.2)
