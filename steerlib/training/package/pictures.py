"""From a diffusers pipeline to a bank of latents by noise level: draw, fit, look, measure. A run that stops goes on.

folder/seen.safetensors   activations `site@level`, a share of the tokens of every picture
folder/encoders/          what `fit` keeps of every encoder
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from ...bank.concept_bank import BaseModel, ConceptBank, SiteFacts
from ...bank.concepts import Concept
from ...encoders import Sparse, TopK
from ...errors import BadRecipe
from ...evaluation.representation import dead_share, dense_share, explained_variance, l0, random_encoder
from ..fit.inputs import Tokens
from ..fit.run import fit
from ..recipe import Recipe, SiteEncoder
from ..record.documents import documents
from ..record.noised import Seen, at_levels, joined, spans
from .card import pictures_card
from .quality import apart

HELD_OUT = 0.1
"""Share of the pictures that encoders are not trained on."""
TOKENS = 64
"""Tokens of a picture that are kept at a site, drawn at random."""
STEPS = 20
"""Scheduler steps of a picture."""
BATCH = 8
"""Prompts that are drawn together."""


def train_pictures(pipe: Any, recipe: Recipe, folder: Path) -> ConceptBank:
    """Encoders for every site and level that the recipe names; latents are labelled by the words of prompts they go with.

    The recipe's corpus is prompts. `recipe.tokens` is how many tokens of every site are recorded in all.
    """
    prompts = [text for text in documents(recipe.corpus_files()) if isinstance(text, str)]
    prompts = prompts[: max(2, recipe.tokens // TOKENS)]
    pipe.set_progress_bar_config(disable=True)
    seen = recorded(folder, prompts_seen(pipe, prompts, recipe))
    encoders, figures = fitted(recipe.encoders, seen, folder / "encoders", epochs=recipe.epochs)
    named = words(prompts)
    concepts = [
        concept
        for id, encoder in encoders.items()
        for concept in described(id, encoder, *by_picture(encoder, seen[_key(id)], named))
    ]
    made = bank_of(pipe, recipe.name, recipe.base, concepts, encoders, seen, levels_of(recipe.encoders))
    made.provenance = {"recipe": recipe.name, "recipe_sha256": recipe.digest, "seed": recipe.seed, "quality": figures}
    made.license = recipe.license
    return made.with_concepts(concepts, card=pictures_card(made, recipe.description))


def levels_of(encoders: Sequence[SiteEncoder]) -> list[int]:
    """Noise levels, the noisiest first."""
    return sorted({spec.level for spec in encoders if spec.level is not None}, reverse=True)


def _key(id: str) -> str:
    return id.partition("#")[0]


# -- activations -------------------------------------------------------------------------------------------------


def prompts_seen(pipe: Any, prompts: Sequence[str], recipe: Recipe) -> Callable[[], Seen]:
    """What a pipeline shows while it draws prompts, some tokens of every picture."""
    sites, levels = [*dict.fromkeys(spec.site for spec in recipe.encoders)], levels_of(recipe.encoders)

    def see() -> Seen:
        parts = []
        for start in tqdm(range(0, len(prompts), BATCH), desc="drawing", leave=False):
            some = list(prompts[start : start + BATCH])
            g = [torch.Generator().manual_seed(recipe.seed + start + k) for k in range(len(some))]
            run = lambda: pipe(some, num_inference_steps=STEPS, generator=g, output_type="latent")  # noqa: B023, E731
            parts.append(thinned(at_levels(pipe, sites, levels, run), TOKENS, recipe.seed + start))
        return joined(parts)

    return see


def thinned(seen: Seen, count: int, seed: int) -> Seen:
    """At most `count` tokens of every picture, the same ones at all sites of one size."""
    found = {}
    for key, x in seen.items():
        chosen = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(seed))[:count].sort().values
        found[key] = x[:, chosen.to(x.device)]
    return found


def recorded(folder: Path, see: Callable[[], Seen]) -> Seen:
    """What is in the folder, or else what is seen now, written down."""
    path = folder / "seen.safetensors"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: x.contiguous() for name, x in see().items()}, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    return load_file(path)


def halves(x: Float[Tensor, "B N D"]) -> tuple[Float[Tensor, "T D"], Float[Tensor, "H D"]]:
    """Tokens to train on, and those of the last pictures, held out."""
    cut = max(1, round(len(x) * (1 - HELD_OUT)))
    return x[:cut].flatten(0, 1).float(), x[cut:].flatten(0, 1).float()


# -- encoders ----------------------------------------------------------------------------------------------------


def fitted(
    specs: Iterable[SiteEncoder], seen: Seen, folder: Path, *, epochs: int
) -> tuple[dict[str, Sparse], dict[str, dict[str, Any]]]:
    """Every encoder with the statistics of its latents, in half precision, and what is measured of it on held-out pictures."""
    encoders: dict[str, Sparse] = {}
    figures: dict[str, dict[str, Any]] = {}
    for spec in tqdm(list(specs), desc="encoders", leave=False):
        x, apart_x = halves(seen[_key(spec.id)])
        if len(x) < spec.recipe.batch:
            raise BadRecipe(f"{spec.id!r}: expected {spec.recipe.batch} tokens or more for one batch, got {len(x)}; draw more")
        steps = max(1, epochs * len(x) // spec.recipe.batch)
        runs = fit(spec.runs, Tokens(x, seed=spec.recipe.seed), steps=steps, folder=folder / re.sub(r"[^\w.@-]", "_", spec.id))
        encoders[spec.id] = finished(runs[spec.id], x)
        figures[spec.id] = measured(encoders[spec.id], apart_x) | apart([runs[name] for name in spec.runs], apart_x)
    return encoders, figures


def finished(encoder: Sparse, x: Float[Tensor, "T D"]) -> Sparse:
    """The encoder with unit, frequency and highest natural reading of every latent and, where latents compete, a threshold."""
    z = encoder.encode(x[: 1 << 16])
    fires = z > 0
    positive = torch.where(fires, z, torch.nan)
    unit, high = (positive.nanquantile(q, dim=0).nan_to_num(0.0) for q in (0.5, 0.995))
    statistics = {"unit": unit, "frequency": fires.float().mean(0), "high": high}
    tensors = {name: t.detach().cpu().half() for name, t in (encoder.to_tensors() | statistics).items()}
    made = type(encoder).from_tensors(tensors, encoder.settings)
    return made.calibrated(x[: 1 << 14]) if isinstance(made, TopK) else made


def measured(encoder: Sparse, x: Float[Tensor, "H D"]) -> dict[str, Any]:
    """What an encoder keeps of activations it was not trained on, and how much of it is used."""
    z = encoder.encode(x)
    control = random_encoder(encoder, x, max(1, round(l0(z))))
    return {
        "kind": encoder.kind,
        "latents": len(encoder.encoder),
        "tokens": len(x),
        "explained": explained_variance(x, encoder.reconstruct(x)),
        "control": explained_variance(x, control.reconstruct(x)),
        "l0": l0(z),
        "dead": dead_share(z),
        "dense": dense_share(z),
        "used": used(z),
    }


def used(z: Float[Tensor, "T n"]) -> float:
    """Share of the dictionary that is in use: the exponential of the entropy of how often latents fire, over their number."""
    share = (z > 0).double().sum(0)
    share = share / share.sum().clamp(min=1)
    return float(torch.exp(-(share * share.clamp(min=1e-12).log()).sum()) / len(share))


# -- labels ------------------------------------------------------------------------------------------------------


def words(prompts: Sequence[str], *, least: int = 4) -> dict[str, Bool[Tensor, " B"]]:
    """For every word of several prompts, though not of all, which ones have it."""
    have = [{*re.findall(r"\w+", prompt.lower())} for prompt in prompts]
    counted = {word: sum(word in some for some in have) for word in sorted(set[str]().union(*have))}
    usual = {word for word, count in counted.items() if least <= count <= len(have) - least}
    return {word: torch.tensor([word in some for some in have]) for word in sorted(usual)}


def by_picture(
    encoder: Sparse, x: Float[Tensor, "B N D"], named: Mapping[str, Bool[Tensor, " B"]]
) -> tuple[list[str], Float[Tensor, " n"]]:
    """For each latent what its mean reading over a picture goes with most, and how much."""
    z = torch.stack([encoder.encode(picture.float()).mean(0) for picture in x])
    return best(z, named)


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
    unit, high, frequency = (encoder.statistics[name].float() for name in ("unit", "high", "frequency"))
    return [
        Concept(
            name=f"{id}/{i}",
            encoder=id,
            index=i,
            unit=float(unit[i]),
            natural=(0.0, max(float(high[i]), float(unit[i]))),
            label=labels[i],
            source="correlation of its readings",
            effects={"frequency": round(float(frequency[i]), 6), "correlation": round(float(likeness[i]), 4)},
        )
        for i in range(len(unit))
        if unit[i] > 0
    ]


def bank_of(
    pipe: Any,
    name: str,
    base: str,
    concepts: Sequence[Concept],
    encoders: Mapping[str, Any],
    seen: Seen,
    levels: Sequence[int],
    *,
    capped: bool = True,
) -> ConceptBank:
    """The bank, yet without a card. `capped`: whether changes are kept to a share of what is usual at a site."""
    at: dict[str, list[Tensor]] = {}
    for key, x in seen.items():
        at.setdefault(key.partition("@")[0], []).append(x.flatten(0, 1)[:4096].float())
    norms = {site: float(torch.cat(parts).norm(dim=-1).median()) if capped else None for site, parts in at.items()}
    sites = {site: SiteFacts(width=parts[0].shape[1], norm=norms[site]) for site, parts in at.items()}
    identity = BaseModel.of(pipe, id=base)
    return ConceptBank(name, concepts, encoders, base=identity, sites=sites, levels=spans(pipe, levels))
