"""Teach a small text encoder its captions before anything is drawn.

Which colour goes with which thing is learned from words alone in minutes; a denoiser that starts from states in which it is
settled needs far fewer pictures, as it does with the ready text encoders of larger models. `B` captions, `N` tokens, `D` width.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from scenes.judges import ABSENT

RATE = 2e-3
"""Learning rate, at its highest."""
ASKED = 1000
"""Captions on which is measured what was learned."""
APART = 10**9
"""A step that training never reaches."""


class Group(NamedTuple):
    """Things that captions speak of, and the factors of each with how many values."""

    things: int
    sizes: Mapping[str, int]


class Lesson(NamedTuple):
    """Captions, and what they say of the factors of some groups: `[B]`, or `[B, things]`; `ABSENT` where there is nothing."""

    name: str
    captions: list[str]
    truth: Mapping[str, Tensor]
    groups: tuple[str, ...]


class Course(NamedTuple):
    """All that a text encoder learns to tell: groups by name, and lessons of `batch` captions, the same for the same seed."""

    groups: Mapping[str, Group]
    lessons: Callable[[tuple[int, ...], int, float], Iterator[Lesson]]
    """Of a seed, a batch and how often captions leave something unsaid."""


def tokens(tokenizer: Any, captions: list[str]) -> Int[Tensor, "B N"]:
    """As pipelines of diffusers give captions to a text encoder."""
    length = tokenizer.model_max_length
    return tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


class CaptionReader(nn.Module):
    """Looks at a text encoder's states once for each thing of every group, and reads its factors."""

    def __init__(self, width: int, groups: Mapping[str, Group]):
        super().__init__()
        self.groups = groups
        self.queries = nn.Parameter(torch.randn(sum(group.things for group in groups.values()), width))
        self.attend = nn.MultiheadAttention(width, 4, batch_first=True)
        self.think = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU())
        self.heads = nn.ModuleDict({name: nn.Linear(2 * width, sum(group.sizes.values())) for name, group in groups.items()})

    def forward(self, states: Float[Tensor, "B N D"]) -> dict[str, dict[str, Tensor]]:
        """Logits by group and factor, `[B, things, values]`."""
        asked = self.queries.expand(len(states), -1, -1)
        seen = self.think(asked + self.attend(asked, states, states, need_weights=False)[0])
        places = zip(self.groups, seen.split([group.things for group in self.groups.values()], 1), strict=True)
        return {name: _split(self.heads[name](own), self.groups[name].sizes) for name, own in places}


def _split(logits: Tensor, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    return dict(zip(sizes, logits.split(list(sizes.values()), -1), strict=True))


def learn_words(pipe: Any, course: Course, *, steps: int, batch: int = 128, seed: int = 0) -> dict[str, float]:
    """Train `pipe.text_encoder` to tell what captions say; gives the share of factors read right of captions that say all.

    The reader that it learns with is thrown away.
    """
    encoder = pipe.text_encoder
    torch.manual_seed(seed)
    reader = CaptionReader(encoder.config.hidden_size, course.groups).to(encoder.device)
    weights = [*encoder.parameters(), *reader.parameters()]
    adam = torch.optim.AdamW(weights, lr=RATE, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(adam, RATE, total_steps=steps, pct_start=0.1)
    encoder.train().requires_grad_(True)
    with tqdm(total=steps * batch, desc="words", unit="caption", leave=False) as bar:
        for step in range(steps):
            given = answers(pipe, reader, course.lessons((seed, step), batch, 0.15))
            loss = torch.stack([cross_entropy(read, true, ignore_index=ABSENT) for _, read, true in given]).sum()
            adam.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            adam.step()
            rate.step()
            bar.update(batch)
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    encoder.eval()
    return comprehension(pipe, reader, course.lessons((seed, APART), ASKED, 0.0))


def answers(pipe: Any, reader: CaptionReader, lessons: Iterator[Lesson]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, logits and truth of every factor."""
    for lesson in lessons:
        logits = reader(pipe.text_encoder(tokens(pipe.tokenizer, lesson.captions).to(reader.queries.device))[0])
        read = {name: own for group in lesson.groups for name, own in logits[group].items()}
        for name, value in lesson.truth.items():
            yield f"{lesson.name}.{name}", read[name].flatten(0, -2), value.flatten().to(reader.queries.device)


@torch.no_grad()
def comprehension(pipe: Any, reader: CaptionReader, lessons: Iterator[Lesson]) -> dict[str, float]:
    """Share of factors that are read right, by factor, of captions that leave nothing unsaid but what they never say."""
    found = {}
    for name, logits, value in answers(pipe, reader, lessons):
        there = value != ABSENT
        found[name] = float((logits.argmax(-1) == value)[there].float().mean())
    return found
