"""Effects of one thing on another, in all and by what lies between (Pearl 2001; VanderWeele 2013).

v, v0  what the cause is set to, and the reference     M(v)  mediators under v     y(v, m)  mean outcome with mediators m
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

Run = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Runs a model with some names set to values, and returns the values of all names; the same random numbers every time."""


class Effects(NamedTuple):
    """Changes of the mean outcome: `te = nde + tie`; `te = nde + nie` only where cause and mediators do not interact.

    te   total: `y(v, M(v)) - y(v0, M(v0))`                nde  natural direct: `y(v, M(v0)) - y(v0, M(v0))`
    nie  natural indirect: `y(v0, M(v)) - y(v0, M(v0))`    tie  total indirect: `y(v, M(v)) - y(v, M(v0))`
    cde  controlled direct: `y(v, m) - y(v0, m)`, with mediators at given values m
    """

    te: Tensor
    nde: Tensor
    nie: Tensor
    tie: Tensor
    cde: Tensor | None


def effects(
    run: Run,
    cause: str,
    outcome: str,
    mediators: Sequence[str],
    *,
    value: Any,
    reference: Any,
    controlled: Mapping[str, Any] | None = None,
) -> Effects:
    """Effects on the mean of `outcome` of setting `cause` to `value` rather than to `reference`, in all and by `mediators`.

    Mediators are held, unit by unit, at their values in another run: the units need the same random numbers in every run.
    `controlled` are values of mediators for the controlled direct effect.
    """

    def mean(v: Any, held: Mapping[str, Any] | None) -> Tensor:
        return run({cause: v, **(held or {})})[outcome].double().mean(0)

    moved, plain = (run({cause: v}) for v in (value, reference))
    m, m0 = ({name: found[name] for name in mediators} for found in (moved, plain))
    total, base = (found[outcome].double().mean(0) for found in (moved, plain))
    direct = mean(value, m0)
    return Effects(
        te=total - base,
        nde=direct - mean(reference, m0),
        nie=mean(reference, m) - mean(reference, m0),
        tie=mean(value, m) - direct,
        cde=None if controlled is None else mean(value, controlled) - mean(reference, controlled),
    )
