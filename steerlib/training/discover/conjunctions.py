"""Parts of wholes from readings alone: the fewest latents that, all there together, tell whether a whole is there.

    P(whole | parts) = a  where all parts S read,  b  elsewhere;  a > b            (a noisy AND, Pearl 1988)

S is found for each whole by itself: the part that raises the log-likelihood most is added, and one that later ones make
needless is dropped, as long as what each adds is more than the best of all candidates would add by chance but for one whole in
a hundred, or, to a whole that has a part, in twenty (Wilks 1938, Bonferroni). So a whole is no more than its parts: what only
comes along with them tells nothing that they do not.

z  readings `[U units, latents]`, of which only counts whether they are above 0
"""

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from scipy.special import xlogy
from scipy.stats import chi2

from .systems import Codes, csr

FIRST, FURTHER = 0.01, 0.05
"""How often a part is found by chance, at most: by a whole that has none, and by one that has."""
MOST = 8
"""Parts of a whole, at most, and how many are tried in turn."""
Units = Bool[NDArray, " U"]


def parts_of_wholes(parts: Codes, wholes: Codes, usable: tuple[NDArray[np.bool_], NDArray[np.bool_]]) -> Codes:
    """`[parts, wholes]`: what a part adds to the log-likelihood of a whole, nats a unit; 0 where it is none. `usable`: which
    latents of either side may take part."""
    x, found = csr(parts > 0).astype(np.float32), csr((parts.shape[1], wholes.shape[1]), dtype=np.float64).tolil()
    for whole in np.flatnonzero(usable[1]).tolist():
        there = wholes[:, [whole]].toarray()[:, 0] > 0
        for part, gain in conjunction(x, there, usable[0]).items():
            found[part, whole] = gain
    return csr(found)


def conjunction(x: Codes, there: Units, usable: Bool[NDArray, " parts"]) -> dict[int, float]:
    """The parts of one whole, and what each adds to its log-likelihood beside the others, nats a unit."""
    chosen, (least, further) = list[int](), (chi2.isf(2 * p / max(int(usable.sum()), 1), 1) / 2 for p in (FIRST, FURTHER))
    for _ in range(MOST):
        now, tried = likelihood(x, there, chosen), extended(x, there, chosen)
        tried[~usable], tried[chosen] = -np.inf, -np.inf
        best = int(tried.argmax())
        if tried[best] - now <= least:
            break
        chosen.append(best)
        least = further
        chosen = [part for part in chosen if part == best or _added(x, there, chosen, part) > least]
    return {part: _added(x, there, chosen, part) / len(there) for part in chosen}


def _added(x: Codes, there: Units, chosen: list[int], part: int) -> float:
    return likelihood(x, there, chosen) - likelihood(x, there, [other for other in chosen if other != part])


def together(x: Codes, chosen: list[int]) -> Units:
    """Units where all of these read."""
    return np.asarray(x[:, chosen].sum(1)).ravel() == len(chosen)


def likelihood(x: Codes, there: Units, chosen: list[int]) -> float:
    """Log-likelihood of the noisy AND of these parts at its best rates."""
    units = together(x, chosen)
    return float(_fit(np.array([units.sum()]), np.array([(units & there).sum()]), there)[0])


def extended(x: Codes, there: Units, chosen: list[int]) -> Float[NDArray, " parts"]:
    """The same of these parts with each other one."""
    units = together(x, chosen)
    often, both = (np.asarray(x[some].sum(0)).ravel() for some in (units, units & there))
    return _fit(often, both, there)


def _fit(units: NDArray, both: NDArray, there: Units) -> Float[NDArray, " parts"]:
    """Of parts that are together in so many `units`, `both` of these with the whole; -inf where others have it as often."""
    n, k = len(there), int(there.sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        is_more = both / units > (k - both) / (n - units)
    found = _binomial(both, units) + _binomial(k - both, n - units)
    return np.where(is_more | (units == n) | (units == 0), found, -np.inf)


def _binomial(k: NDArray, n: NDArray) -> NDArray:
    """`k ln(k/n) + (n - k) ln(1 - k/n)`, 0 where n is."""
    return xlogy(k, k) + xlogy(n - k, n - k) - xlogy(n, n)
