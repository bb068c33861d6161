"""What a session did, as a table."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """What became of one concept."""

    concept: str
    site: str
    passes: int
    """Of the model through the site."""
    acted: int
    """Of these, in how many an edit of the site acted."""
    tokens: int
    """Positions per row, pads included, at which one acted."""
    seen: int
    """Of how many."""
    change: float | None
    """Mean length of the site's change, as a share of the median activation there."""
    off_range: float | None
    """Share of looked-at tokens at which the concept reads outside its natural range."""
    largest: float | None
    """Largest reading, in units."""
    capped: float
    """Share of looked-at tokens whose change was cut short."""
    why: str = ""
    """Why nothing happened, where nothing did."""


@dataclass(frozen=True)
class Report:
    """What a session did. Prints as a table."""

    lines: tuple[Line, ...]
    ran: bool

    def __str__(self) -> str:
        if not self.lines:
            return "Steering: no edits are set"
        names = [("concept", "site"), *((line.concept, line.site) for line in self.lines)]
        first, second = (max(map(len, column)) + 2 for column in zip(*names, strict=True))
        numbers = f"{'passes':>9}{'tokens':>14}{'change':>8}{'off range':>11}{'largest':>9}{'capped':>8}"
        rows = [f"{'concept':<{first}}{'site':<{second}}{numbers}"]
        for line in self.lines:
            change = "–" if line.change is None else f"{line.change:.0%}"
            off = "–" if line.off_range is None else f"{line.off_range:.0%}"
            largest = "–" if line.largest is None else f"{line.largest:.1f}"
            passes, tokens = f"{line.acted}/{line.passes}", f"{line.tokens} ({line.tokens / max(1, line.seen):.0%})"
            numbers = f"{passes:>9}{tokens:>14}{change:>8}{off:>11}{largest:>9}{line.capped:>8.0%}"
            rows.append(f"{line.concept:<{first}}{line.site:<{second}}{numbers}")
        if not self.ran:
            rows.append("nothing happened: the model did not run inside this session")
        elif not any(line.tokens for line in self.lines):
            rows.append("nothing happened: the model ran, but no schedule, part of the text or gate let an edit through")
        rows += [f"{line.concept}: {line.why}" for line in self.lines if self.ran and line.why]
        return "\n".join(rows)
