"""What is steered: a named coordinate of an encoder."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from math import inf, isfinite
from typing import Any, Literal

from torch import Tensor

from ..errors import BadEdit, CorruptBank

MAX_NAME, MAX_TEXT = 256, 1 << 14


def printable(text: str, length: int | None = None) -> str:
    """A stranger's text without control characters, which a terminal would obey; with a length, cut to it and on one line."""
    shown = text if length is None else " ".join(text.split())
    shown = shown if length is None or len(shown) <= length else f"{shown[: length - 1]}…"
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in shown)


def signed(*amounts: float | None) -> str:
    """An amount in units as text, or the ends of a range; nothing for what was not measured."""
    return " to ".join(f"{amount:+.2f}" for amount in amounts if amount is not None)


@dataclass(frozen=True)
class Gate:
    """Apply an edit only where another concept reads `above` a value, or `below` one.

    With neither bound the gate opens where its concept is present, by the threshold that the bank stores (`present`).

    Args:
        concept: name of the concept that is read.
        above: the gate is open at readings above this, in units of that concept.
        below: and below this.
        full: let the edit grow linearly from none at `above` to all of it at `full`; only without `below`.
        over: "token": each token decides for itself. "prompt": the mean reading over a row's prompt decides once for the row,
            its prompt included, from the site on at which the concept is read. The mean leaves out the first token, on which
            attention rests whatever it is.

    Raises:
        BadEdit: the bounds leave nothing between them, or `full` is not above a finite `above`.

    >>> gate = sl.Gate("a", above=0.5, full=1.5)
    >>> gate.passed(torch.tensor([0.0, 1.0, 2.0])).tolist()
    [0.0, 0.5, 1.0]
    >>> with sl.steer(model, bank, {"b": sl.Add(2.0, gate=gate)}):
    ...     logits = model(torch.tensor([[1, 2, 3]])).logits
    """

    concept: str
    above: float = -inf
    below: float = inf
    full: float | None = None
    over: Literal["token", "prompt"] = "token"

    def __post_init__(self) -> None:
        if self.over not in ("token", "prompt"):
            raise BadEdit(f"expected a gate over 'token' or 'prompt', got {self.over!r:.80}")
        if not isinstance(self.concept, str):
            raise BadEdit(
                f"expected the name of one concept for a gate, got {self.concept!r:.80}; an edit takes one gate, beside the "
                "one that the bank stores with its concept"
            )
        for name in ("above", "below", "full"):
            value = getattr(self, name)
            if hasattr(value, "item"):
                object.__setattr__(self, name, value := value.item())
            if isinstance(value, bool) or not isinstance(value, float | int | None) or value != value:
                raise BadEdit(f"expected {name} of a gate as a number, got {value!r:.80}")
        if not self.above < self.below:
            raise BadEdit(f"expected a gate with above < below, got {self}")
        if self.full is not None and not (isfinite(self.above) and self.above < self.full < inf and self.below == inf):
            raise BadEdit(f"expected a gate that grows from a finite above to a larger, finite full, without below, got {self}")

    @property
    def is_bounded(self) -> bool:
        """Whether the gate itself says where it opens."""
        return (self.above, self.below) != (-inf, inf)

    def passed(self, z: Tensor) -> Tensor:
        """The share of an edit, 0 to 1, that the gate lets through where its concept reads `z`, in units of that concept."""
        if self.full is not None:
            return ((z - self.above) / (self.full - self.above)).clamp(0, 1)
        return ((z > self.above) & (z < self.below)).float()


@dataclass(frozen=True, kw_only=True)
class Part:
    """Another coordinate that moves with a concept: a concept of several layers has one part for each further layer.

    Args:
        encoder: id of the encoder it belongs to.
        index: its row in that encoder.
        unit: one unit of the concept here, in raw coordinates.

    >>> sl.Part(encoder="layers.1", index=3, unit=0.25)
    Part(encoder='layers.1', index=3, unit=0.25)
    """

    encoder: str
    index: int
    unit: float


@dataclass(frozen=True)
class Place:
    """One coordinate at which a concept is read and moved: its own, or that of one of its parts.

    `unit` is one unit of the concept here, in raw coordinates; between the `natural` values, raw too, lie 99 % of the reference
    data (None: not measured). At a part they are as many units as at the concept's own coordinate.
    """

    encoder: str
    index: int
    unit: float
    natural: tuple[float, float] | None = None
    blend: "Blend | None" = None
    """What its direction is made of, where no encoder has it."""

    @property
    def id(self) -> str:
        """`encoder/index`."""
        own = f"{self.encoder}/{self.index}"
        return own if self.blend is None else f"{own}: {self.blend.formula(lambda concept: concept.id)}"


@dataclass(frozen=True)
class Blend:
    """A concept without what it shares with others, or only that.

    Args:
        of: the concept.
        others: the others.
        only: whether what it shares is all that is left.
    """

    of: "Concept"
    others: "tuple[Concept, ...]"
    only: bool

    def formula(self, word: "Callable[[Concept], str]") -> str:
        """How it is written."""
        words = [word(one) if one.blend is None else f"({word(one)})" for one in (self.of, *self.others)]
        return (" & " if self.only else " - ").join(words)


@dataclass(frozen=True, kw_only=True, repr=False)
class Concept:
    """A named coordinate of an encoder, with what was measured about it.

    Directions can be combined: `a - b` is `a` without what it shares with `b`, its part at right angles to it, and `a & b` is
    what it shares, its part along `b` or against it; together they make up `a`. `a - b - c` is at right angles to `b` and `c`.
    One unit is what is left of one of `a`. Nothing of a combination was measured, so it has no range and no useful amount; it
    keeps site, gate and norms of `a`. It is a key of edits, `{bank["a"] - bank["b"]: 2.0}`, and gets a name by `with_concepts`.

    Args:
        name: what users call it.
        encoder: id of the encoder it belongs to: `site[@level][#kind]`.
        index: its row in that encoder.
        unit: one unit, in raw coordinates: the standard deviation on reference data, of a latent the median where it fires.
        natural: raw coordinates below and above which 0.5 % of the reference data lie.
        range: amounts measured to be safe, in units.
        useful: the least amount measured to move the concept clearly, in units; None where none within the range did.
        useful_as: the edit that `useful` and `range` are amounts of: `"Add"`, `"Set"`, or, of a context bank, `"Do"`.
        beyond: what was seen beyond the range.
        parts: other coordinates that the same edit moves.
        gate: where edits of it act; a gate that an edit brings narrows it further.
        match_norm: whether additions grow and shrink with the length of each token's activation.
        keep_norm: whether additions turn activations, and leave their length as it is.
        present: reading, in units, above which the concept counts as present. A concept that has one serves as a gate.
        label: what it means, in words.
        source: where the label comes from.
        factor: what it is a value of, as "red" is one of "hue"; `hold=` and `free=` take all values of a factor by its name.
        examples: texts in which it is strong.
        effects: measured effects; `steerlib/bank/effects.py` names the keys.
        blend: what it is made of; `-` and `&` make one.

    >>> bank["a"].id, bank["a"].unit
    ('layers.0/0', 1.0)
    >>> with sl.steer(model, bank, {bank["a"] - bank["b"]: 2.0}) as session:
    ...     _ = model(torch.ones(1, 4, dtype=torch.long))
    >>> session.report().lines[0].concept
    'a - b'
    """

    name: str
    encoder: str
    index: int
    unit: float = 1.0
    natural: tuple[float, float] | None = None
    range: tuple[float, float] | None = None
    useful: float | None = None
    useful_as: str = "Add"
    beyond: str = ""
    parts: tuple[Part, ...] = ()
    gate: Gate | None = None
    match_norm: bool = False
    keep_norm: bool = False
    present: float | None = None
    label: str = ""
    source: str = ""
    factor: str = ""
    examples: tuple[str, ...] = ()
    effects: Mapping[str, Any] = field(default_factory=dict)
    blend: Blend | None = None

    def __hash__(self) -> int:
        return hash(self.id)

    def __sub__(self, other: "Concept") -> "Concept":
        if self.blend is not None and not self.blend.only:
            return _blended(self.blend.of, (*self.blend.others, other), only=False)
        return _blended(self, (other,), only=False)

    def __and__(self, other: "Concept") -> "Concept":
        return _blended(self, (other,), only=True)

    @property
    def id(self) -> str:
        """The name that always works: `encoder/index`."""
        return f"{self.encoder}/{self.index}" if self.blend is None else self.blend.formula(lambda concept: concept.id)

    @property
    def places(self) -> tuple[Place, ...]:
        """Every coordinate that moves with the concept: first its own, then its parts."""
        own = Place(self.encoder, self.index, self.unit, self.natural, self.blend)
        return own, *(Place(part.encoder, part.index, part.unit, self._natural_of(part), self.blend) for part in self.parts)

    def _natural_of(self, part: Part) -> tuple[float, float] | None:
        if self.natural is None:
            return None
        low, high = (end * (part.unit / self.unit) for end in self.natural)
        return low, high

    @property
    def amounts(self) -> str:
        """What was measured of its amounts, in words."""
        edit = "useful" if self.useful_as == "Add" else f"useful as {self.useful_as}"  # a bare number is added
        known = {edit: signed(self.useful), "safe": signed(*self.range or ()), "present above": signed(self.present)}
        return "  ".join(f"{what} {amount}" for what, amount in known.items() if amount)

    @property
    def unmeasured(self) -> str:
        """What is not known of its amounts, in words, with the command that measures it; nothing of gates, and of what is
        switched, whose amounts go from 0 to 1."""
        if self.range is not None or self.present is not None or self.useful_as == "Do":
            return ""
        what = "range" if self.natural is not None else "unit and range"
        return f"{what} not measured: sl.calibrate(model, bank, [{self.name!r}], judge=…)"

    def __repr__(self) -> str:
        parts = f"{len(self.parts)} more places" if self.parts else ""
        gate = f"gated by {self.gate.concept!r}" if self.gate else ""
        lines = [
            f"Concept {self.name!r}: {self.id}, unit {self.unit:.4g}",
            printable(self.label, 120),
            ", ".join(filter(None, (self.amounts, parts, gate))),
            self.unmeasured if self.blend is None else "",
            f"beyond: {printable(self.beyond, 100)}" if self.beyond else "",
            f"examples: {printable(' | '.join(self.examples), 100)}" if self.examples else "",
        ]
        return "\n  ".join(filter(None, lines))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, defaults left out."""
        assert self.blend is None, "a combination is a concept of no bank"
        plain = {f.name: f.default for f in fields(self)}
        values = {key: value for key, value in asdict(self).items() if value not in (plain[key], (), {})}
        if self.gate is not None:
            values["gate"] = {key: value for key, value in asdict(self.gate).items() if value not in (None, inf, -inf, "token")}
        return values

    @classmethod
    def from_dict(cls, values: Any) -> "Concept":
        """From JSON of a stranger: unknown fields are ignored; raises `CorruptBank` on bad values."""
        try:
            if not isinstance(values, dict) or not isinstance(values.get("examples", []), list):
                raise TypeError("examples are a list")
            given = {f.name: values[f.name] for f in fields(cls) if f.name in values and f.name != "blend"}
            for key in ("natural", "range"):
                if given.get(key) is not None:
                    low, high = given[key]
                    given[key] = (low, high)
            given["examples"] = tuple(given.get("examples", ()))
            given["parts"] = tuple(Part(**part) for part in given.get("parts", ()))
            if given.get("gate") is not None:
                given["gate"] = Gate(**given["gate"])
            concept = cls(**given)
            sound = is_sound(concept)
        except (TypeError, ValueError, OverflowError, BadEdit) as error:
            raise CorruptBank(f"expected a concept's fields, got {values!r:.200}: {error}") from None
        if not sound:
            raise CorruptBank(
                f"expected finite numbers, short texts, positive units, whole indices for {concept.name!r:.100} and its parts, "
                f"got {values!r:.200}"
            )
        return concept


def _blended(of: Concept, others: tuple[Concept, ...], *, only: bool) -> Concept:
    """A concept that is made of others, of which nothing was measured."""
    blend = Blend(of, others, only)
    shown = " and ".join(repr(other.name) for other in others)
    label = f"what {of.name!r} shares with {shown}" if only else f"{of.name!r} without what it shares with {shown}"
    return Concept(
        name=blend.formula(lambda concept: concept.name),
        encoder=of.encoder,
        index=of.index,
        unit=of.unit,
        parts=of.parts,
        gate=of.gate,
        match_norm=of.match_norm,
        keep_norm=of.keep_norm,
        label=label,
        source="made of other concepts; nothing was measured of it",
        blend=blend,
    )


def is_sound(concept: Concept) -> bool:
    """Whether a stranger's values can be used."""
    places = concept, *concept.parts
    names = [concept.name, *(place.encoder for place in places), *([concept.gate.concept] if concept.gate else ())]
    numbers = [*(concept.natural or ()), *(concept.range or ()), *(place.unit for place in places)]
    numbers += [number for number in (concept.useful, concept.present) if number is not None]
    return (
        all(isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable() for name in names)
        and all(
            isinstance(t, str) and len(t) <= MAX_TEXT
            for t in (concept.beyond, concept.label, concept.source, concept.factor, *concept.examples)
        )
        and concept.useful_as in ("Add", "Set", "Do")
        and isinstance(concept.effects, dict)
        and all(type(place.index) is int and place.index >= 0 and place.unit > 0 for place in places)
        and type(concept.match_norm) is type(concept.keep_norm) is bool
        and all(type(number) in (int, float) and isfinite(number) for number in numbers)
        and all(low <= high for low, high in (concept.natural or (0, 0), concept.range or (0, 0)))
    )
