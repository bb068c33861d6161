"""What the edits at one site do to `x`.

`B` rows, `N` tokens of this pass, `D` width, `K` edits at the site, `R` rows that amounts are given for.

    z  = x r^T + b                                        what each concept reads
    x1 = x + sum_k g_k ((scale_k - 1) z_k + shift_k) w_k  the additions
    x2 = x1 + argmin |d|  with  r_k (x1 + d) + b_k = z_k(x1) + g_k (clamp(z_k(x1), low_k, high_k) - z_k(x1))

for every target k that acts there (g_k > 0). The change x2 - x is capped in length and cast once.
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
from .encoders import Rows
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

    @property
    def is_constant(self) -> bool:
        """Whether the change depends on nothing but the row and the part of the text."""
        i = self.intervention
        unconditional = i.when is None and i.mask is None and self.branch is None and not self.gates
        return (
            unconditional
            and not (self.is_target or self.forecast or self.scope is not None or isinstance(i.tokens, slice))
            and self.norm is None
            and self.rule.scale == 1
        )


class Reading(NamedTuple):
    """A concept whose reading, in its units, other edits ask for."""

    key: Key
    rows: Rows
    unit: float


@dataclass(eq=False)
class Table:
    """`K` edits as tensors; a compiled model keeps one of fixed size and has its contents replaced in place."""

    read: Float[Tensor, "K D"]
    bias: Float[Tensor, " K"]
    write: Float[Tensor, "K D"]
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
        table = cls.empty(len(edits), edits[0].rows.read.shape[-1], rows)
        table.read, table.bias, table.write = (torch.cat(part) for part in zip(*(e.rows for e in edits), strict=True))
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
        has_targets: bool = True,
    ) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B N K"], Float[Tensor, "B N"], Bool[Tensor, "B N"]]:
        """The change of x, the change of each coordinate, the change's length before the cap, and where edits act.

        `extra` scales each edit (gates, masks), `forecast` adds to its shift, `wanted` replaces targets that are not NaN.
        """
        row = (torch.arange(len(x), device=x.device) * self.prompts.long()) // len(x)
        x = x.float()
        z = x @ self.read.T + self.bias
        g = self._gains(state, z) if extra is None else self._gains(state, z) * extra
        shift = self.shift[row, None] if forecast is None else self.shift[row, None] + forecast
        moved = g * ((self.scale[row, None] - 1) * z + shift)
        delta = moved @ self.write
        if has_targets:
            z1 = z + delta @ self.read.T
            aim = z1.clamp(self.low[row, None], self.high[row, None])
            if wanted is not None:
                aim = torch.where(wanted.isnan(), aim, wanted)
            active = self.target * (g > 0)
            miss = active * g * (aim - z1)
            delta = delta + self._least_change(miss, active)
            moved = moved + miss
        length = delta.detach().norm(dim=-1)  # the cap is a measure, not a part of the edit that is learned through
        kept = (self.cap / length.clamp(min=1e-30)).clamp(max=1)[..., None]
        return delta * kept, moved * kept, length, (g > 0).any(-1)

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
        targets = [edit.rows.read[0] for edit in edits if edit.is_target]
        self.has_targets = bool(targets)
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
                self.twin.readings[edit.key] = (x.float() @ edit.rows.read[0].to(x.device)) + edit.rows.bias[0].to(x.device)

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
        if self.table is not None and x.shape[-1] != self.table.read.shape[-1]:
            names = ", ".join(repr(edit.concept.name) for edit in self.edits)
            raise WrongWidth(f"{names} expects activations of width {self.table.read.shape[-1]}, the site has {x.shape[-1]}")

    def _repeated(self, delta: Tensor, x: Tensor, state: StepState) -> Tensor:
        """The constant change of each row of the batch: rows are prompts, which beams repeat."""
        self._check_rows(len(delta), len(x), state)
        return delta if len(delta) == len(x) else delta.repeat_interleave(len(x) // len(delta), dim=0)

    def _check_rows(self, amounts: int, rows: int, state: StepState) -> None:
        expected = state.prompts or rows
        if amounts not in (1, expected) or rows % amounts:
            raise RowMismatch(f"expected one amount for each of {expected} rows, got {amounts}; give one number or {expected}")

    def _general(self, x: Tensor, state: StepState) -> Tensor:
        for key, rows, unit in self.readings:
            state.notes[key] = (x.float() @ rows.read[0].to(x.device) + rows.bias[0].to(x.device)) / unit
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
            has_targets=self.has_targets,
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
            own = (x.float() @ self.table.read[k] + self.table.bias[k]) if self.table is not None else value
            wanted[..., k] = torch.where((position < table.shape[1]) & ~value.isnan(), value, own)
        return wanted

    def _look(self, y: Tensor, state: StepState, length: Tensor) -> None:
        """Note how large the change is and how far the concepts are off their natural range (first tokens excluded)."""
        assert self.table is not None
        with torch.no_grad():
            table = self.table if self.table.read.device == y.device else self.table.to(y.device)
            z = y.float() @ table.read.T + table.bias
            seen = (state.positions > 0).expand(y.shape[:2])
            if state.real is not None:
                seen = seen & state.real
            ends = [edit.concept.natural or (-inf, inf) for edit in self.edits]
            low, high = (torch.tensor(side, device=y.device) for side in zip(*ends, strict=True))
            units = torch.tensor([edit.concept.unit for edit in self.edits], device=y.device)
            off = (((z < low) | (z > high)) & seen[..., None]).sum((0, 1))
            largest = (z.abs() / units * seen[..., None]).amax((0, 1))
            tally = self.tally
            tally.looked = tally.looked + seen.sum()
            tally.changed = tally.changed + (length.clamp(max=self.cap) * seen).sum()
            tally.off = off if tally.off is None else tally.off + off
            tally.largest = largest if tally.largest is None else tally.largest.maximum(largest)
