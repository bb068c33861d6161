"""The pipeline for scenes is made of diffusers' own parts, and its training goes on after a crash as if there had been none."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from figures.subject import figures
from safetensors.torch import load_file
from scenes import faces, judges, painting, wording, world
from scenes.painting import PaintingRecipe
from scenes.pipeline import autoencoder, pipeline, tokenizer
from scenes.subject import ASKED, batch_of, scenes

from steerlib.evaluation.pictures import draw_as_told

RECIPE = PaintingRecipe(images=48, batch=8, words=3, warmup=2)
SUBJECT = scenes(judges.PictureJudge("scenes").eval())
"""With an untrained judge, which tells nothing."""
SINCE = ("images_per_second", "loss")
"""Figures that are means since the last look, or since a run began again."""


def test_the_autoencoder_gives_back_what_it_is_given():
    vae, x = autoencoder(), torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z = vae.encode(x).latent_dist
    for found in (z.mean, z.sample(torch.Generator().manual_seed(0)), vae.decode(z.mean).sample):
        torch.testing.assert_close(found, x, atol=2e-4, rtol=0)


def test_every_word_of_a_caption_is_a_token_and_others_are_spelt():
    words = tokenizer()
    for word in {*world.vocabulary(), *faces.vocabulary()}:
        assert words.tokenize(word) == [f"{word}</w>"]
    assert "".join(words.tokenize("zebra")) == "zebra</w>"
    longest = max(world.captions(world.draw(2000).factors), key=lambda caption: len(caption.split()))
    assert len(words(longest).input_ids) <= words.model_max_length


def test_a_saved_folder_is_an_ordinary_pipeline(tmp_path):
    pipe = pipeline("toy")
    pipe.save_pretrained(tmp_path)
    again: Any = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again) is StableDiffusionPipeline
    pictures = [draw_as_told(p, ["a red square at night"] * 2, steps=2) for p in (pipe, again)]
    assert pictures[0].shape == (2, 32, 32, 3) and (pictures[0] == pictures[1]).all()
    assert (pictures[0][0] != pictures[0][1]).any()
    drawn: Any = again("a red square at night", num_inference_steps=1)
    assert drawn.images[0].size == (32, 32)


def test_sizes_stay_small():
    counted = {
        part: sum(p.numel() for p in getattr(pipeline("small"), part).parameters()) for part in ("unet", "text_encoder", "vae")
    }
    assert sum(counted.values()) < 5e6


def test_batches_are_functions_of_their_seed_and_weigh_what_captions_speak_of():
    one, same, other = batch_of(RECIPE, 64, 1, 0), batch_of(RECIPE, 64, 1, 0), batch_of(RECIPE, 64, 2, 0)
    assert one.captions == same.captions != other.captions and (one.pixels == same.pixels).all()
    assert one.weight.mean() == pytest.approx(1, abs=1e-5) and len(np.unique(one.weight)) == 2
    assert one.weight.max() == pytest.approx(RECIPE.emphasis * one.weight.min())
    silent = [caption == "" for step in range(30) for caption in batch_of(RECIPE, 64, step, 0).captions]
    assert np.mean(silent) == pytest.approx(RECIPE.unconditional, abs=0.03)


def test_noise_levels_are_drawn_as_their_weight_says():
    scheduler = pipeline("toy").scheduler
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    torch.testing.assert_close(painting.levels(scheduler, 5.0), (snr + 1).clamp(max=5) / (snr + 1), rtol=1e-3, atol=1e-6)
    assert float(snr[-1]) < 1e-6


def test_the_words_are_learned():
    short, long = (wording.learn_words(pipeline("toy"), SUBJECT.course, steps=steps, batch=64) for steps in (1, 60))
    assert long["scenes.scene"] > short["scenes.scene"] + 0.1


def run(folder, stop_after=None, monkeypatch=None):
    """A short run; it may be cut off after some steps."""
    if stop_after is not None and monkeypatch is not None:
        learn = painting.Run.learn

        def cut_off(self):
            if self.step == stop_after:
                raise KeyboardInterrupt
            return learn(self)

        monkeypatch.setattr(painting.Run, "learn", cut_off)
    return painting.paint(
        pipeline("toy"), SUBJECT, RECIPE, folder, accelerator=Accelerator(cpu=True), look_every=24, look_at=4, save_every=2
    )


def test_a_run_that_was_cut_off_ends_with_the_same_bytes(tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    figures = run(whole)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        run(cut, 5, patch)
    assert len((cut / "curve.jsonl").read_text().splitlines()) == 1
    again = run(cut)
    kept = [load_file(folder / "state.safetensors") for folder in (whole, cut)]
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0] | kept[1])
    asked = [{name: value for name, value in found.items() if name not in SINCE} for found in (figures, again)]
    assert asked[0] == asked[1]
    lines = [json.loads(line) for line in (cut / "curve.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [24, 48]
    assert sorted(path.name for path in (cut / "samples").iterdir()) == ["000000024.png", "000000048.png"]
    assert type(DiffusionPipeline.from_pretrained(cut / "pipeline")) is StableDiffusionPipeline


def test_training_lowers_the_loss(tmp_path):
    pipe, recipe = pipeline("toy"), PaintingRecipe(images=64 * 60, batch=64, words=1, warmup=5, lr=5e-3)
    painting.begin(pipe, SUBJECT, recipe, tmp_path, Accelerator(cpu=True))
    going = painting.Run(pipe, SUBJECT, recipe, tmp_path, Accelerator(cpu=True))
    losses = [float(going.learn()) for _ in range(30)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3])
    own = going.weights["unet.conv_in.weight"].detach().clone()
    with going.averaged() as averaged:
        assert torch.equal(averaged.unet.conv_in.weight, going.mean["unet.conv_in.weight"])
        assert not torch.equal(averaged.unet.conv_in.weight, own)
    assert torch.equal(going.weights["unet.conv_in.weight"], own)


def test_a_run_stops_when_two_looks_in_a_row_are_good_enough():
    good = dict.fromkeys(ASKED, 0.97)
    bad = {**good, "size": 0.9}
    assert painting.good_enough([bad, good, good], ASKED, 0.96)
    assert not painting.good_enough([good, bad], ASKED, 0.96) and not painting.good_enough([good], ASKED, 0.96)


@pytest.mark.parametrize("subject", [SUBJECT, figures()], ids=["scenes", "figures"])
def test_pictures_of_a_pipeline_are_read(subject):
    seen = subject.look(pipeline("toy", known=subject.words), 6, (0, 1))
    assert seen.asked.shape == seen.drawn.shape == (6, 32, 32, 3)
    assert {*subject.asked} < {*seen.figures} and all(0 <= share <= 1 for share in seen.figures.values())
