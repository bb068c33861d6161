"""The edits of one site at work. A `Program` is fixed; what differs from run to run (counts, readings) lives in a `Run`."""

import threading
from collections.abc import Callable, Sequence
from copy import copy
from math import inf
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..devices import placed, unrounded
from ..errors import ConflictingEdits, RowMismatch, Unanswerable, WrongWidth
from ..passes import StepState
from .aims import Aim
from .edit import Change, Edit, EditTensors, Given, Has
from .exact import emptied
from .reading import Key, Note, NoteReader
from .report import STEPS_EVERY, Tally, gauge


class Program:
    """All edits at one site, and the notes that it leaves for others.

    Raises `ConflictingEdits` where targets cannot all be met, `RowMismatch` where amounts are for different numbers of rows.
    """

    def __init__(self, edits: Sequence[Edit], notes: Sequence[Note] = (), cap: float = inf):
        self.edits, self.notes, self.cap = tuple(edits), tuple(notes), cap
        self.tensors = EditTensors.of(edits, cap) if edits else None
        self.rows = 1 if self.tensors is None else len(self.tensors.scale)
        self.has_targets = any(edit.is_target for edit in edits)
        self.has = Has(
            latents=any(edit.rows.is_sparse for edit in edits),
            targets=self.has_targets,
            directions=any(edit.is_target and not edit.rows.is_sparse for edit in edits),
            cap=cap < inf and not all(edit.aim.is_removal for edit in edits),
        )
        self.learns = any(edit.now is not None for edit in edits)
        self.is_constant = bool(edits) and not (notes or self.learns) and all(edit.is_constant for edit in edits)
        self.is_unconditional = not any(edit.shares for edit in edits)
        self.is_scheduled = not notes and all(any(share.clock for share in edit.shares) for edit in edits)
        self.is_normed = any(edit.rows.norm for edit in edits)
        self.is_exact = any(edit.aim.is_exact for edit in edits)
        self.is_relative = any(edit.aim.is_relative for edit in edits)
        self.keeps = [k for k, edit in enumerate(edits) if edit.aim.keeps_norm]
        self.codes, self.modules = (_grouped(edits, of) for of in (lambda e: e.read.code, lambda e: e.aim.module))
        self.gauge, self.cut = gauge(edits), self._cut()
        self._refuse_dependent()

    def _cut(self) -> list[float]:
        """The share of the amounts of each edit that the cap cuts, where all are constant."""
        if self.tensors is None or not self.is_constant or self.cap == inf:
            return [0.0] * len(self.edits)
        shift, (_, kept) = self.tensors.shift.detach(), self.tensors.constant(self.cap)
        return ((shift != 0) & (kept < 1 / 1.0001)).float().mean(0).tolist()

    def _refuse_dependent(self) -> None:
        """Targets that may act in one pass need directions of their own."""
        targets = [edit for edit in self.edits if edit.is_target and not edit.rows.is_sparse]
        for span in dict.fromkeys(edit.span for edit in targets):
            together = [e for e in targets if span.start < e.span.stop and e.span.start < span.stop]
            if int(torch.linalg.matrix_rank(torch.stack([edit.rows.read[0] for edit in together]))) < len(together):
                names = ", ".join(repr(edit.name) for edit in together)
                raise ConflictingEdits(f"{names} cannot all be given a value: their directions depend on each other; set fewer")

    def weight(self, x: Float[Tensor, "B N D"], now: StepState) -> float | None:
        """The share that all edits have in common in this pass; None where they differ."""
        weights = [edit.weight(x, now) for edit in self.edits]
        first = weights[0]
        return first if isinstance(first, float) and all(isinstance(w, float) and w == first for w in weights) else None

    def check_width(self, x: Tensor) -> None:
        """Raise `WrongWidth` for activations that the edits do not fit."""
        if self.tensors is not None and x.shape[-1] != (width := self.tensors.write.shape[-1]):
            names = ", ".join(repr(edit.name) for edit in self.edits)
            raise WrongWidth(f"{names} expects activations of width {width}, the site has {x.shape[-1]}")

    def check_rows(self, rows: int, now: StepState) -> None:
        """Raise `RowMismatch` where amounts are not one for each prompt."""
        rows, amounts = rows // now.copies, self.rows
        if amounts > 1 and now.refused:
            raise Unanswerable(now.refused)
        expected = now.prompts or rows
        if amounts > 1 and now.branches is None and (now.images or rows) != rows:
            raise Unanswerable(
                f"{amounts} amounts for {now.images} images: nothing shows in which order this pipeline stacks the halves of "
                "guidance; give one number, or enter the order in steerlib.hooks.diffusers.families.GUIDANCE"
            )
        if amounts not in (1, expected, now.images) or (rows % amounts and now.first is None):
            raise RowMismatch(f"expected one amount for each of {expected} rows, got {amounts}; give one number or {expected}")

    def given(self, x: Tensor, now: StepState, weights: "Sequence[float | Tensor]", twin: dict[Key, Tensor]) -> Given:
        """What differs between tokens in this pass."""
        edits, shape = self.edits, x.shape[:2]
        shifts = [edit.aim.shift(x, now) for edit in edits]
        gains, row = _gains(x, now, weights), None if self.rows == 1 else now.row(self.rows, len(x)).to(x.device)
        return Given(
            gains=gains,
            row=row,
            beside=_switched(self, x, now, gains, row) if self.modules else None,
            forecast=_stacked([0.0 if s is None else s for s in shifts], x, shape)
            if any(s is not None for s in shifts)
            else None,
            wanted=self._targets(x, lambda aim: aim.target(x, now, twin)),
            beyond=self._targets(x, lambda aim: aim.beyond(x, now)) if self.is_relative else None,
            known=self._known(x, now),
            lengths=self.lengths(x),
        )

    def change(self, tensors: EditTensors, x: Float[Tensor, "B N D"], given: Given) -> Change:
        """What the edits do to activations; `tensors` are theirs, on the device of x."""
        change = tensors.change(x, given, self.has)
        if not self.is_exact:
            return change
        share = [(float(e.aim.is_exact), float(e.is_target and not e.rows.is_sparse)) for e in self.edits]
        exact, kept = (_stacked(column, x, x.shape[:2]) for column in zip(*share, strict=True))
        acts = 1.0 if given.gains is None else (given.gains > 0).float()
        return emptied(tensors, x, change, exact * acts, kept * acts, self.lengths)

    def lengths(self, x: Tensor) -> Float[Tensor, "B N K"] | None:
        """What encoders that normalise divide tokens by; None where there are none."""
        if not self.is_normed:
            return None
        lengths = [edit.rows.lengths(x) for edit in self.edits]
        return _stacked([one[..., 0] if isinstance(one, Tensor) else one for one in lengths], x, x.shape[:2])

    def read(self, tensors: EditTensors, y: Tensor, coded: "Tensor | None" = None) -> Float[Tensor, "B N K"]:
        """What concepts read of activations; `coded` stands for those that are read at an earlier site. Without it these, and
        latents that are read beside others, are NaN: a constant change is not worth reading them."""
        known = None
        if self.codes and coded is not None:
            known = _stacked(self._coded(y, [torch.nan] * len(self.edits)), y, y.shape[:2])
        z = tensors.readings(y.float(), Given(known=known, lengths=self.lengths(y)))
        for k, edit in enumerate(self.edits):
            if not edit.read.is_own and (coded is None or isinstance(edit.read, NoteReader)):
                z[..., k] = torch.nan if coded is None else coded[..., k]
        return z

    def _targets(self, x: Tensor, of: "Callable[[Aim], Tensor | None]") -> Tensor | None:
        """Targets that differ from token to token, NaN where there is none."""
        if not self.has_targets:
            return None
        wanted = [of(edit.aim) for edit in self.edits]
        if all(target is None for target in wanted):
            return None
        return _stacked([torch.nan if target is None else target for target in wanted], x, x.shape[:2])

    def _known(self, x: Tensor, now: StepState) -> Tensor | None:
        """Readings that the concept's own row does not give, NaN elsewhere."""
        edits = self.edits
        if all(edit.read.is_own for edit in edits):
            return None
        own = [torch.nan if edit.read.is_own or edit.read.code is not None else edit.read(x, now) for edit in edits]
        return _stacked(self._coded(x, own), x, x.shape[:2])

    def _coded(self, x: Tensor, known: "list[float | Tensor]") -> "list[float | Tensor]":
        """The readings of latents that compete in place of what is known, each code made once."""
        for encoder, members in self.codes.items():
            code = encoder.readings(x, [self.edits[k].place.index for k in members])
            for k, z in zip(members, code.unbind(-1), strict=True):
                known[k] = z
        return known


class Twin(threading.local):
    """What pinned concepts read in this thread's unsteered pass."""

    def __init__(self) -> None:
        self.readings: dict[Key, Tensor] = {}


class Run:
    """A program in one session: it edits `x[B, N, D]` pass by pass, and counts."""

    def __init__(self, program: Program):
        self.program, self.tally, self.twin = program, Tally(), Twin()
        self.tensors, self.delta, self.place = program.tensors, torch.zeros(0), (None, None)
        self.joined: list[tuple[Run, slice]] = []
        """Runs that act in place of this one where several sessions edit a site, and which edits there are its own."""
        self.tell: Callable[[], None] = lambda: None
        """Where compiled code counts for it, asks for its counts."""

    def __call__(self, x: Tensor, now: StepState) -> Tensor:
        """The steered x."""
        if now.is_again:
            return self._repeated(x, now)
        tally, program = self.tally, self.program
        tally.passes += 1
        tally.seen += now.length
        if now.progress is not None:
            tally.saw(now)
        if program.is_constant and now.is_plain:
            weight = 1.0 if program.is_unconditional else program.weight(x, now)
            if weight == 1.0:
                return self._added(x, now)
            if weight == 0.0:
                return x
        with unrounded(x):
            return self._edited(x, now)

    def _repeated(self, x: Tensor, now: StepState) -> Tensor:
        """The steered x, counted nowhere."""
        uncounted, then = copy(self), copy(now)
        uncounted.tally, then.is_again = Tally(), False
        return uncounted(x, then)

    @property
    def counts(self) -> Tally:
        """What it did in all, beside other sessions and alone."""
        self.tell()
        counts = self.tally.settled(self.program.cut)
        for run, mine in self.joined:
            counts = counts.plus(run.counts, mine)
        return counts

    def leave_joined(self) -> None:
        """Act alone again, and keep what was counted."""
        self.tally, self.joined = self.counts, []

    def listen(self, x: Tensor, now: StepState) -> None:
        """Keep what pinned concepts read here, in a pass without edits."""
        with unrounded(x):
            self.twin.readings |= {edit.key: edit.read(x, now) for edit in self.program.edits if edit.aim.needs_twin}

    # -- where the change is the same at every token -----------------------------------------------------------

    def _added(self, x: Tensor, now: StepState) -> Tensor:
        tally, delta = self.tally, self.delta
        tally.added += now.length
        if self.place != (x.dtype, x.device):
            delta, self.place = self._constant(x), (x.dtype, x.device)
            self.delta = delta
        acts = tally.acts = tally.acts + 1
        if self.program.rows > 1:
            self.program.check_rows(len(x), now)
            delta = delta if len(delta) == len(x) else delta[now.row(len(delta), len(x)).to(delta.device)]
        y = x + delta
        if acts < 3 or (not acts % STEPS_EVERY and tally.is_due(now, acts)):
            self._look(x, y, now)
        return y

    def _constant(self, x: Tensor) -> Tensor:
        """The change of every token like x, `[D]` or `[R, 1, D]`."""
        assert self.program.tensors is not None
        self.program.check_width(x)
        with unrounded(self.program.tensors.write):
            delta = self.program.tensors.constant(self.program.cap)[0].to(x.device, x.dtype)
        return delta[0] if len(delta) == 1 else delta[:, None]

    # -- in general --------------------------------------------------------------------------------------------

    def _edited(self, x: Tensor, now: StepState) -> Tensor:
        program, tally = self.program, self.tally
        self.program.check_width(x)
        now = now.on(x.device)
        for note in program.notes:
            now.notes[note.key] = note.of(x, now)
        weights = [edit.weight(x, now) for edit in program.edits]
        if not any(isinstance(weight, Tensor) or weight for weight in weights):
            return x
        program.check_rows(len(x), now)
        given = program.given(x, now, weights, self.twin.readings)
        change = program.change(self._tensors(x.device), x, given)
        for k, edit in enumerate(program.edits):
            if edit.leaves is not None:
                before = now.notes.get(edit.leaves)
                now.notes[edit.leaves] = change.moved[..., k] + (0 if before is None else before.to(x.device))
        y, on, swaps = self._replaced(_kept(program, x, x + change.delta.to(x.dtype), change), now, weights, given)
        tally.count(now, on, change.cut)
        state = now.section, [isinstance(weight, Tensor) or weight > 0 for weight in weights]
        if tally.is_due(now, tally.turns) or tally.state != state:
            self._look(x, y, now, on, change, swaps)
        tally.state = state
        return y

    def _tensors(self, device: torch.device) -> EditTensors:
        """The edits as tensors on a device; what learns as it is now."""
        assert self.tensors is not None
        if self.program.learns:
            return self.tensors.renewed(self.program.edits, device)
        if self.tensors.read.device != device:
            self.tensors = self.tensors.to(device)
        return self.tensors

    def _replaced(
        self, y: Tensor, now: StepState, weights: "Sequence[float | Tensor]", given: Given
    ) -> tuple[Tensor, Bool[Tensor, "B N K"] | None, dict[int, Tensor]]:
        """Whole activations of another run, as far as they are let in; where each edit acts, None: everywhere; and the length
        of the change of those that replace or are switched."""
        on, swaps = None if given.gains is None else given.gains > 0, _switched_lengths(self.program, given)
        for k, (edit, weight) in enumerate(zip(self.program.edits, weights, strict=True)):
            if (other := edit.aim.whole(y, now)) is not None:
                share = torch.zeros_like(y[..., 0], dtype=torch.float32) + weight
                share = torch.where(other.isnan().any(-1), 0.0, share if now.real is None else share * now.real)
                z = torch.where(share[..., None] > 0, y.lerp(other.nan_to_num().to(y.dtype), share[..., None].to(y.dtype)), y)
                y, swaps[k] = z, (z - y).float().norm(dim=-1)
                on = torch.ones((*share.shape, len(weights)), dtype=torch.bool, device=y.device) if on is None else on
                on[..., k] = share > 0
        return y, on, swaps

    def _look(
        self, x: Tensor, y: Tensor, now: StepState, on: Any = None, change: Change | None = None, swaps: Any = None
    ) -> None:  # fmt: skip
        """Measure what became of the concepts where they were edited; without a `change` it was the constant one."""
        program = self.program
        tensors = self._tensors(y.device)
        with torch.no_grad(), unrounded(y):
            if change is None:
                moved = tensors.shift * tensors.constant(program.cap)[1]
                moved = moved[0] if program.rows == 1 else moved[now.row(program.rows, len(y)).to(y.device), None]
                before, after = (program.read(tensors, some) for some in (x, y))
            else:
                before, moved = change.before, change.moved
                after = program.read(tensors, y, before + moved)
            lengths = program.lengths(y)
            length = moved.abs() * tensors.write.norm(dim=-1) * (torch.ones_like(after) if lengths is None else lengths)
            for k, own in (swaps or {}).items():
                length[..., k] = own
            code = torch.where(tensors.threshold > -inf, before + moved, after)
            self.tally.look(now.on(y.device), placed(program.gauge, y.device), (before, after, code), length, on)


def _grouped(edits: Sequence[Edit], of: Callable[[Edit], Any]) -> dict[Any, list[int]]:
    """The edits that share what `of` gives, so that it is run once for all of theirs."""
    found: dict[Any, list[int]] = {}
    for k, edit in enumerate(edits):
        if (shared := of(edit)) is not None:
            found.setdefault(shared, []).append(k)
    return found


def _switched(
    program: Program, x: Float[Tensor, "B N D"], now: StepState, gains: Tensor | None, row: Tensor | None
) -> Float[Tensor, "B N D"]:
    """What context modules add where concepts of theirs are switched."""
    assert program.tensors is not None
    shift = placed(program.tensors.shift, x.device)
    amounts = (shift[0] if row is None else shift[row, None]).expand(*x.shape[:2], -1)
    amounts, total = amounts if gains is None else amounts * gains, torch.zeros_like(x, dtype=torch.float32)
    for module, members in program.modules.items():
        a = x.new_zeros(*x.shape[:2], module.count, dtype=torch.float32)
        for k in members:
            a[..., program.edits[k].place.index] = amounts[..., k]
        source = program.edits[members[0]].aim.source
        total = total + module.change(x if source is None else now.notes[source].to(x.device), a)
    return total


def _switched_lengths(program: Program, given: Given) -> dict[int, Tensor]:
    """How far each edit that switches moves tokens, with all that are switched beside it."""
    return {} if given.beside is None else {k: given.beside.norm(dim=-1) for own in program.modules.values() for k in own}


def _kept(program: Program, x: Tensor, y: Tensor, change: Change) -> Tensor:
    """y, where tokens that some edits moved have their old length again."""
    if not program.keeps:
        return y
    moved = torch.stack([change.moved[..., k] != 0 for k in program.keeps], dim=-1).any(-1, keepdim=True)
    return torch.where(moved, y * (x.norm(dim=-1, keepdim=True) / y.norm(dim=-1, keepdim=True).clamp(min=1e-30)), y)


def _gains(x: Tensor, now: StepState, weights: "Sequence[float | Tensor]") -> Float[Tensor, "B N K"] | None:
    """The share of each edit, 0 on pads; None: all of it everywhere."""
    if now.real is None and all(isinstance(weight, float) and weight == 1.0 for weight in weights):
        return None
    gains = _stacked(weights, x, x.shape[:2])
    return gains if now.real is None else gains * now.real[..., None]


def _stacked(values: "Sequence[float | Tensor]", x: Tensor, shape: torch.Size) -> Float[Tensor, "B N K"]:
    """One column for each edit, made on the device of x."""
    like = x.new_empty((), dtype=torch.float32)
    return torch.stack([(v if isinstance(v, Tensor) else torch.full_like(like, v)).expand(shape) for v in values], dim=-1)
