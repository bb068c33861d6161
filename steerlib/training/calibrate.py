"""Units from reference text; site, method and strength from measured effect."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isclose
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..bank import BaseModel, ConceptBank, SiteFacts
from ..concepts import Concept
from ..encoders import Directions
from ..errors import BadRecipe
from ..evaluation.text import Completions, Scorer, chat, complete, nll
from ..steering import steer
from .recipe import ConceptRecipe, Recipe

BATCH = 120
"""Answers written at once."""
DOSES = (-0.3, -0.2, -0.1, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35)
"""Lengths of the dose–response, as shares of the median activation."""
WORN = 1.0
"""Nats per token below prompted text at which steered text counts as damaged."""


class Statistics(NamedTuple):
    """How a direction reads on reference text, in raw coordinates."""

    mean: float
    std: float
    low: float
    high: float


def statistics(direction: Float[Tensor, " D"], x: Float[Tensor, "tokens D"]) -> Statistics:
    """Mean, standard deviation, and the 0.5 % and 99.5 % values around that mean."""
    z = x @ direction / direction.square().sum()
    low, high = torch.quantile(z - z.mean(), torch.tensor([0.005, 0.995])).tolist()
    return Statistics(float(z.mean()), float(z.std()), low, high)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One setting that was tried, on the prompts used to choose."""

    site: str
    method: str
    share: float
    score: float
    moved: float
    """Share of prompts whose score went up."""
    nll: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the search chose, and all it tried."""

    site: str
    method: str
    share: float
    low: float
    high: float
    """Shares between which text stays sound."""
    beyond: str
    base: float
    prompted: float
    nll_prompted: float
    trials: tuple[Trial, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Choice":
        return cls(**{**values, "trials": tuple(Trial(**trial) for trial in values["trials"])})


class Candidate(NamedTuple):
    """A direction of length 1 at a site whose activations measure `norm`."""

    site: str
    method: str
    direction: Tensor
    norm: float


def search(
    model: Any, tokenizer: Any, concept: ConceptRecipe, candidates: Sequence[Candidate], score: Scorer, recipe: Recipe
) -> Choice:
    """Choose a direction and a strength by what they do to text.

    First the site, then the method there, then the dose–response of the winner, in both signs. Best is the highest
    mean score among settings whose text is at most `tolerance` nats per token less likely than prompted text.
    """
    prompts = recipe.read_prompts("dev")
    asked = [chat(tokenizer, prompt) for prompt in prompts]
    base = complete(model, tokenizer, asked, new_tokens=recipe.new_tokens)
    told = complete(model, tokenizer, [chat(tokenizer, p, concept.instruction) for p in prompts], new_tokens=recipe.new_tokens)
    shares = concept.shares or recipe.shares
    tolerance = recipe.tolerance if concept.tolerance is None else concept.tolerance
    before, limit = score(base.texts), float(nll(model, told).mean()) + tolerance

    known: dict[tuple[str, str, float], Trial] = {}

    def tried(some: Sequence[Candidate], shares: Sequence[float]) -> list[Trial]:
        wanted = [(candidate, share) for candidate in some for share in shares]
        new = [(c, share) for c, share in wanted if (c.site, c.method, share) not in known]
        for (c, share), part in zip(new, _write(model, tokenizer, asked, new, recipe.new_tokens), strict=True):
            known[c.site, c.method, share] = _trial(c, share, score(part.texts), before, nll(model, part))
        return [known[c.site, c.method, share] for c, share in wanted]

    def best(trials: Sequence[Trial]) -> Trial:
        sound = [trial for trial in trials if trial.nll <= limit] or [min(trials, key=lambda trial: trial.nll)]
        return max(sound, key=lambda trial: (min(trial.moved, 0.9), trial.score))

    first = [c for c in candidates if c.method == recipe.methods[0]]
    site = best(tried(first, shares[1::2] or shares)).site
    winner = best(tried([c for c in candidates if c.site == site], shares))
    chosen = next(c for c in candidates if (c.site, c.method) == (site, winner.method))
    doses = tried([chosen], DOSES)
    useful = best([trial for trial in doses if trial.share > 0])
    low, high, beyond = _sound_range(doses, limit - tolerance + WORN, chosen)
    return Choice(
        site=site,
        method=chosen.method,
        share=useful.share,
        low=low,
        high=max(high, useful.share),
        beyond=beyond,
        base=float(before.mean()),
        prompted=float(score(told.texts).mean()),
        nll_prompted=limit - tolerance,
        trials=tuple(known.values()),
    )


def _write(
    model: Any, tokenizer: Any, asked: list[str], settings: Sequence[tuple[Candidate, float]], new_tokens: int
) -> list[Completions]:
    """Answers under each setting; many settings share a batch, one amount per row."""
    parts: list[Completions] = []
    at_once = max(1, BATCH // len(asked))
    for i in range(0, len(settings), at_once):
        some = settings[i : i + at_once]
        bank, edits = _rows_bank(some, len(asked))
        with steer(model, bank, edits, allow_ood=True):
            done = complete(model, tokenizer, asked * len(some), new_tokens=new_tokens)
        for k in range(len(some)):
            rows = slice(k * len(asked), (k + 1) * len(asked))
            parts.append(Completions(done.texts[rows], done.ids[rows], done.mask[rows], done.prompt))
    return parts


def _rows_bank(settings: Sequence[tuple[Candidate, float]], each: int) -> tuple[ConceptBank, dict[str, list[float]]]:
    """A bank of the candidates, and amounts that give each setting rows of its own."""
    by_site: dict[str, list[int]] = {}
    for k, (candidate, _) in enumerate(settings):
        by_site.setdefault(candidate.site, []).append(k)
    concepts, encoders, sites, edits = [], {}, {}, {}
    for site, ks in by_site.items():
        encoders[site] = Directions(torch.stack([settings[k][0].direction for k in ks]))
        sites[site] = SiteFacts(width=len(settings[ks[0]][0].direction))
        for index, k in enumerate(ks):
            concepts.append(Concept(name=f"setting-{k}", encoder=site, index=index))
            amount = settings[k][1] * settings[k][0].norm
            edits[f"setting-{k}"] = [amount * (row // each == k) for row in range(len(settings) * each)]
    return ConceptBank("settings", concepts, encoders, base=BaseModel(), sites=sites), edits


def _trial(candidate: Candidate, share: float, after: np.ndarray, before: np.ndarray, worn: np.ndarray) -> Trial:
    return Trial(
        site=candidate.site,
        method=candidate.method,
        share=share,
        score=float(after.mean()),
        moved=float((after > before).mean()),
        nll=float(worn.mean()),
    )


def _sound_range(doses: Sequence[Trial], limit: float, chosen: Candidate) -> tuple[float, float, str]:
    """The shares around 0 within which text stays likely, and what was seen just beyond."""
    ends, seen = [0.0, 0.0], []
    for end, sign in ((0, -1), (1, 1)):
        for trial in sorted((t for t in doses if t.share * sign > 0), key=lambda t: abs(t.share)):
            if trial.nll > limit:
                seen.append(
                    f"text was {trial.nll - limit + WORN:.1f} nats per token less likely at {trial.share:+.2f} of the norm"
                )
                break
            ends[end] = trial.share
    if isclose(ends[0], ends[1]):
        raise BadRecipe(f"no strength of {chosen.method} at {chosen.site} leaves the text sound; try other layers or pairs")
    return ends[0], ends[1], "; ".join(seen)
