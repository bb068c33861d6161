"""Solids as distances, and the light that comes from them: spheres are traced along rays (Hart 1996).

B  pictures     P  pixels     p  points [B, P, 3], y up
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

STEPS, FAR, NEAR = 32, 12.0, 1e-2
"""Steps along a ray, the distance at which nothing is met any more, and that at which something is."""
Distance = Callable[[Tensor], Tensor]
"""Points `[B, P, 3]` to the distance of the nearest surface, `[B, P]`."""


class Seen(NamedTuple):
    """Where rays end, what the surface faces there, and how much of the pixel it covers."""

    point: Tensor
    normal: Tensor
    cover: Tensor


def ball(p: Tensor) -> Tensor:
    """Of radius 1, as all of them are about the origin."""
    return p.norm(dim=-1) - 1


def box(p: Tensor) -> Tensor:
    """A cube of half side 0.8."""
    q = p.abs() - 0.8
    return q.clamp(min=0).norm(dim=-1) + q.amax(-1).clamp(max=0)


def cylinder(p: Tensor) -> Tensor:
    """Upright, of radius 0.8 and half height 0.8."""
    q = torch.stack([p[..., [0, 2]].norm(dim=-1), p[..., 1].abs()], -1) - 0.8
    return q.clamp(min=0).norm(dim=-1) + q.amax(-1).clamp(max=0)


def capsule(p: Tensor) -> Tensor:
    """Upright, of radius 0.5 and height 2."""
    return (p - _along(p[..., 1].clamp(-0.5, 0.5))).norm(dim=-1) - 0.5


def cone(p: Tensor) -> Tensor:
    """Upright, its top at height 1, as wide as it is high at height -0.8; a bound of the distance from outside."""
    r, y = p[..., [0, 2]].norm(dim=-1), p[..., 1]
    return torch.maximum((2 * r + y - 1) / 5**0.5, -0.8 - y)


def ring(p: Tensor) -> Tensor:
    """Lying, of radius 0.75, 0.3 thick."""
    return torch.stack([p[..., [0, 2]].norm(dim=-1) - 0.75, p[..., 1]], -1).norm(dim=-1) - 0.3


def one_of(shapes: tuple[Distance, ...], which: Tensor) -> Distance:
    """In each picture, one of the shapes; `which [B]`."""
    marks = torch.nn.functional.one_hot(which, len(shapes)).bool().T[..., None]
    return lambda p: sum(torch.where(mark, shape(p), 0.0) for shape, mark in zip(shapes, marks, strict=True))  # type: ignore[return-value]


def turned(p: Tensor, angle: Tensor) -> Tensor:
    """Points turned about the upright axis by `angle [B]`."""
    c, s = angle.cos()[:, None], angle.sin()[:, None]
    return torch.stack([c * p[..., 0] + s * p[..., 2], p[..., 1], c * p[..., 2] - s * p[..., 0]], -1)


def rays(side: int, azimuth: Tensor, elevation: Tensor, away: float, wide: float = 0.45) -> tuple[Tensor, Tensor]:
    """Where a camera that looks at the origin stands, `[B, 1, 3]`, and where its pixels look, `[B, P, 3]`; angles `[B]`."""
    at = ((torch.arange(side) + 0.5) / side * 2 - 1) * wide
    y, x = torch.meshgrid(-at, at, indexing="ij")
    flat = torch.stack([x, y, -torch.ones_like(x)], -1).reshape(1, -1, 3)
    c, s = elevation.cos()[:, None], elevation.sin()[:, None]

    def placed(p: Tensor) -> Tensor:
        raised = torch.stack([p[..., 0].expand(len(c), -1), c * p[..., 1] + s * p[..., 2], c * p[..., 2] - s * p[..., 1]], -1)
        return turned(raised, azimuth)

    looks = placed(flat)
    return placed(torch.tensor([[[0.0, 0.0, away]]])), looks / looks.norm(dim=-1, keepdim=True)


def trace(distance: Distance, start: Tensor, looks: Tensor, side: int) -> Seen:
    """Follow rays to a surface. Edges are soft: a ray that passes by within half a pixel is half covered."""
    t = torch.full(looks.shape[:2], 0.1)
    closest, at = torch.full_like(t, FAR), t
    for _ in range(STEPS):
        d = distance(start + t[..., None] * looks)
        at = torch.where(d / t < closest, t, at)
        closest = torch.minimum(closest, d / t)
        t = (t + d).clamp(max=FAR)
    point = start + at[..., None] * looks
    steps = NEAR * torch.eye(3)
    normal = torch.stack([distance(point + step) - distance(point - step) for step in steps], -1)
    normal = normal / normal.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    return Seen(point, normal, (1 - closest * side).clamp(0, 1))


def lit(normal: Tensor, light: Tensor) -> Tensor:
    """Brightness `[B, P]` of surfaces under a light from `light [B, 1, 3]`: diffuse, and a little from everywhere."""
    return 0.3 + 0.7 * (normal * light / light.norm(dim=-1, keepdim=True)).sum(-1).clamp(min=0)


def _along(y: Tensor) -> Tensor:
    zero = torch.zeros_like(y)
    return torch.stack([zero, y, zero], -1)
