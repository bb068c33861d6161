"""A lever: what a method found for one concept, before its strength is chosen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ...bank.concept_bank import BaseModel, ConceptBank, SiteFacts
from ...bank.concepts import Concept, Gate, Part
from ...encoders import Directions
from ..recipe import Pair


class TokenGate(NamedTuple):
    """How much of a change each token gets: `clamp(x @ read + bias, 0, 1)` at an earlier site, or the same."""

    site: str
    read: Float[Tensor, " D"]
    bias: Float[Tensor, ""]


@dataclass(frozen=True, kw_only=True)
class Lever:
    """Vectors that are added at some sites when the strength is 1."""

    moves: dict[str, Float[Tensor, " D"]]
    """By site; the first is where the concept is read."""
    gate: TokenGate | None = None
    norm: float | None = None
    """Median length of an activation there, for a lever that grows and shrinks with each token's own."""

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
                gate = TokenGate(rest[0], tensors[key][:-1], tensors[key][-1])
        return cls(moves=moves, gate=gate, norm=float(tensors["norm"]) if "norm" in tensors else None)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a method may look at to find the lever of one concept."""

    model: Any
    tokenizer: Any
    instruction: str
    """How a prompt would ask for the concept."""
    pairs: Sequence[Pair]
    prompts: Sequence[str]
    """Requests to learn from; nothing is ever measured on them."""
    texts: Sequence[str]
    """Ordinary text, which a gate should leave alone."""
    site: str
    """Where methods of one site work."""
    sites: Sequence[str]
    """All sites that are tried, in the model's order."""
    positive: dict[str, Float[Tensor, "n D"]]
    """By site: mean activations over answers with the concept."""
    negative: dict[str, Float[Tensor, "n D"]]
    reference: dict[str, Float[Tensor, "tokens D"]]
    """By site: activations of ordinary text."""
    norms: dict[str, float]
    """By site: the median length of an activation."""
    keep: dict[str, Float[Tensor, "k D"]] = field(default_factory=dict)
    """By site: directions of the other concepts."""
    seed: int = 0
    memo: dict[str, Any] = field(default_factory=dict, repr=False)
    """What several methods need and one has made."""

    def at(self, direction: Float[Tensor, " D"], **others: Any) -> Lever:
        """A lever of one site: the direction, as long as the site's activations."""
        return Lever(moves={self.site: direction / direction.norm() * self.norms[self.site]}, **others)

    def elsewhere(self, site: str) -> "Task":
        """The same task at another site."""
        return replace(self, site=site)


def bank_of(levers: Sequence[tuple[str, Lever]], norms: Mapping[str, float] | None = None) -> ConceptBank:
    """Levers as a bank: one concept each, whose unit is the lever itself; a gate is a concept of its own.

    With the `norms` of all sites, changes are capped in length as in a finished bank.
    """
    rows: dict[str, list[Tensor]] = {}
    bias: dict[str, list[Tensor]] = {}

    def place(site: str, vector: Tensor, mean: Tensor | None = None) -> tuple[str, int]:
        rows.setdefault(site, []).append(vector)
        bias.setdefault(site, []).append(torch.zeros(()) if mean is None else mean)
        return site, len(rows[site]) - 1

    concepts = []
    for name, lever in levers:
        (first, index), *others = [place(site, vector) for site, vector in lever.moves.items()]
        gate = None
        if lever.gate is not None:
            # a direction d reads <x, d> / |d|^2 - mean, so d = read / |read|^2 reads x @ read
            vector = lever.gate.read / lever.gate.read.square().sum()
            concepts.append(_concept(f"{name}.gate", *place(lever.gate.site, vector, -lever.gate.bias)))
            gate = Gate(f"{name}.gate", above=0.0, full=1.0)
        parts = tuple(Part(encoder=site, index=i, unit=1.0) for site, i in others)
        concepts.append(
            Concept(name=name, encoder=first, index=index, parts=parts, gate=gate, match_norm=lever.norm is not None)
        )
    norms = norms or {lever.site: lever.norm for _, lever in levers if lever.norm is not None}
    encoders = {site: Directions(torch.stack(vectors), torch.stack(bias[site])) for site, vectors in rows.items()}
    sites = {site: SiteFacts(width=len(vectors[0]), norm=norms.get(site)) for site, vectors in rows.items()}
    return ConceptBank("levers", concepts, encoders, base=BaseModel(), sites=sites)


def _concept(name: str, encoder: str, index: int) -> Concept:
    return Concept(name=name, encoder=encoder, index=index)
