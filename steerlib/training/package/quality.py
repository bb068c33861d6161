"""What is measured of sparse encoders: when they were trained, and by `steerlib eval`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ...bank.concept_bank import ConceptBank
from ...bank.manifest import EncoderFacts
from ...encoders import Sparse
from ...evaluation.probing import Attribute
from ...evaluation.representation import quality, stability
from ...hosts import host_for
from ...text import progress
from ..label.attributes import read
from ..recipe import Recipe, SiteEncoder
from ..record.activations import tokens

BEST = 5
"""Latents that are named for an attribute."""


def figures(
    model: Any,
    tokenizer: Any,
    encoder: Sparse,
    place: SiteEncoder | EncoderFacts,
    x: Float[Tensor, "N D"],
    y: Float[Tensor, "N D2"],
    texts: Sequence[str],
    labelled: Mapping[str, Attribute],
) -> dict[str, Any]:
    """What an encoder that reads x keeps of y, what it costs the model on texts, and what its latents tell.

    x and y, activations that it was not trained on, are the same unless `place` names a site that it reads.
    """
    found = asdict(quality(model, tokenizer, encoder, place.site, x, texts, reads=place.reads, y=y))
    found = {"kind": encoder.kind, "latents": len(encoder.encoder), "tokens": len(x), **found}
    probes = {name: probed(attribute, encoder) for name, attribute in progress(list(labelled.items()), "probing latents")}
    return found | ({"probes": probes} if probes else {})


def probed(attribute: Attribute, encoder: Sparse) -> dict[str, Any]:
    """Accuracies by how many latents are looked at, and the latents that go with an attribute with their selection scores."""
    found = asdict(attribute.probes(encoder))
    by_size = {name: {str(k): a for k, a in value.items()} for name, value in found.items() if name != "dense"}
    best = [[i, round(score, 4)] for i, score in zip(*map(Tensor.tolist, attribute.best(encoder, BEST)), strict=True)]
    return {**by_size, "dense": found["dense"], "best": best}


def apart(runs: Sequence[Sparse], x: Float[Tensor, "N D"]) -> dict[str, Any]:
    """How much of an encoder its twins found, on average; nothing where it has none."""
    found = [stability(runs[0], twin, x) for twin in runs[1:]]
    if not found:
        return {}
    mcc, control = (sum(values) / len(found) for values in zip(*found, strict=True))
    return {"stability": mcc, "stability_control": control}


def evaluate_encoders(
    model: Any, tokenizer: Any, bank: ConceptBank, recipe: Recipe, *, against: ConceptBank | None = None
) -> dict[str, dict[str, Any]]:
    """The same figures for every encoder of a bank, on the recipe's ordinary texts; with those of `against`, a bank from
    another seed, as twins."""
    bank.check(host_for(model))
    sites = sorted({site for facts in bank.encoders.values() for site in (facts.site, facts.reads) if site})
    seen = tokens(model, tokenizer, recipe.read_texts(recipe.reference), sites, what="reference text")
    labelled, unrelated = read(model, tokenizer, recipe.read_attributes(), sites), recipe.read_texts(recipe.unrelated)
    found = {}
    for id, facts in bank.encoders.items():
        encoder, reads = bank.encoder(id), facts.reads or facts.site
        if isinstance(encoder, Sparse):
            x, y = seen[reads], seen[facts.site]
            found[id] = figures(model, tokenizer, encoder, facts, x, y, unrelated, labelled[reads])
            twin = against.encoder(id) if against is not None and id in against.encoders else None
            found[id] |= apart([encoder, twin], x) if isinstance(twin, Sparse) else {}
    return found
