"""Steering a denoiser: a U-Net with cross-attention and a transformer of image patches, of 5 to 15 million parameters.

Eight steps with guidance. Weights are random: what is measured is cost.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import diffusers
import torch

import steerlib as sl
from steerlib.bank import SiteFacts
from steerlib.encoders import Context, JumpReLU
from steerlib.training.fit.contexts import ContextFit, ContextLayer

from .measurement import Condition, Measurement, Way, over, within

d: Any = diffusers  # whose annotations do not know that parts of a pipeline can be absent
UNET = {"block_out_channels": (64, 128, 192), "layers_per_block": 1, "cross_attention_dim": 128, "attention_head_dim": 32}
UNET_SITES = ("unet.down_blocks.1.attentions.0", "unet.mid_block.attentions.0", "unet.up_blocks.1.attentions.0")
DIT = {"num_layers": 8, "num_attention_heads": 8, "attention_head_dim": 32, "cross_attention_dim": 256, "caption_channels": 128}
DIT_SITES = ("transformer.transformer_blocks.2", "transformer.transformer_blocks.4", "transformer.transformer_blocks.6")
LATENTS = 4096


def unet() -> Any:
    """A small Stable Diffusion of the first generation."""
    parts: dict[str, Any] = {"text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    down, up = ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2), (*["CrossAttnUpBlock2D"] * 2, "UpBlock2D")
    denoiser = d.UNet2DConditionModel(sample_size=32, down_block_types=down, up_block_types=up, **UNET)
    scheduler = d.DDIMScheduler(steps_offset=1, clip_sample=False)
    return d.StableDiffusionPipeline(
        vae=autoencoder(), unet=denoiser, scheduler=scheduler, requires_safety_checker=False, **parts
    )


def transformer() -> Any:
    """A small PixArt."""
    denoiser = d.PixArtTransformer2DModel(sample_size=32, use_additional_conditions=False, **DIT)
    scheduler = d.DDIMScheduler(steps_offset=1, clip_sample=False)
    return d.PixArtSigmaPipeline(None, None, autoencoder(), denoiser, scheduler)


def autoencoder() -> Any:
    """Asked for nothing: latents are not decoded."""
    stages = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return d.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, **stages)


def given(pipe: Any, batch: int) -> dict[str, Any]:
    """What a pipeline is called with: 32 × 32 latents, precomputed prompts."""
    drawn = [torch.randn(batch, 8, 128, generator=torch.Generator().manual_seed(k)) for k in (0, 1)]
    common = {"prompt_embeds": drawn[0], "negative_prompt_embeds": drawn[1], "num_inference_steps": 8, "guidance_scale": 4.0}
    common |= {"height": 64, "width": 64, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    if hasattr(pipe, "unet"):
        return common
    masks = {
        name: torch.ones(batch, 8, device=pipe.device) for name in ("prompt_attention_mask", "negative_prompt_attention_mask")
    }
    return common | masks | {"use_resolution_binning": False, "negative_prompt": None}


def banks(pipe: Any, sites: tuple[str, ...]) -> tuple[sl.ConceptBank, sl.ConceptBank]:
    """Directions and sparse latents at every site."""
    with sl.record(pipe, list(sites)) as tape:
        pipe(**given(pipe, 1) | {"num_inference_steps": 1})
    widths = {site: tape[site][0][1].shape[-1] for site in sites}
    g, identity = torch.Generator().manual_seed(0), sl.BaseModel.of(pipe)
    facts = {site: SiteFacts(width=width) for site, width in widths.items()}
    drawn = {site: sl.Directions(torch.randn(1, width, generator=g) * 0.01) for site, width in widths.items()}
    names = [sl.Concept(name=f"c{k}", encoder=site, index=0) for k, site in enumerate(sites)]
    sparse = {site: _latents(width, g) for site, width in widths.items()}
    return (
        sl.ConceptBank("directions", names, drawn, base=identity, sites=facts),
        sl.ConceptBank("latents", [], sparse, base=identity, sites=facts),
    )


def _latents(width: int, g: torch.Generator) -> JumpReLU:
    encoder, decoder = (torch.randn(LATENTS, width, generator=g) / width**0.5 for _ in range(2))
    return JumpReLU(encoder=encoder, decoder=decoder, bias=torch.zeros(LATENTS), threshold=torch.full((LATENTS,), 0.5))


def switched(pipe: Any, site: str, width: int) -> sl.ConceptBank:
    """A context module of the size that recipes make, of four concepts."""
    names = ["a", "b", "c", "d"]
    tensors = ContextLayer(names, width, ContextFit(inner=16, outer=16, depth=2)).module.to_tensors()
    module = Context({name: tensor.detach() for name, tensor in tensors.items()})
    concepts = [sl.Concept(name=name, encoder=site, index=k) for k, name in enumerate(names)]
    return sl.ConceptBank(
        "switched", concepts, {site: module}, base=sl.BaseModel.of(pipe), sites={site: SiteFacts(width=width)}
    )


def conditions(pipe: Any, sites: tuple[str, ...]) -> dict[str, Condition]:
    """What is compared, by name."""
    directions, latents = banks(pipe, sites)
    steer = partial(sl.steer, pipe)
    chosen: dict[str, Condition] = {"plain": nullcontext, "plain again": nullcontext}
    chosen["a direction"] = partial(steer, directions, {"c0": 1.0})
    chosen["a direction at three sites"] = partial(steer, directions, dict.fromkeys(("c0", "c1", "c2"), 1.0))
    edit = sl.Set(0.01, unit="raw")
    chosen["a sparse latent at three sites"] = partial(steer, latents, {f"{site}/17": edit for site in sites})
    chosen["in a window, one half of guidance"] = partial(
        steer, directions, {"c0": sl.Add(1.0, when=sl.Window(0.2, 0.8), branch="cond")}
    )
    means = tuple(f"{site}.mean" for site in sites)
    chosen["a sparse latent of the mean of tokens, at three sites"] = partial(
        steer, banks(pipe, means)[1], {f"{site}/17": edit for site in means}
    )
    contexts = switched(pipe, sites[1], directions.sites[sites[1]].width)
    chosen["two concepts of a context module"] = partial(steer, contexts, {"a": sl.Do(), "b": sl.Do()})
    return chosen


PIPELINES = {"U-Net of 10.9 M parameters": (unet, UNET_SITES), "transformer of 9.1 M parameters": (transformer, DIT_SITES)}


def drawing(name: str, batch: int, only: Sequence[str], clock: Callable[[], float]) -> dict[str, Way]:
    """A batch of images by one pipeline."""
    make, sites = PIPELINES[name]
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    chosen = conditions(pipe, sites)
    if unknown := {*only} - {*chosen}:
        raise ValueError(f"expected conditions among {', '.join(chosen)}, got {', '.join(unknown)}")
    kept = [what for what in chosen if not only or what in only or what.startswith("plain")]
    return {what: within(chosen[what], lambda: pipe(**given(pipe, batch)), clock) for what in kept}


def measurements(
    batch: int = 1, only: Sequence[str] = (), clock: Callable[[], float] = time.perf_counter
) -> dict[str, Measurement]:
    """What is measured in turns."""
    contests = {name: partial(drawing, name, batch, only, clock) for name in PIPELINES}
    said = ", in processor time" if clock is time.process_time else ""
    title = f"an image, steered / unsteered{said}: median (least–most)"
    return {"drawing": Measurement(title, contests, over("plain"))}
