"""The edits of one site at work. A `Program` is fixed; what differs from run to run (counts, readings) lives in a `Run`."""

import threading
from collections.abc import Callable, Sequence
from copy import copy
from math import inf

import torch
from jaxtyping import Float
from torch import Tensor

from ..encoders.base import Encoder, scale
from ..errors import ConflictingEdits, RowMismatch, WrongWidth
from ..passes import StepState
from ..precision import unrounded
from .edit import Change, Edit, EditTensors, Given
from .reading import Key, Note
from .report import STEPS_EVERY, Tally


class Program:
    """All edits at one site, and the notes that it leaves for others.

    Raises `ConflictingEdits` where targets cannot all be met, `RowMismatch` where amounts are for different numbers of rows.
    """

    def __init__(self, edits: Sequence[Edit], notes: Sequence[Note] = (), cap: float = inf):
        self.edits, self.notes, self.cap = tuple(edits), tuple(notes), cap
        self.tensors = EditTensors.of(edits, cap) if edits else None
        self.rows = 1 if self.tensors is None else len(self.tensors.scale)
        self.has_targets = any(edit.is_target for edit in edits)
        self.has_latents = any(edit.rows.is_sparse for edit in edits)
        self.is_constant = bool(edits) and not notes and all(edit.is_constant for edit in edits)
        self.is_unconditional = not any(edit.shares for edit in edits)
        self.is_scheduled = not notes and all(any(share.clock for share in edit.shares) for edit in edits)
        self.is_normed = any(edit.rows.norm for edit in edits)
        self.keeps = [k for k, edit in enumerate(edits) if edit.aim.keeps_norm]
        self.codes = self._by_encoder()
        self._refuse_dependent()

    def _by_encoder(self) -> dict[Encoder, list[int]]:
        """The edits that are read from a whole code, so that each code is made once."""
        found: dict[Encoder, list[int]] = {}
        for k, edit in enumerate(self.edits):
            if edit.read.code is not None:
                found.setdefault(edit.read.code, []).append(k)
        return found

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
        expected = now.prompts or rows
        if amounts not in (1, expected, now.images) or rows % amounts:
            raise RowMismatch(f"expected one amount for each of {expected} rows, got {amounts}; give one number or {expected}")

    def given(self, x: Tensor, now: StepState, weights: "Sequence[float | Tensor]", twin: dict[Key, Tensor]) -> Given:
        """What differs between tokens in this pass."""
        edits, shape = self.edits, x.shape[:2]
        shifts = [edit.aim.shift(x, now) for edit in edits]
        return Given(
            gains=_gains(x, now, weights),
            row=None if self.rows == 1 else now.row(self.rows, len(x)).to(x.device),
            forecast=_stacked([0.0 if s is None else s for s in shifts], x, shape)
            if any(s is not None for s in shifts)
            else None,
            wanted=self._wanted(x, now, twin),
            known=self._known(x, now),
            lengths=_stacked([_length(edit, x) for edit in edits], x, shape) if self.is_normed else None,
        )

    def _wanted(self, x: Tensor, now: StepState, twin: dict[Key, Tensor]) -> Tensor | None:
        """Targets that differ from token to token, NaN where there is none."""
        if not self.has_targets:
            return None
        wanted = [edit.aim.target(x, now, twin) for edit in self.edits]
        if all(target is None for target in wanted):
            return None
        return _stacked([torch.nan if target is None else target for target in wanted], x, x.shape[:2])

    def _known(self, x: Tensor, now: StepState) -> Tensor | None:
        """Readings that the concept's own row does not give, NaN elsewhere."""
        edits = self.edits
        if all(edit.read.is_own for edit in edits):
            return None
        known = x.new_full((*x.shape[:2], len(edits)), torch.nan, dtype=torch.float32)
        for encoder, members in self.codes.items():
            known[..., members] = encoder.readings(x, [edits[k].place.index for k in members])
        for k, edit in enumerate(edits):
            if not edit.read.is_own and edit.read.code is None:
                known[..., k] = edit.read(x, now)
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
        uncounted = copy(self)
        uncounted.tally, now = Tally(), copy(now)
        now.is_again = False
        return uncounted(x, now)

    @property
    def counts(self) -> Tally:
        """What it did in all, beside other sessions and alone."""
        self.tell()
        counts = self.tally
        for run, mine in self.joined:
            counts = counts.plus(run.tally, mine)
        return counts

    def leave_joined(self) -> None:
        """Act alone again, and keep what was counted."""
        self.tally, self.joined = self.counts, []

    def listen(self, x: Tensor, now: StepState) -> None:
        """Keep what pinned concepts read here, in a pass without edits."""
        with unrounded(x):
            for edit in self.program.edits:
                if edit.aim.needs_twin:
                    self.twin.readings[edit.key] = edit.read(x, now)

    # -- where the change is the same at every token -----------------------------------------------------------

    def _added(self, x: Tensor, now: StepState) -> Tensor:
        tally, delta = self.tally, self.delta
        tally.tokens += now.length
        if self.place != (x.dtype, x.device):
            delta, self.place = self._constant(x), (x.dtype, x.device)
            self.delta = delta
        acts = tally.acts = tally.acts + 1
        if self.program.rows > 1:
            self.program.check_rows(len(x), now)
            delta = delta if len(delta) == len(x) else delta[now.row(len(delta), len(x)).to(delta.device)]
        y = x + delta
        if acts < 3 or (not acts % STEPS_EVERY and tally.is_due(now, acts)):
            self._look(y, now, delta.norm(dim=-1).expand(y.shape[:2]))
        return y

    def _constant(self, x: Tensor) -> Tensor:
        """The change of every token like x, `[D]` or `[R, 1, D]`."""
        assert self.program.tensors is not None
        self.program.check_width(x)
        with unrounded(self.program.tensors.write):
            delta = self.program.tensors.constant(self.program.cap).to(x.device, x.dtype)
        return delta[0] if len(delta) == 1 else delta[:, None]

    # -- in general --------------------------------------------------------------------------------------------

    def _edited(self, x: Tensor, now: StepState) -> Tensor:
        program, tally = self.program, self.tally
        self.program.check_width(x)
        for note in program.notes:
            now.notes[note.key] = note.of(x, now)
        weights = [edit.weight(x, now) for edit in program.edits]
        if not any(isinstance(weight, Tensor) or weight for weight in weights):
            return self._idle(x, now)
        if self.tensors is not None and self.tensors.read.device != x.device:
            self.tensors = self.tensors.to(x.device)
        assert self.tensors is not None
        program.check_rows(len(x), now)
        given = program.given(x, now, weights, self.twin.readings)
        change = self.tensors.change(x, given, has_targets=program.has_targets, has_latents=program.has_latents)
        for k, edit in enumerate(program.edits):
            if edit.leaves is not None:
                now.notes[edit.leaves] = now.notes.get(edit.leaves, 0) + change.moved[..., k]
        y, acting = self._replaced(self._kept(x, x + change.delta.to(x.dtype), change), now, weights, change.acting)
        tally.count(now, x, acting, change.length, self.program.cap)
        self._glance(y, now, change.length)
        return y

    def _idle(self, x: Tensor, now: StepState) -> Tensor:
        """x, in a pass that no edit is let into; between two windows of denoising nothing is looked at either."""
        if self.program.edits and not (now.progress is not None and self.program.is_scheduled):
            self._glance(x, now, x.new_zeros(x.shape[:2], dtype=torch.float32))
        return x

    def _glance(self, y: Tensor, now: StepState, length: Tensor) -> None:
        """Look now and then, and where another part of the text begins."""
        if self.tally.is_due(now, self.tally.passes) or self.tally.section != now.section:
            self._look(y, now, length)
        self.tally.section = now.section

    def _kept(self, x: Tensor, y: Tensor, change: Change) -> Tensor:
        """y, where tokens that some edits moved have their old length again."""
        if not self.program.keeps:
            return y
        moved = (change.moved[..., self.program.keeps] != 0).any(-1, keepdim=True)
        return torch.where(moved, y * (x.norm(dim=-1, keepdim=True) / y.norm(dim=-1, keepdim=True).clamp(min=1e-30)), y)

    def _replaced(
        self, y: Tensor, now: StepState, weights: "Sequence[float | Tensor]", acting: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Whole activations of another run, as far as they are let in, and where edits act."""
        for edit, weight in zip(self.program.edits, weights, strict=True):
            if (other := edit.aim.whole(y, now)) is not None:
                share = torch.zeros_like(y[..., 0], dtype=torch.float32) + weight
                share = torch.where(other.isnan().any(-1), 0.0, share if now.real is None else share * now.real)
                y = torch.where(share[..., None] > 0, y.lerp(other.nan_to_num().to(y.dtype), share[..., None].to(y.dtype)), y)
                acting = (share > 0) if acting is None else acting | (share > 0)
        return y, acting

    def _look(self, y: Tensor, now: StepState, length: Tensor) -> None:
        """Measure how far the concepts are off their natural range after the edit."""
        assert self.program.tensors is not None
        if self.tensors is None or self.tensors.read.device != y.device:
            self.tensors = self.program.tensors.to(y.device)
        with torch.no_grad(), unrounded(y):
            z = self.tensors.readings(y.float(), Given())
            self.tally.look(now, self.program.edits, z, length.clamp(max=self.program.cap))


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


def _length(edit: Edit, x: Tensor) -> "float | Tensor":
    """What an edit's encoder divides tokens by."""
    return scale(x, edit.rows.norm)[..., 0] if edit.rows.norm else 1.0
