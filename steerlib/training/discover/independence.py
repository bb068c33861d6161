"""Parents by tests of independence, for some hundreds of latents: PC's first phase (Spirtes & Glymour 1991), orders known.

p  a latent of an earlier level     c  one of a later     S  other latents that are still joined to c
"""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import BadRecipe, MissingExtra
from .regress import Fit, Rows, columns_of, explains, placed, products, refit
from .systems import csr

Test = Callable[[NDArray[Any], int, int, Sequence[int]], float]
"""From data `[units, variables]`, two variables and those to condition on: the probability of independence."""
MOST = 500
"""Latents that one level may be tested against."""
ALPHA = 0.01
GIVEN = 2
"""Most latents that are conditioned on at once."""


def fisher_z() -> Test:
    """Of partial correlation, by causal-learn, as are its others: `CIT(data, "kci")` and so on."""
    try:
        from causallearn.utils.cit import CIT  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise MissingExtra("tests of independence need causal-learn: pip install 'steerlib[graph]', or give test=") from None
    known: dict[int, Any] = {}

    def test(data: NDArray[Any], p: int, c: int, given: Sequence[int]) -> float:
        if id(data) not in known:
            known.clear()
            known[id(data)] = CIT(data, "fisherz")
        return float(known[id(data)](p, c, list(given)))

    return test


def by_independence(rows: Rows, test: Test) -> Fit:
    """A parent stays while no few of the others make it independent of the child; effects are refitted by least squares."""
    children, parents = rows.candidates.shape
    if len(rows.x) != 1 or parents > MOST:
        raise BadRecipe(f"tests of independence are for one route and at most {MOST} latents, got {len(rows.x)} and {parents}")
    data = np.hstack([rows.x[0].toarray(), rows.y.toarray()]).astype(np.float64)
    near, kept = rows.candidates.tolil(), csr((children, parents), dtype=bool).tolil()
    for c, joined in enumerate(near.rows):
        kept[c, parents_of(data, list(joined), parents + c, test)] = True
    columns = columns_of(csr(kept), 1)
    p = products(rows.x[0].tocsc(), rows.y.tocsc(), columns, centred=True)
    return Fit(placed(refit(p, explains(p, p.cross != 0, 1)), columns, parents), 0.0, {})


def parents_of(data: NDArray[Any], joined: list[int], child: int, test: Test) -> list[int]:
    """Candidates that stay dependent on the child given any few of the others."""
    for size in range(GIVEN + 1):
        for p in list(joined):
            others = [other for other in joined if other != p]
            if any(test(data, p, child, given) > ALPHA for given in combinations(others, size)):
                joined.remove(p)
    return joined
