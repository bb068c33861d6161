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

from ..bank import ConceptBank
from ..concepts import Concept
from ..encoders import Directions, Sparse
from ..evaluation.text import progress
from ..interventions import Add
from ..plans import SHARE
from ..steering import steer
from .shards import Shards

TOKENS = 8
"""That a latent is labelled with, at most."""
LEAST = 3
"""Times that a token has to follow it."""
RARE, OFTEN = 20, 0.05
"""A latent that fires on fewer held-out tokens is not looked at, nor one that fires on a larger share of them."""
TEXTS, LENGTH = 16, 16
"""Texts that latents are moved on, and tokens of each that are read before the next one is looked at, or as many as half of the
texts have."""
TWICE = 2.0
"""How much more a latent's own tokens have to gain than those of others."""


class Followers(NamedTuple):
    """The tokens that follow a latent more than they follow others."""

    tokens: tuple[int, ...]
    weight: float
    """How much they tell: the sum of `p(token | latent) log p(token | latent) / p(token)`, nats."""


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
    """What moving a latent did to its tokens, as the relative gain of their probability, beside controls."""

    tokens: tuple[int, ...]
    gain: float
    others: float
    """Gain of the tokens of other latents, on average: permuted labels."""
    highest: float
    """Which of them gain 95 % stay below."""
    random: bool
    """Whether a random direction as long would have passed in the latent's place."""
    swapped: bool
    """Whether the latent would have passed with the tokens of another."""

    @property
    def holds(self) -> bool:
        """Whether its own tokens gain at least twice as much as, and more than 95 % of, those of others."""
        return passes(self.gain, self.others, self.highest)


def passes(gain: float, others: float, highest: float) -> bool:
    """The bar that a latent has to clear."""
    return gain > 0 and gain >= TWICE * others and gain > highest


def verify(
    model: Any,
    tokenizer: Any,
    bank: ConceptBank,
    labelled: Mapping[str, Followers],
    texts: Sequence[str],
    *,
    seed: int = 0,
) -> dict[str, Verification]:
    """Move each latent on texts by as much as it fires at its strongest, and see what is likelier to come next.

    `labelled` holds latents by name. The tokens of all of them are the permuted labels of each.
    """
    prompts = opened(tokenizer, texts, model.device)
    plain, sets = next_tokens(model, prompts), [list(found.tokens) for found in labelled.values()]
    g = torch.Generator().manual_seed(seed)
    found = {}
    for number, name in enumerate(progress(list(labelled), "moving latents")):
        amount = Add(strongest(bank, bank[name]), unit="raw")
        with steer(model, bank, {name: amount}):
            own = gains(plain, next_tokens(model, prompts), sets)
        with steer(model, astray(bank, bank[name], g), {"astray": amount}):
            random = gains(plain, next_tokens(model, prompts), sets)
        rest = np.arange(len(sets)) != number
        bar = float(own[rest].mean()), float(np.quantile(own[rest], 0.95))
        random_bar = float(random[rest].mean()), float(np.quantile(random[rest], 0.95))
        found[name] = Verification(
            labelled[name].tokens,
            float(own[number]),
            *bar,
            random=passes(float(random[number]), *random_bar),
            swapped=passes(float(own[(number + 1) % len(sets)]), *bar),
        )
    return found


def strongest(bank: ConceptBank, concept: Concept) -> float:
    """The reading that a latent rarely exceeds, raw; no more than additions are capped at."""
    norm, row = bank.sites[bank.site_of(concept)].norm, row_of(bank, concept)
    cap = SHARE * norm / float(row.norm()) if norm else inf
    assert concept.natural is not None
    return min(concept.natural[1], 0.999 * cap)


def row_of(bank: ConceptBank, concept: Concept) -> Float[Tensor, " D"]:
    """What a latent writes."""
    encoder = bank.encoder(concept.encoder)
    assert isinstance(encoder, Sparse)
    return encoder.decoder[concept.index].float()


def astray(bank: ConceptBank, concept: Concept, g: torch.Generator) -> ConceptBank:
    """A bank of one random direction, where and as long as a latent's own."""
    site, row = bank.site_of(concept), row_of(bank, concept)
    drawn = torch.randn(row.shape, generator=g)
    direction = Directions((drawn / drawn.norm() * row.norm())[None])
    sites = {site: bank.sites[site]}
    return ConceptBank(
        "astray", [Concept(name="astray", encoder=site, index=0)], {site: direction}, base=bank.base, sites=sites
    )


def opened(tokenizer: Any, texts: Sequence[str], device: torch.device) -> Tensor:
    """The first tokens of the texts that are long enough, `[TEXTS, LENGTH]`: without pads."""
    ids = [tokenizer(text)["input_ids"] for text in texts]
    length = min(LENGTH, sorted(map(len, ids))[len(ids) // 2])
    return torch.tensor([own[:length] for own in ids if len(own) >= length][:TEXTS], device=device)


@torch.no_grad()
def next_tokens(model: Any, prompts: Tensor) -> Float[Tensor, " V"]:
    """Probabilities of the next token, averaged over prompts."""
    return model(input_ids=prompts, logits_to_keep=1).logits[:, -1].float().softmax(-1).mean(0).cpu()


def gains(plain: Float[Tensor, " V"], moved: Float[Tensor, " V"], sets: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """By how much the probability of each set of tokens grew, over what it was."""
    return np.array([float(moved[own].sum() / plain[own].sum().clamp(min=1e-12)) - 1 for own in sets])
