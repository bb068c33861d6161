"""What a run of the protocol takes, before any weight is loaded; and one denoising step at full size with random weights."""

import resource
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from steerlib.devices import best_device
from steerlib.evaluation.denoising import DRAWS, STEPS
from steerlib.evaluation.report import markdown
from steerlib.hosts import outline
from steerlib.steering.recording import observing
from steerlib.training.discover.confirm import CONFIRMED
from steerlib.training.package.costs import measured_rate
from steerlib.training.package.pictures import STEPS as RECORDED
from steerlib.training.package.pictures import TOKENS, prompts_of
from steerlib.training.recipe import PipelineEncoderRecipe
from steerlib.training.store import recorded

from . import sd14
from .protocol import Protocol
from .stages import BATCH, METHODS


class Stage(NamedTuple):
    """What a stage takes, at most."""

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
        two, latents = _tried(pipe, protocol, done, 2)
    step = _tried(pipe, protocol, done, 3)[0] - two  # of one step some schedulers make no more than one
    whole = lambda steps: two + (steps - 2) * step  # noqa: E731
    prompts, own = prompts or len(prompts_of(recipe)), recipe.encoders
    tokens, sizes = prompts * TOKENS, [widths[one.site] * one.recipe.latents for one in own]
    fit = sum(12.0 * tokens * recipe.epochs * size * one.seeds for one, size in zip(own, sizes, strict=True))
    moved = 0 if recipe.graph is None else recipe.graph.contexts + (len(own) - 1) * recipe.graph.parents * 2 * CONFIRMED
    count, kinds = len(protocol.asked(1)), sum(map(len, protocol.domains.values()))
    each = len(METHODS) * len(protocol.strengths)
    edited = (1 + each * len(protocol.erase) + len(protocol.replace)) * count
    attacked = (1 + each) * sum(len(attack.texts) for attack in protocol.attacks)
    chosen = count + sum(len(attack.asked(0)) for attack in protocol.attacks)
    judged = (edited * kinds + attacked * 2) * STEPS * DRAWS * step / 2  # without guidance
    pixels = latents[0, 0].numel() * getattr(pipe, "vae_scale_factor", 1) ** 2
    kept = {
        "draw and record": 2.0 * tokens * sum(widths[one.site] for one in own),
        "fit encoders": 8.0 * sum(sizes),
        "choose latents": 4.0 * chosen * sum(one.recipe.latents for one in own),
        "erase and replace": (edited + attacked) * (4.0 * latents.numel() + 3.0 * pixels),
    }
    done_in = {
        "draw and record": (prompts, prompts * whole(RECORDED)),
        "fit encoders": (0, fit),
        "graph": (moved, moved * whole(RECORDED)),
        "choose latents": (chosen, chosen * whole(protocol.steps)),
        "erase and replace": (edited + attacked, (edited + attacked) * whole(protocol.steps)),
        "judge": (0, judged),
    }
    return [Stage(name, count, done, kept.get(name, 0.0)) for name, (count, done) in done_in.items()]


def _tried(pipe: Any, protocol: Protocol, done: Counter[str], steps: int) -> tuple[float, torch.Tensor]:
    """Operations of a picture of so many steps, without its decoding; and its latents."""
    before = done["flops"]
    how: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": protocol.guidance, "output_type": "latent"}
    latents = pipe([protocol.asked(0)[0].prompt], **how)[0]
    return done["flops"] - before, latents


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
    said = f"At {rate / 1e12:.3g} TFLOP/s, {said}. Networks rarely run as fast. Decoding of pictures is not counted."
    tokens, widest = found[0].kept / 1e9, found[0].kept / 1e9 / len(recipe.encoder_places) * 2
    said += f" Encoders are fitted with about {tokens + widest:.2g} GB of recorded tokens in memory."
    return f"{markdown('stage | pictures | PFLOP | GB kept | hours', rows)}\n\n{said}"


def _untrained() -> Any:
    """Without a text encoder: embeddings are given."""
    import diffusers

    d: Any = diffusers
    parts = dict[str, Any](dict.fromkeys(sd14.PARTS))
    for name in ("unet", "vae"):
        _, kind, config = sd14.PARTS[name]
        with torch.device("meta"):
            parts[name] = getattr(d, str(kind)).from_config(config)
        parts[name] = sd14.random_weights(parts[name].to(torch.bfloat16))
    parts["scheduler"] = d.PNDMScheduler.from_config(sd14.NOISE)
    pipe = d.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def step(recipe: PipelineEncoderRecipe, folder: Path, *, size: int = 512) -> dict[str, Any]:
    """Stable Diffusion 1.4 with random weights in bfloat16: one denoising step, its activations recorded; and again, from what
    was kept. What a GPU would need follows from the memory that it took."""
    import psutil

    began = time.perf_counter()
    pipe = _untrained()
    built, before = time.perf_counter(), psutil.Process().memory_info().rss / 1e9
    text = torch.randn(2, 77, 768, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)

    def run() -> Mapping[str, torch.Tensor]:
        kept: dict[str, torch.Tensor] = {}
        g, how = torch.Generator().manual_seed(0), {"num_inference_steps": 1, "output_type": "latent", "guidance_scale": 7.5}
        with observing(pipe, {site: lambda x, _, s=site: kept.update({s: x.half()}) for site in recipe.encoder_sites}):
            pipe(prompt_embeds=text[:1], negative_prompt_embeds=text[1:], height=size, width=size, generator=g, **how)
        return kept

    (folder / "step.safetensors").unlink(missing_ok=True)
    worked = time.process_time()
    seen = recorded(folder / "step.safetensors", run)
    drew, worked = time.perf_counter(), time.process_time() - worked
    again = recorded(folder / "step.safetensors", run)
    went = time.perf_counter()
    weights = sum(own.numel() for part in (pipe.unet, pipe.vae) for own in part.parameters())
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {
        "weights": weights,
        "GB of weights": round(2 * weights / 1e9, 2),
        "seconds to build": round(built - began, 1),
        "seconds of the step, a picture with guidance": round(drew - built, 1),
        "of these, at work": round(worked, 1),
        "seconds to go on from what was kept": round(went - drew, 3),
        "GB at most": round(most, 2),
        "GB at most, without what there was before the step": round(most - before, 2),
        "activations": {site: list(x.shape) for site, x in again.items()},
        "finite, and the same when going on": all(
            bool(x.isfinite().all()) and x.equal(again[site]) for site, x in seen.items()
        ),
        f"GB of a GPU for {BATCH} pictures at once": round(2 * weights / 1e9 + BATCH * (most - before), 1),
    }
