"""What banks of latents of texts and of pictures share: from fitted encoders to described concepts."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...bank.concept_bank import SiteFacts
from ...bank.concepts import Concept
from ...encoders import Sparse
from ..entries import SiteEncoder
from ..fit.inputs import Source
from ..fit.run import fit

HELD_OUT = 0.1
"""Share of the documents or pictures that encoders are not trained on."""


@dataclass(frozen=True, eq=False)
class Readings:
    """How each of `n` latents reads on what its encoder was trained on: the median of its positive readings, the value that
    99.5 % of them stay below, and the share of tokens that it fires on."""

    unit: Float[Tensor, " n"]
    high: Float[Tensor, " n"]
    frequency: Float[Tensor, " n"]

    @classmethod
    def of(cls, z: Float[Tensor, "T n"]) -> "Readings":
        """From the codes of some tokens."""
        fires = z > 0
        positive = torch.where(fires, z, torch.nan)
        unit, high = (positive.nanquantile(q, dim=0).nan_to_num(0.0) for q in (0.5, 0.995))
        return cls(unit, high, fires.float().mean(0))


def trained(specs: Iterable[SiteEncoder], source: Source, folder: Path, *, epochs: int) -> dict[str, Sparse]:
    """Encoders and their twins of other seeds, all on the same batches of a source."""
    runs = {name: run for spec in specs for name, run in spec.runs.items()}
    return fit(runs, source, steps=max(1, epochs * len(source) // next(iter(runs.values())).batch), folder=folder)


def finish(encoder: Sparse, readings: Readings, x: Float[Tensor, "T D"]) -> Sparse:
    """The encoder with the statistics of its latents, in half precision; where latents compete, with a threshold from `x`."""
    tensors = encoder.to_tensors() | vars(readings)
    made = type(encoder).from_tensors({name: t.detach().cpu().half() for name, t in tensors.items()}, encoder.settings)
    return made.calibrated(x)


def describe(id: str, encoder: Sparse, about: Callable[[int], Mapping[str, Any]]) -> list[Concept]:
    """A concept for every latent that fired; `about` gives its other fields (`label`, `source`, `effects`) by its index."""
    unit, high = (encoder.statistics[name].float().tolist() for name in ("unit", "high"))
    return [
        Concept(name=f"{id}/{i}", encoder=id, index=i, unit=unit[i], natural=(0.0, max(high[i], unit[i])), **about(i))
        for i in range(len(unit))
        if unit[i] > 0
    ]


def site_facts(x: Float[Tensor, "T D"]) -> SiteFacts:
    """Width of a site, and the median length of its activations."""
    return SiteFacts(width=x.shape[1], norm=float(x.norm(dim=-1).median()))
