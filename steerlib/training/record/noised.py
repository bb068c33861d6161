"""Activations of a denoiser at noise levels: of pictures that it draws, or of given ones with noise added.

A level is named by its timestep; `site@level` names activations as it does encoders. `B` pictures, `N` tokens of a site.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from ...errors import SiteNotReached
from ...passes import StepState
from ...schedules import Window, windows
from ...steering.recording import observing

Seen = dict[str, Float[Tensor, "B N D"]]
"""By `site@level`."""


def spans(pipe: Any, levels: Sequence[int]) -> dict[str, Window]:
    """The window of progress of each level, by name: from half-way to the one before to half-way to the next."""
    ordered = sorted(levels, reverse=True)
    return dict(zip(map(str, ordered), windows([_progress(pipe, level) for level in ordered]), strict=True))


def _progress(pipe: Any, level: float) -> float:
    return 1 - level / pipe.scheduler.config.num_train_timesteps


@torch.no_grad()
def at_levels(pipe: Any, sites: Sequence[str], levels: Sequence[int], run: Callable[[], Any]) -> Seen:
    """What a run shows at sites in the passes nearest to each level, on the conditional half where there is guidance."""
    nearest: dict[str, tuple[float, Tensor]] = {}

    def keeper(site: str) -> Callable[[Tensor, StepState], None]:
        def observe(x: Tensor, state: StepState) -> None:
            if (own := conditional(x, state)) is None or state.progress is None:
                return
            for level in levels:
                off, key = abs(float(state.progress) - _progress(pipe, level)), f"{site}@{level}"
                if key not in nearest or off < nearest[key][0]:
                    nearest[key] = off, own.detach().clone()

        return observe

    with observing(pipe, {site: keeper(site) for site in sites}):
        run()
    if missed := [site for site in sites if f"{site}@{levels[0]}" not in nearest]:
        raise SiteNotReached(f"the pipeline ran and did not reach {', '.join(missed)}; name sites of its denoiser")
    return {f"{site}@{level}": nearest[f"{site}@{level}"][1] for level in levels for site in sites}


def conditional(x: Tensor, state: StepState) -> Tensor | None:
    """The rows that the prompt steers: all without guidance, none in a pass for the other half alone."""
    if not state.branches:
        return x
    if "cond" not in state.branches:
        return None
    return x.chunk(len(state.branches))[state.branches.index("cond")]


@torch.no_grad()
def noised(pipe: Any, pixels: NDArray[np.uint8], captions: Sequence[str], levels: Sequence[int], *, seed: int) -> None:
    """Run a denoiser on pictures `[B, H, W, 3]` with the noise of each level added; hooks record what it computes."""
    x = torch.from_numpy(pixels).to(pipe.unet.device, pipe.unet.dtype).permute(0, 3, 1, 2) / 127.5 - 1
    latents = pipe.vae.encode(x).latent_dist.mean * pipe.vae.config.scaling_factor
    text = pipe.text_encoder(tokens(pipe.tokenizer, list(captions)).to(latents.device))[0]
    for level in levels:
        g = torch.Generator().manual_seed(seed * 1009 + level)
        noise = torch.randn(latents.shape, generator=g).to(latents)
        t = torch.full((len(latents),), level, device=latents.device)
        pipe.unet(pipe.scheduler.add_noise(latents, noise, t), t, encoder_hidden_states=text)


def joined(parts: Sequence[Mapping[str, Tensor]]) -> Seen:
    """What several runs showed, in half precision."""
    return {key: torch.cat([part[key].half().cpu() for part in parts]) for key in parts[0]}


def tokens(tokenizer: Any, captions: list[str]) -> Int[Tensor, "B N"]:
    """As pipelines of diffusers give captions to a text encoder."""
    length = tokenizer.model_max_length
    return tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
