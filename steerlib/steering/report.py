"""What a session did: counted while it runs, shown as a table."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from math import inf
from textwrap import wrap
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..bank.manifest import level_of
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
        passes: of the model through the site; seen: positions that went by, per row.
        acts: passes that a constant change was added to; added: positions per row in these.
        acted: other passes in which an edit acted; tokens: positions per row at which it did; later: of these, under a cap,
            all but the first of a text; cut: of those, where an addition was cut in the run; planned: or before it. One number
            for all edits, or one for each.
        turns: such passes in which any edit acted.
        progress: least and most, of the passes of a denoiser; halves: of guidance, that went by.
        state: part of the text that the last pass with an edit read, and which edits acted.
        sums: over looked-at tokens where an edit acted, by edit: how many there were, length of its change, how many read
            outside the natural range, how much was read before and after.
        largest: reading there, in units, by edit.
    """

    passes: int = 0
    seen: int = 0
    acts: int = 0
    added: int = 0
    acted: int | Tensor = 0
    tokens: float | Tensor = 0
    later: float | Tensor = 0
    cut: float | Tensor = 0
    planned: float | Tensor = 0
    turns: int = 0
    progress: tuple[float, float] | None = None
    halves: frozenset[str] = frozenset()
    state: Any = None
    sums: Tensor | None = None
    largest: Tensor | None = None

    @property
    def capped(self) -> bool:
        """Whether an addition was cut short in the run, other than at first tokens."""
        return bool((self.cut > 0).any()) if isinstance(self.cut, Tensor) else self.cut > 0

    def saw(self, now: StepState) -> None:
        """Note a pass of a denoiser."""
        at = float(now.progress or 0.0)
        low, high = self.progress or (at, at)
        self.progress, self.halves = (min(low, at), max(high, at)), self.halves | {*(now.branches or ())}

    def settled(self, cut: Sequence[float]) -> "Tally":
        """The same with constant changes among the others, of whose amounts a share was `cut` when they were planned."""
        if not self.added:
            return self
        planned = self.planned + self.added * torch.tensor(cut)
        acted, tokens, later = self.acted + self.acts, self.tokens + self.added, self.later + self.added
        return replace(self, acted=acted, tokens=tokens, later=later, planned=planned, acts=0, added=0)

    def plus(self, other: "Tally", mine: slice) -> "Tally":
        """This, and what another counted for edits of several sessions, of which `mine` are those of this; passes are here."""
        ends = [ends for ends in (self.progress, other.progress) if ends is not None]
        counts = {name: getattr(self, name) + _of(getattr(other, name), mine) for name in COUNTS}
        return replace(
            self,
            seen=self.seen + other.seen,
            turns=self.turns + other.turns,
            progress=(min(low for low, _ in ends), max(high for _, high in ends)) if ends else None,
            halves=self.halves | other.halves,
            sums=_both(self.sums, other.sums, mine, torch.add),
            largest=_both(self.largest, other.largest, mine, torch.maximum),
            **counts,
        )

    def is_due(self, now: StepState, passes: int) -> bool:
        """Whether this is a pass to look at."""
        return not passes % (SAMPLE_EVERY if now.progress is None else STEPS_EVERY)

    def count(self, now: StepState, on: Tensor | None, cut: Tensor | None) -> None:
        """Count a pass of the general way: where each edit acted, `[B, N, K]` or everywhere, and whose additions were cut."""
        self.turns += 1
        if on is None:
            self.acted, self.tokens = self.acted + 1, self.tokens + now.length
        else:
            self.acted, self.tokens = self.acted + on.any(0).any(0), self.tokens + on.sum((0, 1)) / len(on)
        if cut is not None and on is None and now.section == "generated":  # no first token is among these
            self.later, self.cut = self.later + now.length, self.cut + cut.sum((0, 1)) / len(cut)
        elif cut is not None:
            later = (now.positions > 0)[..., None].expand(cut.shape)
            self.later = self.later + (later if on is None else on & later).sum((0, 1)) / len(cut)
            self.cut = self.cut + (cut & later).sum((0, 1)) / len(cut)

    def look(
        self, now: StepState, gauge: Tensor, read: tuple[Tensor, Tensor, Tensor], length: Tensor, on: Tensor | None
    ) -> None:  # fmt: skip
        """Note readings `[B, N, K]` before and after, and of latents what became of the code, NaN where unknown; and the length
        of each change, where edits acted and first tokens excluded."""
        before, after, code = read
        seen = (now.positions > 0) if now.real is None else (now.positions > 0) & now.real
        seen = (seen[..., None] if on is None else seen[..., None] & on).expand(after.shape)
        low, high, units = gauge
        columns = (torch.ones_like(after), length, (code < low) | (code > high), before.abs(), after.abs())
        sums = torch.stack([(column * seen).nan_to_num().sum((0, 1)) for column in columns])
        largest = torch.where(seen & ~code.isnan(), code.abs() / units, -inf).amax((0, 1))
        self.sums = sums if self.sums is None else self.sums + sums
        self.largest = largest if self.largest is None else self.largest.maximum(largest)


COUNTS = ("acted", "tokens", "later", "cut", "planned")


def _of(count: "float | Tensor", mine: "slice | int") -> Any:
    """A count for some of the edits."""
    return count[mine] if isinstance(count, Tensor) and count.ndim else count


def gauge(edits: Sequence[Edit]) -> Float[Tensor, "3 K"]:
    """Ends of the natural range of each edit's concept, and its unit."""
    ends = [edit.natural or (-inf, inf) for edit in edits]
    return torch.tensor([(*pair, edit.place.unit) for pair, edit in zip(ends, edits, strict=True)]).reshape(-1, 3).T


def _both(own: Tensor | None, other: Tensor | None, mine: slice, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
    """Counts of some edits, joined with those of the same edits among others."""
    if own is None or other is None:
        return own if other is None else other[..., mine]
    return join(own, other[..., mine])


@dataclass(frozen=True)
class Line:
    """What became of one concept at one site, or of a concept at all of its places.

    Attributes:
        concept, site: names.
        passes: of the model through the site; acted: of these, in how many this edit acted.
        tokens: positions per row at which it acted; seen: of how many, pads included.
        change: mean length of its change, as a share of the median activation there; None where that is unknown.
        left: what a removal left of the reading, as a share; None for other edits.
        off_range: share of tokens at which the concept reads outside its natural range.
        largest: largest reading, in units; of a latent what it was given in the code.
        capped: share of its tokens at which the edit was cut short, when planned or in the run.
        why: why nothing happened, where nothing did.
        level: noise level of its encoder, if it has one.

    Change, left, off_range and largest are of looked-at tokens where the edit acted, first tokens excluded.
    """

    concept: str
    site: str
    passes: int
    acted: int
    tokens: int
    seen: int
    change: float | None
    left: float | None
    off_range: float | None
    largest: float | None
    capped: float
    why: str = ""
    level: str = ""


def line(edit: Edit, k: int, site: str, norm: float | None, tally: Tally) -> Line:
    """The line of the `k`-th edit that a tally counts, at a site of median activation `norm`."""
    acted, tokens, later, cut, planned = (float(_of(getattr(tally, name), k)) for name in COUNTS)
    looked, changed, off, before, after = (0.0,) * 5 if tally.sums is None else tally.sums[:, k].tolist()
    largest = None if tally.largest is None else float(tally.largest[k])
    return Line(
        concept=edit.name,
        site=site,
        passes=tally.passes,
        acted=int(acted),
        tokens=round(tokens),
        seen=tally.seen,
        change=changed / looked / norm if norm and looked else None,
        left=after / before if edit.aim.is_removal and before else None,
        off_range=off / looked if edit.natural and looked else None,
        largest=None if largest == -inf else largest,
        capped=float(tokens > 0) if edit.cut else (cut + planned) / later if later else 0.0,
        why="" if tokens else why_not(edit, tally),
        level=level_of(edit.place.encoder),
    )


def together(lines: Sequence[Line]) -> Line:
    """One line for a concept that moves at several places: at the site where it acted most, the mean of its changes, and of the
    other figures the highest."""
    if len(lines) == 1:
        return lines[0]
    sites = dict.fromkeys(one.site for one in lines)
    acted, tokens = (max(_by_level(lines, site, what) for site in sites) for what in ("acted", "tokens"))
    changes = [one.change for one in lines if one.change is not None]
    return Line(
        concept=lines[0].concept,
        site=f"{len(sites)} sites" if len(sites) > 1 else lines[0].site,
        passes=max(one.passes for one in lines),
        acted=acted,
        tokens=tokens,
        seen=max(one.seen for one in lines),
        change=sum(changes) / len(changes) if changes else None,
        left=_most(one.left for one in lines),
        off_range=_most(one.off_range for one in lines),
        largest=_most(one.largest for one in lines),
        capped=max(one.capped for one in lines),
        why="" if tokens else next((one.why for one in lines if one.why), ""),
    )


def _by_level(lines: Sequence[Line], site: str, what: str) -> int:
    """How often a concept acted at a site: noise levels follow each other, and what belongs to one acts in the same passes."""
    levels = {one.level for one in lines if one.site == site}
    return sum(max(getattr(one, what) for one in lines if (one.site, one.level) == (site, level)) for level in levels)


def _most(values: Iterable[float | None]) -> float | None:
    """The highest of those that are known."""
    return max((value for value in values if value is not None), default=None)


def why_not(edit: Edit, tally: Tally) -> str:
    """What kept an edit from acting, as far as the passes tell; empty where they do not."""
    if not tally.passes:
        return "no pass of the model went through its site"
    return next((why for share in edit.shares if (why := share.why_closed(tally.progress, tally.halves))), "")


COLUMNS: dict[str, tuple[str, Callable[[Line], str]]] = {
    "concept": ("", lambda one: one.concept),
    "site": ("", lambda one: one.site),
    "passes": ("where the edit acted, of all through its site", lambda one: f"{one.acted}/{one.passes}"),
    "tokens": (
        "per row where it acted, and their share",
        lambda one: f"{one.tokens} ({one.tokens / max(1, one.seen):.0%})",
    ),
    "change": ("mean length, of the median activation's", lambda one: _percent(one.change)),
    "left": ("of a reading that is taken away", lambda one: _percent(one.left)),
    "off range": ("tokens that read what 99 % of reference data do not", lambda one: _percent(one.off_range)),
    "largest": ("reading afterwards, in units", lambda one: "–" if one.largest is None else f"{one.largest:.1f}"),
    "capped": ("tokens where it was cut short", lambda one: _percent(one.capped)),
}
"""Every column of a report: what its legend says, and how it is written. One that is empty throughout is left out."""
LOOKED = "from change on: where the edit acted, without first tokens, and up to largest over some of the passes"
PLACES = "of several sites: the mean change, and the highest of the other figures; report().lines has each"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


@dataclass(frozen=True)
class Report:
    """What a session did. Prints as a table with a row for each concept and a legend, shows as one in notebooks.

    Attributes:
        lines: one for each concept and each place where it moves.
        ran: whether the model ran inside the session.
        said: what was cut, or is beyond measured ranges, as was known before the run.
    """

    lines: tuple[Line, ...]
    ran: bool
    said: tuple[str, ...] = ()

    @property
    def concepts(self) -> list[Line]:
        """One line for each concept."""
        names = dict.fromkeys(one.concept for one in self.lines)
        return [together([one for one in self.lines if one.concept == name]) for name in names]

    def cells(self) -> list[tuple[str, ...]]:
        """The table: a head, then a row for each concept, in the columns that say something."""
        columns = {name: [write(one) for one in self.concepts] for name, (_, write) in COLUMNS.items()}
        shown = {name: cells for name, cells in columns.items() if set(cells) != {"–"}}
        return [tuple(shown), *zip(*shown.values(), strict=True)]

    def legend(self) -> str:
        """What the columns say."""
        shown = self.cells()[0]
        said = [f"{name}: {COLUMNS[name][0]}" for name in shown if COLUMNS[name][0]]
        said += [LOOKED] if {"change", "left", "off range", "largest"} & {*shown} else []
        said += [PLACES] if len(self.concepts) < len(self.lines) else []
        return f"{'; '.join(said)}."

    def notes(self) -> list[str]:
        """Why nothing happened, where nothing did, and what was said before the run."""
        notes = [f"{one.concept}: {one.why}" for one in self.concepts if self.ran and one.why]
        if not self.ran:
            notes = ["nothing happened: the model did not run inside this session", *notes]
        elif not any(one.tokens for one in self.lines):
            notes = ["nothing happened: the model ran, but no schedule, part of the text or gate let an edit through", *notes]
        return [*notes, *self.said]

    def __str__(self) -> str:
        if not self.lines:
            return "Steering: no edits are set"
        rows = self.cells()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join((*map(str.ljust, row[:2], widths), *map(str.rjust, row[2:], widths[2:]))) for row in rows]
        return "\n".join([*table, *wrap(self.legend(), 120), *self.notes()])

    def _repr_html_(self) -> str:
        if not self.lines:
            return "<p>no edits are set</p>"
        head, *rows = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in self.cells())
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        notes = "".join(f"<p>{escape(note)}</p>" for note in (self.legend(), *self.notes()))
        return f"<table><thead><tr>{head.replace('td>', 'th>')}</tr></thead><tbody>{body}</tbody></table>{notes}"
