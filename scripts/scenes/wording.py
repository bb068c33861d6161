"""Teach a small text encoder its captions before anything is drawn.

Which colour goes with which thing is learned from words alone in minutes; a denoiser that starts from states in which it is
settled needs far fewer pictures, as it does with the ready text encoders of larger models. `B` captions, `N` tokens, `D` width.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from scenes import faces, judges, world

GROUPS = {"scenes": judges.KINDS["scenes"].whole, "faces": judges.KINDS["faces"].whole, "cells": judges.KINDS["scenes"].cells}
"""Factors by what they are factors of."""
RATE = 2e-3
"""Learning rate, at its highest."""
ASKED = 1000
"""Captions on which is measured what was learned."""
APART = 10**9
"""A step that training never reaches."""


def tokens(tokenizer: Any, captions: list[str]) -> Int[Tensor, "B N"]:
    """As pipelines of diffusers give captions to a text encoder."""
    length = tokenizer.model_max_length
    return tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


class CaptionReader(nn.Module):
    """Looks at a text encoder's states from six cells, the scene as a whole, and a face, and reads their factors."""

    def __init__(self, width: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(world.CELLS) + 2, width))
        self.attend = nn.MultiheadAttention(width, 4, batch_first=True)
        self.think = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU())
        self.heads = nn.ModuleDict({group: nn.Linear(2 * width, sum(sizes.values())) for group, sizes in GROUPS.items()})

    def forward(self, states: Float[Tensor, "B N D"]) -> dict[str, dict[str, Tensor]]:
        """Logits by group and factor, `[B, values]` or `[B, 6, values]`."""
        asked = self.queries.expand(len(states), -1, -1)
        seen = self.think(asked + self.attend(asked, states, states, need_weights=False)[0])
        places = {"cells": seen[:, :-2], "scenes": seen[:, -2], "faces": seen[:, -1]}
        return {group: _split(self.heads[group](places[group]), sizes) for group, sizes in GROUPS.items()}


def _split(logits: Tensor, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    return dict(zip(sizes, logits.split(list(sizes.values()), -1), strict=True))


def learn_words(pipe: Any, *, steps: int, batch: int = 128, seed: int = 0) -> dict[str, float]:
    """Train `pipe.text_encoder` to tell what captions say; gives the share of factors read right of captions that say all.

    The reader that it learns with is thrown away.
    """
    encoder = pipe.text_encoder
    torch.manual_seed(seed)
    reader = CaptionReader(encoder.config.hidden_size).to(encoder.device)
    weights = [*encoder.parameters(), *reader.parameters()]
    adam = torch.optim.AdamW(weights, lr=RATE, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(adam, RATE, total_steps=steps, pct_start=0.1)
    encoder.train().requires_grad_(True)
    with tqdm(total=steps * batch, desc="words", unit="caption", leave=False) as bar:
        for step in range(steps):
            given = answers(pipe, reader, (seed, step), batch, 0.15)
            loss = torch.stack([cross_entropy(read, true, ignore_index=judges.ABSENT) for _, read, true in given]).sum()
            adam.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            adam.step()
            rate.step()
            bar.update(batch)
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    encoder.eval()
    return comprehension(pipe, reader, seed)


def answers(
    pipe: Any, reader: CaptionReader, seed: tuple[int, ...], batch: int, drop: float
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, logits and truth of every factor, for captions of scenes, then for an eighth as many of faces."""
    for kind, maker, n in (("scenes", world, batch - batch // 8), ("faces", faces, batch // 8)):
        factors = maker.solve(maker.noise(n, seed=seed), {})
        ids = tokens(pipe.tokenizer, maker.captions(factors, seed=seed, drop=drop)).to(reader.queries.device)
        logits = reader(pipe.text_encoder(ids)[0])
        read = logits[kind] | (logits["cells"] if kind == "scenes" else {})
        for name, value in judges.truth(kind, factors).items():
            yield f"{kind}.{name}", read[name].flatten(0, -2), value.flatten().to(ids.device)


@torch.no_grad()
def comprehension(pipe: Any, reader: CaptionReader, seed: int) -> dict[str, float]:
    """Share of factors that are read right, by factor, of captions that leave nothing unsaid but what they never say."""
    found = {}
    for name, logits, value in answers(pipe, reader, (seed, APART), ASKED, 0.0):
        there = value != judges.ABSENT
        found[name] = float((logits.argmax(-1) == value)[there].float().mean())
    return found
