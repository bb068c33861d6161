"""A lever: what a method found for one concept, before its strength is chosen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...bank.concept_bank import BaseModel, ConceptBank, SiteFacts
from ...bank.concepts import Concept, Gate, Part
from ...encoders import Directions
from ..entries import Shown
from .readouts import Readout


@dataclass(frozen=True, kw_only=True)
class Lever:
    """Vectors that are added at some sites when the strength is 1.

    Args:
        moves: By site; the first site is where the concept is read.
        gate: Share of the addition that a token gets: this reading, kept between 0 and 1. Default: all of it.
        norm: Median length of an activation at the first site, for a lever that grows and shrinks with each token's own length.
    """

    moves: dict[str, Float[Tensor, " D"]]
    gate: Readout | None = None
    norm: float | None = None

    @property
    def site(self) -> str:
        """Where the concept is read."""
        return next(iter(self.moves))

    def to_tensors(self) -> dict[str, Tensor]:
        """What `from_tensors` takes."""
        tensors = {f"move|{i:03}|{site}": vector.detach() for i, (site, vector) in enumerate(self.moves.items())}
        if self.gate is not None:
            tensors[f"gate|{self.gate.site}"] = torch.cat((self.gate.read.detach(), self.gate.bias.detach().reshape(1)))
        if self.norm is not None:
            tensors["norm"] = torch.tensor([self.norm])
        return tensors

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "Lever":
        moves, gate = {}, None
        for key in sorted(tensors):
            kind, *rest = key.split("|")
            if kind == "move":
                moves[rest[1]] = tensors[key]
            elif kind == "gate":
                gate = Readout(rest[0], tensors[key][:-1], tensors[key][-1])
        return cls(moves=moves, gate=gate, norm=float(tensors["norm"]) if "norm" in tensors else None)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a method may use to find the lever of one concept.

    `name` is what the concept is called, `instruction` how a prompt would ask for it. Nothing is ever measured on `prompts`,
    requests to learn from; `texts` are ordinary text, which a gate should leave alone. Methods of one site work at `site`;
    `sites` are all that are tried, in the model's order. `shown` are answers with and without the concept, of any numbers. By
    site: `positive` and `negative`, mean activations over these answers, in the same order; `reference`, activations of
    ordinary text; `norms`, their median length; `keep`, directions of the other concepts. `memo` keeps what several methods
    need and one has made.
    """

    model: Any
    tokenizer: Any
    instruction: str
    shown: Shown
    prompts: Sequence[str]
    texts: Sequence[str]
    site: str
    sites: Sequence[str]
    positive: dict[str, Float[Tensor, "n D"]]
    negative: dict[str, Float[Tensor, "m D"]]
    reference: dict[str, Float[Tensor, "tokens D"]]
    norms: dict[str, float]
    keep: dict[str, Float[Tensor, "k D"]] = field(default_factory=dict)
    name: str = ""
    seed: int = 0
    memo: dict[str, Any] = field(default_factory=dict, repr=False)

    def at(self, direction: Float[Tensor, " D"], **others: Any) -> Lever:
        """A lever of one site: the direction, as long as the site's activations."""
        return Lever(moves={self.site: direction / direction.norm() * self.norms[self.site]}, **others)

    def half(self, k: int) -> "Task":
        """The same task with every second answer of each side only, from the k-th on."""
        sides = ({site: x[k::2] for site, x in side.items()} for side in (self.positive, self.negative))
        said = Shown(*(side[k::2] for side in self.shown))
        return replace(self, shown=said, positive=next(sides), negative=next(sides))

    def elsewhere(self, site: str) -> "Task":
        """The same task at another site."""
        return replace(self, site=site)


class DirectionRows:
    """Directions by site, which concepts name by encoder and index."""

    def __init__(self) -> None:
        self.rows: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def add(self, site: str, direction: Float[Tensor, " D"], mean: Tensor) -> tuple[str, int]:
        """Add a direction with its reference mean; gives its encoder and index."""
        rows = self.rows.setdefault(site, [])
        rows.append((direction, mean))
        return site, len(rows) - 1

    def encoders(self) -> dict[str, Directions]:
        """One for each site."""
        return {site: Directions(*map(torch.stack, zip(*rows, strict=True))) for site, rows in self.rows.items()}


def bank_of(lever: Lever, norms: Mapping[str, float] | None = None) -> ConceptBank:
    """A bank of one concept, `lever`, whose unit is the lever itself; a gate is a concept of its own.

    With the `norms` of its sites, changes are capped in length as in a finished bank.
    """
    rows, concepts, gate, zero = DirectionRows(), [], None, torch.zeros(())
    (first, index), *others = [rows.add(site, vector, zero) for site, vector in lever.moves.items()]
    if lever.gate is not None:
        encoder, row = rows.add(lever.gate.site, lever.gate.row, lever.gate.mean)
        concepts.append(Concept(name="lever.gate", encoder=encoder, index=row))
        gate = Gate("lever.gate", above=0.0, full=1.0)
    facts = {"parts": tuple(Part(encoder=site, index=i, unit=1.0) for site, i in others), "gate": gate}
    concepts.append(Concept(name="lever", encoder=first, index=index, match_norm=lever.norm is not None, **facts))
    norms = norms or ({} if lever.norm is None else {lever.site: lever.norm})
    encoders = rows.encoders()
    sites = {site: SiteFacts(width=e.decoder.shape[1], norm=norms.get(site)) for site, e in encoders.items()}
    return ConceptBank("levers", concepts, encoders, base=BaseModel(), sites=sites)
