"""From texts to a bank of latents: record, fit, look, measure; a run that stops goes on from recordings and checkpoints."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...bank.concept_bank import BaseModel, ConceptBank, SiteFacts
from ...bank.concepts import Concept
from ...encoders import Sparse, TopK
from ...errors import BadRecipe
from ...hosts import host_for
from ..fit.run import fit
from ..label.attributes import read
from ..label.labels import AMONG, SHOWN, Sightings, Texts, label, promoted, sightings
from ..label.verify import Followers, Verification, followers, verify
from ..recipe import GraphRecipe, Recipe
from ..record.documents import sources
from ..record.harvest import harvest
from ..record.shards import Shards
from .card import latents_card
from .quality import apart, figures

HELD_OUT = 0.1
"""Share of the documents that encoders are not trained on."""
VERIFIED = "tokens that follow it in text it was not trained on, and that steering it makes likelier"
LOOKED_AT = 1 << 16
"""Tokens on which thresholds and lengths are measured."""


def train_latents(model: Any, tokenizer: Any, recipe: Recipe, folder: Path) -> ConceptBank:
    """Encoders for every site that the recipe names, as a bank whose latents are labelled and measured."""
    check_order(model, recipe)
    sites = recipe.encoder_sites
    harvest(model, tokenizer, recipe.corpus_files(), sites, folder / "activations", tokens=recipe.tokens, seed=recipe.seed)
    shards = Shards(folder / "activations", held_out=HELD_OUT)
    trained = fitted(recipe, shards, folder / "encoders")
    labelled = read(model, tokenizer, recipe.read_attributes(), sites)
    texts, unrelated = Texts(tokenizer, shards), recipe.read_texts(recipe.unrelated)
    encoders: dict[str, Sparse] = {}
    concepts, found, telling = [], {}, {}
    for spec in recipe.encoders:
        id, site = spec.id, spec.reads or spec.site
        seen = sightings(trained[id], shards, site)
        encoders[id] = finished(trained[id], seen, head(shards, site))
        concepts += described(id, encoders[id], seen, texts, promoted(model, tokenizer, trained[id].decoder))
        x = held_out(shards, site)
        y = held_out(shards, spec.site)
        found[id] = figures(model, tokenizer, encoders[id], spec, x, y, unrelated, labelled[site])
        found[id] |= apart([trained[name] for name in spec.runs], x)
        telling |= most_telling(followers(encoders[id], shards, site), id, spec.verify)
    bank = bank_of(model, recipe, encoders, concepts, shards, found)
    bank = with_verified(bank, verify(model, tokenizer, bank, telling, unrelated), recipe, tokenizer)
    return bank if recipe.graph is None else with_graph_of(model, tokenizer, bank, recipe, folder / "graph")


def with_graph_of(model: Any, tokenizer: Any, bank: ConceptBank, recipe: Recipe, folder: Path) -> ConceptBank:
    """The bank with the graph that its recipe asks for, and a card that says so."""
    from ..discover.text_graph import contexts, graphed  # needs scipy

    own = recipe.graph or GraphRecipe()
    made = graphed(model, bank, contexts(tokenizer, recipe.corpus_files(), own), own, folder)
    made.card = latents_card(made, recipe)
    return made


def check_order(model: Any, recipe: Recipe) -> None:
    """Raise `BadRecipe` for a transcoder that would have to read what is not there yet."""
    host = host_for(model)
    for spec in recipe.encoders:
        if spec.reads and host.order(host.site(spec.reads)) >= host.order(host.site(spec.site)):
            raise BadRecipe(f"{spec.id!r}: expected it to read at a site before {spec.site!r}, got {spec.reads!r}")


def fitted(recipe: Recipe, shards: Shards, folder: Path) -> dict[str, Sparse]:
    """Every encoder and its twins, those of one site (or of one that is read and one that is written) from one pass."""
    found: dict[str, Sparse] = {}
    for reads, site in dict.fromkeys((spec.reads, spec.site) for spec in recipe.encoders):
        specs = [spec for spec in recipe.encoders if (spec.reads, spec.site) == (reads, site)]
        runs = {name: run for spec in specs for name, run in spec.runs.items()}
        steps = recipe.epochs * shards.training // specs[0].recipe.batch
        source = shards.source(reads or site, target=site if reads else None, seed=recipe.seed)
        found |= fit(runs, source, steps=steps, folder=folder / (f"{reads} to {site}" if reads else site))
    return found


def head(shards: Shards, site: str) -> Tensor:
    """Some training activations, as recorded."""
    return torch.cat(list(shards.in_order(site, 4096, 0, min(LOOKED_AT, shards.training)))).float()


def held_out(shards: Shards, site: str) -> Tensor:
    """Activations of documents that no encoder was trained on."""
    stop = min(len(shards), shards.training + LOOKED_AT)
    return torch.cat(list(shards.in_order(site, 4096, shards.training, stop))).float()


def finished(encoder: Sparse, seen: Sightings, x: Tensor) -> Sparse:
    """The encoder with the statistics of its latents, in half precision, and where latents compete with its threshold."""
    statistics = {"unit": seen.quantile(0.5), "frequency": seen.frequency.float(), "high": seen.quantile(0.995)}
    tensors = {name: tensor.detach().cpu().half() for name, tensor in (encoder.to_tensors() | statistics).items()}
    made = type(encoder).from_tensors(tensors, encoder.settings)
    return made.calibrated(x) if isinstance(made, TopK) else made


def described(id: str, encoder: Sparse, seen: Sightings, texts: Texts, promotes: Sequence[Sequence[str]]) -> list[Concept]:
    """A concept for every latent that fired: label, contexts, histogram, what it makes the model say."""
    concepts, histogram = [], seen.kept
    for i in map(int, (seen.frequency > 0).nonzero()[:, 0]):
        rows = [int(row) for row, value in zip(seen.rows[i], seen.highest[i], strict=True) if value > 0]
        filled = histogram[i].nonzero()[:, 0]
        effects = {
            "frequency": round(float(seen.frequency[i]), 6),
            "promotes": list(promotes[i]),
            "histogram": {"first": int(filled[0]), "counts": histogram[i, filled[0] : filled[-1] + 1].tolist()},
        }
        concepts.append(
            Concept(
                name=f"{id}/{i}",
                encoder=id,
                index=i,
                unit=float(encoder.statistics["unit"][i]),
                natural=(0.0, float(encoder.statistics["high"][i])),
                label=label([texts.token(row) for row in rows], list(promotes[i])),
                source="contexts and head",
                examples=tuple(dict.fromkeys(texts.around(row) for row in rows[:AMONG]))[:SHOWN],
                effects=effects,
            )
        )
    return concepts


def bank_of(
    model: Any,
    recipe: Recipe,
    encoders: Mapping[str, Sparse],
    concepts: Sequence[Concept],
    shards: Shards,
    found: Mapping[str, Mapping[str, Any]],
) -> ConceptBank:
    """The bank, yet without a card."""
    sites = {
        site: SiteFacts(width=shards.width(site), norm=float(head(shards, site).norm(dim=-1).median())) for site in shards.sites
    }
    return ConceptBank(
        recipe.name,
        concepts,
        encoders,
        base=BaseModel.of(model, id=recipe.base),
        sites=sites,
        reads={spec.id: spec.reads for spec in recipe.encoders},
        license=recipe.license,
        provenance={"recipe": recipe.name, "recipe_sha256": recipe.digest, "seed": recipe.seed, "quality": found}
        | {"tokens": shards.training, "corpus": sources(recipe.corpus_files())},
    )


def most_telling(found: Mapping[int, Followers], id: str, count: int) -> dict[str, Followers]:
    """The latents whose followers tell most, by name."""
    best = sorted(found, key=lambda i: -found[i].weight)[:count]
    return {f"{id}/{i}": found[i] for i in best}


def with_verified(bank: ConceptBank, found: Mapping[str, Verification], recipe: Recipe, tokenizer: Any) -> ConceptBank:
    """The bank with what moving latents did, and those that do what their contexts say labelled by it."""
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


def share(found: Sequence[Verification]) -> dict[str, Any]:
    """How many latents were moved and held, and how many would have by chance."""
    if not found:
        return {}
    sides = {
        "verified": [v.holds for v in found],
        "verified_random": [v.random for v in found],
        "verified_swapped": [v.swapped for v in found],
    }
    return {"moved": len(found), **{name: sum(side) for name, side in sides.items()}}


def labelled(concept: Concept, found: Verification, tokenizer: Any) -> Concept:
    """The concept with what moving it did; if that is what its contexts say, labelled by the tokens that follow it."""
    tokens = [tokenizer.decode([token]) for token in found.tokens]
    effects = {"tokens": tokens, "holds": found.holds}
    effects |= {
        name: round(value, 4) for name, value in (("gain", found.gain), ("others", found.others), ("highest", found.highest))
    }
    made = replace(concept, effects={**concept.effects, "verified": effects})
    if not found.holds:
        return made
    said = list(dict.fromkeys(token.strip() or "␣" for token in tokens))[:3]
    return replace(made, label="before " + ", ".join(f"“{token}”" for token in said), source=VERIFIED)
