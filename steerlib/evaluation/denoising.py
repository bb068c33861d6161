"""A diffusion pipeline as the judge of pictures: how well a prompt explains them, without any other model.

A picture with noise is given to the denoiser, under one prompt and under another; the prompt with the smaller error explains it
better (Li et al. 2023, arXiv 2303.16203). Noises and noise levels are the same for all prompts and pictures, which removes
most of the variance. `B` pictures, as latents of the pipeline; `N` tokens, `D` channels of a latent.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..errors import UnsupportedTarget
from ..hosts import host_for
from ..passes import StepState
from ..steering.recording import conditional, observing, replacing

STEPS = 4
"""Scheduler steps of a run whose noisy pictures are replaced by those that are judged."""
JUDGED = (0.15, 0.85)
"""Progress between which errors count: of nearly pure noise, and of nearly no noise, prompts say little."""
DRAWS = 2
"""Noises at each level."""
OPPOSITE = -0.2
"""Cosine of a prediction and its target below which the two cannot mean the same."""


@torch.no_grad()
def errors(
    pipe: Any, latents: Float[Tensor, "B ..."], prompts: Sequence[str], *, seed: int = 0, draws: int | None = None
) -> Float[Tensor, " B"]:
    """Mean squared error of the denoiser on each picture under its prompt, over noise levels and noises.

    Args:
        pipe: The pipeline, unsteered.
        latents: What the pipeline gives with `output_type="latent"`.
        seed: Of the noises.
        draws: The number of noises at each level; default: `DRAWS`.

    Raises:
        UnsupportedTarget: The denoiser is given other things than latents and noise, or its scheduler predicts something else
            than noise, a picture, or the velocity between them.
    """
    host = host_for(pipe)
    kind, places = predicts(pipe.scheduler), [path for path in host.passes() if not path.startswith("controlnet")]
    clean = host.site(f"{places[0]}.in").read(latents)
    guide = {"guidance_scale": 1.0} if hasattr(type(pipe), "do_classifier_free_guidance") else {}
    found: list[Tensor] = []
    for k in range(draws or DRAWS):
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed + k)).to(clean)
        judge = _Judge(pipe.scheduler, kind, clean, noise, found)
        given, taken = ({f"{path}.in": judge.give for path in host.passes()}, dict.fromkeys(places, judge.take))
        with replacing(pipe, given), observing(pipe, taken):
            pipe(list(prompts), num_inference_steps=STEPS, latents=latents.clone(), output_type="latent", **guide)
    if not found:
        raise UnsupportedTarget(f"none of {STEPS} steps of {type(pipe).__name__} has a noise level at which prompts are judged")
    return torch.stack(found).mean(0).cpu()


def predicts(scheduler: Any) -> str:
    """What a denoiser is trained to give: `epsilon` (noise), `sample` (the picture), `v_prediction` or `flow`."""
    kind = getattr(scheduler.config, "prediction_type", "flow" if hasattr(scheduler, "scale_noise") else "")
    kind = {"flow_prediction": "flow"}.get(kind, kind)
    if kind not in ("epsilon", "sample", "v_prediction", "flow"):
        raise UnsupportedTarget(
            f"{type(scheduler).__name__} does not say what its denoiser predicts, so nothing can be judged by it"
        )
    return kind


class _Judge:
    """Gives the denoiser noisy pictures in place of the run's own, and takes its errors."""

    def __init__(self, scheduler: Any, kind: str, clean: Tensor, noise: Tensor, found: list[Tensor]):
        self.scheduler, self.kind, self.clean, self.noise, self.found = scheduler, kind, clean, noise, found

    def give(self, x: Tensor, state: StepState) -> Tensor:
        if x.shape[1:] != self.clean.shape[1:] or len(x) % len(self.clean):
            raise UnsupportedTarget(
                f"the denoiser is given {tuple(x.shape)} and latents are {tuple(self.clean.shape)}, so it cannot judge them"
            )
        clean, noise = self._shares(state)
        self.shares = clean, noise
        return (clean * self.clean + noise * self.noise).repeat(len(x) // len(self.clean), 1, 1).to(x)

    def take(self, x: Tensor, state: StepState) -> None:
        own = conditional(x, state)
        if own is not None and JUDGED[0] <= float(state.progress) <= JUDGED[1]:
            due = self._target(*self.shares)
            guess = own[..., : due.shape[-1]].float()
            if cosine_similarity(guess.flatten(), due.flatten(), 0) < OPPOSITE:
                raise UnsupportedTarget("the denoiser predicts the opposite of what its scheduler says, so it cannot judge")
            self.found.append((guess - due).square().mean((1, 2)))

    def _shares(self, state: StepState) -> tuple[float, float]:
        """How much of the picture and of the noise there is in what the denoiser is given in this step."""
        t = self.scheduler.timesteps[state.step : state.step + 1]
        ends = torch.tensor([[1.0], [0.0]], device=t.device), torch.tensor([[0.0], [1.0]], device=t.device)
        if hasattr(self.scheduler, "scale_noise"):
            mixed = self.scheduler.scale_noise(ends[0], t, ends[1])
        else:
            mixed = self.scheduler.add_noise(*ends, t.expand(2))
            mixed = self.scheduler.scale_model_input(mixed, t[0]) if hasattr(self.scheduler, "scale_model_input") else mixed
        return float(mixed[0]), float(mixed[1])

    def _target(self, clean: float, noise: float) -> Tensor:
        x, e = self.clean.float(), self.noise.float()
        return {"epsilon": e, "sample": x, "v_prediction": clean * e - noise * x, "flow": e - x}[self.kind]
