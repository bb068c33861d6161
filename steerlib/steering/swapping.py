"""One concept for another: what a swap does to each of its concepts.

Beside what it does to its own concept, a swap has a part for the concept that takes its place. Parts for one concept are joined
before they are lowered, so that all readings are exchanged at once.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from ..bank.concepts import Concept
from ..errors import BadEdit
from .aims import Aim, Numbers, Rule, Traded
from .interventions import Coordinate, Intervention


@dataclass(frozen=True)
class Swap(Intervention):
    """Put another concept in the place of this one: as much of it as there was of this.

    This concept then reads 0, and the other one what it read before plus what this one did, in units of each, or raw ones with
    `unit="raw"`. Both are read before anything is edited at the site, and both targets are met by one shortest change; latents
    are changed in the code. Two that are swapped for each other, `{"a": sl.Swap("b"), "b": sl.Swap("a")}`, exchange their
    readings.

    What a direction reads below its average is handed on too. The first token of a text, on which attention rests whatever it
    is, is left alone, unless `tokens=` is given. The new concept is moved wherever it acts; there the old one is read at the
    same site, or else at its first, which must not come later. Additions are capped as those of `Add` are.

    Args:
        new: the concept that takes the place.

    Raises in `steer` `ConflictingEdits` where the new concept is edited otherwise in the same call, and `Unanswerable` where
    the two act on other tokens by their stored gates, at other noise levels, or the old one is read after the new one is moved.

    >>> with sl.steer(model, bank, {"a": sl.Swap("b")}) as session:
    ...     _ = model(torch.ones(1, 4, dtype=torch.long))
    >>> [line.concept for line in session.report().lines]
    ['a', 'b']
    """

    new: "str | Concept"
    tokens: Literal["all", "prompt", "generated"] | slice | None = field(default=None, kw_only=True)
    spares_first: ClassVar[bool] = True
    keeps_codes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.new, str | Concept):
            raise BadEdit(f"expected the name of a concept that takes the place, got {self.new!r:.80}")

    def parts(self, name: "str | Concept") -> "list[tuple[str | Concept, Intervention]]":
        return [(name, self), (self.new, Received((name,), **self.scope))]

    def joined(self, other: Intervention) -> Intervention | None:
        return other.joined(self) if isinstance(other, Received) else None

    @property
    def is_plain(self) -> bool:
        return super().is_plain and isinstance(self.new, str)

    def aim(self, at: Coordinate) -> Aim:  # noqa: ARG002 - 0 has no unit
        return Numbers(Rule(low=0.0, high=0.0))


@dataclass(frozen=True)
class Received(Intervention):
    """What a `Swap` does to a concept that takes the place of others.

    Args:
        given: the others.
        keeps: whether it keeps what it read itself; it does not where it was swapped too.
    """

    given: tuple["str | Concept", ...]
    keeps: bool = True
    tokens: Literal["all", "prompt", "generated"] | slice | None = field(default=None, kw_only=True)
    spares_first: ClassVar[bool] = True
    keeps_codes: ClassVar[bool] = True

    def joined(self, other: Intervention) -> Intervention | None:
        mine, theirs = ({**one.scope, "mask": id(one.mask)} for one in (self, other))
        if not isinstance(other, Swap | Received) or mine != theirs:
            return None
        more = other.given if isinstance(other, Received) else ()
        return replace(self, given=(*self.given, *more), keeps=self.keeps and isinstance(other, Received) and other.keeps)

    def aim(self, at: Coordinate) -> Aim:
        assert at.other is not None
        others = [at.other(name) for name in self.given]
        given = tuple((other.read, self.raw(at.unit) / self.raw(other.unit)) for other in others)
        return Traded(given, self.keeps, tuple(note for other in others for note in other.notes))
