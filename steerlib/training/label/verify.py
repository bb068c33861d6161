"""Whether latents do what their contexts say, by intervention: moving one has to make the tokens likelier that follow it.

What follows a latent is read from held-out documents, what moving it does from other texts, so that neither can be had from the
latent's own decoder row. `n` latents, `V` tokens of the vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from ...bank.concept_bank import ConceptBank
from ...bank.concepts import Concept
from ...encoders import Directions, Sparse
from ...steering.interventions import Add
from ...steering.lowering import SHARE
from ...steering.session import steer
from ...text import progress
from ..record.shards import Shards

TOKENS = 8
"""That a latent is labelled with, at most."""
LEAST = 3
"""Times that a token has to follow it."""
RARE, OFTEN = 20, 0.05
"""A latent that fires on fewer held-out tokens is not looked at, nor one that fires on a larger share of them."""
TEXTS, LENGTH, LOOKED_AT = 16, 16, 4
"""Texts that latents are moved on; tokens of each, or as many as half of the texts have; behind how many of the last of them
the next token is looked at."""
DOSE = 2.0
"""How far latents are moved, in units: medians of their firings."""
TWICE = 2.0
"""How much more a latent's own tokens have to gain than those of others."""


class Followers(NamedTuple):
    """The tokens that follow a latent more than they follow others, and how telling they are: `weight` is the sum of
    `p(token | latent) log p(token | latent) / p(token)`, in nats."""

    tokens: tuple[int, ...]
    weight: float


def followers(encoder: Sparse, shards: Shards, site: str) -> dict[int, Followers]:
    """By latent, from the held-out rows of a recording: what comes behind the tokens that it fires on."""
    row, latent, following = fired_on(encoder, shards, site)
    usual = np.bincount(following) / len(following)
    fired = np.bincount(latent, minlength=len(encoder.encoder))
    pairs, counts = np.unique(latent * len(usual) + following[row], return_counts=True)
    owner, token = np.divmod(pairs, len(usual))
    share = counts / fired[owner]
    telling = np.where(counts >= LEAST, share * np.log(share / usual[token]), 0.0)
    bounds, found = np.searchsorted(owner, np.arange(len(fired) + 1)), {}
    for i in np.flatnonzero((fired >= RARE) & (fired <= OFTEN * len(following))):
        own = np.arange(bounds[i], bounds[i + 1])
        best = own[np.argsort(-telling[own], kind="stable")][:TOKENS]
        best = best[telling[best] > 0]
        if len(best):
            found[int(i)] = Followers(tuple(map(int, token[best])), float(telling[best].sum()))
    return found


def fired_on(encoder: Sparse, shards: Shards, site: str) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Held-out tokens that are not the last of their piece: which latent fires on which of them, and what follows each."""
    rows, latents, following, seen = [], [], [], 0
    for part in shards.in_order([site, "ids", "documents", "positions"], 4096, shards.training):
        ids, documents, positions = (part[name].long() for name in ("ids", "documents", "positions"))
        joined = (documents[1:] == documents[:-1]) & (positions[1:] == positions[:-1] + 1)
        row, latent = (encoder.encode(part[site].float())[:-1][joined] > 0).nonzero(as_tuple=True)
        rows.append(row + seen)
        latents.append(latent)
        following.append(ids[1:][joined])
        seen += len(following[-1])
    row, latent, after = (torch.cat(parts).numpy() for parts in (rows, latents, following))
    return row, latent, after


@dataclass(frozen=True)
class Verification:
    """What moving a latent did to its tokens, as the gain of their log-probability in nats, beside controls.

    `others` is the mean gain of the tokens of other latents (permuted labels), `highest` the gain that 95 % of them stay below.
    `random`: whether a random direction as long would have passed in its place. `swapped`: whether the latent would have
    passed with the tokens of another.
    """

    tokens: tuple[int, ...]
    gain: float
    others: float
    highest: float
    random: bool
    swapped: bool

    @property
    def holds(self) -> bool:
        """Whether its own tokens gain at least twice as much as, and more than 95 % of, those of others."""
        return passes(self.gain, self.others, self.highest)


def passes(gain: float, others: float, highest: float) -> bool:
    """The bar that a latent has to clear."""
    return gain > 0 and gain >= TWICE * others and gain > highest


def verify(
    model: Any, tokenizer: Any, bank: ConceptBank, labelled: Mapping[str, Followers], texts: Sequence[str], *, seed: int = 0
) -> dict[str, Verification]:
    """Move each latent on texts by twice as much as it usually fires, and measure which next tokens become likelier.

    `labelled` holds latents by name. The tokens of all others of the same encoder are the permuted labels of each.
    """
    prompts = opened(tokenizer, texts, model.device)
    plain, g = next_tokens(model, prompts), torch.Generator().manual_seed(seed)
    found = {}
    for name in progress(list(labelled), "moving latents"):
        concept, amount = bank[name], dose(bank, bank[name])
        others = [said.tokens for other, said in labelled.items() if other != name and bank[other].encoder == concept.encoder]
        sets = [labelled[name].tokens, *(others or [()])]
        with steer(model, bank, {name: amount}):
            own = gains(next_tokens(model, prompts) - plain, sets)
        with steer(model, astray(bank, concept, g), {"astray": amount}):
            random = gains(next_tokens(model, prompts) - plain, sets)
        bar, random_bar = ((float(gain[1:].mean()), float(np.quantile(gain[1:], 0.95))) for gain in (own, random))
        swapped = passes(float(own[1 + len(found) % len(own[1:])]), *bar)
        found[name] = Verification(
            labelled[name].tokens, float(own[0]), *bar, random=passes(float(random[0]), *random_bar), swapped=swapped
        )
    return found


def dose(bank: ConceptBank, concept: Concept) -> Add:
    """`DOSE`, or the most that additions are capped at."""
    norm, row = bank.sites[bank.site_of(concept)].norm, bank.rows(concept).write[0]
    cap = SHARE * norm / (concept.unit * float(row.norm())) if norm else inf
    return Add(min(DOSE, 0.999 * cap))


def astray(bank: ConceptBank, concept: Concept, g: torch.Generator) -> ConceptBank:
    """A bank of one random direction, where and as long as a latent's own."""
    site, row = bank.site_of(concept), bank.rows(concept).write[0]
    drawn = torch.randn(row.shape, generator=g)
    direction = Directions((drawn / drawn.norm() * row.norm())[None])
    named = Concept(name="astray", encoder=site, index=0, unit=concept.unit)
    return ConceptBank("astray", [named], {site: direction}, base=bank.base, sites={site: bank.sites[site]})


def opened(tokenizer: Any, texts: Sequence[str], device: torch.device) -> Tensor:
    """The first tokens of the texts that are long enough, `[TEXTS, LENGTH]`: without pads."""
    ids = [tokenizer(text)["input_ids"] for text in texts]
    length = min(LENGTH, sorted(map(len, ids))[len(ids) // 2])
    return torch.tensor([own[:length] for own in ids if len(own) >= length][:TEXTS], device=device)


@torch.no_grad()
def next_tokens(model: Any, prompts: Tensor) -> Float[Tensor, " V"]:
    """Log-probabilities of the next token, averaged over prompts and their last tokens."""
    return model(input_ids=prompts, logits_to_keep=LOOKED_AT).logits.float().log_softmax(-1).flatten(0, 1).mean(0).cpu()


def gains(change: Float[Tensor, " V"], sets: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """By how much the log-probability of the tokens of each set grew, on average; 0 for none."""
    return np.array([float(change[[*own]].mean()) if own else 0.0 for own in sets])
