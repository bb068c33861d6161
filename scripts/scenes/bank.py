"""The bank of the scenes model: directions and sparse latents at three noise levels, labelled by the true causes of pictures.

Activations are those of noised true renders, whose masks are exact, and of pictures that the model draws itself.

    folder/seen.safetensors   activations `site@level[B, N, D]`, in half precision
    folder/encoders/          what `fit` keeps of every encoder
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm

from scenes import contrast, places, world
from scenes.painting import noised
from steerlib.bank.concept_bank import ConceptBank
from steerlib.bank.concepts import Concept, Gate, Part
from steerlib.encoders import Directions, Sparse
from steerlib.evaluation.pictures import draw_as_told
from steerlib.training.entries import SiteEncoder
from steerlib.training.fit.encoder_recipe import EncoderRecipe
from steerlib.training.package.pictures import bank_of, best, described, fitted
from steerlib.training.record.noised import Seen, at_levels, joined
from steerlib.training.store import recorded

BASE = "scenes-32"
EARLY = ("unet.down_blocks.2.attentions.0", "unet.mid_block.attentions.0", "unet.up_blocks.0.attentions.0")
"""Blocks at 8 × 8 pixels, which settle where things are."""
LATE = ("unet.up_blocks.0.attentions.1", "unet.up_blocks.1.attentions.0", "unet.up_blocks.1.attentions.1")
"""Blocks behind them, the last two at 16 × 16 pixels, which settle what they look like."""
PLACES = {"object": "an object", "ground": "the ground", "background": "the sky or the wall", "light": "the disc of the light"}
"""Concepts that read where something is."""
GATES = dict.fromkeys(world.OBJECT, "object") | {"ground": "ground", "background": "background"}
"""Where the levers of a factor act."""
BATCH = 100
"""Pictures that are recorded together."""
LIKE = 0.25
"""Correlation with a cause from which on a latent is named after it."""


@dataclass(frozen=True, kw_only=True)
class SceneRecipe:
    """All that the bank depends on, but for the pipeline.

    Attributes:
        pictures: true renders to learn from, with noise.
        drawn: pictures to learn from that the pipeline draws.
        levels: timesteps of the paper (arXiv 2512.10720).
        latents: of each encoder.
        k: of which so many fire at a token.
        epochs: how often encoders see the pictures.
        seeds: of each encoder; the second tells how much of it every seed finds.
        seed: of everything drawn at random.
    """

    pictures: int = 2000
    drawn: int = 500
    levels: tuple[int, ...] = (899, 500, 100)
    latents: int = 384
    k: int = 12
    epochs: int = 4
    seeds: int = 2
    seed: int = 0

    @property
    def sites(self) -> list[str]:
        """What each block's cross-attention adds to the residual stream."""
        return [f"{block}.transformer_blocks.0.attn2" for block in EARLY + LATE]

    @property
    def encoders(self) -> list[SiteEncoder]:
        """One for each site and level."""
        own = EncoderRecipe(
            kind="topk",
            latents=self.latents,
            k=self.k,
            batch=2048,
            normalise="std",
            rate=1e-3,
            dead_after=100_000,
            seed=self.seed,
        )
        return [SiteEncoder(site=s, level=t, recipe=own, seeds=self.seeds) for t in self.levels for s in self.sites]


def train_scene_bank(pipe: Any, recipe: SceneRecipe, folder: Path) -> ConceptBank:
    """Directions for every value of `places.LEVERS` and latents for every site and level; yet without measured effects."""
    drawn = truth(recipe)
    seen = recorded(folder / "seen.safetensors", lambda: seen_by(pipe, recipe))
    latents, figures = fitted(recipe.encoders, seen, folder / "encoders", epochs=recipe.epochs)
    encoders: dict[str, Any] = {f"{key}#causes": causes(x, drawn) for key, x in seen.items()}
    encoders |= {f"{key}#places": presences(x, drawn) for key, x in seen.items()}
    concepts = [*levers([f"{site}@{level}" for level in recipe.levels for site in recipe.sites])]
    for id, encoder in latents.items():
        found = named(encoder, seen[id], drawn)
        concepts += [labelled(c, found) for c in described(id, encoder, *found[:2])]
    bank = bank_of(pipe, BASE, BASE, concepts, encoders | latents, seen)
    bank.sites = {site: replace(facts, norm=None) for site, facts in bank.sites.items()}  # changes are not capped
    bank.provenance = {"quality": figures, "seed": recipe.seed, "pictures": recipe.pictures, "drawn": recipe.drawn}
    return bank


def truth(recipe: SceneRecipe) -> world.Scenes:
    """What the recorded pictures show: true renders, then those that are to be drawn."""
    parts = [world.draw(n, seed=(recipe.seed, 41, k)) for k, n in enumerate((recipe.pictures, recipe.drawn))]
    noise, factors = (
        {n: np.concatenate([getattr(p, kind)[n] for p in parts]) for n in world.VALUES} for kind in ("noise", "factors")
    )
    return world.Scenes(noise, factors, *(np.concatenate([getattr(p, kind) for p in parts]) for kind in ("pixels", "regions")))


def seen_by(pipe: Any, recipe: SceneRecipe) -> Seen:
    """What the model's cross-attention adds for all of these pictures, at every level."""
    drawn = truth(recipe)
    said, parts = world.captions(drawn.factors, seed=(recipe.seed, 41)), []
    bounds = [0, *range(BATCH, recipe.pictures, BATCH), recipe.pictures]
    bounds += [*range(recipe.pictures + BATCH, len(said), BATCH), *([len(said)] if recipe.drawn else [])]
    for start, stop in tqdm([*pairwise(bounds)], desc="recording", leave=False):
        if start < recipe.pictures:
            seed = recipe.seed * 7919 + start
            run = partial(noised, pipe, drawn.pixels[start:stop], said[start:stop], recipe.levels, seed=seed)
        else:
            run = partial(draw_as_told, pipe, said[start:stop], seed=start, batch=BATCH)
        parts.append(at_levels(pipe, recipe.sites, recipe.levels, run))
    return joined(parts)


# -- directions --------------------------------------------------------------------------------------------------


def causes(x: Tensor, drawn: world.Scenes) -> Directions:
    """Difference of means for every value of every lever, in order, among scenes of one type where that is a cause."""
    flat, count, parts = x.flatten(0, 1).float(), x.shape[1], []
    scene = torch.from_numpy(drawn.factors["scene"]).long().repeat_interleave(count)
    for factor in places.LEVERS:
        value = places.where(factor, drawn, count).flatten()
        confounded = factor in world.BY_SCENE
        parts.append(contrast.differences(flat, value, len(places.values(factor)), within=scene if confounded else None))
    return contrast.joined(parts)


def presences(x: Tensor, drawn: world.Scenes) -> Directions:
    """For every one of `PLACES` what sets its tokens apart from all others."""
    flat, count = x.flatten(0, 1).float(), x.shape[1]
    return contrast.joined([contrast.presence(flat, there(name, drawn, count).flatten()) for name in PLACES])


def there(place: str, drawn: world.Scenes, count: int) -> Bool[Tensor, "B N"]:
    """Tokens at a place."""
    return places.objects(drawn, count) if place == "object" else places.covered(drawn.regions, [place], count) > places.SHARE


def levers(keys: list[str]) -> Iterator[Concept]:
    """A concept for each place, read at every site, and for each value: a coordinate at each of three sites, at every level."""
    late, early = ([key for key in keys if key.startswith(blocks)] for blocks in (LATE, EARLY))
    for index, (name, label) in enumerate(PLACES.items()):
        yield _everywhere(
            name, [*late, *early], "places", index, label=label, present=0.5, source="difference of means over tokens"
        )
    index = 0
    for factor in places.LEVERS:
        gate = Gate(GATES[factor], above=0.25, full=0.75) if factor in GATES else None
        for value in places.values(factor):
            label, source = f"{factor}: {value}", "difference of means over tokens, adjusted for the scene"
            said = {"factor": factor, "examples": world.WORDS[factor][value]}
            keys = early if factor == "side" else late
            yield _everywhere(value, keys, "causes", index, label=label, gate=gate, source=source, **said)
            index += 1


def _everywhere(name: str, keys: list[str], kind: str, index: int, **facts: Any) -> Concept:
    first, *others = (f"{key}#{kind}" for key in keys)
    parts = tuple(Part(encoder=id, index=index, unit=1.0) for id in others)
    return Concept(name=name, encoder=first, index=index, parts=parts, **facts)


# -- latents -----------------------------------------------------------------------------------------------------


def shown(drawn: world.Scenes, count: int) -> dict[str, Bool[Tensor, " T"]]:
    """By cause, the tokens that show it."""
    found = {name: there(name, drawn, count).flatten() for name in PLACES}
    for factor in places.LEVERS:
        value: Int[Tensor, " T"] = places.where(factor, drawn, count).flatten()
        found |= {f"{factor}: {name}": value == i for i, name in enumerate(places.values(factor))}
    return found


def named(encoder: Sparse, x: Tensor, drawn: world.Scenes) -> tuple[list[str], Tensor, Tensor]:
    """For each latent the cause that its readings go with most, the correlation, and the overlap (IoU) of where they are."""
    z, found = encoder.encode(x.flatten(0, 1).float()), shown(drawn, x.shape[1])
    labels, likeness = best(z, found)
    true = torch.stack([found[label] for label in labels], 1)
    fires = z > 0
    overlap = (fires & true).sum(0) / (fires | true).sum(0).clamp(min=1)
    return labels, likeness, overlap


def labelled(concept: Concept, found: tuple[list[str], Tensor, Tensor]) -> Concept:
    """The latent with its overlap, and without a label where it goes with no cause in particular."""
    labels, likeness, overlap = found
    effects = {**concept.effects, "overlap": round(float(overlap[concept.index]), 4)}
    is_clear = float(likeness[concept.index]) >= LIKE
    values = {**concept.to_dict(), "effects": effects, "label": labels[concept.index] if is_clear else ""}
    return Concept.from_dict(values)
