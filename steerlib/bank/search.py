"""Concepts by words: those they share with name, label and contexts, and what they mean, where the sentence model is there."""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Float
from tqdm.auto import tqdm

from . import sentences
from .concepts import Concept

ALIKE = 0.3
"""Cosine above which a label counts as found though it shares no word; unrelated ones stay below a quarter."""
MOST = 20_000
"""Labels whose meaning is looked at; of a bank with more, words alone decide, as embedding them would take minutes."""


def ranked(words: str, concepts: Sequence[Concept]) -> list[Concept]:
    """The concepts that words find, best first: `shared` plus the cosine of the sentence embeddings of words and label."""
    match = np.array([shared(words, concept) for concept in concepts])
    cosine = np.zeros(len(concepts))
    if concepts and sentences.is_installed() and len(texts := [text_of(concept) for concept in concepts]) <= MOST:
        found = meanings(tuple(sorted({*texts}, key=lambda text: (len(text), text))))
        own = sentences.embed([words])[0]
        cosine = np.array([found[text] @ own for text in texts])
    order = sorted(range(len(concepts)), key=lambda i: (-match[i] - cosine[i], concepts[i].name))
    return [concepts[i] for i in order if match[i] > 0 or cosine[i] > ALIKE]


def shared(words: str, concept: Concept) -> float:
    """Share of the words that name or label have, half of it where only examples do; 1 more where the name has them all.

    A word of four letters or more is also found as the beginning of another.
    """
    wanted = {*re.findall(r"\w+", words.lower())}

    def found(texts: Iterable[str]) -> float:
        there = {word for text in texts for word in re.findall(r"\w+", text.lower())}
        begun = {own for own in wanted if len(own) > 3 and any(word.startswith(own) for word in there)}
        return len(wanted & there | begun) / max(1, len(wanted))

    name = words.lower() in concept.name.lower()
    return name + max(found((concept.name, concept.label)), found(concept.examples) / 2)


def text_of(concept: Concept) -> str:
    """What a concept means, in words: its label, after its name if it has one of its own; else a context."""
    meaning = concept.label or next(iter(concept.examples), "")
    return meaning if concept.name == concept.id else f"{concept.name}: {meaning}"


@lru_cache(maxsize=4)
def meanings(texts: tuple[str, ...]) -> dict[str, Float[np.ndarray, " width"]]:
    """Embeddings by text; texts of like length stand together, so that little is padded."""
    starts = tqdm(range(0, len(texts), 256), "reading labels", leave=False, disable=len(texts) < 1000)
    parts = [sentences.embed(texts[i : i + 256]) for i in starts]
    return dict(zip(texts, np.concatenate(parts), strict=True))
