"""Sparse regression of many children at once, each on its own few candidates, from products alone.

B children   S = candidates x routes, routes fastest   G = X'X / N [B, S, S]   g = X'y / N [B, S]   b effects [B, S]
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Products(NamedTuple):
    """All that a linear fit has to know of its data: means over rows. What is not a candidate has zeros."""

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
    step = 1 / gram.abs().sum(-1).amax(-1).clamp(min=1e-6)
    b = torch.zeros_like(cross) if start is None else start * size
    ahead, momentum = b, torch.ones_like(step)
    for _ in range(rounds):
        moved = ahead - step[:, None] * (_times(gram, ahead) - cross)
        new = shrunk(moved, step * price, routes, signed)
        back = ((ahead - new) * (new - b)).sum(-1) > 0
        grown = torch.where(back, 1.0, (1 + (1 + 4 * momentum**2).sqrt()) / 2)
        ahead = new + torch.where(back, 0.0, (momentum - 1) / grown)[:, None] * (new - b)
        change, b, momentum = (new - b).abs().amax(), new, grown
        if change <= close * b.abs().amax():
            break
    return b * scale


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
    gram, cross, b = products.gram, products.cross, torch.zeros_like(products.cross)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    for _ in range(1 if signed else 4):
        both = support[:, :, None] & support[:, None, :]
        ridge = 1e-6 * gram.diagonal(dim1=-2, dim2=-1)  # copies of one candidate share its effect
        within = torch.where(both, gram, 0) + torch.diag_embed(torch.where(support, ridge, 1.0)) * eye
        b = torch.linalg.solve(within, torch.where(support, cross, 0))
        if signed or bool((b >= 0).all()):
            break
        support = support & (b > 0)
    return torch.where(support, b, 0) if signed else torch.where(support, b, 0).clamp(min=0)
