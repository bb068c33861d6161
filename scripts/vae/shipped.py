"""The bank `faces-32-latents`: an autoencoder of diffusers, trained on drawn faces, whose latents are concepts."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from steerlib.bank.autoencoders import posterior
from steerlib.bank.card import front
from steerlib.bank.concept_bank import ConceptBank
from steerlib.bank.concepts import Concept
from steerlib.bank.manifest import BaseModel
from steerlib.evaluation import study
from steerlib.evaluation.datasets import Data
from steerlib.evaluation.decoders import decoding
from steerlib.evaluation.interventions import Decoder, Interval
from steerlib.steering.interventions import Add
from steerlib.text import progress

from .findings import SHOWN, figures_of, short, table
from .objectives import Draw, Loss, divergence, total_correlation
from .run import QUICK, Size, pictures, train, unexplained
from .tiny import Plain, empty, exported
from .worlds import WORLDS

NAME, MODEL, WORLD = "faces-32-latents", "autoencoder", "faces"


class Part(NamedTuple):
    """A part of training.

    Args:
        steps: of it.
        noise: standard deviation of pixels, from 0 to 1, about what is decoded; the less, the finer the details that are drawn.
        apart: weight of the total correlation.
    """

    steps: int
    noise: float
    apart: float


PARTS = (Part(4000, 0.15, 15.0), Part(4000, 0.08, 25.0), Part(3000, 0.04, 40.0))
"""First what is large comes apart, then what is small is added."""
SIZE = QUICK._replace(pictures=8000, steps=sum(part.steps for part in PARTS))
"""Measured on as many faces as a run of the study."""
HIDDEN = "decoder.layers.7:BDN"
"""Units in the middle of the decoder, at 4 x 4 places, by which modularity is measured."""
MOVED, CHANCE, FACES = 1.0, 8, 64
"""Units by which a latent is moved each way, random directions as long beside it, and faces that are moved."""


# -- training ----------------------------------------------------------------------------------------------------------


def objective(part: Part, count: int) -> Loss:
    """That of beta-TC-VAE with normal pixels, in nats a picture, of which the data has `count`. Only the first part begins with
    little asked of latents."""

    def loss(model: Plain, x: Tensor, asked: float) -> Tensor:
        q = model.encode(x)
        d = Draw(q.rsample(), q)
        unlikely = (model.decode(d.z) - x).square().sum() / (2 * part.noise**2 * len(x))
        weight = asked if part is PARTS[0] else 1.0
        return unlikely + weight * (divergence(q) + part.apart * total_correlation(d, count))

    return loss


def trained(folder: Path, size: Size | None = None) -> Any:
    """The autoencoder in a folder, stored in half precision; trained first where it is not there, going on where it was cut
    off."""
    size, kept = size or SIZE, folder / MODEL
    if not (kept / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        x = pictures(WORLD, size)[0].inputs.contiguous(memory_format=torch.channels_last)
        torch.manual_seed(0)
        plain: Any = Plain(x.shape[1], size.latents)
        plain.to(memory_format=torch.channels_last)
        with progress(None, "training", total=size.steps) as bar:
            for k, part in enumerate(PARTS):
                own = size._replace(steps=size.steps * part.steps // SIZE.steps)
                how: dict[str, Any] = {"tick": lambda: bar.update(1), "kept": folder / f"training-{k}.pt"}
                train(plain.requires_grad_(), x, lambda part=part: objective(part, len(x)), own, k, **how)
        exported(plain, empty(x.shape[1], size.latents)).half().save_pretrained(kept)
    return loaded(kept)


def loaded(folder: Path) -> Any:
    """The autoencoder in a folder."""
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    return AutoencoderTiny.from_pretrained(folder, torch_dtype=torch.float32).eval()


@lru_cache(maxsize=1)
def held(size: Size) -> Data:
    """Faces whose values together are none of those that it learned from, as many as are told."""
    world = WORLDS[WORLD]
    seen, drawn = world.values(size.pictures, 0), world.values(8 * size.told, 2)
    known = {*zip(*(own.tolist() for own in seen.values()), strict=True)}
    rows = zip(*(own.tolist() for own in drawn.values()), strict=True)
    new = [k for k, row in enumerate(rows) if row not in known][: size.told]
    values = {name: own[new] for name, own in drawn.items()}
    return Data(world.pictures(values, size.side), {name: own.tolist() for name, own in values.items()})


# -- what a judge sees -------------------------------------------------------------------------------------------------


class Judge(NamedTuple):
    """Reads factors from pictures linearly, in standard deviations of each factor: found by ridge regression from true
    pictures and what they were drawn from, which no autoencoder has touched."""

    names: tuple[str, ...]
    weight: Float[Tensor, "pixels factors"]
    right: dict[str, float]
    """Share of each factor's variance that it explains in true pictures which it was not found from."""

    def __call__(self, x: Tensor) -> Float[Tensor, "B factors"]:
        """Of pictures from 0 to 1."""
        return _flat(x) @ self.weight


def _flat(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x.flatten(1), (0, 1), value=1.0)


@lru_cache(maxsize=1)
def judge(size: Size, penalty: float = 10.0) -> Judge:
    """Of the faces that the autoencoder learned from; how right it is, on the others."""
    seen, others = pictures(WORLD, size)[0], held(size)
    values = [torch.stack([torch.tensor(part.factors[name]) for name in part.factors], 1).float() for part in (seen, others)]
    y, other = ((v - values[0].mean(0)) / values[0].std(0) for v in values)
    x = _flat(seen.inputs)
    weight = torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
    right = 1 - (_flat(others.inputs) @ weight - other).square().mean(0) / other.var(0, correction=0)
    return Judge(tuple(seen.factors), weight, dict(zip(seen.factors, right.tolist(), strict=True)))


class Moved(NamedTuple):
    """By how many standard deviations of each factor a move of a latent changes what the judge reads, and what as long random
    directions do, in absolute numbers."""

    each: dict[str, dict[str, Interval]]
    chance: dict[str, float]


@torch.no_grad()
def moved(vae: Any, bank: ConceptBank, x: Tensor, read: Judge, seed: int = 0) -> Moved:
    """Of pictures from 0 to 1: from `MOVED` units less to as many more, steered with the bank; interval over pictures."""
    z = posterior(vae.encode(2 * x - 1)).mean
    decoder = Decoder(vae, decoding(vae), bank)

    def between(low: Tensor, high: Tensor) -> Tensor:
        return read((high + 1) / 2) - read((low + 1) / 2)

    each = {}
    for name in bank.concepts:
        change = between(*(decoder(z, {name: Add(sign * MOVED)}) for sign in (-1, 1)))
        each[name] = {factor: Interval.of(change[:, k]) for k, factor in enumerate(read.names)}
    units = torch.zeros(z.shape[1])
    for concept in bank.concepts.values():
        units[concept.index] = concept.unit
    drawn = torch.randn(CHANCE, len(units), generator=torch.Generator().manual_seed(seed)) * (units > 0)
    drawn = (MOVED * units * drawn / drawn.norm(dim=1, keepdim=True))[..., None, None]  # one unit long, in their units
    chance = torch.stack([between(*(decoder(z + sign * by) for sign in (-1, 1))).mean(0).abs() for by in drawn]).mean(0)
    return Moved(each, dict(zip(read.names, chance.tolist(), strict=True)))


# -- the bank ----------------------------------------------------------------------------------------------------------

ABOUT = f"""A small autoencoder of drawn faces whose active latents are concepts. It lies in the bank, in `{MODEL}/`: an
`AutoencoderTiny` of diffusers with {SIZE.latents} latents in one place, which reads and draws {SIZE.side} × {SIZE.side} pixels.
It was trained without labels, as beta-TC-VAE (Chen et al. 2018), on {SIZE.pictures:,} faces that `scripts/vae/worlds.py`
draws from seven factors; nobody's face is among them. Figures are of {SIZE.told:,} faces none of which it was trained on.
`python -m scripts.vae bank` makes all of it. Bank, autoencoder and faces are under Apache-2.0."""
EXAMPLE = f"""```python
import steerlib as sl, torch
from diffusers import AutoencoderTiny

bank = sl.ConceptBank.from_pretrained("{NAME}")
vae = AutoencoderTiny.from_pretrained(bank.file("{MODEL}"))
with torch.no_grad(), sl.steer(vae, bank, {{"FIRST": 2.0}}):  # standard deviations of that latent
    face = vae.decode(torch.zeros(1, {SIZE.latents}, 1, 1)).sample  # [1, 3, {SIZE.side}, {SIZE.side}], from -1 to 1
```"""


def bank(folder: Path, size: Size | None = None) -> ConceptBank:
    """Of the autoencoder in a folder, trained if need be, with what a study of it finds, and a card that says so."""
    size = size or SIZE
    vae, new = trained(folder, size), held(size)
    x = 2 * new.inputs - 1
    found = study.measured(vae, Data(x, new.factors), hidden=HIDDEN, moved=size.moved, boosted=size.boosted)
    figures = {**found.figures, "unexplained": unexplained(vae, x)}
    effects = {one.pop("name"): one for one in map(asdict, found.found.each)}
    concepts = [replace(concept, effects=effects[name]) for name, concept in found.bank.concepts.items()]
    made: Any = found.bank.with_concepts(concepts)
    with torch.no_grad():
        few = posterior(vae.encode(x[:1])).mean
    drawn = {name: study.traversals(Decoder(vae, decoding(vae), made), few, [name]) for name in made.concepts}
    strips = {f"{name}.png": png for name, png in drawn.items() if png is not None}
    read = judge(size)
    seen = moved(vae, made, new.inputs[:FACES], read)
    trained_as = {"data": WORLD, "kind": "beta-TC-VAE", "parts": [part._asdict() for part in PARTS], **size._asdict()}
    return made.with_concepts(
        name=NAME,
        base=BaseModel.of(vae, id=NAME),
        license="apache-2.0",
        provenance={**made.provenance, "training": trained_as, "study": figures},
        pictures=strips,
        files={MODEL: str(folder / MODEL)},
        card=card(figures, list(made.concepts.values()), seen, read),
    )


def card(figures: dict[str, Any], concepts: list[Concept], seen: Moved, read: Judge) -> str:
    """In Markdown, with model-card metadata."""
    first = max(concepts, key=lambda concept: concept.effects["relative"])
    parts = [
        front(NAME, NAME, "apache-2.0", [], {"tags": ["diffusers", "autoencoder"]}).strip(),
        f"# {NAME}",
        ABOUT,
        EXAMPLE.replace("FIRST", first.name),
        *lines(figures),
        "## What moving a latent does",
        *(f"![{concept.name}]({concept.name}.png)" for concept in concepts),
        table(*study.moves(figures)),
        study.LEGEND,
        "## What of a face it changes",
        on_factors(seen, read),
        FACTORS_LEGEND,
        "## How far latents stand for factors",
        table(*study.told(figures)),
    ]
    return "\n\n".join(parts) + "\n"


def lines(figures: dict[str, Any]) -> list[str]:
    """What was found, as sentences."""
    own, plain = (figures_of({"figures": figures}, part) for part in ("", "untrained"))
    effect, chance, before = (short(part[key]) for part, key in ((own, "relative"), (own, "control"), (plain, "relative")))
    apart, mixed = (short(part["dci_disentanglement"]) for part in (own, plain))
    return [
        f"Active latents: {own['active']:.0f}; passive, saying nothing of a face: {', '.join(figures['passive']) or 'none'}. "
        f"Of the squared error of the mean face {own['unexplained']:.0%} is left.",
        f"Mean relative effect {effect} (random directions {chance}, untrained {before}), DCI disentanglement {apart} "
        f"(untrained {mixed}).",
    ]


FACTORS_LEGEND = f"""By how many standard deviations of a factor a face changes when a latent goes from {MOVED:g} of its units
less to {MOVED:g} more, with the 95 % interval of that mean over {FACES} faces. A linear judge reads the factors; it was found
from true faces and what they were drawn from. *Random*: the absolute change by random directions among active latents, as long
in units, mean of {CHANCE}. *Judge*: the share of a factor's variance that it explains in true faces which it was not found
from."""


def on_factors(seen: Moved, read: Judge) -> str:
    """What the judge sees of each latent, in Markdown; the largest change of a latent is bold."""
    rows = []
    for name, own in seen.each.items():
        most = max(own, key=lambda factor: abs(own[factor].mean))
        cells = {factor: f"{i.mean:+.2f} ({i.low:+.2f} to {i.high:+.2f})" for factor, i in own.items()}
        rows.append([name, *(f"**{cell}**" if factor == most else cell for factor, cell in cells.items())])
    rows.append(["*random*", *(f"{value:.2f}" for value in seen.chance.values())])
    rows.append(["*judge*", *(f"{value:.2f}" for value in read.right.values())])
    return table(["latent", *read.names], rows)


# -- tables ------------------------------------------------------------------------------------------------------------


def tables(made: ConceptBank, studied: str) -> dict[str, str]:
    """Parts of READMEs by name: `faces-latents`, a line for each concept, and `bank`, its figures beside those of the study's
    runs of the same data set, whose rows are taken from the text `studied`."""
    figures = made.provenance["study"]
    rows = [
        [f"`{name}`", concept.label, *(short(concept.effects[key]) for key in ("relative", "control", "focus"))]
        for name, concept in made.concepts.items()
    ]
    head = ["concept", "label", "relative effect", "its control", "focus"]
    own = {"figures": figures}
    lines = [
        [WORLD, f"**`{NAME}`**", *_row(figures_of(own))],
        [WORLD, "*the same, untrained*", *_row(figures_of(own, "untrained"))],
        [WORLD, "*the same, factors shuffled*", *_row(figures_of(own, "shuffled"))],
        *(row for row in rows_of(studied, "all") if row[0] == WORLD),
    ]
    return {"faces-latents": table(head, rows), "bank": table(["data", "kind", *SHOWN], lines)}


def _row(found: Mapping[str, float]) -> list[str]:
    return [short(found[key]) if key in found else "–" for key in SHOWN.values()]


def rows_of(text: str, name: str) -> list[list[str]]:
    """Cells of the table between the marks of a part of a README."""
    part = text.partition(f"<!-- begin: {name} -->")[2].partition(f"<!-- end: {name} -->")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")]
