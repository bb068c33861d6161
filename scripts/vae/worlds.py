"""Five data sets of pictures whose factors are known, drawn by us after public ones that they stand for.

    sprites  dSprites: a square, an ellipse or a heart, of some size and angle, somewhere
    room     3D Shapes: floor, wall and object by hue, the object's shape and size, the angle of view
    arm      MPI3D: an arm of two joints with something in its hand, before grounds, from three heights
    solids   SmallNORB: solids of some proportion under turning light, seen from around and above
    faces    CelebA: drawn faces with hair, eyes, mouth, glasses, looking somewhere

A factor's value is a whole number from 0. Pictures are `[B, channels, side, side]` from 0 to 1.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .tracing import ball, box, capsule, cone, cylinder, lit, one_of, rays, ring, trace, turned

AT_ONCE = 512
"""Pictures that are drawn together."""
Values = Mapping[str, Tensor]
"""Of each factor, whole numbers `[B]`."""


class World(NamedTuple):
    """How many values each factor has, and how they are drawn."""

    factors: dict[str, int]
    draw: Callable[[Values, int], Tensor]

    def pictures(self, values: Values, side: int = 32) -> Tensor:
        """Draw pictures of given values."""
        count = len(next(iter(values.values())))
        parts = [{name: v[k : k + AT_ONCE] for name, v in values.items()} for k in range(0, count, AT_ONCE)]
        return torch.cat([self.draw(part, side).clamp(0, 1) for part in parts])

    def values(self, count: int, seed: int) -> dict[str, Tensor]:
        """Values of every factor, drawn evenly and apart."""
        g = torch.Generator().manual_seed(seed)
        return {name: torch.randint(n, (count,), generator=g) for name, n in self.factors.items()}


# -- pens ------------------------------------------------------------------------------------------------------------


def plane(side: int) -> tuple[Tensor, Tensor]:
    """Across and down of every pixel's middle, from -1 to 1, `[1, side, side]` each."""
    at = (torch.arange(side) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(at, at, indexing="ij")
    return x[None], y[None]


def spread(v: Tensor, n: int, low: float, high: float) -> Tensor:
    """Values 0 to n - 1 as numbers from low to high, `[B, 1, 1]`."""
    return (low + (high - low) * v / (n - 1))[:, None, None]


def hue(turn: Tensor) -> Tensor:
    """Colours `[B, 3]` around a circle, 1 being once around."""
    return torch.stack([(1 + torch.cos(2 * math.pi * (turn + k / 3))) / 2 for k in range(3)], 1)


def cover(distance: Tensor) -> Tensor:
    """How much of each pixel is inside, `[B, 1, side, side]`: distances are in pictures' units, negative inside."""
    return (0.5 - distance * distance.shape[-1] / 2).clamp(0, 1)[:, None]


def over(image: Tensor, colour: Tensor, mark: Tensor) -> Tensor:
    """A colour `[B, C]` laid on a picture where a mark is."""
    return image + mark * (colour[:, :, None, None] - image)


def segment(x: Tensor, y: Tensor, x0: Tensor, y0: Tensor, x1: Tensor, y1: Tensor) -> Tensor:
    """Distance of pixels from a line between two points."""
    u, v = x1 - x0, y1 - y0
    t = (((x - x0) * u + (y - y0) * v) / (u * u + v * v)).clamp(0, 1)
    return ((x - x0 - t * u).square() + (y - y0 - t * v).square()).sqrt()


# -- worlds ------------------------------------------------------------------------------------------------------------


def sprites(v: Values, side: int) -> Tensor:
    """White on black."""
    x, y = plane(side)
    size, angle = spread(v["scale"], 4, 0.25, 0.45), 2 * math.pi * v["angle"][:, None, None] / 8
    x, y = x - spread(v["x"], 8, -0.55, 0.55), y - spread(v["y"], 8, -0.55, 0.55)
    a, b = ((x * angle.cos() + y * angle.sin()) / size, (y * angle.cos() - x * angle.sin()) / size)
    square = torch.maximum(a.abs(), b.abs()) - 0.75
    ellipse = (a.square() + (2 * b).square()).sqrt() * 0.6 - 0.6
    heart = ((a.square() + (1.1 * b + 0.2 - 0.5 * a.abs().sqrt()).square()).sqrt() - 0.8) * 0.8
    shapes = torch.stack([square, ellipse, heart], 1)
    own = shapes[torch.arange(len(shapes)), v["shape"]]
    return cover(own * size)


def room(v: Values, side: int) -> Tensor:
    """An object on the floor of a room with a back wall and two side walls; the camera goes around it."""
    angle = (v["angle"] - 3) * math.pi / 30
    start, looks = rays(side, angle, torch.full_like(angle, 0.4), 5.0)
    size, shape = (0.5 + 0.15 * v["size"])[:, None], one_of((box, cylinder, ball, capsule), v["shape"])
    lowered = torch.tensor([0.0, -1.0, 0.0]) + 0.8 * size[..., None] * torch.tensor([0.0, 1.0, 0.0])
    seen = trace(lambda p: shape((p - lowered) / size[..., None]) * size, start, looks, side)
    walls = ((1, -1.0), (2, -3.0), (0, -2.2), (0, 2.2))  # floor, back, left, right: axis and place
    far = torch.stack([(at - start[..., k]) / looks[..., k] for k, at in walls])
    met = torch.where(far > 0, far, torch.inf).argmin(0)
    floor, wall, thing = (hue(v[name] / 6)[:, None] for name in ("floor hue", "wall hue", "object hue"))
    paint = torch.where((met == 0)[..., None], floor, wall) * torch.tensor([1.0, 0.85, 0.7, 0.6])[met][..., None]
    mine = thing * lit(seen.normal, torch.tensor([[[0.5, 1.0, 0.8]]]))[..., None]
    image = paint + seen.cover[..., None] * (mine - paint)
    return image.transpose(1, 2).reshape(-1, 3, side, side)


def arm(v: Values, side: int) -> Tensor:
    """A grey arm that stands on the ground; the higher the camera, the lower and shorter it is."""
    x, y = plane(side)
    squeeze = spread(v["height"], 3, 1.0, 0.75)
    y = (0.85 - y) / squeeze
    first, second = spread(v["first joint"], 8, 0.35, math.pi - 0.35), spread(v["second joint"], 8, -1.4, 1.4)
    elbow = (0.6 * first.cos(), 0.6 * first.sin())
    hand = (elbow[0] + 0.45 * (first + second).cos(), elbow[1] + 0.45 * (first + second).sin())
    ground = torch.tensor([[0.1, 0.1, 0.35], [0.3, 0.12, 0.12], [0.1, 0.3, 0.15]])[v["ground"]]
    image = ground[:, :, None, None].expand(-1, -1, side, side)
    zero = torch.zeros_like(first)
    for ends in ((zero, zero, *elbow), (*elbow, *hand)):
        image = over(image, torch.full((len(first), 3), 0.65), cover(segment(x, y, *ends) - 0.07))
    u, w = x - hand[0], y - hand[1]
    ends = torch.stack(
        [(u.square() + w.square()).sqrt(), torch.maximum(u.abs(), w.abs()) * 1.15, torch.maximum(u.abs() * 1.6 + w, -w * 1.6)],
        1,
    )
    held = ends[torch.arange(len(ends)), v["shape"]] - spread(v["size"], 2, 0.17, 0.27)
    return over(image, hue(v["colour"] / 4) * 0.8 + 0.2, cover(held))


def solids(v: Values, side: int) -> Tensor:
    """Grey on grey, with a knob at one side, so that each can be seen to turn."""
    elevation = 0.3 + 0.25 * v["elevation"].float()
    start, looks = rays(side, torch.zeros_like(elevation), elevation, 4.5)
    turn = 2 * math.pi * v["azimuth"] / 8
    shape = one_of((ball, box, cylinder, cone, ring), v["kind"])
    tall = (0.75 + 0.25 * v["proportion"].float())[:, None, None] ** torch.tensor([-0.5, 1.0, -0.5])

    def distance(p: Tensor) -> Tensor:
        p = turned(p, turn)
        knob = (p - torch.tensor([1.05, 0.0, 0.0])).norm(dim=-1) - 0.35
        return torch.minimum(shape(p / tall) * tall.amin(-1), knob)

    seen = trace(distance, start, looks, side)
    from_where = 2 * math.pi * v["light"] / 6
    light = torch.stack([from_where.sin(), torch.full_like(from_where, 1.2), from_where.cos()], -1)[:, None]
    return (0.35 + seen.cover * (lit(seen.normal, light) - 0.35)).reshape(-1, 1, side, side)


def faces(v: Values, side: int) -> Tensor:
    """From the front; who looks aside has eyes, mouth and glasses there."""
    x, y = plane(side)
    count = len(v["skin"])
    skin = torch.tensor([[0.98, 0.85, 0.72], [0.88, 0.68, 0.5], [0.65, 0.45, 0.3], [0.4, 0.26, 0.18]])[v["skin"]]
    hair = torch.tensor([[0.1, 0.08, 0.08], [0.45, 0.25, 0.1], [0.9, 0.75, 0.3], [0.75, 0.25, 0.1]])[v["hair"]]
    dark, white = torch.full((count, 3), 0.1), torch.full((count, 3), 0.95)
    image = torch.tensor([0.45, 0.6, 0.8])[None, :, None, None].expand(count, -1, side, side)
    long = spread(v["hair length"], 3, 0.0, 0.8)
    image = over(image, hair, cover((((x / 0.72).square() + ((y + 0.15) / 0.7).square()).sqrt() - 1) * 0.7))
    image = over(image, hair, cover(torch.maximum(x.abs() - 0.7, torch.maximum(-y - 0.15, y + 0.15 - long))))
    image = over(image, skin, cover((((x / 0.58).square() + ((y - 0.08) / 0.72).square()).sqrt() - 1) * 0.6))
    x = x - spread(v["turn"], 5, -0.22, 0.22)
    open_, glasses = spread(v["eyes"], 3, 0.03, 0.13), v["glasses"][:, None, None, None]
    for eye in (-0.24, 0.24):
        u, w = x - eye, y + 0.08
        image = over(image, white, cover((u / 1.4).square().add((w * 0.14 / open_).square()).sqrt() - 0.12))
        image = over(image, dark, cover(torch.maximum((u.square() + w.square()).sqrt() - 0.07, w.abs() - open_)))
        image = over(image, dark, glasses * cover(((u.square() + w.square()).sqrt() - 0.2).abs() - 0.04))
    curve = spread(v["smile"], 5, -0.9, 0.9) * (x.square() - 0.05)
    mouth = torch.maximum((y - 0.45 + curve).abs() - 0.05, x.abs() - 0.28)
    return over(image, torch.tensor([[0.7, 0.2, 0.25]]).expand(count, -1), cover(mouth))


WORLDS = {
    "sprites": World({"shape": 3, "scale": 4, "angle": 8, "x": 8, "y": 8}, sprites),
    "room": World({"floor hue": 6, "wall hue": 6, "object hue": 6, "shape": 4, "size": 4, "angle": 7}, room),
    "arm": World(
        {"colour": 4, "shape": 3, "size": 2, "height": 3, "ground": 3, "first joint": 8, "second joint": 8}, arm
    ),
    "solids": World({"kind": 5, "proportion": 3, "elevation": 4, "azimuth": 8, "light": 6}, solids),
    "faces": World({"skin": 4, "hair": 4, "hair length": 3, "eyes": 3, "smile": 5, "glasses": 2, "turn": 5}, faces),
}  # fmt: skip
