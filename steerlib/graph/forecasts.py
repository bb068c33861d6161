"""What follows from changes of some concepts.

s  a concept that is changed     c  one that follows     b  a parent of c     T_sc  total effect     w_bc  effect past others
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .edge import Edge

Change = Any
"""A number, or a tensor of the shape of given readings."""


class Forecast(dict[str, Any]):
    """Changes by name, in units of each concept.

    Attributes:
        intervals: 95 % intervals of the changes of which every part was measured, by name; none where readings were given.
        unmeasured: names of concepts to which a change comes over two edges or more, while its total effect was not measured.
            That effects multiply along a path does not hold in a network, which has paths that the graph does not know: in the
            latents of SmolLM2-135M products were too small by a factor of four at the median.
    """

    def __init__(self, changes: Mapping[str, Change], intervals: Mapping[str, tuple[float, float]], unmeasured: Iterable[str]):
        super().__init__(changes)
        self.intervals, self.unmeasured = dict(intervals), tuple(unmeasured)

    def __repr__(self) -> str:
        said = f"; over two edges or more, which nothing measured: {', '.join(self.unmeasured)}" if self.unmeasured else ""
        return super().__repr__() + said


def adding_up(
    order: Sequence[str], direct: Mapping[str, Mapping[str, Edge]], total: Mapping[str, Mapping[str, Edge]]
) -> dict[str, dict[str, float]]:
    """Effects of parents such that those along all paths add up to the totals: `w_sc = T_sc - sum_b T_sb w_bc`, b not s."""
    place = {name: i for i, name in enumerate(order)}
    moved: dict[str, dict[str, float]] = {s: {s: 1.0} for own in total.values() for s in own}
    weights: dict[str, dict[str, float]] = {}
    for c in order:
        own = weights[c] = {b: edge.effect for b, edge in direct.get(c, {}).items()}
        for s in sorted(total.get(c, {}), key=place.__getitem__, reverse=True):
            others = sum(moved[s].get(b, 0.0) * w for b, w in own.items() if b != s)
            own[s] = total[c][s].effect - others
        for s, by in moved.items():
            if c != s and (change := sum(by[b] * w for b, w in own.items() if b in by)):
                by[c] = change
    return weights


def floors_of(given: Any) -> Mapping[str, Change]:
    """Readings that cannot fall below 0, of a tape or as they are."""
    return given.latents() if hasattr(given, "latents") else given or {}


def interval(changes: Mapping[str, float], concept: str, parts: Mapping[str, Edge | None]) -> tuple[float, float] | None:
    """Of the change of a concept, from what each changed one does to it: its parts' intervals added up, which is wider than
    necessary. None where a part was not measured."""
    low = high = float(changes.get(concept, 0.0))
    for name, edge in parts.items():
        if edge is None or edge.evidence != "verified" or edge.tau_lo is None or edge.tau_hi is None:
            return None
        ends = sorted((changes[name] * edge.tau_lo, changes[name] * edge.tau_hi))
        low, high = low + ends[0], high + ends[1]
    return low, high


def above(change: Change, reading: Change | None) -> Change:
    """A change of what reads so much, which cannot fall below 0."""
    if reading is None:
        return change
    if isinstance(reading, Tensor) or isinstance(change, Tensor):
        reading = torch.as_tensor(reading)
        return torch.maximum(torch.as_tensor(change, dtype=reading.dtype), -reading)
    return max(change, -reading)


def is_some(change: Change) -> bool:
    return bool(change.any()) if isinstance(change, Tensor) else change != 0
