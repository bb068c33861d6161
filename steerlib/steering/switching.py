"""Concepts of a context module switched: an intervention in Pearl's sense, with what was learned from interventions."""

from dataclasses import dataclass
from typing import ClassVar

from ..errors import BadEdit
from .aims import Aim, Amount, Rule, Switched, each
from .interventions import Coordinate, Intervention, amount_of


@dataclass(frozen=True)
class Do(Intervention):
    """Make the concept what an intervention on it makes it, and cut it from its causes. For concepts of a context bank.

    The site's activation x becomes `x + m(x; do) - m(x)`, where m is the bank's module: what the module does not describe
    stays. Concepts that are done together are switched in one pass of the module, so that order cannot matter. Directions and
    latents of other banks are edited beside it: additions add up, targets count it in. A schedule, a gate or a mask multiplies
    the amount. It is never capped.

    Args:
        amount: how far, from 0, observed, to 1, intervened; a number, or one for each prompt. Between both ends the two sets of
            weights are mixed, which is ours and not the paper's.

    Raises `BadEdit` for another amount; in `steer` `Unanswerable` for a concept of another kind of bank.

    >>> sl.Do().amount, sl.Do(0.5).amount
    (1.0, 0.5)
    """

    amount: Amount = 1.0
    switches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "amount", amount_of(self.amount))
        if not all(0 <= amount <= 1 for amount in each(self.amount)):
            raise BadEdit(f"expected an amount of Do from 0, observed, to 1, intervened, got {self.amount}")

    def aim(self, at: Coordinate) -> Aim:
        assert at.module is not None
        return Switched(Rule(shift=self.amount), at.module, ("kept", at.reads) if at.reads else None)
