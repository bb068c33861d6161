"""Concepts by words: those they share with name, label and contexts, and what they mean, where the sentence model is there.

What labels mean is stored with a bank of many, in `labels.safetensors`: `rows` `[texts, width]`, embeddings in steps of 1 / 400
around 128, and `keys` `[texts, 8]`, the first bytes of the SHA-256 of each text. A label that was changed has no row there.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save

from ..errors import CorruptBank
from . import sentences
from .concepts import Concept

ALIKE = 0.3
"""Cosine above which a label counts as found though it shares no word; unrelated ones stay below a quarter."""
MOST = 500
"""Labels without a stored meaning that are read for a search, which takes seconds; of a bank with more, words alone decide."""
LABELS = "labels.safetensors"
STEP, WIDTH = 1 / 400, 384


def ranked(words: str, concepts: Sequence[Concept], stored: bytes = b"") -> list[Concept]:
    """The concepts that words find, best first: `shared` plus the cosine of the sentence embeddings of words and label.

    `stored` is the bank's `labels.safetensors`.
    """
    match = np.array([shared(words, concept) for concept in concepts])
    cosine = np.zeros(len(concepts))
    if concepts and sentences.is_installed():
        texts = [text_of(concept) for concept in concepts]
        known = kept(stored, tuple(sorted({*texts})))
        unknown = sorted({*texts} - known.keys(), key=lambda text: (len(text), text))
        if len(unknown) <= MOST:
            known = {**known, **meanings(tuple(unknown))}
        own = sentences.embed([words])[0]
        cosine = np.array([known[text] @ own if text in known else 0.0 for text in texts])
    order = sorted(range(len(concepts)), key=lambda i: (-match[i] - cosine[i], concepts[i].name))
    return [concepts[i] for i in order if match[i] > 0 or cosine[i] > ALIKE]


def shared(words: str, concept: Concept) -> float:
    """Share of the words that name or label have, or half of the share that examples have on average; 1 more where the name has
    them all.

    A word of four letters or more is also found as the beginning of another.
    """
    wanted = {*re.findall(r"\w+", words.lower())}

    def found(texts: Iterable[str]) -> float:
        there = {word for text in texts for word in re.findall(r"\w+", text.lower())}
        begun = {own for own in wanted if len(own) > 3 and any(word.startswith(own) for word in there)}
        return len(wanted & there | begun) / max(1, len(wanted))

    name = words.lower() in concept.name.lower()
    often = sum(found((example,)) for example in concept.examples) / max(1, len(concept.examples))
    return name + max(found((concept.name, concept.label)), often / 2)


def text_of(concept: Concept) -> str:
    """What a concept means, in words: its label, after its name if it has one of its own; else a context."""
    meaning = concept.label or next(iter(concept.examples), "")
    return meaning if concept.name == concept.id else f"{concept.name}: {meaning}"


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:8]


def stored(concepts: Iterable[Concept]) -> bytes:
    """The contents of `labels.safetensors`: what the labels of concepts mean. It takes minutes for thousands of them."""
    texts = sorted({text_of(concept) for concept in concepts}, key=lambda text: (len(text), text))
    rows = np.clip(np.round(sentences.embed(texts) / STEP) + 128, 0, 255).astype(np.uint8)
    keys = np.frombuffer(b"".join(map(_key, texts)), np.uint8).reshape(-1, 8)
    return save({"rows": torch.tensor(rows), "keys": torch.tensor(keys)})


@lru_cache(maxsize=4)
def kept(stored: bytes, texts: tuple[str, ...]) -> Mapping[str, Float[np.ndarray, " width"]]:
    """Those of the embeddings in a `labels.safetensors` that belong to some texts."""
    if not stored:
        return {}
    try:
        rows, keys = (load(stored)[name].numpy() for name in ("rows", "keys"))
    except (SafetensorError, KeyError) as error:
        raise CorruptBank(f"{LABELS} does not hold embeddings of labels: {error}") from None
    if (rows.dtype, keys.dtype) != (np.uint8, np.uint8) or rows.shape != (len(keys), WIDTH) or keys.shape[1:] != (8,):
        raise CorruptBank(f"{LABELS}: expected rows [n, {WIDTH}] and keys [n, 8] of bytes, got {rows.shape} and {keys.shape}")
    found = {key.tobytes(): i for i, key in enumerate(keys)}
    there = {text: found[key] for text in texts if (key := _key(text)) in found}
    meant = (rows[[*there.values()]].astype(np.float32) - 128) * STEP
    return dict(zip(there, meant, strict=True))


@lru_cache(maxsize=4)
def meanings(texts: tuple[str, ...]) -> Mapping[str, Float[np.ndarray, " width"]]:
    """Embeddings by text; texts of like length stand together, so that little is padded."""
    return dict(zip(texts, sentences.embed(texts), strict=True)) if texts else {}
