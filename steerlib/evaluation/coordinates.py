"""Every coordinate of a decoder by what moving it does: how strongly, how specifically, and how apart from the others.

As published (2505.03530, by way of a re-implementation that cites it; its full text was not at hand), and mended:

    CES_i = E |D(z) - D(z~_i)|               z~_i: coordinate i set to 7 values from -3 to 3     (root of a sum over outputs)
    S_i   = 1 / (H(p_i) + 1e-6)              p_i: squared change of each output, coordinate i set to 0, as a distribution
    M     = 1 - mean_ij |rho(a_i, a_j)|      a_i: change of hidden units when coordinate i moves by one unit; Pearson

    relative_i = E |D(z) - D(z~_i)| / E |x - mean x|    z~_i: coordinate i as it is in another row
    focus_i    = 1 - H(p_i) / log n                     p_i: of that change
    modularity = 1 - mean_ij cos(r_i, r_j)              r_i: root mean square change of hidden units under that change

CES grows with the number of outputs and with the range that coordinates are forced to, S has no scale, and two coordinates
that move different units need not have rho = 0, so that M of coordinates that share nothing is below 1. The mended figures
have none of this. Where the factors behind the pictures can be read, `on_factor` is the largest share of all factors' changes.

A coordinate that moves nothing is *dead*: it has no specificity, is left out of modularity, and is named.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import BadEdit
from ..steering.interventions import Add
from ..steering.recording import observing
from ..text import progress
from .interventions import Decoder, by_latent, drawn
from .mediation import places_of

GRID = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)
"""Values that the published CES sets a coordinate to, raw."""
EPSILON = 1e-6
"""Of the published specificity; and the share of the outcomes' spread below which a coordinate counts as dead."""
DRAWS = 4
"""Other rows that each row takes a coordinate from."""
Readout = Callable[[Tensor], Float[Tensor, "B factors"]]
"""Reads known factors from outcomes, each in units of its own spread."""


@dataclass(frozen=True)
class Coordinate:
    """What moving one coordinate does; None is what cannot be said.

    Attributes:
        name: of the concept.
        ces, specificity: as published.
        relative, low, high: length of the change over the spread of outcomes, and its 95 % interval.
        control: the same of a random direction.
        focus: 0: all outputs change alike; 1: one alone does.
        factor, on_factor: the factor that changes most, and its share of all factors' changes.
        dead: whether it moves nothing.
    """

    name: str
    ces: float
    specificity: float | None
    relative: float | None
    low: float | None = None
    high: float | None = None
    control: float | None = None
    focus: float | None = None
    factor: str = ""
    on_factor: float | None = None
    dead: bool = False


@dataclass(frozen=True, eq=False, repr=False)
class Coordinates:
    """All coordinates of a decoder; `modularity` is mended, `published_modularity` as published; None for fewer than two that
    move anything, or where a coordinate moves all hidden units alike, which has no correlation."""

    each: tuple[Coordinate, ...]
    modularity: float | None
    published_modularity: float | None
    spread: float
    alike: Float[Tensor, "n n"]
    """Cosine of what two coordinates move, the dead ones 0."""
    channels: Float[Tensor, "n channels"]
    """Root mean square change of hidden channels, the dead ones 0; no channels without a hidden site."""

    @property
    def dead(self) -> tuple[str, ...]:
        """Names of coordinates that move nothing."""
        return tuple(one.name for one in self.each if one.dead)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        shown = ("modularity", "published_modularity", "spread", "dead")
        return {name: getattr(self, name) for name in shown} | {"each": [asdict(one) for one in self.each]}

    def __repr__(self) -> str:
        dead = f"; dead, moving nothing: {', '.join(self.dead)}" if self.dead else ""
        return f"Coordinates: {len(self.each)}, modularity {said(self.modularity)}{dead}"


def said(value: float | None) -> str:
    """A figure as text."""
    return "undefined" if value is None else f"{value:.3f}"


def coordinates(
    studied: Decoder,
    inputs: Any,
    names: Sequence[str] | None = None,
    *,
    hidden: str | None = None,
    factors: Sequence[str] = (),
    readout: Readout | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Coordinates:
    """Every figure of some coordinates of a bank (None: all its concepts) on `inputs`, of which two rows or more are needed.

    `hidden` is the site of the units that modularity looks at; without it there is none. `readout` reads the `factors`.
    """
    names = list(studied.bank.concepts if names is None else names)
    plain = studied(inputs)
    if len(plain) < 2:
        raise BadEdit("expected two rows or more, since coordinates take their values from other rows, got one")
    how = {"draws": draws, "seed": seed}
    found = [_coordinate(studied, inputs, n, plain, factors, readout, **how) for n in progress(names, "moving coordinates")]
    alive = [k for k, one in enumerate(found) if not one.dead]
    alike, channels, published = torch.zeros(len(names), len(names)), torch.zeros(len(names), 0), None
    if hidden is not None and alive:
        moved, stepped = zip(*(_units(studied, inputs, names[k], hidden, **how) for k in alive), strict=True)
        at, rms = torch.tensor(alive), torch.stack(moved)
        alike[at[:, None], at] = cosines(rms.flatten(1))
        channels = rms.new_zeros(len(names), rms.shape[-1]).index_copy(0, at, rms.square().mean(1).sqrt())
        published = published_modularity(torch.stack(stepped).flatten(1))
    known = hidden is not None and len(alive) > 1
    mended = modularity(alike[alive][:, alive]) if known else None
    return Coordinates(tuple(found), mended, published, spread_of(plain), alike, channels)


def spread_of(plain: Float[Tensor, "B ..."]) -> float:
    """`E |x - mean x|` of outcomes."""
    return float((plain - plain.mean(0)).double().flatten(1).norm(dim=-1).mean())


def _coordinate(
    studied: Decoder,
    inputs: Any,
    name: str,
    plain: Tensor,
    factors: Sequence[str],
    readout: Readout | None,
    *,
    draws: int,
    seed: int,
) -> Coordinate:
    forced = by_latent(studied, inputs, name, values=GRID, unit="raw", seed=seed)
    own = by_latent(studied, inputs, name, draws=draws, seed=seed)
    spread = spread_of(plain)
    lengths = (*own.length, own.by_chance.mean)
    relative, low, high, control = (v / spread if spread and v is not None else None for v in lengths)
    least = EPSILON * max(spread, float(plain.abs().max()), 1e-30)
    if max(forced.strength, own.strength) <= least:
        return Coordinate(name, forced.strength, None, relative, low, high, control, dead=True)
    at_zero = forced.change[GRID.index(0.0)]
    share = {} if readout is None else on_factors(plain, own.change, factors, readout)
    best = max(share, key=share.__getitem__, default="")
    return Coordinate(
        *(name, forced.strength, published_specificity(at_zero), relative, low, high, control),
        focus=focus(own.change),
        factor=best,
        on_factor=share.get(best),
    )


# -- figures ---------------------------------------------------------------------------------------------------------


def entropy(change: Float[Tensor, "rows outcome"]) -> float | None:
    """H of the squared change of each output over all rows, as a distribution, in nats; None where nothing changes."""
    squared = change.double().square().mean(0)
    if not (total := float(squared.sum())) > 0:
        return None
    return float(torch.special.entr(squared / total).sum())


def published_specificity(change: Float[Tensor, "B ..."]) -> float | None:
    """`1 / (H + 1e-6)`, so 1e6 at most."""
    found = entropy(change.flatten(1))
    return None if found is None else 1 / (found + EPSILON)


def focus(change: Float[Tensor, "R B ..."]) -> float | None:
    """`1 - H / log n`; None for a single output."""
    flat = change.flatten(2).flatten(0, 1)
    found, n = entropy(flat), flat.shape[1]
    return None if found is None or n < 2 else 1 - found / float(torch.tensor(float(n)).log())


def on_factors(plain: Tensor, change: Tensor, factors: Sequence[str], readout: Readout) -> dict[str, float]:
    """Each factor's share of the mean absolute changes of all factors; nothing where none changes."""
    before = readout(plain)
    moved = torch.stack([(readout(plain + run) - before).abs().mean(0) for run in change]).mean(0).double()
    total = float(moved.sum())
    return dict(zip(factors, (moved / total).tolist(), strict=True)) if total > 0 else {}


def cosines(moved: Float[Tensor, "n units"]) -> Float[Tensor, "n n"]:
    """Cosine of every two rows, 0 for rows of zeros."""
    rows = torch.nn.functional.normalize(moved.double(), dim=-1)
    return (rows @ rows.T).float()


def modularity(alike: Float[Tensor, "n n"]) -> float:
    """1 less the mean over pairs."""
    return 1 - float(alike.double().triu(1).sum()) * 2 / (len(alike) * (len(alike) - 1))


def published_modularity(change: Float[Tensor, "n units"]) -> float | None:
    """1 less the mean absolute correlation (Pearson) of pairs; None where a row has none, or for a single row."""
    rest = change.double() - change.double().mean(-1, keepdim=True)
    if len(rest) < 2 or bool((rest.norm(dim=-1) <= 1e-9 * change.double().norm(dim=-1)).any()):
        return None
    return modularity(cosines(rest).abs())


@torch.no_grad()
def _units(studied: Decoder, inputs: Any, name: str, site: str, *, draws: int, seed: int) -> tuple[Tensor, Tensor]:
    """What moving a coordinate does to each hidden unit, `[N, D]`: root mean square where it is as in other rows, and the mean
    where it moves by one unit."""
    bank, names = places_of(studied.bank, [name])

    def seen(edits: Any) -> Tensor:
        tape: list[Tensor] = []
        with observing(studied.target, {site: lambda x, _: tape.append(x.detach().float().cpu())}):
            studied.edited(bank, inputs, edits)
        return torch.cat(tape, 1)

    plain = seen({})
    moved = torch.stack([seen(edits) - plain for edits in drawn(studied, bank, names, inputs, draws, seed)])
    stepped = seen({one: Add(1.0) for one in names}) - plain
    return moved.square().mean((0, 1)).sqrt(), stepped.mean(0)
