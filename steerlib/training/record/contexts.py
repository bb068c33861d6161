"""Activations of prompts that are sorted by context, at one site, `[n, P, D]`: of a language model P is 1, the last token.

What an intervention does is told by pairs of the same prompt as observed and with it. Where no pairs are given, prompts are
matched so that as little as possible differs between them; so are the tokens of both, which stand at other places.
"""

from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import MissingExtra, SiteNotReached
from ...hosts import Host
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

    def observe(x: Tensor, state: StepState) -> None:
        own = conditional(x, state)
        if own is not None and len(own) == rows:
            raise _Reached(own.detach().clone())

    try:
        with observing(pipe, {site: observe}):
            run()
    except _Reached as reached:
        return reached.args[0]
    raise SiteNotReached(f"the pipeline ran and did not reach {site!r} with a row for each prompt; name another site")


class _Reached(Exception):
    """Ends a run that nothing more is wanted of; its argument is what was seen."""


# -- pairs -------------------------------------------------------------------------------------------------------


def reads_words(host: Host, site: str) -> bool:
    """Whether the tokens of a site are those of a prompt, so that in another prompt the same stand at other places."""
    found = host.site(site)
    return found.reads_text or found.module.startswith("text_encoder")


def paired(
    x: Float[Tensor, "n P D"], y: Float[Tensor, "m P D"], *, words: bool
) -> tuple[Float[Tensor, "k P D"], Float[Tensor, "k P D"]]:
    """Pairs of both, as many as the fewer of them are: of all ways to pair them the one with the least total squared distance.
    Of words the means over tokens are compared."""
    flat = (x.mean(1), y.mean(1)) if words else (x.flatten(1), y.flatten(1))
    rows, columns = _assigned(*flat)
    return x[rows], y[columns]


def aligned(x: Float[Tensor, "n P D"], y: Float[Tensor, "n P D"]) -> Float[Tensor, "n P D"]:
    """y with the tokens of each prompt in the order in which they are nearest those of its partner."""
    return torch.stack([after[_assigned(before, after)[1]] for before, after in zip(x, y, strict=True)])


def _assigned(x: Float[Tensor, "n D"], y: Float[Tensor, "m D"]) -> tuple[Tensor, Tensor]:
    """Rows and columns of the assignment with the least total squared distance."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise MissingExtra("pairing activations needs scipy: pip install 'steerlib[train]'") from None
    rows, columns = linear_sum_assignment(torch.cdist(x, y).square().numpy())
    return torch.as_tensor(rows), torch.as_tensor(columns)
