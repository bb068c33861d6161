"""What is steered: a named coordinate of an encoder."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from math import inf, isfinite
from typing import Any

from torch import Tensor

from ..errors import BadEdit, CorruptBank

MAX_NAME, MAX_TEXT = 256, 1 << 14


def printable(text: str) -> str:
    """A stranger's text without what a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


@dataclass(frozen=True)
class Gate:
    """Apply an edit only where another concept reads `above` a value, or `below` one, in that concept's units.

    With `full` the edit grows from nothing at `above` to all of it at `full`. With neither bound the gate opens where the
    concept is present, by the threshold its bank stores.
    """

    concept: str
    above: float = -inf
    below: float = inf
    full: float | None = None

    def __post_init__(self) -> None:
        if not self.above < self.below:
            raise BadEdit(f"expected a gate with above < below, got {self}")
        if self.full is not None and not (isfinite(self.above) and self.above < self.full < inf and self.below == inf):
            raise BadEdit(f"expected a gate that grows from a finite above to a larger, finite full, without below, got {self}")

    @property
    def is_bounded(self) -> bool:
        """Whether it says itself where it opens."""
        return (self.above, self.below) != (-inf, inf)

    def passed(self, z: Tensor) -> Tensor:
        """The share of an edit, 0 to 1, that the gate lets through where its concept reads `z`, in units of that concept."""
        if self.full is not None:
            return ((z - self.above) / (self.full - self.above)).clamp(0, 1)
        return ((z > self.above) & (z < self.below)).float()


@dataclass(frozen=True, kw_only=True)
class Part:
    """Another coordinate that moves with a concept: what several layers at once are made of."""

    encoder: str
    index: int
    unit: float
    """What one unit of the concept is here, in raw coordinates."""


@dataclass(frozen=True)
class Place:
    """One coordinate at which a concept is read and moved: its own, or that of one of its parts.

    Attributes:
        encoder: id of the encoder.
        index: row of the encoder.
        unit: one unit of the concept here, in raw coordinates.
        natural: raw coordinates between which 99 % of the reference data lie, as many units of the concept here as at
            its own coordinate; None if they were not measured.
    """

    encoder: str
    index: int
    unit: float
    natural: tuple[float, float] | None = None

    @property
    def id(self) -> str:
        """`encoder/index`."""
        return f"{self.encoder}/{self.index}"


@dataclass(frozen=True, kw_only=True)
class Concept:
    """A named coordinate, with what was measured about it. Amounts are in units of the concept."""

    name: str
    encoder: str
    """Id of the encoder it belongs to: `site[@level][#kind]`."""
    index: int
    """Its row in that encoder."""
    unit: float = 1.0
    """One unit, in raw coordinates: the standard deviation on reference data."""
    natural: tuple[float, float] | None = None
    """Raw coordinate below and above which 0.5 % of the reference data lie."""
    range: tuple[float, float] | None = None
    """Amounts measured to be safe."""
    useful: float | None = None
    """The least amount measured to move the concept clearly."""
    beyond: str = ""
    """What was seen beyond the range."""
    parts: tuple[Part, ...] = ()
    """Where else it is moved, by the same intervention."""
    gate: Gate | None = None
    """Where edits of it act; a gate that an edit brings narrows it further."""
    match_norm: bool = False
    """Whether additions grow and shrink with each token's own length."""
    present: float | None = None
    """Reading, in units, above which the concept counts as present."""
    label: str = ""
    source: str = ""
    """Where the label comes from."""
    examples: tuple[str, ...] = ()
    effects: Mapping[str, Any] = field(default_factory=dict)
    """Measured effects, as the evaluation wrote them."""

    @property
    def id(self) -> str:
        """The name that always works: `encoder/index`."""
        return f"{self.encoder}/{self.index}"

    @property
    def at(self) -> tuple[Place, ...]:
        """Every coordinate that moves with the concept: first its own, then its parts."""
        own = Place(self.encoder, self.index, self.unit, self.natural)
        return own, *(Place(part.encoder, part.index, part.unit, self._natural_of(part)) for part in self.parts)

    def _natural_of(self, part: Part) -> tuple[float, float] | None:
        """The natural values at a part: as many units of it as of the concept."""
        if self.natural is None:
            return None
        low, high = (end * (part.unit / self.unit) for end in self.natural)
        return low, high

    @property
    def places(self) -> "tuple[Concept, ...]":
        """This concept, and itself as each of its parts."""
        bare = replace(self, natural=None, range=None, parts=())
        return self, *(replace(bare, encoder=part.encoder, index=part.index, unit=part.unit) for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, defaults left out."""
        plain = {f.name: f.default for f in fields(self)}
        values = {key: value for key, value in asdict(self).items() if value not in (plain[key], (), {})}
        if self.gate is not None:
            values["gate"] = {key: value for key, value in asdict(self.gate).items() if value not in (None, inf, -inf)}
        return values

    @classmethod
    def from_dict(cls, values: Any) -> "Concept":
        """From JSON of a stranger: unknown fields are ignored, bad values refused."""
        if not isinstance(values, dict):
            raise CorruptBank(f"expected a concept's fields, got {values!r:.200}")
        known = {f.name for f in fields(cls)}
        given = {key: value for key, value in values.items() if key in known}
        try:
            for key in ("natural", "range"):
                if given.get(key) is not None:
                    low, high = given[key]
                    given[key] = (low, high)
            if not isinstance(given.get("examples", []), list):
                raise TypeError("examples are a list")
            given["examples"] = tuple(given.get("examples", ()))
            given["parts"] = tuple(Part(**part) for part in given.get("parts", ()))
            if given.get("gate") is not None:
                given["gate"] = Gate(**given["gate"])
            concept = cls(**given)
            places = concept, *concept.parts
            names = [concept.name, *(place.encoder for place in places), *([concept.gate.concept] if concept.gate else ())]
            numbers = [*(concept.natural or ()), *(concept.range or ()), *(place.unit for place in places)]
            numbers += [number for number in (concept.useful, concept.present) if number is not None]
            texts = [concept.beyond, concept.label, concept.source, *concept.examples]
            sound = (
                all(isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable() for name in names)
                and all(isinstance(text, str) and len(text) <= MAX_TEXT for text in texts)
                and isinstance(concept.effects, dict)
                and all(type(place.index) is int and place.index >= 0 and place.unit > 0 for place in places)
                and type(concept.match_norm) is bool
                and all(type(number) in (int, float) and isfinite(number) for number in numbers)
                and all(low <= high for low, high in (concept.natural or (0, 0), concept.range or (0, 0)))
            )
        except (TypeError, ValueError, OverflowError, BadEdit) as error:
            raise CorruptBank(f"expected a concept's fields, got {values!r:.200}: {error}") from None
        if not sound:
            raise CorruptBank(
                f"expected finite numbers, short texts, positive units, whole indices for {concept.name!r:.100} and its parts, "
                f"got {values!r:.200}"
            )
        return concept
