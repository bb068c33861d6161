"""What the edits at one site do to `x`.

`B` rows, `N` tokens of this pass, `D` width, `K` edits at the site, `R` rows that amounts are given for.

    z  = x r^T + b                                        what each concept reads
    x1 = x + sum_k g_k ((scale_k - 1) z_k + shift_k) w_k  the additions, and what context modules add
    x2 = x1 + argmin |d|  with  r_k (x1 + d) + b_k = z_k(x1) + g_k (clamp(z_k(x1), low_k, high_k) - z_k(x1))

for every target k that acts there (g_k > 0). The change is cast once.

Latents of sparse codes read `z = p` where their potential `p = x r^T + b` is above a threshold, else 0. They are changed in the
code: x moves by `(z' - z) w`, where z', after all additions to the latent together, is not below 0; what the code does not
describe stays. Their targets are met before those of directions, which see what they did.

The change is a sum of what is added and what is taken away: where a scaling or a target brings a reading nearer to 0, and not
beyond, that is a *removal*. Only what is added is capped. Together it is as long as the cap at most, and readings that it
forces are met as far as it goes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from math import inf
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.compiler import is_compiling

from ..bank.concepts import Gate, Place
from ..devices import placed
from ..encoders import Rows
from ..encoders.base import fired
from ..errors import RowMismatch
from ..passes import StepState
from ..schedules import Window
from .aims import Aim, each
from .reading import Key, Reader
from .shares import Share


@dataclass(frozen=True, eq=False, kw_only=True)
class Edit:
    """One intervention on one coordinate, lowered: how it is read, what it writes, what it aims at, what lets it through.

    Attributes:
        key: concept and bank, for notes and conflicts.
        name: of the concept.
        place: the coordinate.
        rows: of this coordinate alone: `read[1, D]`, `bias[1]`, `write[1, D]`.
        read: tells its reading.
        aim: what it does.
        shares: what it is multiplied by.
        leaves: the note of how far it moved the concept, for later sites; None: none is needed.
        now: tells the rows of a concept that learns, in the pass that runs; None: they never change.
        natural: raw readings between which 99 % of reference data lie; None where that was not measured.
        cut: whether its amount was cut to natural readings before the first pass.
    """

    key: Key
    name: str
    place: Place
    rows: Rows
    read: Reader
    aim: Aim
    shares: tuple[Share, ...] = ()
    leaves: Key | None = None
    now: Callable[[], Rows] | None = None
    natural: tuple[float, float] | None = None
    cut: bool = False

    @property
    def is_target(self) -> bool:
        """Whether the concept has to read a given value afterwards."""
        return self.aim.is_target

    @property
    def is_sole(self) -> bool:
        """Whether nothing else may be done to its concept in the same pass."""
        return self.is_target or self.aim.module is not None

    @property
    def gates(self) -> tuple[Gate, ...]:
        """Where it acts."""
        return tuple(share.gate for share in self.shares if share.gate is not None)

    @property
    def is_constant(self) -> bool:
        """Whether its change is the same at every token, wherever it is let through as a whole."""
        floored = self.rows.is_sparse and min(each(self.aim.rule.shift)) < 0
        free = self.leaves is None and not floored and not self.rows.norm
        return free and self.aim.is_constant and all(share.is_constant for share in self.shares)

    @property
    def span(self) -> Window:
        """The part of denoising outside of which it does nothing."""
        spans = [share.span for share in self.shares]
        start, stop = max((s.start for s in spans), default=0.0), min((s.stop for s in spans), default=1.0)
        return Window(start, stop) if start < stop else Window()

    def weight(self, x: Float[Tensor, "B N D"], now: StepState) -> "float | Tensor":
        """The share of it that each token gets: one number for all, or `[B, N]`."""
        weight: float | Tensor = 1.0
        for share in self.shares:
            own = share.weight(x, now)
            if isinstance(own, Tensor) and own.device != x.device:
                own = own.to(x.device)
            weight = own if isinstance(weight, float) and weight == 1.0 else weight * own
            if isinstance(weight, float) and weight == 0.0:
                break
        return weight


class Given(NamedTuple):
    """What differs between tokens in this pass; None where nothing does."""

    gains: Float[Tensor, "B N K"] | None = None
    """The share of each edit; None: all of it everywhere."""
    row: Int[Tensor, " B"] | None = None
    """Which of the `R` amounts each row gets; None: there is one for all."""
    forecast: Float[Tensor, "B N K"] | None = None
    """Added to shifts."""
    wanted: Float[Tensor, "B N K"] | None = None
    """Targets in place of the bounds; NaN: none."""
    beside: Float[Tensor, "B N D"] | None = None
    """What context modules add, which is never capped."""
    beyond: Float[Tensor, "B N K"] | None = None
    """Such targets less what was read before any edit; NaN: none."""
    known: Float[Tensor, "B N K"] | None = None
    """Readings in place of those by one row; NaN: none."""
    lengths: Float[Tensor, "B N K"] | None = None
    """What encoders that normalise divide tokens by."""


class Change(NamedTuple):
    """What the edits of a site do in a pass."""

    delta: Float[Tensor, "B N D"]
    before: Float[Tensor, "B N K"]
    """What each coordinate read."""
    moved: Float[Tensor, "B N K"]
    """The change of each coordinate."""
    cut: Bool[Tensor, "B N K"] | None
    """Which edits added something that was cut to the cap; None: there is no cap."""


class Has(NamedTuple):
    """What there is among the edits of a site; the rest need not be computed."""

    latents: bool = True
    targets: bool = True
    directions: bool = True
    """Among the targets."""
    cap: bool = True
    """And something that it may cut."""


EVERYTHING = Has()


@dataclass(eq=False)
class EditTensors:
    """`K` edits as tensors."""

    read: Float[Tensor, "K D"]
    bias: Float[Tensor, " K"]
    write: Float[Tensor, "K D"]
    threshold: Float[Tensor, " K"]
    same: Float[Tensor, "K K"]
    """1 where two edits move the same concept."""
    scale: Float[Tensor, "R K"]
    shift: Float[Tensor, "R K"]
    low: Float[Tensor, "R K"]
    high: Float[Tensor, "R K"]
    target: Float[Tensor, " K"]
    takes: Float[Tensor, " K"]
    """1 where an edit may take away: 0 for those that only add."""
    cap: Float[Tensor, ""]
    """Longest addition to a token."""

    @classmethod
    def of(cls, edits: Sequence[Edit], cap: float = inf) -> "EditTensors":
        """The contents for some edits, on the CPU. Raises `RowMismatch` where amounts are for different numbers of rows."""
        given = {len(amount) for edit in edits for amount in edit.aim.rule if isinstance(amount, tuple)}
        if len(given) > 1:
            raise RowMismatch(f"expected amounts for one number of rows, got {' and '.join(map(str, sorted(given)))}")
        rows = max(given, default=1)
        read, bias, write, threshold = (torch.cat(rows) for rows in zip(*(edit.rows[:4] for edit in edits), strict=True))
        scale, shift, low, high = (
            torch.tensor([each(amount) if len(each(amount)) == rows else each(amount) * rows for amount in column]).T
            for column in zip(*(edit.aim.rule for edit in edits), strict=True)
        )
        same = torch.tensor([[float(one.key == other.key) for other in edits] for one in edits])
        target = torch.tensor([float(edit.is_target) for edit in edits])
        takes = torch.maximum(target, (scale != 1).any(0).float())
        return cls(read, bias, write, threshold, same, scale, shift, low, high, target, takes, torch.tensor(cap))

    def to(self, device: torch.device) -> "EditTensors":
        """The same contents elsewhere, copied once for all sessions."""
        return EditTensors(**{f.name: placed(getattr(self, f.name), device) for f in fields(self)})

    def renewed(self, edits: Sequence[Edit], device: torch.device) -> "EditTensors":
        """The same elsewhere, with the rows that concepts have now."""
        rows = zip(*((edit.rows if edit.now is None else edit.now())[:4] for edit in edits), strict=True)
        read, bias, write, threshold = (torch.cat([one.to(device, torch.float32) for one in column]) for column in rows)
        return replace(self.to(device), read=read, bias=bias, write=write, threshold=threshold)

    def constant(self, cap: float) -> tuple[Float[Tensor, "R D"], Float[Tensor, "R 1"]]:
        """The change of every token where all edits are constant, cut to a length, and the share of it that is left."""
        delta = self.shift @ self.write
        kept = (cap / delta.norm(dim=-1, keepdim=True).clamp(min=1e-30)).clamp(max=1)
        return delta * kept, kept

    def readings(self, x: Float[Tensor, "B N D"], given: Given) -> Float[Tensor, "B N K"]:
        """z of float32 activations."""
        z = x @ self.read.T if given.lengths is None else x @ self.read.T / given.lengths
        z = fired(z + self.bias, self.threshold)
        return z if given.known is None else torch.where(given.known.isnan(), z, given.known)

    def change(self, x: Float[Tensor, "B N D"], given: Given, has: Has = EVERYTHING) -> Change:
        """What the edits do to activations, by the formulas above."""
        x = x.float()
        z, g = self.readings(x, given), given.gains
        scale, shift, low, high = (self._for(amounts, given.row) for amounts in (self.scale, self.shift, self.low, self.high))
        moved = (scale - 1) * z + (shift if given.forecast is None else shift + given.forecast)
        moved = moved if g is None else g * moved
        written = self.write if given.lengths is None else given.lengths[..., None] * self.write
        if has.latents:
            moved = self._floored(moved, z)
        delta, total, share = _sum(moved, written), moved, None
        delta = delta if given.beside is None else delta + given.beside
        if has.targets:
            wanted = _wanted(z, given)
            share = self.target if g is None else self.target * (g > 0)
            gains = 1.0 if g is None else g
            if has.latents:
                coded, others = share * (self.threshold > -inf), moved @ self.same
                miss = _miss(z + others, low.clamp(min=0), high.clamp(min=0), wanted, coded * gains)
                delta, moved, total = delta + _sum(miss, written), moved + miss, total + coded * others + miss
                share = share - coded
            if has.directions:
                others = delta @ self.read.T
                miss = _miss(z + others, low, high, wanted, share * gains)
                total = total + share * others + miss
                delta, moved = delta + self._least_change(miss, share.expand_as(z)), moved + miss
        change = Change(delta, z, moved, None)
        if not has.cap:
            return change
        return self._capped(change, total, share if has.directions else None, written, given.beside)

    def _capped(
        self, change: Change, total: Float[Tensor, "B N K"], share: Tensor | None, written: Tensor, beside: Tensor | None
    ) -> Change:
        """A change whose additions are cut to the cap; `total` is how far the edits move readings, `share` 1 where a direction
        is given a value, `beside` what is not cut."""
        z = change.before
        taken = total.clamp(z.clamp(min=0).neg(), z.clamp(max=0).neg())  # no farther than to 0
        takes = ((total - taken).abs() <= 1e-5 * z.abs()) & (self.takes > 0)
        taken = torch.where(takes, taken, 0)
        coded = taken if share is None else taken * (1 - share)
        less = _sum(coded, written)
        if share is not None:  # what takes from these directions, and from no other target
            own = share * (taken - less @ self.read.T)
            less, coded = less + self._least_change(own, share.expand_as(own)), coded + own
        less = less if beside is None else less + beside
        more = change.delta - less
        # compiled code has caps that are infinite, through which gradients are not numbers
        length = (more.detach() if is_compiling() else more).norm(dim=-1, keepdim=True)
        kept = (self.cap / length.clamp(min=1e-12)).clamp(max=1)
        delta = torch.where(kept < 1, less + more * kept, change.delta)
        moved = torch.where(kept < 1, coded + (change.moved - coded) * kept, change.moved)
        return Change(delta, z, moved, (kept < 1 / 1.0001) & ~takes & (total != 0))

    def _for(self, amounts: Float[Tensor, "R K"], row: Tensor | None) -> Tensor:
        """Amounts of each row of the batch, `[B, 1, K]`, or one for all."""
        return amounts[0] if row is None else amounts[row, None]

    def _floored(self, moved: Float[Tensor, "B N K"], z: Float[Tensor, "B N K"]) -> Float[Tensor, "B N K"]:
        """Additions that leave no latent below 0; several to one latent count together, and each is given its part."""
        floor = torch.where(self.threshold > -inf, -z, -inf)
        return (moved @ self.same).maximum(floor) / self.same.sum(0)

    def _least_change(self, miss: Float[Tensor, "B N K"], active: Float[Tensor, "B N K"]) -> Float[Tensor, "B N D"]:
        """The shortest d with `r_k d = miss_k` for the active k: `R^T (R R^T)^-1 miss`."""
        gram = self.read @ self.read.T
        if len(gram) == 1:
            return miss / gram.clamp(min=1e-30) @ self.read
        both = active[..., :, None] * active[..., None, :]
        system = gram * both + torch.diag_embed(1 - active)
        return torch.linalg.solve_ex(system, miss[..., None])[0][..., 0] @ self.read  # unchecked: the host would wait


def _wanted(z: Float[Tensor, "B N K"], given: Given) -> Float[Tensor, "B N K"] | None:
    """Targets in place of the bounds, where concepts read z before any edit."""
    if given.beyond is None:
        return given.wanted
    held = z + given.beyond
    return held if given.wanted is None else torch.where(held.isnan(), given.wanted, held)


def _miss(z: Tensor, low: Tensor, high: Tensor, wanted: Tensor | None, share: Tensor) -> Float[Tensor, "B N K"]:
    """How far readings are from their targets, as far as edits act."""
    aim = z.clamp(low, high)
    if wanted is not None:
        aim = torch.where(wanted.isnan(), aim, wanted)
    return share * (aim - z)


def _sum(moved: Float[Tensor, "B N K"], written: Any) -> Float[Tensor, "B N D"]:
    """What movements write, `[K, D]`, or of each token its own, `[B, N, K, D]`."""
    return moved @ written if written.ndim == 2 else torch.einsum("bnk,bnkd->bnd", moved, written)
