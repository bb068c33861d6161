"""What is done to a concept: values that can be compared, logged and hashed.

Every intervention lowers to one `Rule` in raw coordinates: `z' = clamp(scale * z + shift, low, high)`. Rules with finite
bounds are targets (the concept must read them afterwards); the others are additions.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Any, Literal, NamedTuple

from ..bank.concepts import Gate
from ..errors import BadEdit
from ..passes import Branch
from ..schedules import Schedule
from . import masks

Amount = float | Sequence[float]
"""One number, or one per row."""


class Rule(NamedTuple):
    """`z' = clamp(scale * z + shift, low, high)`, each a number or one per row, in raw coordinates."""

    scale: Amount = 1.0
    shift: Amount = 0.0
    low: Amount = -inf
    high: Amount = inf

    @property
    def is_target(self) -> bool:
        """Whether the concept has to read a given value afterwards."""
        return self.low != -inf or self.high != inf


@dataclass(frozen=True)
class Intervention(ABC):
    """What to do to one concept, and under which circumstances."""

    when: Schedule | None = field(default=None, kw_only=True)
    """None: always (or the window of the concept's level)."""
    tokens: Literal["all", "prompt", "generated"] | slice = field(default="all", kw_only=True)
    """Which positions: those of the prompt, of new tokens, or a slice that counts both together."""
    unit: Literal["concept", "raw"] = field(default="concept", kw_only=True)
    """Amounts in units of the concept, or in raw coordinates."""
    branch: Branch | None = field(default=None, kw_only=True)
    """Which half of guidance; None: what `steer` says."""
    gate: Gate | Literal["open"] | None = field(default=None, kw_only=True)
    """Where another concept reads high, beside the gate stored with the concept, if any; "open" lifts the stored one."""
    mask: masks.Mask | None = field(default=None, kw_only=True, compare=False)
    """Where. Text: the share of the edit at each position, `[L]` or `[rows, L]`; positions beyond `L` get none. Images: a box
    `(left, top, right, bottom)` in parts of the image, shares `[height, width]` or `[rows, height, width]` of any size, for
    videos with frames before the height, or a `Word` of the prompt."""

    def __post_init__(self) -> None:
        if isinstance(self.tokens, slice):
            ends = (self.tokens.start or 0, self.tokens.stop if self.tokens.stop is not None else inf)
            if self.tokens.step not in (None, 1) or not 0 <= ends[0] < ends[1]:
                raise BadEdit(f"expected a slice of positions with 0 <= start < stop and no step, got {self.tokens}")
        elif self.tokens not in ("all", "prompt", "generated"):
            raise BadEdit(f"expected tokens 'all', 'prompt', 'generated' or a slice, got {self.tokens!r}")
        if self.unit not in ("concept", "raw"):
            raise BadEdit(f"expected unit 'concept' or 'raw', got {self.unit!r}")
        if self.branch not in (None, "both", "cond", "uncond"):
            raise BadEdit(f"expected branch 'both', 'cond' or 'uncond', got {self.branch!r}")
        if self.gate is not None and self.gate != "open" and not isinstance(self.gate, Gate):
            raise BadEdit(f"expected gate to be a Gate or 'open', got {self.gate!r}")
        if self.when is not None and not isinstance(self.when, Schedule):
            raise BadEdit(f"expected when to be Steps, PerStep, Window or Ramp, got {self.when!r}")
        object.__setattr__(self, "mask", masks.check(self.mask))

    @abstractmethod
    def rule(self, unit: float) -> Rule:
        """This intervention in raw coordinates, where one unit is `unit`."""


def _amount(value: Any) -> Amount:
    """One finite float, or a tuple of them."""
    if hasattr(value, "tolist"):  # a tensor or an array
        value = value.tolist()
    amounts = tuple(map(float, value)) if isinstance(value, Sequence) and not isinstance(value, str) else float(value)
    if not all(map(isfinite, amounts if isinstance(amounts, tuple) else (amounts,))) or amounts == ():
        raise BadEdit(f"expected a finite amount, or one per row, got {value!r}")
    return amounts[0] if isinstance(amounts, tuple) and len(amounts) == 1 else amounts


def _each(amount: Amount) -> tuple[float, ...]:
    return amount if isinstance(amount, tuple) else (amount,)  # type: ignore[return-value]


def _times(amount: Amount, unit: float) -> Amount:
    return tuple(a * unit for a in amount) if isinstance(amount, tuple) else amount * unit  # type: ignore[operator]


@dataclass(frozen=True)
class Add(Intervention):
    """Move the concept by an amount. A bare number means this."""

    amount: Amount
    match_norm: bool = field(default=False, kw_only=True)
    """Grow and shrink with each token's own length, relative to the site's median."""
    keep_norm: bool = field(default=False, kw_only=True)
    """Give every token that is moved its old length again: turn it, and no more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "amount", _amount(self.amount))

    def rule(self, unit: float) -> Rule:
        return Rule(shift=_times(self.amount, unit if self.unit == "concept" else 1.0))


@dataclass(frozen=True)
class Scale(Intervention):
    """Multiply the concept's reading."""

    factor: Amount

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "factor", _amount(self.factor))

    def rule(self, unit: float) -> Rule:  # noqa: ARG002 - a factor has no unit
        return Rule(scale=self.factor)


@dataclass(frozen=True)
class Set(Intervention):
    """Make the concept read a value."""

    value: Amount

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "value", _amount(self.value))

    def rule(self, unit: float) -> Rule:
        value = _times(self.value, unit if self.unit == "concept" else 1.0)
        return Rule(low=value, high=value)


@dataclass(frozen=True)
class Ablate(Intervention):
    """Make the concept read 0: for a direction, its mean on reference data."""

    def rule(self, unit: float) -> Rule:  # noqa: ARG002 - zero has no unit
        return Rule(low=0.0, high=0.0)


@dataclass(frozen=True)
class Clamp(Intervention):
    """Keep the concept's reading between two values; None leaves a side open."""

    low: Amount | None = None
    high: Amount | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        low = -inf if self.low is None else _amount(self.low)
        high = inf if self.high is None else _amount(self.high)
        lows, highs = (_each(end) for end in (low, high))
        if (self.low is None and self.high is None) or max(lows) > min(highs):
            raise BadEdit(f"expected a low, a high or both, with low <= high, got {self.low} and {self.high}")
        object.__setattr__(self, "low", low)
        object.__setattr__(self, "high", high)

    def rule(self, unit: float) -> Rule:
        unit = unit if self.unit == "concept" else 1.0
        return Rule(low=_times(self.low, unit), high=_times(self.high, unit))  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Patch(Intervention):
    """Make the concept read what `sl.record` saw: in text by position, in images at the nearest noise level.

    A tape of the concept's *site* gives whole activations instead: with `gate=` on the concept, tokens where it shows are
    replaced by those of the other run (detect and replace). What was not recorded is left alone.
    """

    tape: Any
    """The tape of `sl.record`, which must hold this concept or its site."""

    def rule(self, unit: float) -> Rule:  # noqa: ARG002 - readings are raw
        return Rule(low=0.0, high=0.0)
