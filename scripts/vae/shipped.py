"""The bank `faces-32`: an autoencoder of diffusers, trained on drawn faces, whose latents are concepts."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerlib.bank.card import front
from steerlib.bank.concept_bank import ConceptBank
from steerlib.bank.concepts import Concept
from steerlib.bank.manifest import BaseModel
from steerlib.evaluation import study
from steerlib.text import progress

from .findings import table
from .run import Size, pictures, train

NAME, LATENTS = "faces-32", 8
SIZE = Size(told=1000, steps=2000, batch=16, rate=2e-3)
CHANNELS = (8, 16, 32, 32, 32, 32)
"""Of each stage; every one but the last halves the side, so that the latents have one place: 32 pixels, 16, 8, 4, 2, 1."""
NOISE = 0.15
"""Standard deviation of pixels, from -1 to 1, about what is decoded: the more, the more latents are passive."""


def autoencoder(seed: int = 0) -> Any:
    """Untrained."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(seed)
    stages = len(CHANNELS)
    shape: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * stages,
        "up_block_types": ("UpDecoderBlock2D",) * stages,
        "block_out_channels": CHANNELS,
    }
    return AutoencoderKL(
        **shape,
        latent_channels=LATENTS,
        sample_size=SIZE.side,
        norm_num_groups=1,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def loss(vae: Any, x: Tensor, asked: float) -> Tensor:
    """As of a VAE, in nats a picture, with normal pixels from -1 to 1."""
    told = vae.encode(x).latent_dist
    unlikely = (vae.decode(told.sample()).sample - x).square().sum() / (2 * NOISE**2 * len(x))
    return unlikely + asked * told.kl().mean()


def trained(folder: Path) -> Any:
    """The autoencoder in a folder, in half precision; trained first where it is not there."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    if not (folder / "config.json").is_file():
        vae, x = autoencoder(), 2 * pictures("faces", SIZE)[0].inputs - 1
        with progress(None, "training", total=SIZE.steps) as bar:
            train(vae, x, lambda: loss, SIZE, tick=lambda: bar.update(1))
        vae.half().save_pretrained(folder)
    return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).eval()


# -- the bank --------------------------------------------------------------------------------------------------------

ABOUT = f"""A small autoencoder of drawn faces (`autoencoder/`: an `AutoencoderKL` of diffusers, with {LATENTS} latents in one
place), whose active latents are concepts. It was trained as a VAE, and the faces are drawn, so that their factors are
known. `python -m scripts.vae bank` makes all of it. Every figure is of faces that it never saw, as `steerlib study` has it."""
EXAMPLE = f"""```python
import torch
from diffusers import AutoencoderKL
import steerlib as sl

bank = sl.ConceptBank.from_pretrained("{NAME}")
vae = AutoencoderKL.from_pretrained(bank.file("autoencoder"))
with torch.no_grad(), sl.steer(vae, bank, {{"FIRST": 2.0}}):  # standard deviations of that latent
    face = vae.decode(torch.zeros(1, {LATENTS}, 1, 1)).sample  # [1, 3, 32, 32], from -1 to 1
```"""


def bank(folder: Path) -> ConceptBank:
    """Of the autoencoder in a folder, with what a study of it finds, and a card that says so."""
    vae = trained(folder)
    found = study.studied(vae, pictures("faces", SIZE)[1])
    made: Any = found.bank
    kept = {key: value for key, value in found.figures.items() if key not in ("untrained", "labels", "coordinates")}
    return made.with_concepts(
        name=NAME,
        base=BaseModel.of(vae, id=NAME),
        license="apache-2.0",
        provenance={**made.provenance, "study": kept},
        pictures=found.pictures,
        files={"autoencoder": str(folder)},
        card=card(found.figures, list(made.concepts.values())),
    )


def card(figures: dict[str, Any], concepts: list[Concept]) -> str:
    """In Markdown, with model-card metadata."""
    first = max(concepts, key=lambda concept: concept.effects["relative"])
    parts = [
        front(NAME, NAME, "apache-2.0", [], {"tags": ["diffusers", "autoencoder"]}).strip(),
        f"# {NAME}",
        ABOUT,
        EXAMPLE.replace("FIRST", first.name),
        *study.lines(figures),
        "## What moving a latent does\n\n![each latent from one end to the other](traversals.png)",
        table(*study.moves(figures)),
        study.LEGEND,
        "## What changing a face does, and by which way",
        table(*study.changes(figures)),
        study.WAYS_LEGEND,
        "![circuit](circuit.png)",
        "## How far latents stand for factors",
        table(*study.told(figures)),
    ]
    return "\n\n".join(parts) + "\n"
