"""From a diffusers pipeline to a bank of latents by noise level: draw, fit, look, measure. A run that stops goes on.

seen/       activations `site@level`, a share of the tokens of every picture, a file for each batch
encoders/   what `fit` keeps of every encoder
graph/      what latents read of other pictures, and where some were moved
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from ...bank.concept_bank import BaseModel, ConceptBank
from ...bank.concepts import Concept
from ...bank.effects import LatentEffects
from ...encoders import Sparse
from ...errors import BadRecipe
from ...evaluation.quality import apart, control_of, kept, used
from ...hosts import host_for
from ...text import progress, stage
from ..entries import LatentGraphRecipe, SiteEncoder
from ..fit.inputs import Tokens
from ..recipe import PipelineEncoderRecipe
from ..record.documents import documents
from ..record.noised import Seen, at_levels, joined, spans
from ..store import recorded
from .card import pictures_card
from .encoders import HELD_OUT, Readings, describe, finish, site_facts, trained

TOKENS = 64
"""Tokens of a picture that are kept at a site, chosen at random."""
STEPS = 20
"""Scheduler steps of a picture."""
BATCH = 8
"""Prompts that are drawn together."""
LEAST = 4
"""Prompts that have a word which latents are labelled by, and prompts that lack it."""
LOOKED_AT, CALIBRATED = 1 << 16, 1 << 14
"""Tokens on which readings, and thresholds, are measured."""
FACTS = 4096
"""Tokens of each level by which the length of a site's activations is known."""


def train_pictures(pipe: Any, recipe: PipelineEncoderRecipe, folder: Path) -> ConceptBank:
    """Encoders for every site and level that the recipe names, as a bank whose latents are labelled by words of the prompts.

    The recipe's corpus is prompts; `recipe.tokens` is how many tokens of every site are recorded in all. A folder beside
    `folder` keeps what was recorded, and checkpoints.
    """
    prompts = prompts_of(recipe)
    pipe.set_progress_bar_config(disable=True)
    place = folder.parent / recipe.recorded_key
    count = 3 + (recipe.graph is not None)
    with stage(1, count, f"drawing {len(prompts)} prompts"):
        seen = drawn(pipe, prompts, recipe, place=place / "seen")
    with stage(2, count, f"fitting and measuring {len(recipe.encoders)} encoders"):
        at = place / "encoders" / recipe.fitted_key(recipe.encoders)
        encoders, figures = fitted(recipe.encoders, seen, at, epochs=recipe.epochs)
    named, concepts = words(prompts), []
    with stage(3, count, "labelling latents by words of the prompts"):
        for id, encoder in encoders.items():
            z = torch.stack([encoder.encode(picture.float()).mean(0) for picture in seen[id.partition("#")[0]]])
            concepts += described(id, encoder, *best(z, named))
    made = bank_of(pipe, recipe.name, recipe.base, concepts, encoders, seen)
    made.provenance = {**recipe.provenance, "quality": figures}
    made.license = recipe.license
    if recipe.graph is not None:
        with stage(4, count, "finding parts of wholes, and moving wholes"):
            made = with_graph_of(pipe, made, recipe, prompts, folder / "graph")
        concepts = [*made.concepts.values()]
    return made.with_concepts(concepts, card=pictures_card(made, recipe))


def with_graph_of(
    pipe: Any, bank: ConceptBank, recipe: PipelineEncoderRecipe, prompts: Sequence[str], folder: Path
) -> ConceptBank:
    """The bank with the graph that its recipe describes, found on new pictures of its prompts."""
    from ..discover.latent_graph import graphed  # needs scipy
    from ..discover.steered_pictures import SteeredPictures

    own = recipe.graph or LatentGraphRecipe()
    asked = islice(cycle(prompts), own.contexts)
    contexts = [(prompt, recipe.seed + len(prompts) + k) for k, prompt in enumerate(asked)]  # encoders saw the noises before
    draw = lambda some, seeds: painted(pipe, some, seeds)  # noqa: E731
    first, second = (SteeredPictures(pipe, bank, some, draw, BATCH) for some in (contexts[: own.first], contexts[own.first :]))
    return graphed(bank, first, second, own, folder)


def painted(pipe: Any, prompts: Sequence[str], seeds: Sequence[int]) -> None:
    """Draw prompts, each from the noise of its seed."""
    g = [torch.Generator().manual_seed(seed) for seed in seeds]
    pipe([*prompts], num_inference_steps=STEPS, generator=g, output_type="latent")


def prompts_of(recipe: PipelineEncoderRecipe) -> list[str]:
    """The prompts that are drawn: as many as give the tokens that the recipe asks for."""
    prompts = [text for text in documents(recipe.read_corpus()) if isinstance(text, str)]
    if len(prompts) < 2:
        raise BadRecipe(f"expected two prompts or more in {', '.join(recipe.corpus)}, got {len(prompts)}")
    return prompts[: max(2, recipe.tokens // TOKENS)]


def evaluate_pictures(
    pipe: Any, bank: ConceptBank, recipe: PipelineEncoderRecipe, *, against: ConceptBank | None = None
) -> dict[str, dict[str, Any]]:
    """What the encoders of a bank keep of the recipe's last prompts, which none was trained on, by id: as a training run
    measures it. With `against`, a bank of the same encoders trained from another seed, also how much of each that one found."""
    bank.check(host_for(pipe))
    if not isinstance(recipe, PipelineEncoderRecipe):
        raise BadRecipe(f"recipe {recipe.name!r} is of a language model, bank {bank.name!r} of one that draws; give its own")
    prompts = prompts_of(recipe)
    first = held_from(len(prompts))
    pipe.set_progress_bar_config(disable=True)
    seen, found = drawn(pipe, prompts, recipe, first), {}
    for id in bank.encoders:
        encoder, x = bank.encoder(id), seen[id.partition("#")[0]].flatten(0, 1).float()
        if isinstance(encoder, Sparse):
            twin = against.encoder(id) if against is not None and id in against.encoders else None
            found[id] = kept(encoder, x, x, control_of(encoder, x, x)) | {"used": used(encoder.encode(x))}
            found[id] |= apart([encoder, *([twin] if isinstance(twin, Sparse) else [])], x)
    return found


def drawn(pipe: Any, prompts: Sequence[str], recipe: PipelineEncoderRecipe, first: int = 0, place: Path | None = None) -> Seen:
    """Activations while prompts are drawn, from the `first` on, of some tokens of every picture. `place` keeps each batch."""
    parts = []
    for start in progress(range(first // BATCH * BATCH, len(prompts), BATCH), "drawing"):
        file = None if place is None else place / f"{start:06}.safetensors"
        part = recorded(file, lambda s=start: _batch(pipe, prompts[s : s + BATCH], recipe, s))
        parts.append({key: x[max(0, first - start) :] for key, x in part.items()})
    return joined(parts)


def _batch(pipe: Any, some: Sequence[str], recipe: PipelineEncoderRecipe, start: int) -> Seen:
    """What prompts show, the first of which is number `start`: a site at the levels of its encoders, and of the first pictures
    at all levels, for what the bank says of the site."""
    seeds = range(recipe.seed + start, recipe.seed + start + len(some))
    seen = at_levels(pipe, recipe.encoder_sites, recipe.levels, lambda: painted(pipe, some, seeds))
    few = thinned(seen, TOKENS, recipe.seed + start)
    return {key: x.half() for key, x in few.items() if key in recipe.encoder_places or start * x.shape[1] < FACTS}


def thinned(seen: Seen, count: int, seed: int) -> Seen:
    """At most `count` tokens of every picture, the same ones at all sites of one size."""
    found = {}
    for key, x in seen.items():
        chosen = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(seed))[:count].sort().values
        found[key] = x[:, chosen.to(x.device)]
    return found


def held_from(count: int) -> int:
    """The first of so many pictures that no encoder is trained on."""
    return max(1, round(count * (1 - HELD_OUT)))


def halves(x: Float[Tensor, "B N D"]) -> tuple[Float[Tensor, "T D"], Float[Tensor, "H D"]]:
    """Tokens to train on, and those of the last pictures, held out."""
    cut = held_from(len(x))
    return x[:cut].flatten(0, 1).float(), x[cut:].flatten(0, 1).float()


def fitted(
    specs: Iterable[SiteEncoder], seen: Seen, folder: Path, *, epochs: int
) -> tuple[dict[str, Sparse], dict[str, dict[str, Any]]]:
    """Every encoder with the statistics of its latents, in half precision, and what is measured of it on held-out pictures."""
    encoders: dict[str, Sparse] = {}
    figures: dict[str, dict[str, Any]] = {}
    for spec in progress(list(specs), "encoders"):
        x, apart_x = halves(seen[spec.id.partition("#")[0]])
        if len(x) < spec.recipe.batch:
            raise BadRecipe(f"{spec.id!r}: expected {spec.recipe.batch} tokens or more for one batch, got {len(x)}; draw more")
        place = folder / re.sub(r"[^\w.@-]", "_", spec.id)
        runs = trained([spec], Tokens(x, seed=spec.recipe.seed), place, epochs=spec.epochs or epochs)
        own = runs[spec.id]
        encoder = encoders[spec.id] = finish(own, Readings.of(own.encode(x[:LOOKED_AT])), x[:CALIBRATED])
        figures[spec.id] = kept(encoder, apart_x, apart_x, control_of(encoder, apart_x, apart_x))
        figures[spec.id] |= {"used": used(encoder.encode(apart_x))} | apart([runs[name] for name in spec.runs], apart_x)
    return encoders, figures


def words(prompts: Sequence[str]) -> dict[str, Bool[Tensor, " B"]]:
    """For every word that `LEAST` prompts or more have, and as many lack, which ones have it."""
    have = [{*re.findall(r"\w+", prompt.lower())} for prompt in prompts]
    counted = {word: sum(word in some for some in have) for word in sorted(set[str]().union(*have))}
    usual = {word for word, count in counted.items() if LEAST <= count <= len(have) - LEAST}
    return {word: torch.tensor([word in some for some in have]) for word in sorted(usual)}


def best(z: Float[Tensor, "T n"], named: Mapping[str, Bool[Tensor, " T"]]) -> tuple[list[str], Float[Tensor, " n"]]:
    """For each latent the attribute that its readings correlate with most (Pearson), and the correlation."""
    if not named:
        return [""] * z.shape[1], torch.zeros(z.shape[1])
    there = torch.stack(list(named.values()), 1).float()
    likeness = normalize(z - z.mean(0), dim=0).T @ normalize(there - there.mean(0), dim=0)
    value, index = likeness.max(1)
    names = list(named)
    return [names[int(i)] for i in index], value


def described(id: str, encoder: Sparse, labels: Sequence[str], likeness: Float[Tensor, " n"]) -> list[Concept]:
    """A concept for every latent that fires, with its label."""
    frequency = encoder.statistics["frequency"].float()

    def about(i: int) -> dict[str, Any]:
        effects: LatentEffects = {"frequency": round(float(frequency[i]), 6), "correlation": round(float(likeness[i]), 4)}
        return {"label": labels[i], "source": "correlation of its readings", "effects": effects}

    return describe(id, encoder, about)


def bank_of(
    pipe: Any, name: str, base: str, concepts: Sequence[Concept], encoders: Mapping[str, Any], seen: Seen
) -> ConceptBank:
    """The bank, without a card; its levels are those of the activations."""
    at: dict[str, list[Tensor]] = {}
    for key, x in seen.items():
        at.setdefault(key.partition("@")[0], []).append(x.flatten(0, 1)[:FACTS].float())
    sites = {site: site_facts(torch.cat(parts)) for site, parts in at.items()}
    levels = spans(pipe, sorted({int(key.partition("@")[2]) for key in seen}))
    return ConceptBank(name, concepts, encoders, base=BaseModel.of(pipe, id=base), sites=sites, levels=levels)
