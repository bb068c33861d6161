"""What an edit aims at: an addition, bounds, the reading of an unsteered pass, a tape. An aim is one class here.

Raw coordinates throughout. `B` rows, `N` tokens, `D` width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..encoders import Context
from ..errors import Unanswerable
from ..passes import StepState
from .reading import Key, Note, Reader, laid
from .replay import Replay

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


class Aim:
    """What an edit aims at. The numbers of its `rule` hold for all tokens; the methods say what differs between them."""

    rule: Rule = Rule()
    is_target: bool = False
    """Whether the concept has to read a given value afterwards."""
    is_constant: bool = False
    """Whether the change is the same at every token."""
    is_traceable: bool = False
    """Whether the rule says all, so that compiled code can follow it."""
    keeps_norm: bool = False
    """Whether tokens that are moved keep their length."""
    needs_twin: bool = False
    """Whether an unsteered pass has to run first."""
    is_removal: bool = False
    """Whether it does nothing but bring readings nearer to 0, so that what is left of them is reported."""
    is_exact: bool = False
    """Whether a latent has to read what is left of it, and not only its code."""
    is_relative: bool = False
    """Whether what the concept has to read is told by `beyond`, not by `target`."""
    notes: tuple[tuple[str, Note], ...] = ()
    """What it has to know, and the sites at which that is read."""
    module: Context | None = None
    """The context module that switches the concept, as far as the rule's shift says."""
    source: tuple[str, str] | None = None
    """The note of what that module reads, and its site, where that is an earlier one."""

    def shift(self, x: Tensor, now: StepState) -> Float[Tensor, "B N"] | None:  # noqa: ARG002
        """What is added to the rule's shift."""
        return None

    def target(self, x: Tensor, now: StepState, twin: dict[Key, Tensor]) -> Float[Tensor, "B N"] | None:  # noqa: ARG002
        """What the concept has to read, in place of the rule's bounds; `twin` holds the readings of an unsteered pass."""
        return None

    def beyond(self, x: Tensor, now: StepState) -> Float[Tensor, "B N"] | None:  # noqa: ARG002
        """What the concept has to read beyond what it read before any edit, in place of the rule's bounds."""
        return None

    def whole(self, x: Tensor, now: StepState) -> Float[Tensor, "B N D"] | None:  # noqa: ARG002
        """Activations that replace these; NaN where nothing is known."""
        return None


@dataclass(frozen=True)
class Numbers(Aim):
    """A rule and nothing else: Add, Scale, Set, Ablate, Clamp."""

    rule: Rule
    keeps_norm: bool = False
    is_exact: bool = False

    @property
    def is_traceable(self) -> bool:  # type: ignore[override]
        return not self.is_exact

    @property
    def is_removal(self) -> bool:  # type: ignore[override]
        rule = self.rule
        return all(0 <= f < 1 for f in each(rule.scale)) or not any((*each(rule.low), *each(rule.high)))

    @property
    def is_target(self) -> bool:  # type: ignore[override]
        return self.rule.is_target

    @property
    def is_constant(self) -> bool:  # type: ignore[override]
        return not (self.rule.is_target or self.keeps_norm) and self.rule.scale == 1


@dataclass(frozen=True)
class Forecast(Aim):
    """What the bank's graph foretells: these multiples (raw per raw) of the changes of other concepts at earlier sites."""

    weights: Mapping[Key, float]

    def shift(self, x: Tensor, now: StepState) -> Float[Tensor, "B N"]:
        none = x.new_zeros(x.shape[:2], dtype=torch.float32)
        moved = {key: now.notes.get(key, none).to(x.device) for key in self.weights}
        return sum((w * laid(moved[key], x, "a concept of do='graph'", "its effect") for key, w in self.weights.items()), none)


@dataclass(frozen=True)
class AsTwin(Aim):
    """The reading of the concept `key` in an unsteered pass over the same input."""

    key: Key
    is_target: bool = True
    needs_twin: bool = True

    def target(self, x: Tensor, now: StepState, twin: dict[Key, Tensor]) -> Tensor:  # noqa: ARG002
        if self.key not in twin:
            raise Unanswerable(
                "do='hold' needs the whole model to be called, not a part of it (by hand, or by gradient checkpointing): its "
                "twin did not run"
            )
        return twin.pop(self.key)


@dataclass(frozen=True, eq=False)
class Recorded(Aim):
    """The readings of a tape; where nothing was recorded, what the concept reads anyway."""

    tape: Replay
    read: Reader
    is_target: bool = True

    def target(self, x: Tensor, now: StepState, twin: dict[Key, Tensor]) -> Tensor:  # noqa: ARG002
        values = self.tape.at(now, x)
        return torch.where(values.isnan(), self.read(x, now), values)


@dataclass(frozen=True, eq=False)
class Traded(Aim):
    """The readings of other concepts before any edit, each times a number, beside its own reading or in place of it."""

    given: tuple[tuple[Reader, float], ...]
    is_relative: bool
    notes: tuple[tuple[str, Note], ...] = ()
    is_target: bool = True

    def target(self, x: Tensor, now: StepState, twin: dict[Key, Tensor]) -> Tensor | None:  # noqa: ARG002
        return None if self.is_relative else self._received(x, now)

    def beyond(self, x: Tensor, now: StepState) -> Tensor | None:
        return self._received(x, now) if self.is_relative else None

    def _received(self, x: Tensor, now: StepState) -> Tensor:
        return sum((times * read(x, now) for read, times in self.given), x.new_zeros(x.shape[:2], dtype=torch.float32))


@dataclass(frozen=True, eq=False)
class Switched(Aim):
    """A concept of a context module intervened on, as far as the rule's shift says."""

    rule: Rule
    module: Context
    source: tuple[str, str] | None = None

    @property
    def notes(self) -> tuple[tuple[str, Note], ...]:  # type: ignore[override]
        return () if self.source is None else ((self.source[1], Note(self.source, None)),)


@dataclass(frozen=True, eq=False)
class Swapped(Aim):
    """The whole activations of a tape."""

    tape: Replay

    def whole(self, x: Tensor, now: StepState) -> Tensor:
        return self.tape.at(now, x)


def each(amount: Any) -> tuple[float, ...]:
    """The numbers of an amount."""
    return amount if isinstance(amount, tuple) else (amount,)
