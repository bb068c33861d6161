"""How good a context module is: whether it gives what interventions give, and whether its concepts are the true ones.

x, y  samples [N, ...]     c  true concepts [N, m]     z  what a module reads [N, n]
"""

from collections.abc import Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import BadEdit, MissingExtra
from .representation import Match

DIRECTIONS, QUANTILES = 256, 256
"""Random directions that two samples are looked at along, and points at which they are compared there."""
SHUFFLES = 49
"""How often two samples are mixed, to see how far apart they are by chance."""


def sliced_wasserstein(x: Tensor, y: Tensor, *, directions: int = DIRECTIONS, seed: int = 0) -> float:
    """The sliced Wasserstein distance of two samples `[N, ...]` (Rabin et al. 2011): along random directions of length 1, the
    root mean square difference of quantiles.

    >>> sliced_wasserstein(torch.zeros(9, 1), torch.ones(9, 1))
    1.0
    """
    first, second = x.flatten(1).double(), y.flatten(1).double()
    if first.shape[1] != second.shape[1] or min(len(first), len(second)) < 2:
        raise BadEdit(f"expected two samples of equal shape, of 2 or more each, got {tuple(x.shape)} and {tuple(y.shape)}")
    g = torch.Generator().manual_seed(seed)
    along = torch.randn(first.shape[1], directions, generator=g, dtype=torch.float64)
    along = along / along.norm(dim=0)
    at = (torch.arange(QUANTILES, dtype=torch.float64) + 0.5) / QUANTILES
    one, other = (torch.quantile(sample @ along, at, dim=0) for sample in (first, second))
    return float((one - other).square().mean().sqrt())


class Composition(NamedTuple):
    """Distances of what a module gives from what interventions give, by concept or pair of concepts; and of what is given
    without it, and their ratio of means."""

    distance: dict[str, float]
    plain: dict[str, float]

    @property
    def ratio(self) -> float:
        """Mean distance over that of the control; 1: it does nothing."""
        return sum(self.distance.values()) / max(1e-12, sum(self.plain.values()))


def distances(given: Mapping[str, Tensor], truth: Mapping[str, Tensor], plain: Tensor, *, seed: int = 0) -> Composition:
    """Distances of samples by name of what was done: `given` by a module, of `truth`, and of `plain`, with nothing done."""
    if given.keys() - truth.keys():
        raise BadEdit(f"expected true samples of {', '.join(sorted(given.keys() - truth.keys()))}, got none")
    far = {name: sliced_wasserstein(sample, truth[name], seed=seed) for name, sample in given.items()}
    return Composition(far, {name: sliced_wasserstein(plain, truth[name], seed=seed) for name in given})


def unidentified(observed: Tensor, contexts: Mapping[str, Tensor], *, seed: int = 0) -> list[str]:
    """Contexts, by name, whose samples are no farther from observed ones than parts of both that are drawn at random
    (a permutation test, wrong once in 50 times): of an intervention that shows nothing, nothing is learned.

    >>> unidentified(torch.arange(8.0)[:, None], {"same": torch.arange(8.0)[:, None], "moved": torch.full((8, 1), 9.0)})
    ['same']
    """
    return [name for name, sample in contexts.items() if not _is_apart(_some(observed), _some(sample), seed)]


def _is_apart(x: Tensor, y: Tensor, seed: int) -> bool:
    every, g = torch.cat([x, y]), torch.Generator().manual_seed(seed)
    drawn = (every[torch.randperm(len(every), generator=g)].split([len(x), len(y)]) for _ in range(SHUFFLES))
    far, *by_chance = (sliced_wasserstein(*both, directions=64, seed=seed) for both in chain([(x, y)], drawn))
    return far > max(by_chance)


def _some(x: Tensor) -> Tensor:
    return x[:: 1 + len(x) // 1000]


def correlations(truth: Float[Tensor, "N m"], found: Float[Tensor, "N n"]) -> Float[Tensor, "m n"]:
    """`|r|` of each true concept with each reading (Pearson)."""
    first, second = (v.double() - v.double().mean(0) for v in (truth, found))
    lengths = first.norm(dim=0)[:, None] * second.norm(dim=0)
    return (first.T @ second / lengths.clamp(min=1e-300)).abs()


def concept_match(truth: Float[Tensor, "N m"], found: Float[Tensor, "N n"]) -> Match:
    """The mean correlation coefficient (MCC) with the true concepts, under the best assignment, and that of each: those that
    were not identified are low.

    >>> concept_match(torch.eye(3), torch.eye(3)[:, [1, 2, 0]]).truths.tolist()
    [0, 1, 2]
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise MissingExtra("matching concepts needs scipy: pip install 'steerlib[eval]'") from None
    likeness: Any = correlations(truth, found)
    truths, latents = map(torch.as_tensor, linear_sum_assignment(likeness.numpy(), maximize=True))
    kept = likeness[truths, latents]
    return Match(truths, latents, kept, float(kept.sum() / len(likeness)))
