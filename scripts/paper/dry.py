"""What a run of the protocol takes, before any weight is loaded; and one denoising step at full size with random weights."""

import resource
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from paper import sd14
from paper.protocol import Protocol, table
from steerlib.devices import best_device
from steerlib.evaluation.denoising import DRAWS, STEPS
from steerlib.hosts import outline
from steerlib.steering.recording import observing
from steerlib.training.package.costs import measured_rate
from steerlib.training.package.pictures import STEPS as RECORDED
from steerlib.training.package.pictures import TOKENS, prompts_of
from steerlib.training.recipe import PipelineEncoderRecipe
from steerlib.training.store import recorded


class Stage(NamedTuple):
    """What a stage takes."""

    name: str
    pictures: int
    flops: float
    kept: float
    """Bytes on disk."""


def stages(source: str, protocol: Protocol, recipe: PipelineEncoderRecipe, prompts: int = 0) -> list[Stage]:
    """Of a pipeline that a folder describes, run for its shapes alone; `prompts`: how many, if not the recipe's."""
    pipe, done = outline(source)
    widths: dict[str, int] = {}
    with observing(pipe, {site: lambda x, _, s=site: widths.update({s: x.shape[-1]}) for site in recipe.encoder_sites}):
        two = _flops(pipe, protocol, done, 2)
    step = _flops(pipe, protocol, done, 3) - two  # of one step some schedulers make no more than one
    whole = lambda steps: two + (steps - 2) * step  # noqa: E731
    prompts = prompts or len(prompts_of(recipe))
    count, kinds = len(protocol.asked(1)), sum(map(len, protocol.domains.values()))
    runs = 1 + 2 * len(protocol.erase) * len(protocol.strengths) + len(protocol.replace)
    tokens, latents = prompts * TOKENS, sum(own.recipe.latents for own in recipe.encoders)
    fit = sum(6 * tokens * recipe.epochs * widths[own.site] * own.recipe.latents * 2 * own.seeds for own in recipe.encoders)
    judged = runs * count * kinds * STEPS * DRAWS * step / 2  # without guidance
    return [
        Stage("draw and record", prompts, prompts * whole(RECORDED), 2.0 * tokens * len(recipe.levels) * sum(widths.values())),
        Stage("fit encoders", 0, fit, sum(8.0 * widths[own.site] * own.recipe.latents for own in recipe.encoders)),
        Stage("choose latents", count, count * whole(protocol.steps), 2.0 * count * latents),
        Stage("erase and replace", runs * count, runs * count * whole(protocol.steps), 0.0),
        Stage("judge", 0, judged, 0.0),
    ]


def _flops(pipe: Any, protocol: Protocol, done: Counter[str], steps: int) -> float:
    """Operations of a picture of so many steps, without its decoding."""
    before = done["flops"]
    how: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": protocol.guidance, "output_type": "latent"}
    pipe([protocol.asked(0)[0].prompt], **how)
    return done["flops"] - before


def dry(source: str, protocol: Protocol, recipe: PipelineEncoderRecipe, *, prompts: int = 0, tflops: float = 0.0) -> str:
    """The table of a dry run: hours at the rate of this device, measured, or at `tflops`."""
    rate = tflops * 1e12 or measured_rate(best_device())
    found = stages(source, protocol, recipe, prompts)
    pictures, total, kept = (sum(values) for values in zip(*(own[1:] for own in found), strict=True))
    rows = [
        (own.name, f"{own.pictures:,}", f"{own.flops / 1e15:.3g}", f"{own.kept / 1e9:.2g}", f"{own.flops / rate / 3600:.3g}")
        for own in (*found, Stage("all", int(pictures), total, kept))
    ]
    said = "as given" if tflops else f"of large products in float32 on {best_device()}, measured"
    text = f"At {rate / 1e12:.3g} TFLOP/s, {said}. Networks rarely run as fast as large products."
    return f"{table(rows, ('stage', 'pictures', 'PFLOP', 'GB kept', 'hours'))}\n\n{text}"


def step(protocol: Protocol, recipe: PipelineEncoderRecipe, folder: Path, *, size: int = 512) -> dict[str, Any]:
    """Stable Diffusion 1.4 with random weights: one denoising step, its activations recorded; and again, from what was kept."""
    import diffusers

    began = time.perf_counter()
    pipe = diffusers.StableDiffusionPipeline(**_parts(), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    built = time.perf_counter()
    g = torch.Generator().manual_seed(0)
    text = torch.randn(2, 77, 768, generator=g)

    def made() -> Mapping[str, torch.Tensor]:
        kept: dict[str, torch.Tensor] = {}
        with observing(pipe, {site: lambda x, _, s=site: kept.update({s: x.half()}) for site in recipe.encoder_sites}):
            how: dict[str, Any] = {"num_inference_steps": 1, "output_type": "latent", "height": size, "width": size}
            pipe(prompt_embeds=text[:1], negative_prompt_embeds=text[1:], guidance_scale=protocol.guidance, generator=g, **how)
        return kept

    seen = recorded(folder / "step.safetensors", made)
    drew = time.perf_counter()
    again = recorded(folder / "step.safetensors", made)
    return {
        "weights": sum(own.numel() for part in (pipe.unet, pipe.vae) for own in part.parameters()),
        "seconds to build": round(built - began, 1),
        "seconds of the step": round(drew - built, 1),
        "seconds to go on": round(time.perf_counter() - drew, 3),
        "most memory, GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "activations": {site: list(x.shape) for site, x in again.items()},
        "finite": all(bool(x.isfinite().all()) for x in seen.values()),
    }


def _parts() -> dict[str, Any]:
    """The components, without a text encoder: embeddings are given."""
    import diffusers

    made: dict[str, Any] = dict.fromkeys(sd14.PARTS)
    for name in ("unet", "vae"):
        _, kind, config = sd14.PARTS[name]
        with torch.device("meta"):
            made[name] = sd14.random_weights(getattr(diffusers, str(kind)).from_config(config))
    return made | {"scheduler": diffusers.PNDMScheduler.from_config(sd14.NOISE)}
