"""What a session did: counted while it runs, shown as a table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from math import inf

import torch
from jaxtyping import Float
from torch import Tensor

from ..passes import StepState
from .edit import Edit

SAMPLE_EVERY = 256
"""Passes between two looks at how far off its natural range a concept is; the first two passes are looked at."""
STEPS_EVERY = 4
"""The same for passes of a denoiser, which are few and differ."""


@dataclass(eq=False)
class Tally:
    """What a program did at its site. Tensors are read only when a report is made, so that no device is waited for.

    Attributes:
        passes: of the model through the site.
        acts: passes that a constant change was added to.
        acted: other passes in which an edit acted.
        seen: positions that went by, per row; tokens: of these, where an edit acted.
        progress: least and most, of the passes of a denoiser; halves: of guidance, that went by.
        section: part of the text that the last pass read.
        changed: sum over looked-at tokens of the change's length; capped: tokens whose change was cut.
        looked: tokens looked at; off: of these, how many read outside the natural range, largest: reading, by edit.
    """

    passes: int = 0
    acts: int = 0
    acted: int | Tensor = 0
    seen: int = 0
    tokens: int | Tensor = 0
    progress: tuple[float, float] | None = None
    halves: frozenset[str] = frozenset()
    section: str = ""
    changed: float | Tensor = 0.0
    capped: int | Tensor = 0
    looked: int | Tensor = 0
    off: Tensor | None = None
    largest: Tensor | None = None

    def saw(self, now: StepState) -> None:
        """Note a pass of a denoiser."""
        at = float(now.progress or 0.0)
        low, high = self.progress or (at, at)
        self.progress, self.halves = (min(low, at), max(high, at)), self.halves | {*(now.branches or ())}

    def plus(self, other: "Tally", mine: slice) -> "Tally":
        """This, and what another counted for edits of several sessions, of which `mine` are those of this; passes are here."""
        ends = [ends for ends in (self.progress, other.progress) if ends is not None]
        return Tally(
            passes=self.passes,
            progress=(min(low for low, _ in ends), max(high for _, high in ends)) if ends else None,
            halves=self.halves | other.halves,
            section=other.section or self.section,
            off=_both(self.off, other.off, mine, torch.add),
            largest=_both(self.largest, other.largest, mine, torch.maximum),
            **{name: getattr(self, name) + getattr(other, name) for name in SUMMED},
        )

    def is_due(self, now: StepState, passes: int) -> bool:
        """Whether this is a pass to look at."""
        return not passes % (SAMPLE_EVERY if now.progress is None else STEPS_EVERY)

    def count(self, now: StepState, x: Tensor, acting: Tensor | None, length: Tensor, cap: float) -> None:
        """Count a pass of the general way: where edits acted, and whose change was cut."""
        if acting is None:
            self.tokens, self.acted = self.tokens + x.shape[1], self.acted + 1
        else:
            self.tokens, self.acted = self.tokens + acting.sum() / len(x), self.acted + acting.any()
        if cap < inf:
            self.capped = self.capped + ((length > cap * 1.0001) & (now.positions > 0)).sum()

    def look(self, now: StepState, gauge: Tensor, z: Tensor, length: Tensor) -> None:
        """Note how large the change is, `[B, N]`, and how far readings `z[B, N, K]` are off (first tokens excluded)."""
        seen = (now.positions > 0).expand(z.shape[:2])
        if now.real is not None:
            seen = seen & now.real
        low, high, units = gauge
        off = (((z < low) | (z > high)) & seen[..., None]).sum((0, 1))
        largest = (z.abs() / units * seen[..., None]).amax((0, 1))
        self.looked = self.looked + seen.sum()
        self.changed = self.changed + (length * seen).sum()
        self.off = off if self.off is None else self.off + off
        self.largest = largest if self.largest is None else self.largest.maximum(largest)


def gauge(edits: Sequence[Edit]) -> Float[Tensor, "3 K"]:
    """Ends of the natural range of each edit's concept, and its unit."""
    ends = [(edit.natural if edit.read.is_own and not edit.rows.norm else None) or (-inf, inf) for edit in edits]
    return torch.tensor([(*pair, edit.place.unit) for pair, edit in zip(ends, edits, strict=True)]).reshape(-1, 3).T


def _both(own: Tensor | None, other: Tensor | None, mine: slice, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
    """Counts of some edits, joined with those of the same edits among others."""
    if own is None or other is None:
        return own if other is None else other[mine]
    return join(own, other[mine])


SUMMED = ("acts", "acted", "seen", "tokens", "changed", "capped", "looked")


@dataclass(frozen=True)
class Line:
    """What became of one concept at one site.

    Attributes:
        concept, site: names.
        passes: of the model through the site; acted: of these, in how many an edit of the site acted.
        tokens: positions per row, pads included, at which one acted; seen: of how many.
        change: mean length of the site's change, as a share of the median activation there; None where that is unknown.
        off_range: share of looked-at tokens at which the concept reads outside its natural range.
        largest: largest reading, in units.
        capped: share of looked-at tokens whose change was cut short.
        why: why nothing happened, where nothing did.
    """

    concept: str
    site: str
    passes: int
    acted: int
    tokens: int
    seen: int
    change: float | None
    off_range: float | None
    largest: float | None
    capped: float
    why: str = ""


def line(edit: Edit, k: int, site: str, norm: float | None, tally: Tally) -> Line:
    """The line of the `k`-th edit that a tally counts, at a site of median activation `norm`."""
    looked = int(tally.looked)
    return Line(
        concept=edit.name,
        site=site,
        passes=tally.passes,
        acted=tally.acts + int(tally.acted),
        tokens=round(float(tally.tokens)),
        seen=tally.seen,
        change=float(tally.changed) / looked / norm if norm and looked else None,
        off_range=float(tally.off[k]) / looked if edit.natural and tally.off is not None else None,
        largest=None if tally.largest is None else float(tally.largest[k]),
        capped=float(tally.capped) / max(1.0, float(tally.tokens)),
        why="" if float(tally.tokens) else why_not(edit, tally),
    )


def why_not(edit: Edit, tally: Tally) -> str:
    """What kept an edit from acting, as far as the passes tell; empty where they do not."""
    if not tally.passes:
        return "no pass of the model went through its site"
    return next((why for share in edit.shares if (why := share.why_closed(tally.progress, tally.halves))), "")


@dataclass(frozen=True)
class Report:
    """What a session did. Prints as a table, shows as one in notebooks.

    Attributes:
        lines: one for each concept and site.
        ran: whether the model ran inside the session.
    """

    lines: tuple[Line, ...]
    ran: bool

    def cells(self) -> list[tuple[str, ...]]:
        """The table: a head, then a row for each line."""
        rows: list[tuple[str, ...]] = [("concept", "site", "passes", "tokens", "change", "off range", "largest", "capped")]
        for line in self.lines:
            shares = ("–" if share is None else f"{share:.0%}" for share in (line.change, line.off_range))
            largest = "–" if line.largest is None else f"{line.largest:.1f}"
            tokens = f"{line.tokens} ({line.tokens / max(1, line.seen):.0%})"
            rows.append(
                (line.concept, line.site, f"{line.acted}/{line.passes}", tokens, *shares, largest, f"{line.capped:.0%}")
            )
        return rows

    def notes(self) -> list[str]:
        """Why nothing happened, where nothing did."""
        notes = [f"{line.concept}: {line.why}" for line in self.lines if self.ran and line.why]
        if not self.ran:
            return ["nothing happened: the model did not run inside this session", *notes]
        if not any(line.tokens for line in self.lines):
            return ["nothing happened: the model ran, but no schedule, part of the text or gate let an edit through", *notes]
        return notes

    def __str__(self) -> str:
        if not self.lines:
            return "Steering: no edits are set"
        rows, widths = self.cells(), (9, 14, 8, 11, 9, 8)
        first, second = (max(len(row[i]) for row in rows) + 2 for i in (0, 1))
        numbers = ("".join(f"{cell:>{width}}" for cell, width in zip(row[2:], widths, strict=True)) for row in rows)
        table = [f"{row[0]:<{first}}{row[1]:<{second}}{rest}" for row, rest in zip(rows, numbers, strict=True)]
        return "\n".join([*table, *self.notes()])

    def _repr_html_(self) -> str:
        if not self.lines:
            return "<p>no edits are set</p>"
        head, *rows = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in self.cells())
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes())
        return f"<table><thead><tr>{head.replace('td>', 'th>')}</tr></thead><tbody>{body}</tbody></table>{notes}"
