"""From texts to a bank of latents: record, fit, label, measure, verify; a run that stops goes on from what it recorded."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ...bank.concept_bank import BaseModel, ConceptBank
from ...bank.concepts import Concept
from ...bank.effects import LatentEffects, Verified
from ...encoders import Sparse
from ...errors import BadRecipe, UnsupportedTarget
from ...evaluation.quality import apart, probed, quality
from ...hosts import host_for
from ...text import is_pair, stage
from ..entries import GraphRecipe
from ..label.attributes import read
from ..label.labels import AMONG, SHOWN, Sightings, Texts, label, promoted, sightings
from ..label.verify import Verification, followers, verify
from ..recipe import Recipe, TextEncoderRecipe
from ..record.activations import tokens
from ..record.documents import sources
from ..record.harvest import harvest
from ..record.shards import Shards
from .card import latents_card
from .encoders import HELD_OUT, Readings, describe, finish, site_facts, trained

VERIFIED = "tokens that follow it in text it was not trained on, and that steering it makes likelier"
LOOKED_AT = 1 << 16
"""Tokens on which thresholds and lengths are measured."""


def train_latents(model: Any, tokenizer: Any, recipe: TextEncoderRecipe, folder: Path) -> ConceptBank:
    """Encoders for every site that the recipe names, as a bank whose latents are labelled, measured and verified.

    `folder` keeps the graph; one beside it keeps recordings and checkpoints, also for recipes of other encoders.
    """
    if is_pair(model):
        raise UnsupportedTarget(
            f"latents of {type(model).__name__} can be recorded in its encoder and fitted (steerlib.training.record.harvest, "
            "steerlib.training.fit.run), but what they do to text is measured for models without an encoder only"
        )
    check_order(model, recipe)
    sites, place = recipe.encoder_sites, folder.parent / recipe.recorded_key
    count, many = 4 + (recipe.graph is not None), f"{len(recipe.encoders)} encoders"
    with stage(1, count, f"recording {recipe.tokens:,} tokens at {len(sites)} sites"):
        harvest(model, tokenizer, recipe.corpus_files(), sites, place / "activations", tokens=recipe.tokens, seed=recipe.seed)
    shards = Shards(place / "activations", held_out=HELD_OUT)
    with stage(2, count, f"fitting {many}"):
        runs = fitted(recipe, shards, place / "encoders")
    with stage(3, count, f"labelling and measuring {many}"):
        bank, telling = labelled_bank(model, tokenizer, recipe, shards, runs)
    with stage(4, count, f"moving {len(telling)} latents to verify their labels"):
        found = verify(model, tokenizer, bank, telling, recipe.read_texts(recipe.unrelated))
        bank = with_verified(bank, found, recipe, tokenizer)
    if recipe.graph is None:
        return bank
    with stage(5, count, "finding what moves what"):
        return with_graph_of(model, tokenizer, bank, recipe, folder / "graph")


def labelled_bank(
    model: Any, tokenizer: Any, recipe: TextEncoderRecipe, shards: Shards, runs: Mapping[str, Sparse]
) -> tuple[ConceptBank, dict[str, Any]]:
    """The bank of fitted encoders with labels and figures, and what latents to verify are followed by, by name."""
    sites = recipe.encoder_sites
    labelled = read(model, tokenizer, recipe.read_attributes(), sites)
    texts, unrelated = Texts(tokenizer, shards), recipe.read_texts(recipe.unrelated)
    encoders: dict[str, Sparse] = {}
    concepts, found, telling = [], {}, {}
    for spec in recipe.encoders:
        id, site = spec.id, spec.reads or spec.site
        seen = sightings(runs[id], shards, site)
        readings = Readings(seen.quantile(0.5), seen.quantile(0.995), seen.frequency.float())
        encoders[id] = finish(runs[id], readings, some_rows(shards, site, held_out=False))
        concepts += described(id, encoders[id], seen, texts, promoted(model, tokenizer, runs[id].decoder))
        x, y = (some_rows(shards, name, held_out=True) for name in (site, spec.site))
        found[id] = quality(model, tokenizer, encoders[id], spec.site, x, unrelated, reads=spec.reads, y=y)
        found[id] |= probed(encoders[id], labelled[site]) | apart([runs[name] for name in spec.runs], x)
        said = sorted(followers(encoders[id], shards, site).items(), key=lambda item: -item[1].weight)
        telling |= {f"{id}/{i}": own for i, own in said[: spec.verify]}
    bank = ConceptBank(
        recipe.name,
        concepts,
        encoders,
        base=BaseModel.of(model, id=recipe.base),
        sites={site: site_facts(some_rows(shards, site, held_out=False)) for site in shards.sites},
        reads={spec.id: spec.reads for spec in recipe.encoders},
        license=recipe.license,
        provenance=recipe.provenance | {"quality": found, "tokens": shards.training, "corpus": sources(recipe.corpus_files())},
    )
    return bank, telling


def with_graph_of(model: Any, tokenizer: Any, bank: ConceptBank, recipe: TextEncoderRecipe, folder: Path) -> ConceptBank:
    """The bank with the graph that its recipe describes, and a card with the graph's table."""
    from ..discover.text_graph import graphed  # needs scipy

    made = graphed(model, bank, *_graph_texts(tokenizer, recipe), folder)
    made.card = latents_card(made, recipe)
    return made


def with_forecasts_of(model: Any, tokenizer: Any, bank: ConceptBank, recipe: TextEncoderRecipe, folder: Path) -> ConceptBank:
    """The bank with the graph that it has, whose effects over two levels or more and whose forecasts are measured again."""
    from ..discover.text_graph import measure_forecasts  # needs scipy

    told = measure_forecasts(model, bank, *_graph_texts(tokenizer, recipe), folder)
    total = sum(edge.relation == "total" for edge in bank.graph.edges)
    facts = {**bank.provenance["graph"], "forecast": told, "total": total}
    bank.provenance = {**bank.provenance, "graph": facts}
    bank.card = latents_card(bank, recipe)
    return bank


def _graph_texts(tokenizer: Any, recipe: TextEncoderRecipe) -> tuple[Int[Tensor, "C N"], GraphRecipe]:
    """Texts of the graph, and how it is found."""
    from ..discover.text_graph import contexts

    own = recipe.graph or GraphRecipe()
    sets = [recipe.corpus_files([name]) for name in own.environments] or [recipe.corpus_files()]
    return contexts(tokenizer, sets, own), own


def check_order(model: Any, recipe: TextEncoderRecipe) -> None:
    """Raise `BadRecipe` for a transcoder that reads at a site which the model reaches after the one it writes."""
    host = host_for(model)
    for spec in recipe.encoders:
        if spec.reads and host.order(host.site(spec.reads)) >= host.order(host.site(spec.site)):
            raise BadRecipe(f"{spec.id!r}: expected it to read at a site before {spec.site!r}, got {spec.reads!r}")


def fitted(recipe: TextEncoderRecipe, shards: Shards, folder: Path) -> dict[str, Sparse]:
    """Every encoder and its twins, those of one site (or of one that is read and one that is written) from one pass."""
    found: dict[str, Sparse] = {}
    for reads, site in dict.fromkeys((spec.reads, spec.site) for spec in recipe.encoders):
        specs = [spec for spec in recipe.encoders if (spec.reads, spec.site) == (reads, site)]
        source = shards.source(reads or site, target=site if reads else None, seed=recipe.seed)
        found |= trained(specs, source, folder / recipe.fitted_key(specs), epochs=recipe.epochs)
    return found


def some_rows(shards: Shards, site: str, *, held_out: bool) -> Tensor:
    """Activations as recorded: of documents that no encoder was trained on, or of others."""
    start, stop = (shards.training, len(shards)) if held_out else (0, shards.training)
    return torch.cat(list(shards.in_order(site, 4096, start, min(stop, start + LOOKED_AT)))).float()


def described(id: str, encoder: Sparse, seen: Sightings, texts: Texts, promotes: Sequence[Sequence[str]]) -> list[Concept]:
    """A concept for every latent that fired: label, contexts, histogram, what it makes the model say."""
    histogram = seen.kept

    def about(i: int) -> dict[str, Any]:
        rows = [int(row) for row, value in zip(seen.rows[i], seen.highest[i], strict=True) if value > 0]
        filled = histogram[i].nonzero()[:, 0]
        effects: LatentEffects = {
            "frequency": round(float(seen.frequency[i]), 6),
            "promotes": list(promotes[i]),
            "histogram": {"first": int(filled[0]), "counts": histogram[i, filled[0] : filled[-1] + 1].tolist()},
        }
        return {
            "label": label([texts.token(row) for row in rows], list(promotes[i])),
            "source": "contexts and head",
            "examples": tuple(dict.fromkeys(texts.around(row) for row in rows[:AMONG]))[:SHOWN],
            "effects": effects,
        }

    return describe(id, encoder, about)


def with_verified(
    bank: ConceptBank, found: Mapping[str, Verification], recipe: TextEncoderRecipe, tokenizer: Any
) -> ConceptBank:
    """The bank with what moving latents did; those that do what their contexts say get a label that says so."""
    quality = {
        id: {**figures, **share([v for name, v in found.items() if bank[name].encoder == id])}
        for id, figures in bank.provenance["quality"].items()
    }
    concepts = [
        labelled(concept, found[name], tokenizer) if name in found else concept for name, concept in bank.concepts.items()
    ]
    made = bank.with_concepts(concepts)
    made.provenance = {**bank.provenance, "quality": quality}
    made.card = latents_card(made, recipe)
    return made


def share(found: Sequence[Verification]) -> dict[str, int]:
    """How many latents were moved and held, and how many would have by chance."""
    if not found:
        return {}
    held, random, swapped = (sum(getattr(v, name) for v in found) for name in ("holds", "random", "swapped"))
    return {"moved": len(found), "verified": held, "verified_random": random, "verified_swapped": swapped}


def labelled(concept: Concept, found: Verification, tokenizer: Any) -> Concept:
    """The concept with what moving it did; if that is what its contexts say, labelled by the tokens that follow it."""
    tokens = [tokenizer.decode([token]) for token in found.tokens]
    gain, others, highest = (round(value, 4) for value in (found.gain, found.others, found.highest))
    effects: Verified = {"tokens": tokens, "holds": found.holds, "gain": gain, "others": others, "highest": highest}
    made = replace(concept, effects={**concept.effects, "verified": effects})
    if not found.holds:
        return made
    said = list(dict.fromkeys(token.strip() or "␣" for token in tokens))[:3]
    return replace(made, label="before " + ", ".join(f"“{token}”" for token in said), source=VERIFIED)


def evaluate_encoders(
    model: Any, tokenizer: Any, bank: ConceptBank, recipe: Recipe, *, against: ConceptBank | None = None
) -> dict[str, dict[str, Any]]:
    """The figures of a training run for every sparse encoder of a bank of text latents, by id (`evaluation.quality`).

    The recipe names the texts: `reference` to encode, `unrelated` to measure the model's loss on, and any attributes. With
    `against`, a bank of the same encoders trained from another seed, also how much of each that one found.
    """
    bank.check(host_for(model))
    sites = sorted({site for facts in bank.encoders.values() for site in (facts.site, facts.reads) if site})
    seen = tokens(model, tokenizer, recipe.read_texts(recipe.reference), sites, what="reference text")
    attributes = recipe.read_attributes() if isinstance(recipe, TextEncoderRecipe) else {}
    labelled, unrelated = read(model, tokenizer, attributes, sites), recipe.read_texts(recipe.unrelated)
    found = {}
    for id, facts in bank.encoders.items():
        encoder, reads = bank.encoder(id), facts.reads or facts.site
        if isinstance(encoder, Sparse):
            x, y = seen[reads], seen[facts.site]
            found[id] = quality(model, tokenizer, encoder, facts.site, x, unrelated, reads=facts.reads, y=y)
            twin = against.encoder(id) if against is not None and id in against.encoders else None
            twins = [twin] if isinstance(twin, Sparse) else []
            found[id] |= probed(encoder, labelled[reads]) | apart([encoder, *twins], x)
    return found
