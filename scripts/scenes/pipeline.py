"""A small Stable Diffusion for pictures of 32 × 32 pixels, of diffusers' and transformers' own classes, yet to be trained.

The autoencoder gives back what it is given: its denoiser works on pixels. The tokenizer knows the words of the captions.
"""

from collections.abc import Iterable
from typing import Any

import diffusers
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from scenes import faces, world

d: Any = diffusers
LONGEST = 40
"""Tokens of a prompt."""
SPREAD = 0.5
"""Standard deviation of pixels between -1 and 1, which a denoiser wants to be 1."""
SIZES: dict[str, dict[str, Any]] = {
    "small": {"channels": (24, 64, 96), "text": 96},
    "large": {"channels": (64, 128, 192), "text": 128},
    "toy": {"channels": (8, 16, 16), "text": 16},
}


def vocabulary() -> list[str]:
    """Every word of captions of scenes and faces."""
    return [*world.vocabulary(), *faces.vocabulary()]


def pipeline(size: str = "small", *, seed: int = 0, known: Iterable[str] | None = None) -> Any:
    """A `StableDiffusionPipeline` with random weights in its denoiser and its text encoder; `known` are the words that its
    tokenizer has, by default those of scenes."""
    options = SIZES[size]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        words = tokenizer(known)
        parts = {"unet": unet(**options), "text_encoder": text_encoder(words, options["text"]), "tokenizer": words}
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return d.StableDiffusionPipeline(vae=autoencoder(), scheduler=scheduler(), **parts, **none)


def unet(channels: tuple[int, ...], text: int) -> Any:
    """Attention to words at 8 × 8 and, on the way up, at 16 × 16 pixels."""
    down = ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D")
    up = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    return d.UNet2DConditionModel(
        sample_size=world.SIDE,
        in_channels=3,
        out_channels=3,
        down_block_types=down,
        up_block_types=up,
        block_out_channels=channels,
        layers_per_block=1,
        cross_attention_dim=text,
        attention_head_dim=4,  # the number of heads, whatever it is called
        norm_num_groups=8,
    )


def text_encoder(words: CLIPTokenizer, width: int) -> CLIPTextModel:
    """Two layers that read from left to right."""
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": LONGEST, "vocab_size": len(words)}
    special: dict[str, Any] = {name: getattr(words, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return CLIPTextModel(CLIPTextConfig(**sizes, **special))


def tokenizer(known: Iterable[str] | None = None) -> CLIPTokenizer:
    """Every known word is one token, other words are spelt.

    Words are put together from their ends, so that no merge of one word can get in the way of another's.
    """
    letters = "abcdefghijklmnopqrstuvwxyz"
    own = sorted({*(known or vocabulary())})
    merges = list(dict.fromkeys((w[i], f"{w[i + 1 :]}</w>") for w in own for i in range(len(w) - 2, -1, -1)))
    tokens = [*letters, *(f"{c}</w>" for c in letters), ",</w>", ".</w>", *(a + b for a, b in merges)]
    vocab = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LONGEST)  # type: ignore[arg-type]


def scheduler() -> Any:
    """Velocity, on a cosine schedule that ends in nothing but noise."""
    noise = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    return d.DDIMScheduler(**noise, clip_sample=False, steps_offset=1)  # the last two as Stable Diffusion insists


# -- an autoencoder that changes nothing -----------------------------------------------------------------------

FAINT = 3e-3
"""Of pixels beside the constants that normalisation is left to work on."""


@torch.no_grad()
def autoencoder() -> Any:
    """An `AutoencoderKL` set by hand, of which both halves are the identity to four digits.

    Its residual blocks add nothing. What is left is normalisation and SiLU before the last convolution: pixels go through as
    `x` and `-x`, faint beside two constants, so that mean and scale hardly depend on them, and `silu(x) - silu(-x) = x`.
    """
    stage = {"block_out_channels": (8,), "norm_num_groups": 1, "layers_per_block": 1, "mid_block_add_attention": False}
    none = {"use_quant_conv": False, "use_post_quant_conv": False}
    whole = d.AutoencoderKL(latent_channels=3, scaling_factor=1 / SPREAD, **none, **stage)
    for part in (whole.encoder, whole.decoder):
        for name, weight in part.named_parameters():
            weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        _enter(part.conv_in)
        part.conv_norm_out.weight.fill_((2 / 8) ** 0.5 / FAINT)
        _leave(part.conv_out)
    whole.encoder.conv_out.bias[3:] = -30.0  # the logarithm of a variance of nothing
    return whole.requires_grad_(False).eval()


def _enter(conv: nn.Conv2d) -> None:
    for k in range(3):
        conv.weight[k, k, 1, 1], conv.weight[3 + k, k, 1, 1] = FAINT, -FAINT
    assert conv.bias is not None
    conv.bias[6], conv.bias[7] = 1.0, -1.0


def _leave(conv: nn.Conv2d) -> None:
    for k in range(3):
        conv.weight[k, k, 1, 1], conv.weight[k, 3 + k, 1, 1] = 1.0, -1.0
