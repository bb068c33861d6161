"""Contrast pairs that the model writes itself: answers as asked for a concept by its name, and as not asked.

Of every prompt there are two answers, to the prompt and to the prompt with a request for the concept. Kept are the pairs whose
asked answer comes nearer to the name than the other one does, the nearest first; answers that repeat themselves are dropped.
"""

from collections.abc import Sequence
from typing import Any

from ...errors import BadRecipe
from ...evaluation.text import distinct, nearness
from ...text import chat, complete, progress
from ..entries import Pair

ASKINGS = ("Talk about {}.", "Let your whole answer be full of {}.")
"""How a prompt asks for a concept of which only the name is known."""
KEPT = 14
"""Pairs at most."""
LOOPING = 0.8
"""An answer with a smaller share of distinct word trigrams repeats itself."""
TOKENS = 32
TEMPERATURE = 0.7


def written(model: Any, tokenizer: Any, names: Sequence[str], prompts: Sequence[str], *, seed: int) -> dict[str, list[Pair]]:
    """Pairs by name, from one batch a name and one for the answers as not asked.

    Raises:
        BadRecipe: the model does not write about a name when it is asked to.
    """
    how: Any = {"new_tokens": TOKENS, "temperature": TEMPERATURE}
    texts: dict[str, list[str]] = {}
    for name in progress(["", *names], "the model writes answers, plain and as asked"):
        asking = [ASKINGS[i % len(ASKINGS)].format(name) if name else "" for i in range(len(prompts))]
        asked = [chat(tokenizer, *both, model) for both in zip(prompts, asking, strict=True)]
        texts[name] = complete(model, tokenizer, asked, seed=seed + bool(name), **how).texts
    plain = texts.pop("")
    return {name: kept(name, [Pair(*three) for three in zip(prompts, own, plain, strict=True)]) for name, own in texts.items()}


def kept(name: str, pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs that show the concept best; raises `BadRecipe` for fewer than two."""
    near = nearness(name)
    gains = near([pair.positive for pair in pairs]) - near([pair.negative for pair in pairs])
    sound = [pair.positive.strip() and pair.negative.strip() and distinct(pair.positive, 3) >= LOOPING for pair in pairs]
    order = sorted((i for i in range(len(pairs)) if sound[i] and gains[i] > 0), key=lambda i: -gains[i])
    if len(order) < 2:
        raise BadRecipe(
            f"the model does not write about {name!r} when it is asked to: {len(order)} of {len(pairs)} answers come nearer to "
            "it and do not repeat themselves; take another name, or make the concept from examples: steerlib train --template"
        )
    return [pairs[i] for i in sorted(order[:KEPT])]
