"""Levers of a denoiser from sums over pairs of prompts: what is added at each site and noise level, and where.

A method is a function from sums to a lever, and an entry of `METHODS`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...bank.concept_bank import BaseModel, ConceptBank, SiteFacts
from ...bank.concepts import Concept, Gate, Part
from ...errors import BadRecipe
from ..record.contrasts import Sums, given_to
from ..record.noised import spans
from .levers import DirectionRows as Rows

OPENS = 0.5
"""Reading from which a gate opens; at 1 it is open."""
WHERE = ".where"
"""Behind the name of a concept, that of the gate which tells where it acts."""

RIDGE = 1e-2
"""Share of the mean variance that is added to every direction's own before it is inverted."""


@dataclass(frozen=True, kw_only=True)
class Lever:
    """By `site@level`: the directions, what they read where the concept is not, and the share of tokens that get them.

    With `keep_norm` tokens are turned, and keep their length. A gate reads what its site is given: a direction, and its reading
    half-way between tokens in place and others; it is scaled so that it reads 0 among the others and 1 in place.
    """

    moves: dict[str, Float[Tensor, " D"]]
    zeros: dict[str, Float[Tensor, ""]]
    gates: dict[str, tuple[Float[Tensor, " E"], Float[Tensor, ""]]] = field(default_factory=dict)
    keep_norm: bool = False


def mean(sums: Sums) -> Lever:
    """Difference of means over all tokens."""
    return _lever(sums, _difference, _mean)


def weighed(sums: Sums) -> Lever:
    """Differences of tokens, each weighed by its own length: what happens where the pairs differ."""
    return _lever(sums, lambda own: own["weighed"] / own["length"], lambda own: own["zero"] / own["length"])


def placed(sums: Sums) -> Lever:
    """The same, only at tokens like those where the pairs differ, by what their site is given (Fisher's discriminant)."""
    found = weighed(sums)
    return Lever(moves=found.moves, zeros=found.zeros, gates={key: _gate(by_key(sums)[key]) for key in found.moves})


def text(sums: Sums) -> Lever:
    """Difference of means of what text encoders make of prompts, at every token that they read."""
    return _lever(sums, _difference, _mean, of_text=True)


METHODS: dict[str, Callable[[Sums], Lever]] = {"mean": mean, "weighed": weighed, "placed": placed, "text": text}
"""By name. `placed` alone does not act on every token."""
KEPT = "norm kept"
REACHES: dict[str, Callable[[Sequence[str], Sequence[int]], tuple[Sequence[str], Sequence[int]]]] = {
    "earlier sites": lambda sites, levels: (sites[: len(sites) // 2], levels),
    "later sites": lambda sites, levels: (sites[len(sites) // 2 :], levels),
    "high noise": lambda sites, levels: (sites, sorted(levels)[1:]),
    "low noise": lambda sites, levels: (sites, sorted(levels)[:-1]),
    KEPT: lambda sites, levels: (sites, levels),
}
"""Where and when a lever acts instead of at all sites, in the order of a pass, and at all levels; or that what it adds turns
tokens, which keep their length (CASteer, arXiv 2503.09630). Named behind its method: `placed, later sites`."""


def usable(methods: Sequence[str], sums: Sums) -> list[str]:
    """Those of some methods that there are sums for; raises `BadRecipe` where there is none."""
    has_text = any("@" not in key for key in sums)
    if not (found := [name for name in methods if name != "text" or has_text]):
        raise BadRecipe("method 'text' needs a text encoder that reads all prompts of a batch in one pass; name other methods")
    return found


def found_by(method: str, sums: Sums, sites: Sequence[str], levels: Sequence[int]) -> Lever:
    """What a method finds, at all sites and levels or within the reach that is named behind it."""
    name, _, reach = method.partition(", ")
    lever = METHODS[name](sums)
    keys = [key for key in lever.moves if "@" not in key]
    keys += [key for key in _within(reach, sites, levels) if key in lever.moves]
    moves, zeros = ({key: own[key] for key in keys} for own in (lever.moves, lever.zeros))
    gates = {key: lever.gates[key] for key in keys if key in lever.gates}
    return Lever(moves=moves, zeros=zeros, gates=gates, keep_norm=reach == KEPT)


def reaches(method: str, edit: str, sums: Sums, sites: Sequence[str], levels: Sequence[int]) -> list[str]:
    """The method with every reach that leaves some of its directions, and not all; of what is added also with norms kept."""
    whole = METHODS[method](sums).moves.keys()
    less = [reach for reach in REACHES if 0 < len(whole & {*_within(reach, sites, levels)}) < len(whole)]
    return [f"{method}, {reach}" for reach in (*less, *([KEPT] if edit == "Add" else []))]


def _within(reach: str, sites: Sequence[str], levels: Sequence[int]) -> list[str]:
    """By noise level and site, in the order in which they are passed, what is within a reach."""
    where, when = REACHES[reach](sites, levels) if reach else (sites, levels)
    return [f"{site}@{level}" for level in sorted(when, reverse=True) for site in where]


def by_key(sums: Sums) -> dict[str, dict[str, Tensor]]:
    """The sums of each `site@level`, and of each site of a text encoder."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in sums.items():
        key, _, what = name.partition("|")
        found.setdefault(key, {})[what] = value
    return found


def _difference(own: Mapping[str, Tensor]) -> Tensor:
    return own["difference"] / own["count"]


def _mean(own: Mapping[str, Tensor]) -> Tensor:
    return own["mean"] / own["count"]


def _lever(
    sums: Sums,
    move: Callable[[Mapping[str, Tensor]], Tensor],
    zero: Callable[[Mapping[str, Tensor]], Tensor],
    *,
    of_text: bool = False,
) -> Lever:
    differing = {key: own for key, own in by_key(sums).items() if own["length"] > 0 and ("@" not in key) == of_text}
    moves = {key: move(own) for key, own in differing.items()}
    moves = {key: row for key, row in moves.items() if row.any()}
    if not moves:
        raise BadRecipe("the prompts of the pairs make no difference to what the pipeline computes at these sites")
    zeros = {key: (zero(differing[key]) @ row) / row.square().sum() for key, row in moves.items()}
    return Lever(moves=moves, zeros=zeros)


def _gate(own: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A row d and a mean so that `<x, d> / |d|^2 - mean` is 0 at the mean of tokens outside and 1 at that of tokens inside."""
    means = {name: own[f"{name} sum"] / own[f"{name} count"] for name in ("inside", "outside")}
    total = own["inside count"] + own["outside count"]
    within = own["inside square"] + own["outside square"]
    if within.ndim == 1:  # of a wide site the diagonal alone is known
        within = within.diag()
        within -= sum(own[f"{n} count"] * (m * m).diag() for n, m in means.items())
    else:
        within = within - sum(own[f"{n} count"] * torch.outer(m, m) for n, m in means.items())
    within = within / total
    within += RIDGE * within.diagonal().mean() * torch.eye(len(within))
    step = means["inside"] - means["outside"]
    read = torch.linalg.solve(within, step)
    read = read / (read @ step)
    row = read / read.square().sum()
    return row, means["outside"] @ read


def bank_of(
    pipe: Any,
    name: str,
    levers: Mapping[str, Lever],
    levels: Sequence[int],
    *,
    base: str = "",
    concepts: Sequence[Concept] = (),
) -> ConceptBank:
    """A bank of levers by name of concept; one unit of a concept is its lever.

    `concepts` are what is known of some beside their places, by the same names.
    """
    known, rows, gates, made = {c.name: c for c in concepts}, Rows(), Rows(), []
    for concept, lever in levers.items():
        own, *others = [rows.add(key, move, lever.zeros[key]) for key, move in lever.moves.items()]
        parts = tuple(Part(encoder=key, index=index, unit=1.0) for key, index in others)
        place = f"{concept}{WHERE}"
        gate = Gate(place, above=OPENS, full=1.0) if lever.gates else None
        about = known.get(concept, Concept(name=concept, encoder=own[0], index=own[1]))
        made.append(replace(about, encoder=own[0], index=own[1], parts=parts, gate=gate, keep_norm=lever.keep_norm))
        if lever.gates:
            own, *others = [gates.add(f"{key}#where", *gate) for key, gate in lever.gates.items()]
            parts = tuple(Part(encoder=key, index=index, unit=1.0) for key, index in others)
            label = f"where {concept!r} shows in a picture"
            made.append(Concept(name=place, encoder=own[0], index=own[1], parts=parts, label=label, present=OPENS))
    encoders = {**rows.encoders(), **gates.encoders()}
    where = {id: id.partition("@")[0] for id in encoders}
    reads = {id: given_to(where[id]) for id in gates.rows}
    widths = {reads.get(id, where[id]): encoder.decoder.shape[1] for id, encoder in encoders.items()}
    widths |= {where[id]: encoder.decoder.shape[1] for id, encoder in rows.encoders().items()}
    sites = {site: SiteFacts(width=width) for site, width in widths.items()}
    about = {"base": BaseModel.of(pipe, id=base), "sites": sites, "levels": spans(pipe, levels), "where": where, "reads": reads}
    return ConceptBank(name, made, encoders, **about)
