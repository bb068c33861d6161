"""The paper's protocol end to end on a toy pipeline, whose weights are random; its dry run beside what pipelines really do."""

from pathlib import Path

import pytest
import torch
from paper import dry, sd14
from paper.protocol import Protocol, figures_table
from paper.stages import Run
from scenes.pipeline import pipeline
from torch.utils.flop_counter import FlopCounterMode

from steerlib.errors import BadRecipe
from steerlib.training.package import pictures
from steerlib.training.recipe import PipelineEncoderRecipe

HERE = Path(__file__).parents[1] / "scripts" / "paper"
SITES = ("unet.mid_block.attentions.0.update", "unet.up_blocks.0.attentions.0.update")
RECIPE = 'name = "toy"\nbase = "toy"\nsource = "toy"\ncorpus = ["prompts.txt"]\ntokens = 768\nepochs = 4\n' + "".join(
    f'[[encoders]]\nsite = "{site}"\nlevel = {level}\nkind = "topk"\nlatents = 24\nk = 4\nbatch = 64\n'
    for site, level in zip(SITES, (899, 100), strict=True)
)
PLAN = """template = "a big plain {hue} {shape} at noon on grass"
steps = 2
guidance = 2.0
latents = 2
strengths = [0.0]
erase = ["red"]
replace = ["red -> blue"]
[domains]
hue = ["red", "blue"]
shape = ["box", "ball"]
"""


@pytest.fixture(scope="module")
def toy():
    torch.manual_seed(0)
    pipe = pipeline("toy")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "protocol.toml").write_text(PLAN)
    return Protocol.from_file(tmp_path / "protocol.toml")


@pytest.fixture
def recipe(tmp_path):
    lines = [
        f"a {size} plain {hue} {shape}"
        for size in ("big", "little", "tiny")
        for hue in ("red", "blue")
        for shape in ("box", "ball")
    ]
    (tmp_path / "prompts.txt").write_text("\n\n".join(lines))
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return PipelineEncoderRecipe.from_file(tmp_path / "recipe.toml")


def blue(part, texts):
    """A judge to whom all pictures are blue boxes."""
    return torch.tensor([("blue" in text) + ("box" in text) for text in texts]).float()


def test_the_protocol_runs_end_to_end_and_goes_on(toy, plan, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "STEPS", 2)
    run = Run(toy, plan, recipe, tmp_path / "out", blue)
    text = run.report()
    assert "| red | latents of all levels | 0.0 | 1.0 | 0.5 | 0.5 | 1.0 |" in text, "blue boxes alone: no red, half of the rest"
    assert "red -> blue" in text and "| UA, IRA, CRA |" in text and "None: the recipe asks for none." in text
    assert {"red", "blue", "box", "ball"} == {*run.latents} and all(len(own) <= 4 for own in run.latents.values())
    for name in ("_draw", "_judged"):
        monkeypatch.setattr(Run, name, None)  # nothing is done again
    assert Run(toy, plan, recipe, tmp_path / "out").report() == text


def test_pictures_change_where_a_concept_is_erased_and_not_without_edits(toy, plan, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "STEPS", 2)
    run = Run(toy, plan, recipe, tmp_path / "out", blue)
    plain, again = run.pictures("plain", run.bank, {}), run.pictures("again", run.bank, {})
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(plain, again, strict=True))
    (row,) = run.erased()
    assert row["change_e"] > 0 and row["concept"] == "red"
    told = Run(toy, plan, recipe, tmp_path / "out").told("by itself", plain)  # the pipeline judges its own pictures
    assert {*told["hue"]} <= {"red", "blue"} and len(told["shape"]) == 4


def test_a_dry_run_counts_what_the_pipeline_does(toy, plan, recipe, tmp_path):
    toy.save_pretrained(tmp_path / "pipe")
    found = {own.name: own for own in dry.stages(str(tmp_path / "pipe"), plan, recipe)}
    with FlopCounterMode(display=False) as counter:
        toy([plan.asked(0)[0].prompt], num_inference_steps=2, guidance_scale=2.0, output_type="latent")
    assert found["choose latents"].flops / 4 == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert found["draw and record"].pictures == 12 and found["erase and replace"].pictures == 4 * (1 + 2 + 1)


def test_the_recipe_is_the_papers_and_fits_stable_diffusion(tmp_path):
    recipe = PipelineEncoderRecipe.from_file(HERE / "recipe.toml", to_train=False)
    assert recipe.levels == [899, 500, 100] and {own.recipe.latents for own in recipe.encoders} == {5120}
    assert recipe.tokens == 10_000 * pictures.TOKENS
    found = dry.stages(sd14.described(tmp_path), Protocol.from_file(HERE / "protocol.toml"), recipe, 10_000)
    step = found[2].flops / found[2].pictures / 51  # guided; the scheduler asks once more than it has steps
    assert step == pytest.approx(2 * 0.68e12, rel=0.2), "published: 0.34 T multiplications of the denoiser"
    assert "nudenet" in figures_table()


def test_a_protocol_of_unknown_concepts_is_refused(tmp_path):
    (tmp_path / "protocol.toml").write_text(PLAN.replace("[0.0]", "[-1.0]"))
    with pytest.raises(BadRecipe, match="below 1"):
        Protocol.from_file(tmp_path / "protocol.toml")
    for wrong, said in (('["red"]', "green"), ("{shape}", "two domains")):
        text = PLAN.replace('erase = ["red"]', 'erase = ["green"]') if said == "green" else PLAN.replace(wrong, "thing")
        (tmp_path / "protocol.toml").write_text(text)
        with pytest.raises(BadRecipe, match=said):
            Protocol.from_file(tmp_path / "protocol.toml")
