"""What a session did, as a table."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """What became of one concept."""

    concept: str
    site: str
    passes: int
    tokens: int
    """Positions per row, pads included."""
    change: float | None
    """Mean length of the site's change, as a share of the median activation there."""
    off_range: float | None
    """Share of looked-at tokens at which the concept reads outside its natural range."""
    largest: float | None
    """Largest reading, in units."""
    capped: float
    """Share of looked-at tokens whose change was cut short."""


@dataclass(frozen=True)
class Report:
    """What a session did. Prints as a table."""

    lines: tuple[Line, ...]
    ran: bool

    def __str__(self) -> str:
        if not self.lines:
            return "Steering: no edits are set"
        head = f"{'concept':<18}{'site':<14}{'passes':>7}{'tokens':>8}{'change':>9}{'off range':>11}{'largest':>9}{'capped':>8}"
        rows = [head]
        for line in self.lines:
            change = "–" if line.change is None else f"{line.change:.0%}"
            off = "–" if line.off_range is None else f"{line.off_range:.0%}"
            largest = "–" if line.largest is None else f"{line.largest:.1f}"
            rows.append(
                f"{line.concept:<18}{line.site:<14}{line.passes:>7}{line.tokens:>8}{change:>9}{off:>11}{largest:>9}"
                f"{line.capped:>8.0%}"
            )
        if not self.ran:
            rows.append("nothing happened: the model did not run inside this session")
        elif not any(line.tokens for line in self.lines):
            rows.append("nothing happened: the model ran, but no schedule, part of the text or gate let an edit through")
        return "\n".join(rows)
