"""What is steered: a named coordinate of an encoder."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from math import isfinite
from typing import Any

from .errors import CorruptBank


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

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, defaults left out."""
        plain = {f.name: f.default for f in fields(self)}
        return {key: value for key, value in asdict(self).items() if value not in (plain[key], (), {})}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Concept":
        """From JSON of a stranger: unknown fields are ignored, bad values refused."""
        known = {f.name for f in fields(cls)}
        given = {key: value for key, value in values.items() if key in known}
        try:
            for key in ("natural", "range"):
                if given.get(key) is not None:
                    low, high = map(float, given[key])
                    given[key] = (low, high)
            given["examples"] = tuple(map(str, given.get("examples", ())))
            concept = cls(**given)
            numbers = [concept.unit, concept.useful or 0.0, *(concept.natural or ()), *(concept.range or ())]
            sound = (
                isinstance(concept.name, str)
                and isinstance(concept.encoder, str)
                and type(concept.index) is int
                and concept.index >= 0
                and concept.unit > 0
                and all(map(isfinite, numbers))
            )
        except (TypeError, ValueError) as error:
            raise CorruptBank(f"expected a concept's fields, got {dict(values)!r:.200}: {error}") from None
        if not sound:
            raise CorruptBank(f"expected finite numbers, a positive unit and an index, got {dict(values)!r:.200}")
        return concept
