"""What is done to a concept: values that can be compared, logged and hashed. An intervention is one class here.

Each lowers itself to an aim in raw coordinates.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from math import inf, isfinite
from typing import Any, ClassVar, Literal, NamedTuple

from ..bank.concepts import Concept, Gate
from ..encoders import Context
from ..errors import BadEdit, Unanswerable
from ..passes import Branch
from ..schedules import Schedule
from .aims import Aim, Amount, Numbers, Recorded, Rule, Swapped, each
from .dialect import WORDS, is_word
from .masks import mask_of
from .reading import Note, Reader
from .replay import Replay

Tokens = str | slice | tuple[str | slice, ...]


class Other(NamedTuple):
    """What another concept reads, as an intervention has to know it."""

    read: Reader
    unit: float
    """One unit, raw."""
    notes: tuple[tuple[str, Note], ...] = ()
    """What is read at an earlier site, and the site."""


class Coordinate(NamedTuple):
    """What an intervention has to know of the coordinate that it moves."""

    name: str
    """Of the concept."""
    site: str
    unit: float
    """One unit, raw."""
    read: Reader
    natural: tuple[float, float] | None = None
    """Raw readings that a concept is forced to at most; None: any."""
    count: int = 1
    """Coordinates that move with the concept, this one included."""
    is_latent: bool = False
    """Whether it is a latent of a sparse code."""
    other: "Callable[[str | Concept], Other] | None" = None
    """Who tells what other concepts read."""
    module: Context | None = None
    """The context module that switches it, if one does."""
    reads: str = ""
    """The earlier site at which it is read, if it is."""
    keep_norm: bool = False
    """Whether additions leave the length of activations as it is."""


@dataclass(frozen=True)
class Intervention(ABC):
    """What to do to one concept, and under which circumstances. Of your own: one frozen subclass with an `aim`.

    >>> sl.Add(2.0) == sl.Add(2.0), isinstance(sl.Add(2.0), sl.Intervention)
    (True, True)

    Args:
        when: a schedule (`Window`, `Steps`, `Ramp`, `PerStep`); None: always, or the window of the concept's noise level.
        tokens: positions to edit, of text: "all", "prompt" (what the model reads in its first pass), "generated" (the input
            positions after it, so the first new token is not moved), or a slice that counts prompt and new tokens together.
            Or a part of the text, which `sl.steer(..., tokenizer=tokenizer)` tells: "system", "user", "assistant" (turns of a
            chat), "answer" (new tokens without thinking and tool calls), "thinking", "tool-call", "code" (between ```), "json"
            (that begins a line), or two delimiters, "<a>...</a>", which belong to their part; "not-code" all but it. A tuple:
            tokens for which all of these hold.
        unit: what amounts count: "concept", units of the concept, or "raw", coordinates of its encoder.
        branch: the half of guidance, "both", "cond" or "uncond"; None: what `steer` says.
        gate: a `Gate` on what another concept reads, beside the one stored with the concept; "open" lifts the stored one.
        mask: where. Text: the share of the edit at each position, `[L]` or `[rows, L]`; positions beyond `L` get none.
            Images: a box `(left, top, right, bottom)` in parts of the image, shares `[height, width]` or
            `[rows, height, width]` of any size (for videos with frames before the height), or a `Word` of the prompt. Shares
            are 0 to 1 or truth values; bytes 0 to 255 and pictures count white as 1. Tensors, arrays and PIL images serve.

    Every amount may be a sequence, one number for each prompt. Raises `BadEdit` for values that make no sense.
    """

    when: Schedule | None = field(default=None, kw_only=True)
    tokens: Tokens | None = field(default="all", kw_only=True)
    unit: Literal["concept", "raw"] = field(default="concept", kw_only=True)
    branch: Literal["both"] | Branch | None = field(default=None, kw_only=True)
    gate: Gate | Literal["open"] | None = field(default=None, kw_only=True)
    mask: Any = field(default=None, kw_only=True, compare=False)
    spares_first: ClassVar[bool] = False
    """Whether it leaves the first token of a text alone unless `tokens` says otherwise."""
    keeps_codes: ClassVar[bool] = False
    """Whether a code of a quantiser, which is there or not, is one afterwards."""
    switches: ClassVar[bool] = False
    """Whether it is for concepts of a context module, and for no others."""

    def __init_subclass__(cls) -> None:
        """What `help` shows of an intervention lists the arguments that all have, too."""
        shared = (Intervention.__doc__ or "").partition("Args:")[2]
        cls.__doc__ = f"{(cls.__doc__ or '').rstrip()}\n\n    Arguments of every intervention, by keyword:{shared}"

    def __post_init__(self) -> None:
        if self.tokens is not type(self).tokens:
            _check_tokens(self.tokens)
        if self.unit not in ("concept", "raw"):
            raise BadEdit(f"expected unit 'concept' or 'raw', got {self.unit!r}")
        if self.branch not in (None, "both", "cond", "uncond"):
            raise BadEdit(f"expected branch 'both', 'cond' or 'uncond', got {self.branch!r}")
        if self.gate is not None and self.gate != "open" and not isinstance(self.gate, Gate):
            raise BadEdit(f"expected gate to be a Gate or 'open', got {self.gate!r}")
        if self.when is not None and not isinstance(self.when, Schedule):
            raise BadEdit(f"expected when to be a schedule such as Steps, PerStep, Window or Ramp, got {self.when!r}")
        if self.mask is not None:
            mask_of(self.mask)

    @abstractmethod
    def aim(self, at: Coordinate) -> Aim:
        """This intervention in the raw coordinates of one of the places that it moves."""

    def parts(self, name: "str | Concept") -> "list[tuple[str | Concept, Intervention]]":
        """What it does to each concept, where it was given for the concept `name`."""
        return [(name, self)]

    def joined(self, other: "Intervention") -> "Intervention | None":  # noqa: ARG002
        """What does to one concept what this and another do to it; None: nothing can."""
        return None

    @property
    def amounts(self) -> tuple[float, ...]:
        """What is compared with the safe range of the concept, in its units."""
        return ()

    def is_capped(self, unit: float, natural: tuple[float, float]) -> bool:  # noqa: ARG002
        """Whether natural readings cut what it forces a concept to."""
        return False

    def matches_norm(self, stored: bool) -> bool:  # noqa: ARG002
        """Whether it grows and shrinks with each token's own length; `stored`: whether the bank says so of the concept."""
        return False

    @property
    def is_plain(self) -> bool:
        """Whether equal interventions do equal things, so that a plan of one serves the other; tensors are not compared."""
        return self.mask is None

    @property
    def rows(self) -> set[int]:
        """For how many prompts its amounts are; empty where they are for all."""
        given = [getattr(self, f.name) for f in fields(self) if f.name not in ("mask", "tokens")]
        return {len(amounts) for amounts in given if isinstance(amounts, tuple)}

    @property
    def scope(self) -> dict[str, Any]:
        """The arguments that all interventions have."""
        return {f.name: getattr(self, f.name) for f in fields(Intervention)}

    def raw(self, unit: float) -> float:
        """What amounts are multiplied by."""
        return unit if self.unit == "concept" else 1.0


def _check_tokens(tokens: Any) -> None:
    """Raise `BadEdit` for what names no tokens of a text."""
    for one in tokens if isinstance(tokens, tuple) and tokens else (tokens,):
        if isinstance(one, slice):
            start, stop = one.start or 0, inf if one.stop is None else one.stop
            if one.step not in (None, 1) or not 0 <= start < stop:
                raise BadEdit(f"expected a slice of positions with 0 <= start < stop and no step, got {one}")
        elif one not in ("all", "prompt", "generated") and not (isinstance(one, str) and is_word(one)):
            raise BadEdit(
                f"expected tokens 'all', 'prompt', 'generated', a slice, a part of the text ({', '.join(map(repr, WORDS))}, or "
                f"two delimiters, '<a>...</a>'), 'not-' and a part, or a tuple of these that must all hold, got {one!r:.80}"
            )


def amount_of(value: Any) -> Amount:
    """One finite float, or a tuple of them."""
    if getattr(value, "requires_grad", False):
        raise BadEdit(
            "an amount that requires gradients would get none, because edits keep its value alone; give amount.detach()"
        )
    given = value.tolist() if hasattr(value, "tolist") else value  # of a tensor or an array
    several: list[Any] = list(given) if isinstance(given, Sequence) and not isinstance(given, str | bytes) else [given]
    try:
        if any(isinstance(one, str | bytes) for one in several):
            raise TypeError("text is no amount")
        amounts = tuple(map(float, several))
    except (TypeError, ValueError, OverflowError) as error:
        raise BadEdit(f"expected a number, or one per row, got {value!r:.80}: {error}") from None
    if not all(map(isfinite, amounts)) or amounts == ():
        raise BadEdit(f"expected a finite amount, or one per row, got {value!r:.80}")
    return amounts[0] if len(amounts) == 1 else amounts


def _times(amount: Any, unit: float) -> Amount:
    return tuple(a * unit for a in amount) if isinstance(amount, tuple) else amount * unit


def _within(amount: Any, low: float, high: float) -> Amount:
    return tuple(min(max(a, low), high) for a in amount) if isinstance(amount, tuple) else min(max(amount, low), high)


@dataclass(frozen=True)
class Add(Intervention):
    """Move the concept by an amount. A bare number in `steer` means this.

    Args:
        amount: how far, in units of the concept; one number, or one for each prompt.
        match_norm: grow and shrink with each token's own length, relative to the site's median.
        keep_norm: give every token that is moved its old length again: turn it, and no more.

    >>> sl.Add(2.0, tokens="generated").amount
    2.0
    """

    amount: Amount
    match_norm: bool = field(default=False, kw_only=True)
    keep_norm: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "amount", amount_of(self.amount))

    def aim(self, at: Coordinate) -> Aim:
        return Numbers(Rule(shift=_times(self.amount, self.raw(at.unit))), self.keep_norm or at.keep_norm)

    @property
    def amounts(self) -> tuple[float, ...]:
        return each(self.amount) if self.unit == "concept" else ()

    def matches_norm(self, stored: bool) -> bool:
        return self.match_norm or stored


@dataclass(frozen=True)
class Scale(Intervention):
    """Multiply the concept's reading.

    Args:
        factor: a number, or one for each prompt; 0 is `Ablate` of a direction, negative numbers turn it around.

    >>> sl.Scale(0.5).factor
    0.5
    """

    factor: Amount

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "factor", amount_of(self.factor))

    def aim(self, at: Coordinate) -> Aim:  # noqa: ARG002 - a factor has no unit
        return Numbers(Rule(scale=self.factor))


@dataclass(frozen=True)
class Set(Intervention):
    """Make the concept read a value.

    Args:
        value: what it has to read, in units of the concept from its mean on reference data; a number, or one for each prompt.

    A latent is given the value in the code: `x + (value - z) W_dec`, where z is what it reads. Its own row may read another
    value of that, or 0 for a value below its threshold; what the decoder writes is that of the value.

    It is kept within the natural values that the bank stores, unless `allow_ood=True`.

    >>> sl.Set(1.5, when=sl.Window(0.0, 0.4)).value
    1.5
    """

    value: Amount

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "value", amount_of(self.value))

    def aim(self, at: Coordinate) -> Aim:
        value = _times(self.value, self.raw(at.unit))
        value = value if at.natural is None else _within(value, *at.natural)
        return Numbers(Rule(low=value, high=value))

    def is_capped(self, unit: float, natural: tuple[float, float]) -> bool:
        value = _times(self.value, self.raw(unit))
        return value != _within(value, *natural)


@dataclass(frozen=True)
class Ablate(Intervention):
    """Take the concept away. A direction reads 0 afterwards, its mean on reference data.

    Of a latent, what it writes is taken away, as the graph of a bank does it: `x - z W_dec`, where z is what it reads. Read
    again, it may be left with some of z, since its encoder's row is not its decoder's; `report()` says with how much. It is
    never capped. A latent leaves the first token of a text alone, on which attention rests whatever it is, unless `tokens=` is
    given: "all" includes it.

    Args:
        exact: of a latent, make the shortest further change after which it reads 0, in one solution with the other latents
            ablated so, and the directions that are set, at its site. No difference to a direction. Of latents that compete
            (TopK) the potential is brought to 0, so that they read 0 whatever the others do.

    >>> sl.Ablate(tokens="prompt").tokens, sl.Ablate(exact=True).exact
    ('prompt', True)
    """

    tokens: Tokens | None = field(default=None, kw_only=True)
    exact: bool = field(default=False, kw_only=True)

    def aim(self, at: Coordinate) -> Aim:
        return Numbers(Rule(low=0.0, high=0.0), is_exact=self.exact and at.is_latent)


@dataclass(frozen=True)
class Clamp(Intervention):
    """Keep the concept's reading between two values; of a latent its value in the code, as `Set` does.

    Args:
        low: least value, in units of the concept; None: any.
        high: largest value; None: any. Each a number, or one for each prompt.

    Raises `BadEdit` without a bound, or with `low > high`.

    >>> sl.Clamp(high=1.0).high
    1.0
    """

    low: Amount | None = None
    high: Amount | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        low = -inf if self.low is None else amount_of(self.low)
        high = inf if self.high is None else amount_of(self.high)
        if (self.low is None and self.high is None) or max(each(low)) > min(each(high)):
            raise BadEdit(f"expected a low, a high or both, with low <= high, got {self.low} and {self.high}")
        object.__setattr__(self, "low", low)
        object.__setattr__(self, "high", high)

    def aim(self, at: Coordinate) -> Aim:
        low, high = (_times(end, self.raw(at.unit)) for end in (self.low, self.high))
        if at.natural is not None:
            low, high = _within(low, -inf, at.natural[1]), _within(high, at.natural[0], inf)
        return Numbers(Rule(low=low, high=high))

    def is_capped(self, unit: float, natural: tuple[float, float]) -> bool:
        low, high = (_times(end, self.raw(unit)) for end in (self.low, self.high))
        return max(each(low)) > natural[1] or min(each(high)) < natural[0]


@dataclass(frozen=True, eq=False)
class Patch(Intervention):
    """Make the concept read what `sl.record` saw: in text by position, in images at the nearest noise level.

    A tape of the concept's *site* gives whole activations instead: with `gate=` on the concept, tokens where it shows are
    replaced by those of the other run (detect and replace). What was not recorded is left alone.

    Args:
        tape: what `sl.record` gives; it must hold this concept or its site.

    Raises `BadEdit` in `steer` where the tape holds neither.

    >>> with sl.record(model, bank, ["a"]) as tape:
    ...     _ = model(torch.ones(1, 4, dtype=torch.long))
    >>> session = sl.steer(model, bank, {"a": sl.Patch(tape)})
    """

    tape: Any
    keeps_codes: ClassVar[bool] = True

    def aim(self, at: Coordinate) -> Aim:
        held = next((name for name in (at.name, at.site) if name in self.tape), None)
        if held is None:
            raise BadEdit(
                f"the tape does not hold {at.name!r}; record it with sl.record(model, bank, [{at.name!r}]), or its site with "
                f"sl.record(model, [{at.site!r}]) to replace whole activations"
            )
        replay = Replay(self.tape[held], at.name)
        if held != at.name:
            return Swapped(replay)
        if at.count > 1:
            raise Unanswerable(f"a tape holds one reading of {at.name!r}, which moves at {at.count} sites; use Set")
        return Recorded(replay, at.read)

    @property
    def is_plain(self) -> bool:
        return False
