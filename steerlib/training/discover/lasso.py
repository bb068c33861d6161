"""Sparse regression of many children at once, each on its own few candidates, from products alone.

B children   S = candidates x routes, routes fastest   K of them supported   G = X'X / N [B, S, S]   g = X'y / N [B, S]
b effects [B, S]
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Products(NamedTuple):
    """Sufficient statistics of a linear fit: means over rows, with zeros for what is not a candidate."""

    gram: Float[Tensor, "B S S"]
    cross: Float[Tensor, "B S"]
    power: Float[Tensor, " B"]
    """y'y / N."""

    def error(self, b: Float[Tensor, "B S"]) -> Float[Tensor, " B"]:
        """Mean square of what effects leave unexplained."""
        left = self.power - 2 * (b * self.cross).sum(-1) + (b * _times(self.gram, b)).sum(-1)
        return left.clamp(min=0)


def _times(gram: Float[Tensor, "B S S"], b: Float[Tensor, "B S"]) -> Float[Tensor, "B S"]:
    return torch.bmm(gram, b[..., None])[..., 0]


def lasso(
    products: Products,
    price: Float[Tensor, " B"],
    *,
    routes: int = 1,
    signed: bool = True,
    start: Float[Tensor, "B S"] | None = None,
    rounds: int = 500,
    close: float = 1e-5,
) -> Float[Tensor, "B S"]:
    """`argmin_b |y - Xb|^2 / 2N + price (sum_p sqrt(R) |b_p|_2 + |b|_1) / 2`, columns of X brought to mean square 1.

    `b_p` are a candidate's effects by its R routes (sparse group lasso, Simon et al. 2013); with one route this is the lasso.
    Splitting effects into two parts that are not negative, `b+ - b-`, gives the same minimum. Not `signed`: only `b >= 0`.
    By accelerated proximal steps with restarts (FISTA, Beck & Teboulle 2009; O'Donoghue & Candes 2015).
    """
    size = products.gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    scale = torch.where(size > 0, 1 / size.clamp(min=1e-12), 0)
    gram, cross = products.gram * scale[:, :, None] * scale[:, None, :], products.cross * scale
    whole, b = Products(gram, cross, products.power), torch.zeros_like(cross) if start is None else start * size
    active = torch.zeros_like(b, dtype=torch.bool)
    while True:  # only what is active is solved for, until nothing else would enter (Friedman et al. 2010, section 2.6)
        moved = (b != 0) | (shrunk(cross - _times(gram, b), price, routes, signed) != 0)
        entering = moved.unflatten(-1, (-1, routes)).any(-1).repeat_interleave(routes, -1)
        if not (entering & ~active).any():
            return b * scale
        active |= entering
        own, columns = among(whole, active, routes)
        found = _descended(own, price, b.gather(1, columns), routes, signed, rounds, close)
        b = torch.zeros_like(b).scatter(1, columns, found)


def _descended(
    p: Products, price: Float[Tensor, " B"], b: Float[Tensor, "B K"], routes: int, signed: bool, rounds: int, close: float
) -> Float[Tensor, "B K"]:
    step = 1 / p.gram.abs().sum(-1).amax(-1).clamp(min=1e-6)
    ahead, momentum = b, torch.ones_like(step)
    for _ in range(rounds):
        moved = ahead - step[:, None] * (_times(p.gram, ahead) - p.cross)
        new = shrunk(moved, step * price, routes, signed)
        back = ((ahead - new) * (new - b)).sum(-1) > 0
        grown = torch.where(back, 1.0, (1 + (1 + 4 * momentum**2).sqrt()) / 2)
        ahead = new + torch.where(back, 0.0, (momentum - 1) / grown)[:, None] * (new - b)
        change, b, momentum = (new - b).abs().amax(), new, grown
        if change <= close * b.abs().amax():
            break
    return b


def shrunk(b: Float[Tensor, "B S"], by: Float[Tensor, " B"], routes: int, signed: bool) -> Float[Tensor, "B S"]:
    """The proximal map of the penalty: each effect is shortened, then each candidate's effects together."""
    by = by[:, None] / (2 if routes > 1 else 1)
    b = (b.abs() - by).clamp(min=0) * b.sign() if signed else (b - by).clamp(min=0)
    if routes == 1:
        return b
    parts = b.unflatten(-1, (-1, routes))
    length = parts.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return (parts * (1 - routes**0.5 * by[..., None] / length).clamp(min=0)).flatten(-2)


def refit(products: Products, support: Bool[Tensor, "B S"], *, signed: bool = True) -> Float[Tensor, "B S"]:
    """Least squares on the support alone, without a price; not `signed`: effects that would be negative are left out."""
    own, columns = among(products, support)
    support, b = support.gather(1, columns), torch.zeros_like(own.cross)
    for _ in range(1 if signed else 4):
        b = torch.linalg.solve(masked(own.gram, support), torch.where(support, own.cross, 0))
        if signed or bool((b >= 0).all()):
            break
        support = support & (b > 0)
    b = torch.where(support, b, 0)
    return torch.zeros_like(products.cross).scatter(1, columns, b if signed else b.clamp(min=0))


def among(products: Products, support: Bool[Tensor, "B S"], routes: int = 1) -> tuple[Products, Int[Tensor, "B K"]]:
    """Products of the supported candidates, by all their routes, and their columns; where a child has fewer than another,
    others fill up its place."""
    supported = support.unflatten(-1, (-1, routes)).any(-1)
    most = max(1, int(supported.sum(-1).max()))
    own = supported.byte().argsort(dim=-1, descending=True, stable=True)[:, :most]
    columns = (own[..., None] * routes + torch.arange(routes, device=own.device)).flatten(1)
    rows = products.gram.gather(1, columns[:, :, None].expand(-1, -1, products.gram.shape[-1]))
    gram = rows.gather(2, columns[:, None, :].expand(-1, columns.shape[1], -1))
    return Products(gram, products.cross.gather(1, columns), products.power), columns


def masked(gram: Float[Tensor, "B K K"], support: Bool[Tensor, "B K"]) -> Float[Tensor, "B K K"]:
    """The products within the support, the identity elsewhere; copies of one candidate share its effect by a small ridge."""
    ridge = torch.where(support, 1e-6 * gram.diagonal(dim1=-2, dim2=-1), 1.0)
    return torch.where(support[:, :, None] & support[:, None, :], gram, 0) + torch.diag_embed(ridge)
