"""What the edits at one site do to `x`.

`B` rows, `N` tokens of this pass, `D` width, `K` edits at the site, `R` rows that amounts are given for.

    z  = x r^T + b                                        what each concept reads
    x1 = x + sum_k g_k ((scale_k - 1) z_k + shift_k) w_k  the additions
    x2 = x1 + argmin |d|  with  r_k (x1 + d) + b_k = z_k(x1) + g_k (clamp(z_k(x1), low_k, high_k) - z_k(x1))

for every target k that acts there (g_k > 0). The change x2 - x is capped in length and cast once.

Latents of sparse codes read `z = p` where their potential `p = x r^T + b` is above a threshold, else 0. They are changed in the
code: x moves by `(z' - z) w`, where z', after all additions to the latent together, is not below 0; what the code does not
describe stays. Their targets are met before those of directions, which see what they did.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import inf
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..bank.concepts import Concept, Gate
from ..encoders import Encoder, Rows
from ..encoders.base import fired
from ..errors import RowMismatch, Unanswerable
from ..passes import Branch, StepState
from ..schedules import gain
from .interventions import Intervention, Rule

Key = Hashable
"""One concept of one bank: what notes between sites are filed under."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Edit:
    """One intervention on one concept, in raw coordinates."""

    key: Key
    concept: Concept
    rows: Rows
    """Of this concept alone: `read[1, D]`, `bias[1]`, `write[1, D]`."""
    rule: Rule
    intervention: Intervention
    branch: Branch | None = None
    crowd: Encoder | None = None
    """Where latents compete: all of them, to see whether this one is kept."""
    heard: Key | None = None
    """The note that holds its reading, where that is taken at an earlier site."""
    gates: tuple[Gate, ...] = ()
    """Bounded (plans fill in what a bank stores); what they let through multiplies."""
    shut: tuple[Gate, ...] = ()
    """Those that let it through where they are closed: of concepts held at its site."""
    norm: float | None = None
    """Additions are multiplied by a token's length over this."""
    forecast: Mapping[Key, float] = field(default_factory=dict)
    """Add these multiples of the changes noted for other concepts (raw per raw)."""
    held: bool = False
    """Keep the reading of an unsteered twin."""
    keeps_norm: bool = False
    """Tokens that it moves keep their length."""
    replays: str = ""
    """What it takes from a tape: the recorded readings of its concept, by its name, or the activations of its site."""
    swaps: bool = False
    """Whether the tape gives whole activations."""
    scope: object = None
    """The session whose later sites are told how far this concept was moved; None: nobody is told."""

    @property
    def is_target(self) -> bool:
        """Whether the concept has to read a given value afterwards."""
        return self.held or self.rule.is_target

    def reading(self, x: Float[Tensor, "B N D"], state: StepState) -> Float[Tensor, "B N"]:
        """z as it is, in raw coordinates."""
        if self.heard is not None:
            return state.notes[self.heard]
        return Reading(self.key, self.rows, 1.0, self.crowd, self.concept.index).of(x)

    @property
    def is_constant(self) -> bool:
        """Whether the change depends on nothing but the row and the part of the text."""
        i, floored = self.intervention, self.rows.is_sparse and _least(self.rule.shift) < 0
        unconditional = i.when is None and i.mask is None and self.branch is None and not (self.gates or self.shut)
        return (
            unconditional
            and not (
                self.is_target
                or floored
                or self.rows.norm
                or self.forecast
                or self.scope is not None
                or isinstance(i.tokens, slice)
                or self.swaps
                or self.keeps_norm
            )
            and self.norm is None
            and self.rule.scale == 1
        )


class Kept(NamedTuple):
    """Activations that other edits ask for."""

    key: Key

    def of(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """As they are."""
        return x


class Reading(NamedTuple):
    """A concept whose reading, in its units, other edits ask for."""

    key: Key
    rows: Rows
    unit: float
    crowd: Encoder | None = None
    index: int = 0
    """Its place in the crowd."""

    def of(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N"]:
        """In units, float32."""
        z = self.rows.reading(x) if self.crowd is None else self.crowd.readings(x, [self.index])
        return z[..., 0] / self.unit


def _least(amount: Any) -> float:
    return min(amount) if isinstance(amount, tuple) else amount


@dataclass(eq=False)
class Table:
    """`K` edits as tensors; a compiled model keeps one of fixed size and has its contents replaced in place."""

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
    schedule: Float[Tensor, "K 5"]
    paced: Float[Tensor, " K"]
    """1 where progress opens the schedule, 0 where steps do."""
    span: Float[Tensor, "K 2"]
    """Positions from and up to which an edit acts."""
    sections: Float[Tensor, "2 K"]
    """Whether it acts in the prompt and on new tokens."""
    cap: Float[Tensor, ""]
    """Longest change of a token."""
    prompts: Float[Tensor, ""]
    """`R` of the contents, which may be less than there is room for."""

    @classmethod
    def empty(cls, edits: int, width: int, rows: int = 1, device: torch.device | None = None) -> "Table":
        """Room for some edits, none of which does anything."""
        new = torch.zeros(0, device=device).new_full
        return cls(
            read=new((edits, width), 0),
            bias=new((edits,), 0),
            write=new((edits, width), 0),
            threshold=new((edits,), -inf),
            same=torch.eye(edits, device=device),
            scale=new((rows, edits), 1),
            shift=new((rows, edits), 0),
            low=new((rows, edits), -inf),
            high=new((rows, edits), inf),
            target=new((edits,), 0),
            schedule=torch.tensor([0, inf, 1, 1, 0.0], device=device).repeat(edits, 1),
            paced=new((edits,), 0),
            span=torch.tensor([0, inf], device=device).repeat(edits, 1),
            sections=new((2, edits), 1),
            cap=new((), inf),
            prompts=new((), 1),
        )

    @classmethod
    def of(cls, edits: Sequence[Edit], cap: float = inf) -> "Table":
        """The contents for some edits, on the CPU."""
        amounts = [amount for edit in edits for amount in edit.rule if isinstance(amount, tuple)]
        rows = max(map(len, amounts), default=1)
        if {len(amount) for amount in amounts} - {rows}:
            raise RowMismatch(f"expected equally many amounts for all concepts, got {sorted(map(len, amounts))}")
        table = cls.empty(len(edits), edits[0].rows.write.shape[-1], rows)
        for name in ("read", "bias", "write", "threshold"):
            setattr(table, name, torch.cat([getattr(edit.rows, name) for edit in edits]))
        table.same = torch.tensor([[float(one.key == other.key) for one in edits] for other in edits])
        for k, edit in enumerate(edits):
            for column, amount in zip((table.scale, table.shift, table.low, table.high), edit.rule, strict=True):
                column[:, k] = torch.tensor(amount)
            table.target[k] = edit.is_target
            if (when := edit.intervention.when) is not None:
                table.schedule[k] = torch.tensor(when.numbers())
                table.paced[k] = when.clock == "progress"
            tokens = edit.intervention.tokens
            if isinstance(tokens, slice):
                table.span[k] = torch.tensor([tokens.start or 0, inf if tokens.stop is None else tokens.stop])
            else:
                table.sections[:, k] = torch.tensor([tokens != "generated", tokens != "prompt"])
        table.cap.fill_(cap)
        table.prompts.fill_(rows)
        return table

    def to(self, device: torch.device) -> "Table":
        """The same contents elsewhere."""
        return Table(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def fill(self, other: "Table | None") -> None:
        """Replace the contents in place, leaving shapes, and so compiled code, as they are."""
        edits, width = self.read.shape
        room = Table.empty(edits, width, len(self.scale), self.read.device)
        if other is not None:
            k, rows = len(other.read), len(other.scale)
            if k > edits or rows > len(self.scale):
                raise Unanswerable(
                    f"a compiled model has room for {edits} edits and {len(self.scale)} rows at a site, got {k} and "
                    f"{rows}; edit fewer at once, or do not compile"
                )
            for f in fields(self):
                mine, theirs = getattr(room, f.name), getattr(other, f.name)
                mine[tuple(slice(size) for size in theirs.shape)] = theirs.to(mine.device)
        for f in fields(self):
            getattr(self, f.name).copy_(getattr(room, f.name))

    def change(
        self,
        x: Float[Tensor, "B N D"],
        state: StepState,
        *,
        extra: Float[Tensor, "B N K"] | None = None,
        forecast: Float[Tensor, "B N K"] | None = None,
        wanted: Float[Tensor, "B N K"] | None = None,
        known: Float[Tensor, "B N K"] | None = None,
        lengths: Float[Tensor, "B N K"] | None = None,
        has_targets: bool = True,
        has_latents: bool = True,
    ) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B N K"], Float[Tensor, "B N"], Bool[Tensor, "B N"]]:
        """The change of x, the change of each coordinate, the change's length before the cap, and where edits act.

        `extra` scales each edit (gates, masks), `forecast` adds to its shift, `wanted` replaces targets that are not NaN, and
        `known` readings that are not; `lengths` is what encoders that normalise divide tokens by.
        """
        row = state.row(self.prompts.long(), len(x)).to(x.device)
        x = x.float()
        z = x @ self.read.T if lengths is None else x @ self.read.T / lengths
        z = z + self.bias
        if has_latents:
            z = fired(z, self.threshold)
        if known is not None:
            z = torch.where(known.isnan(), z, known)
        g = self.gains(state, z) if extra is None else self.gains(state, z) * extra
        shift = self.shift[row, None] if forecast is None else self.shift[row, None] + forecast
        moved = g * ((self.scale[row, None] - 1) * z + shift)
        written = self.write if lengths is None else lengths[..., None] * self.write
        if has_latents:
            moved = self._floored(moved, z)
        delta = _sum(moved, written)
        if has_targets:
            active = self.target * (g > 0)
            low, high = self.low[row, None], self.high[row, None]
            if has_latents:
                miss = self._miss(z + moved @ self.same, low.clamp(min=0), high, wanted, active * (self.threshold > -inf) * g)
                delta, moved = delta + _sum(miss, written), moved + miss
                active = active * (self.threshold == -inf)
            miss = self._miss(z + delta @ self.read.T, low, high, wanted, active * g)
            delta, moved = delta + self._least_change(miss, active), moved + miss
        length = delta.detach().norm(dim=-1)  # the cap is a measure, not a part of the edit that is learned through
        kept = (self.cap / length.clamp(min=1e-30)).clamp(max=1)[..., None]
        return delta * kept, moved * kept, length, (g > 0).any(-1)

    def _floored(self, moved: Float[Tensor, "B N K"], z: Float[Tensor, "B N K"]) -> Float[Tensor, "B N K"]:
        """Additions that leave no latent below 0; several to one latent count together, and each is given its part."""
        floor = torch.where(self.threshold > -inf, -z, -inf)
        return (moved @ self.same).maximum(floor) / self.same.sum(0)

    def _miss(self, z: Tensor, low: Tensor, high: Tensor, wanted: Tensor | None, share: Tensor) -> Float[Tensor, "B N K"]:
        """How far readings are from their targets, as far as edits act."""
        aim = z.clamp(low, high)
        if wanted is not None:
            aim = torch.where(wanted.isnan(), aim, wanted)
        return share * (aim - z)

    def gains(self, state: StepState, z: Tensor) -> Tensor:
        """Share of each edit at each token."""
        positions, steps = state.positions, state.steps
        inside = (positions[..., None] >= self.span[:, 0]) & (positions[..., None] < self.span[:, 1])
        section = torch.where(steps[..., None] > 0, self.sections[1], self.sections[0])
        moment = steps[..., None]
        if state.progress is not None:
            moment = torch.where(self.paced > 0, state.progress, moment)
        g = gain(moment, self.schedule) * section * inside
        return (g if state.real is None else g * state.real[..., None]).expand_as(z)

    def _least_change(self, miss: Tensor, active: Tensor) -> Tensor:
        """The shortest d with `r_k d = miss_k` for the active k: `R^T (R R^T)^-1 miss`."""
        gram = self.read @ self.read.T
        if len(gram) == 1:
            return miss / gram.clamp(min=1e-30) @ self.read
        both = active[..., :, None] * active[..., None, :]
        system = gram * both + torch.diag_embed(1 - active)
        return torch.linalg.solve(system, miss[..., None])[..., 0] @ self.read


def _sum(moved: Float[Tensor, "B N K"], written: Tensor) -> Float[Tensor, "B N D"]:
    """What movements write, `[K, D]`, or of each token its own, `[B, N, K, D]`."""
    return moved @ written if written.ndim == 2 else torch.einsum("bnk,bnkd->bnd", moved, written)
