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
"""Latents that may be candidates for those of a level."""
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


def by_independence(rows: Rows, test: Test, environments: Sequence[Any] | None = None) -> Fit:
    """A parent stays while no few of the others make it independent of the child; effects are refitted by least squares.

    `environments`, one for each row, are a variable that every test conditions on, so that what differs between them is no
    dependence (CD-NOD, Huang et al. 2020).
    """
    children, parents = rows.candidates.shape
    some = np.unique(rows.candidates.indices)
    if len(rows.x) != 1 or len(some) > MOST:
        raise BadRecipe(
            f"tests of independence are for one route and at most {MOST} candidates, got {len(rows.x)} and {len(some)}"
        )
    labels = np.asarray([] if environments is None else environments)
    apart = [labels[:, None] == own for own in np.unique(labels)[1:]]
    data = np.hstack([rows.x[0][:, some].toarray(), rows.y.toarray(), *apart]).astype(np.float64)
    always = range(len(some) + children, data.shape[1])
    near, kept = rows.candidates[:, some].tolil(), csr((children, parents), dtype=bool).tolil()
    for c, joined in enumerate(near.rows):
        kept[c, some[parents_of(data, list(joined), len(some) + c, test, always)]] = True
    columns = columns_of(csr(kept), 1)
    p = products(rows.x[0].tocsc(), rows.y.tocsc(), columns, centred=True)
    return Fit(placed(refit(p, explains(p, p.cross != 0, 1)), columns, parents), 0.0, {})


def parents_of(data: NDArray[Any], joined: list[int], child: int, test: Test, always: Sequence[int] = ()) -> list[int]:
    """Candidates that stay dependent on the child given any few of the others, and what is `always` given."""
    for size in range(GIVEN + 1):
        for p in list(joined):
            others = [other for other in joined if other != p]
            if any(test(data, p, child, (*given, *always)) > ALPHA for given in combinations(others, size)):
                joined.remove(p)
    return joined
