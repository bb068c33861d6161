"""What `sl.record` saw, laid over the passes of another run."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..devices import placed
from ..errors import BadEdit, RowMismatch, Unanswerable
from ..passes import StepState


class Replay:
    """Readings `[B, N]` or activations `[B, N, D]` of a tape: texts by position, images by noise level and half of guidance."""

    def __init__(self, recording: Sequence[tuple[StepState, Tensor]], name: str):
        if not recording:
            raise BadEdit("expected a tape with a recorded pass, got an empty one; run the model inside sl.record first")
        self.name = name
        self.passes = [(state, z.detach().float()) for state, z in recording]
        self.table = self._by_position() if self.passes[0][0].progress is None else None

    def _by_position(self) -> Tensor:
        """`[rows, L, ...]`, NaN where nothing was recorded."""
        first = self.passes[0][1]
        states = [state.positions.to(first.device) for state, _ in self.passes]
        rows, length = len(first), 1 + max(int(positions.max()) for positions in states)
        table = first.new_full((rows, length, *first.shape[2:]), torch.nan)
        for (state, z), positions in zip(self.passes, states, strict=True):
            kept = z.new_ones(z.shape[:2], dtype=torch.bool) if state.real is None else state.real.to(z.device)
            row, column = kept.nonzero(as_tuple=True)
            table[row, positions.expand(rows, -1)[row, column]] = z[row, column]
        return table

    def at(self, state: StepState, x: Tensor) -> Tensor:
        """What was recorded for each token of `x[B, N, D]`; NaN where nothing was."""
        if (state.progress is None) != (self.table is not None):
            raise BadEdit(f"the tape of {self.name!r} was recorded from {'text' if self.table is not None else 'images'}")
        if self.passes[0][1].device != x.device:  # all at once: the host waits for the device at every copy
            self.passes = [(then, z.to(x.device)) for then, z in self.passes]
        if self.table is None:
            return self._nearest(state, x)
        table = self._for_rows(placed(self.table, x.device), state, x)
        position = state.positions.expand(len(x), -1).clamp(min=0)
        inside, at = position < table.shape[1], position.clamp(max=table.shape[1] - 1)
        found = table[torch.arange(len(x), device=x.device)[:, None], at]
        return torch.where(inside[(...,) + (None,) * (found.ndim - 2)], found, torch.nan)

    def _nearest(self, state: StepState, x: Tensor) -> Tensor:
        """Of the pass at the nearest noise level, of the same half of guidance."""
        halves, seen = state.branches, {half for then, _ in self.passes for half in then.branches or ("cond",)}
        if halves is None and len(seen) > 1:
            raise Unanswerable(
                f"the tape of {self.name!r} holds both halves of guidance, and nobody knows which one this pass computes; "
                "call the pipeline, or record each half apart"
            )
        halves = halves or ("cond",)
        kept = [(then, z) for then, z in self.passes if {*halves} <= {*(then.branches or ("cond",))}]
        if not kept:
            raise BadEdit(f"the tape of {self.name!r} holds no pass of {' and '.join(halves)}; record with the same guidance")
        progress: Any = state.progress
        then, z = min(kept, key=lambda kept: (abs(float(kept[0].progress) - float(progress)), kept[0].visit != state.visit))
        if z.shape[1] != x.shape[1]:
            raise BadEdit(
                f"the tape of {self.name!r} has {z.shape[1]} tokens, this image {x.shape[1]}; record at the same size"
            )
        names = then.branches or ("cond",)
        parts = z.chunk(len(names))
        each = parts if names == halves else [parts[names.index(half)] for half in halves]
        rows = len(x) // len(halves)
        if rows % len(each[0]):
            raise RowMismatch(f"the tape of {self.name!r} has {len(each[0])} rows, the batch {rows}")
        return torch.cat([part.repeat_interleave(rows // len(part), dim=0) for part in each])

    def _for_rows(self, table: Tensor, state: StepState, x: Tensor) -> Tensor:
        if len(x) % len(table):
            raise RowMismatch(f"the tape of {self.name!r} has {len(table)} rows, the batch {len(x)}")
        return table[state.row(len(table), len(x)).to(x.device)]
