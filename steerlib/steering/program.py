"""The edits of one site at work: what they read, what lets them act, and what became of them."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..encoders.base import Encoder, fired, scale
from ..errors import ConflictingEdits, RowMismatch, Unanswerable, WrongWidth
from ..passes import StepState
from ..schedules import PerStep, Window, Within, gain
from . import masks
from .edit import Edit, Kept, Key, Reading, Table
from .interventions import Patch
from .replay import Replay

SAMPLE_EVERY = 256
"""Passes between two looks at how far off its natural range a concept is; the first two passes are looked at."""
STEPS_EVERY = 4
"""The same for passes of a denoiser, which are few and differ."""


@dataclass(eq=False)
class Tally:
    """What a program did, for the report; tensors are read only when somebody asks."""

    passes: int = 0
    acts: int = 0
    """Passes that the constant change was added to."""
    acted: int | Tensor = 0
    """Other passes in which an edit acted."""
    seen: int = 0
    """Positions that went by, per row."""
    tokens: int | Tensor = 0
    """Of these, where an edit acted."""
    progress: tuple[float, float] | None = None
    """Least and most, of the passes of a denoiser."""
    halves: frozenset[str] = frozenset()
    """Which halves of guidance went by."""
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


class Twin(threading.local):
    """What held concepts read in the unsteered twin of this thread's pass."""

    def __init__(self) -> None:
        self.readings: dict[Key, Tensor] = {}


class Program:
    """All edits at one site, and the readings other sites need from it."""

    def __init__(self, edits: Sequence[Edit], readings: Sequence[Reading | Kept] = (), cap: float = inf):
        self.edits, self.readings, self.cap = tuple(edits), tuple(readings), cap
        self.tally = Tally()
        self.twin = Twin()
        self.merged: tuple[Program, int] | None = None
        """The program that runs in place of this one where several sessions edit a site, and where its edits begin there."""
        self.table = Table.of(edits, cap) if edits else None
        self.has_targets = any(edit.is_target for edit in edits)
        self.has_latents = any(edit.rows.is_sparse for edit in edits)
        targets = [edit for edit in edits if edit.is_target and not edit.rows.is_sparse]
        for together in {_span(edit): [e for e in targets if _meet(edit, e)] for edit in targets}.values():
            if int(torch.linalg.matrix_rank(torch.stack([edit.rows.read[0] for edit in together]))) < len(together):
                names = ", ".join(repr(edit.concept.name) for edit in together)
                raise ConflictingEdits(f"{names} cannot all be given a value: their directions depend on each other; set fewer")
        parts: list[Any] = list(dict.fromkeys(edit.intervention.tokens for edit in edits if edit.is_constant))
        constant = len(parts) == 1 and all(edit.is_constant for edit in edits) and not readings
        self.part: str | None = parts[0] if constant else None
        self.delta = self._constant() if self.part is not None else None
        self.rows = 1 if self.table is None else len(self.table.scale)
        scheduled = all(edit.intervention.when is not None and edit.scope is None and not edit.held for edit in edits)
        self.waits = bool(edits) and scheduled and not readings
        """Whether there are times at which nothing is to be done here."""
        self._times = (self.table.schedule, self.table.paced) if self.waits and self.table is not None else None
        self._replays = {
            k: Replay(edit.intervention.tape[edit.replays], edit.concept.name)
            for k, edit in enumerate(edits)
            if isinstance(edit.intervention, Patch)
        }
        self._is_swap = [edit.swaps for edit in edits]
        self._keeps = [k for k, edit in enumerate(edits) if edit.keeps_norm]

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
        tally.passes += 1
        tally.seen += x.shape[1]
        delta = self.delta
        if state.progress is not None:
            self._note(state)
        if self.waits and not self._is_open(state):
            return x
        if delta is None or not state.is_plain:
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
        if acts < 3 or self._looks(state, acts):
            self._look(y, state, delta.norm(dim=-1).expand(y.shape[:2]))
        return y

    def _note(self, state: StepState) -> None:
        """Remember which passes of a denoiser there were."""
        tally, now = self.tally, float(state.progress or 0.0)
        low, high = tally.progress or (now, now)
        tally.progress, tally.halves = (min(low, now), max(high, now)), tally.halves | {*(state.branches or ())}

    def _looks(self, state: StepState, passes: int) -> bool:
        """Whether this is a pass to look at."""
        return not passes % (SAMPLE_EVERY if state.progress is None else STEPS_EVERY)

    def _is_open(self, state: StepState) -> bool:
        """Whether any edit acts in this pass of a denoiser; a pass over text is looked at token by token."""
        if state.progress is None or self._times is None:
            return True
        schedule, paced = self._times  # on the CPU, so that no device is waited for
        return bool((gain(torch.where(paced > 0, float(state.progress), float(state.step)), schedule) != 0).any())

    def _check_width(self, x: Tensor) -> None:
        if self.table is not None and x.shape[-1] != self.table.write.shape[-1]:
            names = ", ".join(repr(edit.concept.name) for edit in self.edits)
            raise WrongWidth(f"{names} expects activations of width {self.table.write.shape[-1]}, the site has {x.shape[-1]}")

    def _repeated(self, delta: Tensor, x: Tensor, state: StepState) -> Tensor:
        """The constant change of each row of the batch: rows are prompts, which beams repeat."""
        self._check_rows(len(delta), len(x), state)
        return delta if len(delta) == len(x) else delta[state.row(len(delta), len(x)).to(delta.device)]

    def _check_rows(self, amounts: int, rows: int, state: StepState) -> None:
        rows = rows // state.copies
        expected = state.prompts or rows
        if amounts not in (1, expected, state.images) or rows % amounts:
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
        if self._keeps:
            changed = (moved[..., self._keeps] != 0).any(-1, keepdim=True)
            y = torch.where(changed, y * (x.norm(dim=-1, keepdim=True) / y.norm(dim=-1, keepdim=True).clamp(min=1e-30)), y)
        if any(self._is_swap):
            y, acting = self._swapped(y, acting, state)
        tally = self.tally
        tally.tokens = tally.tokens + acting.sum() / len(x)
        tally.acted = tally.acted + acting.any()
        if self.cap < inf:
            tally.capped = tally.capped + ((length > self.cap * 1.0001) & (state.positions > 0)).sum()
        if self._looks(state, tally.passes) or tally.section != state.section:
            self._look(y, state, length)
        tally.section = state.section
        return y

    def _swapped(self, y: Tensor, acting: Tensor, state: StepState) -> tuple[Tensor, Tensor]:
        """Whole activations of another run, as far as gates, masks and schedules let them in."""
        for k, edit in enumerate(self.edits):
            if edit.swaps:
                share = self._only(k, y, state)
                other = self._replays[k].at(state, y)
                share = torch.where(other.isnan().any(-1), 0.0, share)
                y = torch.where(share[..., None] > 0, y.lerp(other.nan_to_num().to(y.dtype), share[..., None].to(y.dtype)), y)
                acting = acting | (share > 0)
        return y, acting

    def _only(self, k: int, x: Tensor, state: StepState) -> Float[Tensor, "B N"]:
        """How much of one edit each token gets."""
        assert self.table is not None
        extra = self._share(self.edits[k], x, state)
        gains = self.table.gains(state, x.new_zeros((*x.shape[:2], len(self.edits)), dtype=torch.float32))[..., k]
        return gains if extra is None else gains * extra

    def _known(self, x: Tensor, state: StepState) -> Tensor | None:
        """Readings that one row of the encoder cannot give, NaN elsewhere, `[B, N, K]`: of latents that compete, and of those
        read at an earlier site."""
        if not any(edit.crowd is not None or edit.heard is not None for edit in self.edits):
            return None
        known = x.new_full((*x.shape[:2], len(self.edits)), torch.nan, dtype=torch.float32)
        crowds: dict[Encoder, list[int]] = {}
        for k, edit in enumerate(self.edits):
            if edit.heard is not None:
                if edit.heard not in state.notes:
                    raise Unanswerable(f"{edit.concept.name!r} is read at an earlier site, which this pass did not go through")
                known[..., k] = state.notes[edit.heard]
            elif edit.crowd is not None:
                crowds.setdefault(edit.crowd, []).append(k)
        for crowd, members in crowds.items():
            known[..., members] = crowd.readings(x, [self.edits[k].concept.index for k in members])
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
        if edit.branch is not None:
            if state.branches is None:
                raise Unanswerable(
                    f"{edit.concept.name!r}: branch={edit.branch!r} needs to know which half of guidance this pass computes, "
                    "which only a pipeline's own call tells; call the pipeline, or pass each half alone with branch='both'"
                )
            halves = [float(half == edit.branch) for half in state.branches or ("cond",)]  # without guidance all is conditional
            if not any(halves):
                return x.new_zeros((), dtype=torch.float32)
            if not all(halves):
                share = x.new_tensor(halves, dtype=torch.float32).repeat_interleave(len(x) // len(halves))[:, None]
        if isinstance(when := edit.intervention.when, PerStep | Within):
            weights = torch.as_tensor(when.weight(state), dtype=torch.float32, device=x.device)
            share = weights if share is None else share * weights
        for gate in (*edit.gates, *edit.shut):
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
            passed = 1 - passed if gate in edit.shut else passed
            share = passed if share is None else share * passed
        if edit.norm is not None:
            length = x.float().norm(dim=-1) / edit.norm
            share = length if share is None else share * length
        if edit.intervention.mask is not None:
            within = masks.share(edit.intervention.mask, state, x, edit.concept.name)
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
        read = {k: replay for k, replay in self._replays.items() if not self._is_swap[k]}
        if not held and not read:
            return None
        wanted = x.new_full((*x.shape[:2], len(self.edits)), torch.nan, dtype=torch.float32)
        for k, values in held.items():
            wanted[..., k] = values
        for k, replay in read.items():
            values = replay.at(state, x)
            wanted[..., k] = torch.where(values.isnan(), self.edits[k].reading(x, state), values)
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


def _span(edit: Edit) -> Window:
    """The part of denoising outside of which an edit does nothing."""
    when = edit.intervention.when
    span = when.window if isinstance(when, Within) else when
    return span if isinstance(span, Window) else Window()


def _meet(edit: Edit, other: Edit) -> bool:
    """Whether there may be a pass in which both act."""
    one, two = _span(edit), _span(other)
    return one.start < two.stop and two.start < one.stop


def why_not(edit: Edit, tally: Tally) -> str:
    """What kept an edit from acting, as far as the passes tell; empty where they do not."""
    when = edit.intervention.when
    if not tally.passes:
        return "no pass of the model went through its site"
    if tally.progress is not None and when is not None and when.clock == "progress":
        low, high = tally.progress
        return f"it waits for {when}, and the run went from progress {low:.2f} to {high:.2f}"
    if tally.progress is not None and edit.branch is not None and edit.branch not in (tally.halves or {"cond"}):
        return f"it acts on branch={edit.branch!r}, and no pass was of that half of guidance: is guidance on?"
    if edit.gates:
        return f"its gate on {', '.join(repr(gate.concept) for gate in edit.gates)} never opened"
    return f"it waits for {when}" if when is not None else ""
