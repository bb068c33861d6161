"""Published and mended figures on linear decoders whose truth is written down: `D(z) = z W`, `z` of three normal numbers."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import steerlib as sl
from steerlib.evaluation.coordinates import Coordinates, coordinates
from steerlib.evaluation.decoders import decoding
from steerlib.evaluation.interventions import Decoder

from .findings import Figure, mean_of, table

ROWS = 64


class Linear(nn.Module):
    """`decode(z) = z W`."""

    def __init__(self, weights: Tensor):
        super().__init__()
        linear = nn.Linear(*weights.shape, bias=False)
        linear.weight.data = weights.T.clone()
        self.decoder = nn.Sequential(nn.Identity(), linear)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)


class Case(NamedTuple):
    """What is true, the decoder's weights `[n, outputs]`, and how many times as large as normal numbers latents are."""

    said: str
    weights: Tensor
    scale: float = 1.0


def cases() -> list[Case]:
    """Decoders that differ in one respect from the first."""
    apart = torch.eye(3)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)))[0]
    return [
        Case("each latent moves an output of its own", apart),
        Case("the same outputs from latents ten times as large", apart / 10, 10.0),
        Case("each output shown four times", apart.repeat_interleave(4, 1)),
        Case("latents turned", turn),
        Case("all latents move the same outputs", torch.ones(3, 3)),
        Case("one latent moves nothing", apart * torch.tensor([[1.0], [1.0], [0.0]])),
    ]


def figures(case: Case) -> Coordinates:
    """All figures of a case."""
    model = Linear(case.weights)
    axes = {f"z{k}": axis for k, axis in enumerate(torch.eye(len(case.weights)))}
    bank = sl.ConceptBank.from_directions(axes, site="decoder.in:BDN", base=model)
    z = case.scale * torch.randn(ROWS, len(axes), generator=torch.Generator().manual_seed(0))
    return coordinates(Decoder(model, decoding(model), bank), z, hidden="decoder:BDN")


def truth() -> str:
    """A table, a row for each case: means over latents that move anything."""
    rows: list[Sequence[object]] = []
    for case in cases():
        found = figures(case)
        alive = [one for one in found.each if not one.dead]
        names = ("ces", "relative", "specificity", "focus")
        means = [Figure(mean_of(getattr(one, name) for one in alive)) for name in names]
        modular = (Figure(found.published_modularity), Figure(found.modularity))
        rows.append([case.said, *means, *modular, ", ".join(found.dead) or "none"])
    head = ["decoder", "CES", "relative effect", "specificity", "focus", "modularity, published", "mended", "named as dead"]
    return table(head, rows)
