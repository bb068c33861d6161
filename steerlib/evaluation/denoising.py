"""A diffusion pipeline as the judge of pictures: how well a prompt explains them, without any other model.

A picture with noise is given to the denoiser, under one prompt and under another; the prompt with the smaller error explains it
better (Li et al. 2023, arXiv 2303.16203). Noises and noise levels are the same for all prompts and pictures, which removes
most of the variance. `B` pictures, as latents of the pipeline; `P` prompts; `N` tokens, `D` channels of a latent.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..errors import UnsupportedTarget
from ..hosts import host_for
from ..passes import StepState
from ..steering.recording import conditional, observing, replacing
from .pictures import asked

STEPS = 4
"""Scheduler steps of a run whose noisy pictures are replaced by those that are judged."""
JUDGED = (0.15, 0.85)
"""Progress between which errors count: of nearly pure noise, and of nearly no noise, prompts say little."""
DRAWS = 2
"""Noises at each level."""
OPPOSITE = -0.2
"""Cosine of a prediction and its target below which the two cannot mean the same."""


@contextmanager
def _stepping(pipe: Any, see: Callable[[Any, Any], None]) -> Iterator[None]:
    """Inside a `with` block, show each step of a pipeline's scheduler: what it was given of the denoiser, and what it gave."""
    scheduler, kind = pipe.scheduler, type(pipe.scheduler)

    @wraps(kind.step)
    def step(self: Any, model_output: Any, *args: Any, **kwargs: Any) -> Any:
        given = kind.step(self, model_output, *args, **kwargs)
        if self is scheduler:  # and not a copy
            see(model_output, given[0])
        return given

    scheduler.__class__ = type(kind.__name__, (kind,), {"step": step})
    try:
        yield
    finally:
        scheduler.__class__ = kind


def drawn(pipe: Any, prompts: Sequence[str], **how: Any) -> tuple[Float[Tensor, "B ..."], Any]:
    """What a pipeline draws: latents as its denoiser is given them, the last that its scheduler gave, and what it made of them.

    Args:
        pipe: The pipeline.
        prompts: Of the pictures.
        how: What else it takes.
    """
    last: dict[str, Tensor] = {}
    with _stepping(pipe, lambda _, given: last.update(latents=given)):
        made = pipe(asked(pipe, prompts), **how)[0]
    if not last:
        raise UnsupportedTarget(f"{type(pipe).__name__} ran without its scheduler, so its latents are not known")
    return last["latents"][: len(prompts)], made  # the first: some step both halves of guidance alike


@torch.no_grad()
def errors(
    pipe: Any, latents: Float[Tensor, "B ..."], prompts: Sequence[str], *, seed: int = 0, draws: int | None = None
) -> Float[Tensor, " P"]:
    """Mean squared error of the denoiser on each picture under its prompt, over noise levels and noises.

    Args:
        pipe: The pipeline, unsteered.
        latents: What `drawn` gives, of the pipeline's own size.
        prompts: One for each picture; or several times as many, for the same pictures again, with the same noises.
        seed: Of the noises.
        draws: The number of noises at each level; default: `DRAWS`.

    Raises:
        UnsupportedTarget: The denoiser is given other things than latents and noise, or its scheduler predicts something else
            than noise, a picture, or the velocity between them.
    """
    host = host_for(pipe)
    kind, places = predicts(pipe.scheduler), [path for path in host.passes() if not path.startswith("controlnet")]
    read = host.site(f"{places[0]}.in").read
    clean = read(latents)
    how: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "latent"}
    how |= {"guidance_scale": 1.0} if hasattr(type(pipe), "do_classifier_free_guidance") else {}
    found: list[Tensor] = []
    for k in range(draws or DRAWS):
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed + k)).to(clean)
        judge = _Judge(pipe.scheduler, kind, clean, noise, found)
        given, taken = ({f"{path}.in": judge.give for path in host.passes()}, dict.fromkeys(places, judge.take))
        with replacing(pipe, given), observing(pipe, taken), _stepping(pipe, lambda told, _, j=judge: j.settle(read(told))):
            pipe(asked(pipe, prompts), generator=torch.Generator().manual_seed(seed), **how)  # whose own noise is not looked at
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
    """Gives the denoiser noisy pictures in place of the run's own, and takes its errors when the scheduler steps."""

    def __init__(self, scheduler: Any, kind: str, clean: Tensor, noise: Tensor, found: list[Tensor]):
        self.scheduler, self.kind, self.clean, self.noise, self.found = scheduler, kind, clean, noise, found
        self.own: Tensor | None = None

    def give(self, x: Tensor, state: StepState) -> Tensor:
        if x.shape[1:] != self.clean.shape[1:] or len(x) % len(self.clean):
            raise UnsupportedTarget(
                f"the denoiser is given {tuple(x.shape)} and latents are {tuple(self.clean.shape)}, so it cannot judge them"
            )
        clean, noise = self._shares(state)
        self.shares = clean, noise
        return (clean * self.clean + noise * self.noise).repeat(len(x) // len(self.clean), 1, 1).to(x)

    def take(self, x: Tensor, state: StepState) -> None:
        if JUDGED[0] <= float(state.progress) <= JUDGED[1] and (own := conditional(x, state)) is not None:
            self.own = own

    def settle(self, told: Tensor) -> None:
        """Compare what the denoiser gave with its target, turned around where the scheduler is told the opposite of it."""
        if (own := self.own) is None:
            return
        due = self._target(*self.shares).repeat(len(own) // len(self.clean), 1, 1)
        guess, told = (x[..., : due.shape[-1]].float() for x in (own, told[: len(own)]))
        if cosine_similarity(guess.flatten(), told.flatten(), 0) < 0:
            guess = -guess
        if cosine_similarity(guess.flatten(), due.flatten(), 0) < OPPOSITE:
            raise UnsupportedTarget("the denoiser predicts the opposite of what its scheduler says, so it cannot judge")
        self.found.append((guess - due).square().mean((1, 2)))
        self.own = None

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
