"""The mean activation of each text, over its tokens, or of each picture, over its tokens and steps, at several sites."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import BadBank, SiteNotReached
from ...passes import StepState
from ...steering.recording import conditional, observing
from ...text import progress
from .activations import answers, by_text

Means = dict[str, Tensor]
"""`[n, D]` by site."""


class Lengths(dict[str, list[Tensor]]):
    """Lengths of the activations that were read, by site."""

    def medians(self) -> dict[str, float]:
        """The median of each."""
        return {site: round(float(torch.cat(own).median()), 4) for site, own in self.items() if own}


class Reading:
    """Reads texts at some sites, once each."""

    def __init__(self, model: Any, tokenizer: Any, sites: Sequence[str]):
        self.model, self.tokenizer, self.sites = model, tokenizer, list(sites)
        self.lengths = Lengths({site: [] for site in sites})

    def means(self, texts: Sequence[Any]) -> Means:
        """Of each text, by site: over its tokens but the first, or, of a pair of a prompt and an answer, over the answer's."""
        rows: dict[str, dict[int, Tensor]] = {site: {} for site in self.sites}
        for read, are_plain in ((by_text, True), (answers, False)):
            given: Any = {i: text for i, text in enumerate(texts) if isinstance(text, str) is are_plain}
            found = read(self.model, self.tokenizer, [*given.values()], self.sites, what="texts") if given else {}
            for site, x in found.items():
                if empty := [text for text, one in zip(given.values(), x, strict=True) if not len(one)]:
                    raise BadBank(f"no token is left of the text {empty[0]!r:.80}; leave it out")
                rows[site] |= {i: one.mean(0) for i, one in zip(given, x, strict=True)}
                self.lengths[site].append(torch.cat(x).norm(dim=-1))
        return {site: torch.stack([by_row[i] for i in range(len(texts))]) for site, by_row in rows.items()}


class Drawing:
    """Draws prompts, and keeps what passes at some sites where the prompt is read.

    `draw` draws some prompts, each from the noise of its seed; `batch` of them are drawn together.
    """

    def __init__(self, pipe: Any, draw: Callable[[Sequence[str], Sequence[int]], Any], sites: Sequence[str], batch: int):
        self.pipe, self.draw, self.sites, self.batch = pipe, draw, list(sites), batch
        self.lengths = Lengths({site: [] for site in sites})

    @torch.no_grad()
    def means(self, prompts: Sequence[str], seeds: Sequence[int]) -> Means:
        """Of the picture of each prompt, by site."""
        rows: dict[str, list[Tensor]] = {site: [] for site in self.sites}
        for start in progress(range(0, len(prompts), self.batch), "drawing pictures"):
            some, seen = slice(start, start + self.batch), {site: [] for site in self.sites}
            with observing(self.pipe, {site: self._keeper(site, seen[site]) for site in self.sites}):
                self.draw(prompts[some], seeds[some])
            if missed := [site for site, own in seen.items() if not own]:
                raise SiteNotReached(f"the pipeline ran and did not reach {', '.join(missed)}; name sites of its denoiser")
            for site, own in seen.items():
                rows[site].append(torch.stack(own).mean(0))
        return {site: torch.cat(own) for site, own in rows.items()}

    def _keeper(self, site: str, seen: list[Tensor]) -> Callable[[Tensor, StepState], None]:
        def observe(x: Tensor, state: StepState) -> None:
            if (own := conditional(x, state)) is not None:
                own = own.detach().float().cpu()
                seen.append(own.mean(1))
                self.lengths[site].append(own.norm(dim=-1).flatten())

        return observe
