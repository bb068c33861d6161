"""Directions from contrasts between activations with one value and with others. `T` tokens, `K` values."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steerlib.encoders import Directions


def differences(
    x: Float[Tensor, "T D"], value: Int[Tensor, " T"], count: int, *, within: Int[Tensor, " T"] | None = None
) -> Directions:
    """For each of `count` values the mean where it is, less the mean where another is (difference of means).

    With `within`, the value of a common cause, tokens are only compared where that is the same, and differences averaged over
    its values (adjustment for confounding; Pearl 2009, eq. 3.19, in equal parts). Reads 0 at the mean of the others and 1 at
    its own. Tokens of value -1 take no part; a value that is never compared gets the plain difference.
    """
    strata = [value >= 0] if within is None else [(within == s) & (value >= 0) for s in within.unique()]
    pairs = [[_pair(x, value, v, stratum) for stratum in strata] for v in range(count)]
    ends = []
    for v, compared in enumerate(pairs):
        found = [pair for pair in compared if pair is not None] or [_pair(x, value, v, value >= 0)]
        ends.append(torch.stack([pair for pair in found if pair is not None]).mean(0))
    low, high = torch.stack(ends, 1)
    return _between(low, high)


def _pair(x: Tensor, value: Tensor, v: int, among: Tensor) -> Float[Tensor, "2 D"] | None:
    """Mean of the other values' means, and of the value's own, among some tokens."""
    means = {int(u): x[among & (value == u)].float().mean(0) for u in value[among].unique()}
    if v not in means or len(means) < 2:
        return None
    return torch.stack([torch.stack([mean for u, mean in means.items() if u != v]).mean(0), means[v]])


def presence(x: Float[Tensor, "T D"], there: Bool[Tensor, " T"]) -> Directions:
    """One direction that reads 0 at the mean of tokens where something is not, and 1 where it is."""
    return _between(x[~there].float().mean(0)[None], x[there].float().mean(0)[None])


def _between(low: Float[Tensor, "K D"], high: Float[Tensor, "K D"]) -> Directions:
    direction = high - low
    return Directions(direction, (low * direction).sum(-1) / direction.square().sum(-1))


def joined(parts: list[Directions]) -> Directions:
    """All directions of several encoders, in order."""
    return Directions(torch.cat([part.decoder for part in parts]), torch.cat([part.mean for part in parts]))
