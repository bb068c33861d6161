"""Attributes of texts: their activations, and the latents of a bank that go with them."""

from collections.abc import Mapping, Sequence
from typing import Any

from ...bank.concept_bank import ConceptBank
from ...bank.concepts import Concept
from ...encoders import Sparse
from ...evaluation.probing import Attribute
from ..record.activations import by_text

Labelled = tuple[Sequence[str], Sequence[str]]
"""Texts with an attribute, and texts without it."""


def read(
    model: Any, tokenizer: Any, attributes: Mapping[str, Labelled], sites: Sequence[str]
) -> dict[str, dict[str, Attribute]]:
    """By site and attribute, the activations of labelled texts."""
    found: dict[str, dict[str, Attribute]] = {site: {} for site in sites}
    for name, (positive, negative) in attributes.items():
        seen = by_text(model, tokenizer, [*positive, *negative], sites, what=f"texts with and without {name}")
        for site, x in seen.items():
            found[site][name] = Attribute.of(x[: len(positive)], x[len(positive) :])
    return found


def select(
    model: Any, tokenizer: Any, bank: ConceptBank, positive: Sequence[str], negative: Sequence[str], *, count: int = 10
) -> list[tuple[Concept, float]]:
    """The latents of a bank that fire more on texts with something than on texts without it, and their selection scores,
    best first (`steerlib/evaluation/probing.py` has the formula)."""
    sparse = {id: encoder for id in bank.encoders if isinstance(encoder := bank.encoder(id), Sparse)}
    sites = {id: bank.encoders[id].reads or bank.encoders[id].site for id in sparse}
    seen = read(model, tokenizer, {"it": (positive, negative)}, sorted({*sites.values()}))
    found = [
        (bank[f"{id}/{index}"], score)
        for id, encoder in sparse.items()
        for index, score in zip(*(part.tolist() for part in seen[sites[id]]["it"].best(encoder, count)), strict=True)
    ]
    return sorted(found, key=lambda pair: -pair[1])[:count]
