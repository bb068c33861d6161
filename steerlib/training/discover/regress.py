"""The sparsest linear account of a level by the levels before.

x  parents [N, P], one matrix a route (R)     y  children [N, C]     b  effects     N  units
"""

from collections.abc import Iterator, Mapping, Sequence
from math import log
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from scipy.sparse import coo_matrix, hstack
from torch import Tensor

from .lasso import Products, among, lasso, masked, refit
from .screen import chunks, in_threads
from .systems import Codes, Columns, csr

PATH = (8.0, 4.0, 2.0, 1.0)
"""Prices that are tried, in units of `2 sigma sqrt(log P / N)`."""
HELD_OUT = 0.25
"""Share of the rows that prices are compared on."""
BLOCKS = 8
"""Parts of these, from which the standard error comes."""
LEAST = 0.005
"""Share of a child's variation that a parent has to explain, beside its other parents."""


class Rows(NamedTuple):
    """What one level is regressed on."""

    x: tuple[Codes, ...]
    """By route, the readings of all latents that may act on it, or their changes."""
    y: Codes
    candidates: Codes
    """`[children, parents]`."""


class Fit(NamedTuple):
    """The effects on one level, and how well they predict rows they were not fitted to."""

    effects: Codes
    """`[parents, children]`: change of a child where a parent changes by 1, by all routes."""
    price: float
    scores: Mapping[float, Sequence[float]]
    """By price, `R2 = 1 - sum |y - xb|^2 / sum |y|^2` on each block of held-out rows."""
    echoes: Codes | None = None
    """Effects that were dropped because a correlated neighbour of the child explains them."""


def fitted(rows: Rows, *, signed: bool, centred: bool = False, path: Sequence[float] = PATH) -> Fit:
    """Walk along the prices and take the sparsest graph within one standard error of the best (after Breiman et al. 1984).

    Effects are refitted without a price, and parents that explain next to nothing are left out. `centred`: means are taken
    off first. Not `signed`: effects are positive.
    """
    n, parents, routes = rows.y.shape[0], rows.x[0].shape[1], len(rows.x)
    x, y, kept = csr(hstack(rows.x)), rows.y.tocsc(), n - int(n * HELD_OUT)
    first, last, order = x[:kept].tocsc(), x[kept:].tocsc(), sorted(path, reverse=True)

    def chunk(of: slice) -> list[tuple[Codes, Codes]]:
        """By price, the effects fitted to the first rows and to all."""
        columns, some = columns_of(rows.candidates[of], routes), y[:, of]
        before = products(first, some[:kept], columns, centred)
        after = products(last, some[kept:], columns, centred)
        whole = Products(*(kept / n * one + (1 - kept / n) * other for one, other in zip(before, after, strict=True)))
        found = []
        for support in along(before, 2 * (log(max(parents, 2)) / kept) ** 0.5, order, routes=routes, signed=signed):
            support = support & explains(whole, support, routes)
            both = (refit(p, support, signed=signed) for p in (before, whole))
            found.append(tuple(placed(b, columns, x.shape[1]) for b in both))
        return found

    made = list(in_threads(chunk, chunks(y.shape[1]), "fitting"))
    trial = [[csr(hstack([part[i][j] for part in made])) for j in (0, 1)] for i in range(len(order))]
    scores = {price: score(x[kept:], rows.y[kept:], b, centred) for price, (b, _) in zip(order, trial, strict=True)}
    price = sparsest(scores)
    effects = trial[order.index(price)][1]
    return Fit(csr(sum(effects[r * parents : (r + 1) * parents] for r in range(routes))), price, scores)


def columns_of(candidates: Codes, routes: int) -> NDArray[Any]:
    """For each child the columns of its candidates, a candidate's routes side by side; -1 where there are no more."""
    most, parents = max(1, int(np.diff(candidates.indptr).max(initial=0))), candidates.shape[1]
    columns = np.full((candidates.shape[0], most, routes), -1)
    child = np.repeat(np.arange(candidates.shape[0]), np.diff(candidates.indptr))
    place = np.arange(candidates.nnz) - candidates.indptr[child]
    columns[child, place] = candidates.indices[:, None] + parents * np.arange(routes)
    return columns.reshape(len(columns), -1)


def products(x: Columns, y: Columns, columns: NDArray[Any], centred: bool) -> Products:
    """Means of products of each child's candidates, and with the child."""
    n, (children, size) = x.shape[0], columns.shape
    gram, cross, power = np.zeros((children, size, size)), np.zeros((children, size)), np.zeros(children)
    for child, own in enumerate(columns):
        own = own[own >= 0]
        mine, target = x[:, own], y[:, [child]]
        k = len(own)
        gram[child, :k, :k] = (mine.T @ mine).toarray() / n
        cross[child, :k] = (mine.T @ target).toarray()[:, 0] / n
        power[child] = target.data @ target.data / n
        if centred:
            mean, middle = np.asarray(mine.sum(0)).ravel() / n, target.sum() / n
            gram[child, :k, :k] -= np.outer(mean, mean)
            cross[child, :k] -= mean * middle
            power[child] -= middle**2
    return Products(*map(torch.from_numpy, (gram, cross, power)))


def along(p: Products, unit: float, path: Sequence[float], **how: Any) -> Iterator[Bool[Tensor, "B S"]]:
    """What the lasso keeps at each price, in units of what chance reaches; `sigma` is what a first fit leaves."""
    b = lasso(p, unit * p.power.sqrt(), **how)
    left = p.error(refit(p, b != 0, signed=how["signed"])).maximum(1e-4 * p.power).sqrt()
    for price in path:
        b = lasso(p, price * unit * left, start=b, **how)
        yield b != 0


def explains(p: Products, support: Bool[Tensor, "B S"], routes: int) -> Bool[Tensor, "B S"]:
    """Whether leaving a candidate out, all others refitted, costs more than next to nothing: `b_p' ([G^-1]_pp)^-1 b_p`."""
    own, columns = among(p, support, routes)
    b, inverse = refit(p, support).gather(1, columns), torch.linalg.inv(masked(own.gram, support.gather(1, columns)))
    blocks = inverse.unflatten(-1, (-1, routes)).unflatten(-3, (-1, routes)).diagonal(dim1=-4, dim2=-2)
    parts = b.unflatten(-1, (-1, routes))
    cost = (parts * torch.linalg.solve(blocks.permute(0, 3, 1, 2), parts)).sum(-1).repeat_interleave(routes, -1)
    return torch.zeros_like(support).scatter(1, columns, cost > LEAST * p.power[:, None])


def placed(b: Float[Tensor, "B S"], columns: NDArray[Any], size: int) -> Codes:
    """Effects `[columns, children]`."""
    child, place = (b != 0).nonzero(as_tuple=True)
    where = columns[child.numpy(), place.numpy()], child.numpy()
    return coo_matrix((b[child, place].numpy(), where), shape=(size, len(columns))).tocsr()


def score(x: Codes, y: Codes, b: Codes, centred: bool) -> list[float]:
    """`R2` on blocks of rows that effects were not fitted to."""
    rates = []
    for block in np.array_split(np.arange(x.shape[0]), BLOCKS):
        left, whole = y[block] - x[block] @ b, y[block]
        rates.append(1 - _power(csr(left), centred) / max(_power(whole, centred), 1e-12))
    return rates


def _power(z: Codes, centred: bool) -> float:
    whole = float(z.data.astype(np.float64) @ z.data)
    return whole - float(np.square(np.asarray(z.sum(0))).sum() / z.shape[0]) * centred


def sparsest(scores: Mapping[float, Sequence[float]]) -> float:
    """The highest price whose score is within one standard error of the best.

    The error is that of their difference, block by block: what makes one block harder than another is common to both.
    """
    best = max(scores, key=lambda price: float(np.mean(scores[price])))
    lost = {price: np.subtract(scores[best], own) for price, own in scores.items()}
    return max(price for price, d in lost.items() if price == best or d.mean() <= d.std(ddof=1) / len(d) ** 0.5)
