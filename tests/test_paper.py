"""The paper's protocol end to end on a toy pipeline, whose weights are random; its dry run beside what pipelines really do."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from paper import dry, sd14
from paper.protocol import Protocol, figures_table
from paper.stages import METHODS, Run
from scenes.pipeline import pipeline
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from steerlib.errors import BadRecipe
from steerlib.evaluation.denoising import errors
from steerlib.graph.causal_graph import CausalGraph, Edge
from steerlib.training.package import pictures
from steerlib.training.recipe import PipelineEncoderRecipe

HERE = Path(__file__).parents[1] / "scripts" / "paper"
SITES = ("unet.mid_block.attentions.0.update", "unet.up_blocks.0.attentions.0.update")
RECIPE = 'name = "toy"\nbase = "toy"\nsource = "toy"\ncorpus = ["prompts.txt"]\ntokens = 512\nepochs = 4\n' + "".join(
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
[[attacks]]
name = "night"
shown = "a blue box at night"
lacking = "a box at noon"
positive = ["a little box at night"]
negative = ["a little box at noon"]
prompts = "attacks.jsonl"
"""


@pytest.fixture(scope="module")
def toy():
    pipe = pipeline("toy")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a protocol and a recipe."""
    folder = tmp_path_factory.mktemp("paper")
    lines = [
        f"a {size} plain {hue} {shape}" for size in ("big", "little") for hue in ("red", "blue") for shape in ("box", "ball")
    ]
    texts = {"protocol.toml": PLAN, "recipe.toml": RECIPE, "prompts.txt": "\n\n".join(lines)}
    for name, text in {**texts, "attacks.jsonl": '{"text": "a box under a navy sky"}\n'}.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def plan(place):
    return Protocol.from_file(place / "protocol.toml")


@pytest.fixture(scope="module")
def recipe(place):
    return PipelineEncoderRecipe.from_file(place / "recipe.toml")


@pytest.fixture(scope="module")
def run(toy, plan, recipe, place):
    """A whole run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "STEPS", 2)
        own = Run(toy, plan, recipe, place / "whole", blue)
        own.report()
    return own


def blue(part, texts):  # noqa: ARG001
    """A judge to whom all pictures are blue boxes."""
    return torch.tensor([("blue" in text) + ("box" in text) for text in texts]).float()


def test_a_run_that_is_stopped_goes_on_to_the_same_bytes(toy, plan, recipe, run, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "STEPS", 2)
    draw, count = Run._draw, iter(range(1000))

    def drawn(self, some):
        if next(count) in (0, 2, 5):
            raise KeyboardInterrupt
        return draw(self, some)

    monkeypatch.setattr(Run, "_draw", drawn)
    for _ in range(3):  # while latents of domains, then of attacks, are chosen, and while a concept is erased
        with pytest.raises(KeyboardInterrupt):
            Run(toy, plan, recipe, tmp_path / "out", blue).report()
    text = Run(toy, plan, recipe, tmp_path / "out", blue).report()
    for name in ("tables.md", "latents.json", "erased.json", "attacked.json", "replaced.json", "bank/bank.json"):
        assert (tmp_path / "out" / name).read_bytes() == (run.folder / name).read_bytes()
    monkeypatch.setattr(Run, "_draw", None)
    assert Run(toy, plan, recipe, tmp_path / "out", blue).report() == text, "nothing is done again"
    for other, judge in ((replace(plan, steps=3), blue), (plan, None)):
        with pytest.raises(BadRecipe, match="other settings"):
            Run(toy, other, recipe, tmp_path / "out", judge)
    with pytest.raises(BadRecipe, match="other settings"):
        Run(deepcopy(toy).to(torch.bfloat16), plan, recipe, tmp_path / "out", blue)


def test_tables_say_what_a_judge_says(toy, plan, recipe, run, tmp_path):
    every, (replaced,), attacked = run.erased(), run.replaced(), run.attacked()
    blue_boxes = {"UA": 1.0, "IRA": 1.0, "CRA": 0.5}  # no picture is red, all of blue are blue, half are boxes
    for row in (*every, replaced):
        assert {name: row[name] for name in blue_boxes} == {name: row[f"plain {name}"] for name in blue_boxes} == blue_boxes
    assert [row["method"] for row in every] == [METHODS[0], METHODS[1], METHODS[3]] and every[0]["change_e"] > 0
    assert replaced["shown"] == 1.0 and all(row["ASR"] == row["plain ASR"] == 1.0 and row["prompts"] == 1 for row in attacked)
    text = (run.folder / "tables.md").read_text()
    assert "| red -> blue |" in text and "| UA, IRA, CRA |" in text and "## Graph\n\nNothing asked." in text
    plain = run.pictures("plain", plan.asked(1), {})
    told = Run(toy, plan, recipe, tmp_path / "itself").preferred("plain", plain, [["a red box"] * 4, ["a blue ball"] * 4])
    by_error = torch.stack([errors(toy, plain[0].latents, [text] * 4) for text in ("a red box", "a blue ball")])
    assert told == by_error.argmin(0).tolist(), "without a judge, the pipeline's own"


def test_methods_are_told_apart_by_their_latents(run, monkeypatch):
    found, first = run.methods("red"), f"{SITES[0]}@899"
    every, whole, others = (found[name] for name in (METHODS[0], METHODS[1], METHODS[3]))
    assert METHODS[2] not in found, "there is no graph"
    assert whole == run.latents["red"][first] == [name for name in every if name.startswith(first)]
    assert len(others) == len(every) and not {*others} & {*every}
    part, other = [name for name in run.bank.concepts if name.startswith(SITES[1]) and name not in every][:2]
    monkeypatch.setattr(
        run.bank, "graph", CausalGraph([Edge(src=whole[0], dst=part, weight=0.5), Edge(src=whole[0], dst=other, weight=-0.5)])
    )
    assert {*run.methods("red")[METHODS[2]]} == {*whole, part}, "what it brings, and not what it takes away"


def test_latents_are_those_that_read_most_of_what_they_read_where_a_concept_is(run, monkeypatch):
    monkeypatch.setitem(run.__dict__, "_names", {f"site@1/{k}": f"latent {k}" for k in range(4)})
    z = torch.tensor([[1.0, 5, 0, 4], [1, 5, 2, 4], [3, 5, 0, 1], [3, 5, 0, 1]])  # means over rows: 1, 5, 1, 4 and 3, 5, 0, 1
    assert run._best({"site@1": z}, [True, True, False, False]) == {"site@1": ["latent 3", "latent 2"]}


def test_a_dry_run_counts_what_the_pipeline_does(toy, plan, recipe, tmp_path):
    toy.save_pretrained(tmp_path / "pipe")
    found = {own.name: own for own in dry.stages(str(tmp_path / "pipe"), plan, recipe)}
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # what is fused is not counted
        toy([plan.asked(0)[0].prompt], num_inference_steps=2, guidance_scale=2.0, output_type="latent")
    assert found["choose latents"].flops / 6 == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert found["draw and record"].pictures == 8 and found["graph"].pictures == 0
    assert found["erase and replace"].pictures == 4 * (1 + 4 + 1) + (1 + 4), "plain, four methods, a replacement; attacks"


def test_the_recipe_is_the_papers_and_fits_stable_diffusion(tmp_path):
    recipe = PipelineEncoderRecipe.from_file(HERE / "recipe.toml", to_train=False)
    assert recipe.levels == [899, 500, 100] and {own.recipe.latents for own in recipe.encoders} == {5120}
    assert recipe.tokens == 10_000 * pictures.TOKENS
    found = dry.stages(sd14.described(tmp_path), Protocol.from_file(HERE / "protocol.toml"), recipe, 10_000)
    chosen = next(own for own in found if own.name == "choose latents")
    step = chosen.flops / chosen.pictures / 51  # guided; the scheduler asks once more than it has steps
    assert step == pytest.approx(2 * 0.68e12, rel=0.2), "published: 0.34 T multiplications of the denoiser"
    assert "| NudeNet (" in figures_table()


def test_a_step_with_random_weights_is_one_step_of_the_same_network(tmp_path, monkeypatch):
    small = {"block_out_channels": [32, 32, 64, 64]}
    for name in ("unet", "vae"):
        library, kind, config = sd14.PARTS[name]
        monkeypatch.setitem(sd14.PARTS, name, (library, kind, {**(config or {}), **small}))
    recipe = PipelineEncoderRecipe.from_file(HERE / "recipe.toml", to_train=False)
    found = dry.step(recipe, tmp_path, size=64)
    shapes = {"unet.mid_block.attentions.0.update": [2, 1, 64]}  # of 8 x 8 latents, halved three times
    shapes |= {f"unet.up_blocks.1.attentions.{k}.update": [2, 4, 64] for k in (0, 1)}
    assert found["activations"] == shapes and found["finite, and the same when going on"]
    d: Any = diffusers
    unet, vae = (
        d.UNet2DConditionModel.from_config({**sd14.UNET, **small}),
        d.AutoencoderKL.from_config({**sd14.VAE, **small}),
    )
    assert found["weights"] == sum(p.numel() for part in (unet, vae) for p in part.parameters())
    assert (tmp_path / "step.safetensors").stat().st_size > 2 * sum(2 * n * d for _, n, d in shapes.values())


def test_a_protocol_of_unknown_concepts_is_refused(tmp_path):
    (tmp_path / "protocol.toml").write_text(PLAN.replace("[0.0]", "[-1.0]"))
    with pytest.raises(BadRecipe, match="below 1"):
        Protocol.from_file(tmp_path / "protocol.toml")
    for wrong, said in (('["red"]', "green"), ("{shape}", "two domains")):
        text = PLAN.replace('erase = ["red"]', 'erase = ["green"]') if said == "green" else PLAN.replace(wrong, "thing")
        (tmp_path / "protocol.toml").write_text(text)
        with pytest.raises(BadRecipe, match=said):
            Protocol.from_file(tmp_path / "protocol.toml")
