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

import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import inf
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .concepts import Concept, Gate
from .encoders import Encoder, Rows
from .encoders.base import fired, scale
from .errors import ConflictingEdits, RowMismatch, Unanswerable, WrongWidth
from .interventions import Intervention, Patch, Rule, patched
from .schedules import Branch, StepState, gain

Key = Hashable
"""One concept of one bank: what notes between sites are filed under."""
SAMPLE_EVERY = 256
"""Passes between two looks at how far off its natural range a concept is; the first two passes are looked at."""


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
    norm: float | None = None
    """Additions are multiplied by a token's length over this."""
    forecast: Mapping[Key, float] = field(default_factory=dict)
    """Add these multiples of the changes noted for other concepts (raw per raw)."""
    held: bool = False
    """Keep the reading of an unsteered twin."""
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
        unconditional = i.when is None and i.mask is None and self.branch is None and not self.gates
        return (
            unconditional
            and not (
                self.is_target
                or floored
                or self.rows.norm
                or self.forecast
                or self.scope is not None
                or isinstance(i.tokens, slice)
            )
            and self.norm is None
            and self.rule.scale == 1
        )


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
        z = self.rows.reading(x) if self.crowd is None else self.crowd.encode(x)[..., [self.index]]
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
        row = (torch.arange(len(x), device=x.device) * self.prompts.long()) // len(x)
        x = x.float()
        z = x @ self.read.T if lengths is None else x @ self.read.T / lengths
        z = z + self.bias
        if has_latents:
            z = fired(z, self.threshold)
        if known is not None:
            z = torch.where(known.isnan(), z, known)
        g = self._gains(state, z) if extra is None else self._gains(state, z) * extra
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

    def _gains(self, state: StepState, z: Tensor) -> Tensor:
        """Share of each edit at each token."""
        positions, steps = state.positions, state.steps
        inside = (positions[..., None] >= self.span[:, 0]) & (positions[..., None] < self.span[:, 1])
        section = torch.where(steps[..., None] > 0, self.sections[1], self.sections[0])
        g = gain(steps, self.schedule) * section * inside
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


@dataclass(eq=False)
class Tally:
    """What a program did, for the report; tensors are read only when somebody asks."""

    passes: int = 0
    acts: int = 0
    """Passes that the constant change was added to."""
    tokens: int | Tensor = 0
    """Positions at which an edit acted, per row."""
    section: str = ""
    """Part of the text that the last pass read."""
    changed: float | Tensor = 0.0
    """Sum over looked-at tokens of the change's length."""
    capped: int | Tensor = 0
    looked: int | Tensor = 0
    """Tokens looked at."""
    off: Tensor | None = None
    """Of these, how many read outside the natural range, by concept."""
    largest: Tensor | None = None


def _for_rows(table: Tensor, rows: int, what: str) -> Tensor:
    """A table of prompts for the rows of a batch, which beams repeat."""
    if rows % len(table):
        raise RowMismatch(f"{what} has {len(table)} rows, the batch {rows}")
    return table.repeat_interleave(rows // len(table), dim=0)


class Twin(threading.local):
    """What held concepts read in the unsteered twin of this thread's pass."""

    def __init__(self) -> None:
        self.readings: dict[Key, Tensor] = {}


class Program:
    """All edits at one site, and the readings other sites need from it."""

    def __init__(self, edits: Sequence[Edit], readings: Sequence[Reading] = (), cap: float = inf):
        self.edits, self.readings, self.cap = tuple(edits), tuple(readings), cap
        self.tally = Tally()
        self.twin = Twin()
        self.merged: tuple[Program, int] | None = None
        """The program that runs in place of this one where several sessions edit a site, and where its edits begin there."""
        self.table = Table.of(edits, cap) if edits else None
        targets = [edit.rows.read[0] for edit in edits if edit.is_target and not edit.rows.is_sparse]
        self.has_targets = any(edit.is_target for edit in edits)
        self.has_latents = any(edit.rows.is_sparse for edit in edits)
        if len(targets) > 1 and int(torch.linalg.matrix_rank(torch.stack(targets))) < len(targets):
            names = ", ".join(repr(edit.concept.name) for edit in edits if edit.is_target)
            raise ConflictingEdits(f"{names} cannot all be given a value: their directions depend on each other; set fewer")
        parts: list[Any] = list(dict.fromkeys(edit.intervention.tokens for edit in edits if edit.is_constant))
        constant = len(parts) == 1 and all(edit.is_constant for edit in edits) and not readings
        self.part: str | None = parts[0] if constant else None
        self.delta = self._constant() if self.part is not None else None
        self.rows = 1 if self.table is None else len(self.table.scale)
        self._patches = {
            k: patched(edit.intervention.tape[edit.concept.name])
            for k, edit in enumerate(edits)
            if isinstance(edit.intervention, Patch)
        }

    def _constant(self) -> Tensor:
        """The change of every token, `[D]` or `[R, 1, D]`, capped."""
        assert self.table is not None
        delta = self.table.shift @ self.table.write
        length = delta.norm(dim=-1, keepdim=True)
        delta = delta * (self.cap / length.clamp(min=1e-30)).clamp(max=1)
        return delta[0] if len(delta) == 1 else delta[:, None]

    def anew(self) -> "Program":
        """The same edits with an empty tally."""
        other = Program.__new__(Program)
        other.__dict__.update(self.__dict__, tally=Tally(), twin=Twin(), merged=None)
        return other

    def listen(self, x: Tensor) -> None:
        """Keep what held concepts read here, in a pass without edits."""
        for edit in self.edits:
            if edit.held:
                self.twin.readings[edit.key] = Reading(edit.key, edit.rows, 1.0, edit.crowd, edit.concept.index).of(x)

    def __call__(self, x: Tensor, state: StepState) -> Tensor:
        """The steered x."""
        tally = self.tally
        passes = tally.passes = tally.passes + 1
        delta = self.delta
        if delta is None or not state.is_plain:
            if passes == 1:
                self._check_width(x)
            return self._general(x, state)
        if self.part != "all" and self.part != state.section:
            return x
        tally.tokens += state.length
        if delta.dtype is not x.dtype or delta.device != x.device or tally.acts == 0:
            self._check_width(x)
            delta = self.delta = self._constant().to(x.device, x.dtype)
        acts = tally.acts = tally.acts + 1
        if self.rows > 1:
            delta = self._repeated(delta, x, state)
        y = x + delta
        if acts < 3 or not acts % SAMPLE_EVERY:
            self._look(y, state, delta.norm(dim=-1).expand(y.shape[:2]))
        return y

    def _check_width(self, x: Tensor) -> None:
        if self.table is not None and x.shape[-1] != self.table.write.shape[-1]:
            names = ", ".join(repr(edit.concept.name) for edit in self.edits)
            raise WrongWidth(f"{names} expects activations of width {self.table.write.shape[-1]}, the site has {x.shape[-1]}")

    def _repeated(self, delta: Tensor, x: Tensor, state: StepState) -> Tensor:
        """The constant change of each row of the batch: rows are prompts, which beams repeat."""
        self._check_rows(len(delta), len(x), state)
        return delta if len(delta) == len(x) else delta.repeat_interleave(len(x) // len(delta), dim=0)

    def _check_rows(self, amounts: int, rows: int, state: StepState) -> None:
        expected = state.prompts or rows
        if amounts not in (1, expected) or rows % amounts:
            raise RowMismatch(f"expected one amount for each of {expected} rows, got {amounts}; give one number or {expected}")

    def _general(self, x: Tensor, state: StepState) -> Tensor:
        for reading in self.readings:
            state.notes[reading.key] = reading.of(x)
        if self.table is None:
            return x
        if self.table.read.device != x.device:
            self.table = self.table.to(x.device)
        self._check_rows(len(self.table.scale), len(x), state)
        delta, moved, length, acting = self.table.change(
            x,
            state,
            extra=self._extra(x, state),
            forecast=self._forecast(x, state),
            wanted=self._wanted(x, state),
            known=self._known(x, state),
            lengths=self._lengths(x),
            has_targets=self.has_targets,
            has_latents=self.has_latents,
        )
        for k, edit in enumerate(self.edits):
            if edit.scope is not None:
                note = (edit.scope, edit.key)
                state.notes[note] = state.notes.get(note, 0) + moved[..., k]
        y = x + delta.to(x.dtype)
        tally = self.tally
        tally.tokens = tally.tokens + acting.sum() / len(x)
        if self.cap < inf:
            tally.capped = tally.capped + ((length > self.cap * 1.0001) & (state.positions > 0)).sum()
        if not tally.passes % SAMPLE_EVERY or tally.section != state.section:
            self._look(y, state, length)
        tally.section = state.section
        return y

    def _known(self, x: Tensor, state: StepState) -> Tensor | None:
        """Readings that one row of the encoder cannot give, NaN elsewhere, `[B, N, K]`: of latents that compete, and of those
        read at an earlier site."""
        if not any(edit.crowd is not None or edit.heard is not None for edit in self.edits):
            return None
        known = x.new_full((*x.shape[:2], len(self.edits)), torch.nan, dtype=torch.float32)
        codes: dict[int, Tensor] = {}
        for k, edit in enumerate(self.edits):
            if edit.heard is not None:
                if edit.heard not in state.notes:
                    raise Unanswerable(f"{edit.concept.name!r} is read at an earlier site, which this pass did not go through")
                known[..., k] = state.notes[edit.heard]
            elif edit.crowd is not None:
                if id(edit.crowd) not in codes:
                    codes[id(edit.crowd)] = edit.crowd.encode(x)
                known[..., k] = codes[id(edit.crowd)][..., edit.concept.index]
        return known

    def _lengths(self, x: Tensor) -> Tensor | None:
        """What each edit's encoder divides tokens by, `[B, N, K]`."""
        if not any(edit.rows.norm for edit in self.edits):
            return None
        one = x.new_ones((*x.shape[:2], 1), dtype=torch.float32)
        return torch.cat([scale(x, edit.rows.norm) if edit.rows.norm else one for edit in self.edits], dim=-1)

    def _extra(self, x: Tensor, state: StepState) -> Tensor | None:
        """What gates, masks and branches leave of each edit, `[B, N, K]`."""
        shares = [self._share(edit, x, state) for edit in self.edits]
        if all(share is None for share in shares):
            return None
        whole = x.new_ones((), dtype=torch.float32)
        return torch.stack([(whole if s is None else s).expand(x.shape[:2]) for s in shares], dim=-1)

    def _share(self, edit: Edit, x: Tensor, state: StepState) -> Tensor | None:
        share: Tensor | None = None
        if edit.branch is not None and edit.branch != (state.branch or "cond"):  # without guidance all is conditional
            return x.new_zeros((), dtype=torch.float32)
        for gate in edit.gates:
            noted = state.notes.get(("gate", edit.key, gate))
            if noted is None:
                raise Unanswerable(
                    f"the gate on {gate.concept!r} is read after {edit.concept.name!r} is edited; "
                    "gate with a concept of an earlier site, or of the same one"
                )
            if gate.full is not None:
                passed = ((noted - gate.above) / (gate.full - gate.above)).clamp(0, 1)
            else:
                passed = ((noted > gate.above) & (noted < gate.below)).float()
            share = passed if share is None else share * passed
        if edit.norm is not None:
            length = x.float().norm(dim=-1) / edit.norm
            share = length if share is None else share * length
        if edit.intervention.mask is not None:
            mask = edit.intervention.mask.to(x.device, torch.float32)
            table = _for_rows(mask if mask.ndim == 2 else mask[None], len(x), f"the mask of {edit.concept.name!r}")
            position = state.positions.expand(len(x), -1).clamp(min=0)
            within = table.gather(1, position.clamp(max=table.shape[1] - 1)) * (position < table.shape[1])
            share = within if share is None else share * within
        return share

    def _forecast(self, x: Tensor, state: StepState) -> Tensor | None:
        """What the graph adds to each edit's amount, `[B, N, K]`."""
        if not any(edit.forecast for edit in self.edits):
            return None
        none = x.new_zeros(x.shape[:2], dtype=torch.float32)
        return torch.stack([sum((w * state.notes.get(k, none) for k, w in e.forecast.items()), none) for e in self.edits], -1)

    def _wanted(self, x: Tensor, state: StepState) -> Tensor | None:
        """Targets that differ from token to token, NaN where there is none, `[B, N, K]`."""
        kept = [k for k, edit in enumerate(self.edits) if edit.held]
        held = {k: self.twin.readings.pop(self.edits[k].key) for k in kept if self.edits[k].key in self.twin.readings}
        if len(held) < len(kept):
            raise Unanswerable("do='hold' needs the whole model to be called, not a part of it: its twin did not run")
        if not held and not self._patches:
            return None
        wanted = x.new_full((*x.shape[:2], len(self.edits)), torch.nan, dtype=torch.float32)
        for k, values in held.items():
            wanted[..., k] = values
        for k, table in self._patches.items():
            table = _for_rows(table.to(x.device), len(x), f"the tape of {self.edits[k].concept.name!r}")
            position = state.positions.expand(len(x), -1).clamp(min=0)
            value = table.gather(1, position.clamp(max=table.shape[1] - 1))
            own = self.edits[k].reading(x, state)
            wanted[..., k] = torch.where((position < table.shape[1]) & ~value.isnan(), value, own)
        return wanted

    def _look(self, y: Tensor, state: StepState, length: Tensor) -> None:
        """Note how large the change is and how far the concepts are off their natural range (first tokens excluded)."""
        assert self.table is not None
        with torch.no_grad():
            table = self.table if self.table.read.device == y.device else self.table.to(y.device)
            z = fired(y.float() @ table.read.T + table.bias, table.threshold)
            seen = (state.positions > 0).expand(y.shape[:2])
            if state.real is not None:
                seen = seen & state.real
            alone = [edit.crowd is None and edit.heard is None and not edit.rows.norm for edit in self.edits]
            ends = [(edit.concept.natural if own else None) or (-inf, inf) for edit, own in zip(self.edits, alone, strict=True)]
            low, high = (torch.tensor(side, device=y.device) for side in zip(*ends, strict=True))
            units = torch.tensor([edit.concept.unit for edit in self.edits], device=y.device)
            off = (((z < low) | (z > high)) & seen[..., None]).sum((0, 1))
            largest = (z.abs() / units * seen[..., None]).amax((0, 1))
            tally = self.tally
            tally.looked = tally.looked + seen.sum()
            tally.changed = tally.changed + (length.clamp(max=self.cap) * seen).sum()
            tally.off = off if tally.off is None else tally.off + off
            tally.largest = largest if tally.largest is None else tally.largest.maximum(largest)
