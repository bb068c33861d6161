"""Stable Diffusion 1.4 as its configurations describe it, for runs without its weights."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

CLIP = {"model_type": "clip_text_model", "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072}
CLIP |= {"num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 77, "projection_dim": 768}
DOWN = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
UP = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8, "layers_per_block": 2}
UNET |= {"block_out_channels": [320, 640, 1280, 1280], "down_block_types": DOWN, "up_block_types": UP}
VAE = {"sample_size": 512, "latent_channels": 4, "layers_per_block": 2, "block_out_channels": [128, 256, 512, 512]}
VAE |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
NOISE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NOISE |= {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False}
PARTS: dict[str, tuple[str | None, str | None, dict[str, Any] | None]] = {
    "text_encoder": ("transformers", "CLIPTextModel", CLIP),
    "tokenizer": ("transformers", "CLIPTokenizer", None),
    "unet": ("diffusers", "UNet2DConditionModel", UNET),
    "vae": ("diffusers", "AutoencoderKL", VAE),
    "scheduler": ("diffusers", "PNDMScheduler", NOISE),
    "safety_checker": (None, None, None),
    "feature_extractor": (None, None, None),
}


def described(folder: Path) -> str:
    """A folder with the configurations of its components, and nothing else."""
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.37.0"}
    for name, (library, kind, config) in PARTS.items():
        index[name] = [library, kind]
        if config is not None:
            (folder / name).mkdir(parents=True, exist_ok=True)
            file = "scheduler_config.json" if name == "scheduler" else "config.json"
            (folder / name / file).write_text(json.dumps({"_class_name": kind, **config}), encoding="utf-8")
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return str(folder)


@torch.no_grad()
def random_weights(made: nn.Module) -> nn.Module:
    """A network of the meta device with random weights, small ones, so that nothing overflows: a million numbers again and
    again, since a billion would take a minute to draw."""
    made = made.to_empty(device="cpu")
    pool = 0.02 * torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))  # a prime: no two rows are alike
    for name, own in made.named_parameters():
        if own.ndim < 2:
            own.fill_(float("norm" in name and name.endswith("weight")))
        else:
            own.copy_(pool.repeat(-(-own.numel() // len(pool)))[: own.numel()].view_as(own))
    return made.eval()
