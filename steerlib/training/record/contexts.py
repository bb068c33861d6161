"""Activations of prompts that are sorted by context, at one site, `[n, P, D]`: of a language model P is 1, the last token."""

from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import SiteNotReached
from ...passes import StepState
from ...steering.recording import conditional, observing
from ...text import chat, progress, tokens_of
from .activations import reading
from .noised import at_levels


@torch.no_grad()
def last_tokens(model: Any, tokenizer: Any, prompts: Sequence[str], site: str, batch: int) -> Float[Tensor, "n 1 D"]:
    """What a site shows at the last token of each prompt, as the model is asked it."""
    parts = []
    with reading(model, [site]) as read:
        for start in progress(range(0, len(prompts), batch), "reading prompts"):
            asked = [chat(tokenizer, prompt, model=model) for prompt in prompts[start : start + batch]]
            ids = tokens_of(model, tokenizer, asked)
            parts.append(read(ids.ids, ids.mask.long(), **ids.read)[site][:, -1:].float().cpu())
    return torch.cat(parts)


@torch.no_grad()
def pictures(
    pipe: Any, prompts: Sequence[str], site: str, *, level: int | None, count: int, batch: int, steps: int, seed: int
) -> Float[Tensor, "n P D"]:
    """What a site shows while prompts are drawn, `count` pictures each from its own noise: in the pass nearest to the level,
    or, without one, in the first that goes through it, on the conditional half."""
    drawn, parts = list(islice(cycle(prompts), count)), []
    for start in progress(range(0, count, batch), "drawing prompts"):
        some = drawn[start : start + batch]
        g = [torch.Generator().manual_seed(seed + start + k) for k in range(len(some))]
        run = lambda: pipe(some, num_inference_steps=steps, generator=g, output_type="latent")  # noqa: B023, E731
        x = _first(pipe, site, run, len(some)) if level is None else at_levels(pipe, [site], [level], run)[f"{site}@{level}"]
        parts.append(x.float().cpu())
    return torch.cat(parts)


def _first(pipe: Any, site: str, run: Any, rows: int) -> Tensor:
    """What the first pass with a row for each prompt shows; with guidance, of the conditional half."""
    seen: list[Tensor] = []

    def observe(x: Tensor, state: StepState) -> None:
        own = conditional(x, state)
        if not seen and own is not None and len(own) == rows:
            seen.append(own.detach().clone())

    with observing(pipe, {site: observe}):
        run()
    if not seen:
        raise SiteNotReached(f"the pipeline ran and did not reach {site!r} with a row for each prompt; name another site")
    return seen[0]
