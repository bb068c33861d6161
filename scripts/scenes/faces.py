"""Pictures whose wholes are known: a face is there if an outline, eyes and a mouth are, and each of them is drawn for itself.

Arrows run from parts to wholes, as in hierarchical selection models (arXiv 2512.10720): parts are independent, but
not among pictures that are selected because they show a face. `B` pictures of 32 × 32 pixels, made and changed as in `world`.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scenes.world import HUES, SIDE, Factors, Seed, stream

GREYS = {"white": (240, 240, 240), "grey": (150, 150, 150)}
VALUES: dict[str, tuple[str, ...]] = {
    "outline": ("none", "round", "square"),
    "eyes": ("none", "open", "closed"),
    "mouth": ("none", "smile", "frown"),
    "hue": tuple(HUES),
    "background": tuple(GREYS),
    "x": ("-3", "0", "3"),
    "y": ("-3", "0", "3"),
    "face": ("no", "yes"),
}
"""Factors in causal order: where the parts are (in pixels off the middle), and at last the whole."""
PARENTS: dict[str, tuple[str, ...]] = {name: ("outline", "eyes", "mouth") if name == "face" else () for name in VALUES}
REGIONS = ("background", "outline", "eyes", "mouth")
"""What a pixel can belong to: just one of them."""
PAINTS: dict[str, tuple[str, ...]] = {
    "outline": ("outline",), "eyes": ("eyes",), "mouth": ("mouth",), "hue": ("outline",), "background": ("background",),
    "x": REGIONS, "y": REGIONS, "face": (),
}  # fmt: skip
"""Regions in which each factor shows. That a face is there shows nowhere but in its parts."""
INK = (30, 30, 40)
"""Of eyes and mouths."""
MISSING = 0.25
"""How often a part is."""


class Faces(NamedTuple):
    """Pictures and everything behind them, as `world.Scenes`."""

    noise: Mapping[str, NDArray[np.float32]]
    factors: Factors
    pixels: NDArray[np.uint8]
    regions: NDArray[np.uint8]


def draw(n: int, *, seed: Seed = 0, do: Mapping[str, str] | None = None) -> Faces:
    """`n` pictures of parts, and where all of them came together of faces."""
    return from_noise(noise(n, seed=seed), do)


def noise(n: int, *, seed: Seed = 0) -> dict[str, NDArray[np.float32]]:
    """The exogenous part: of each factor whether, and which."""
    rng = stream(3, seed)
    return {name: rng.random((n, 2), np.float32) for name in VALUES}


def redraw(faces: Faces, do: Mapping[str, str]) -> Faces:
    """The same pictures, had some factors been set."""
    return from_noise(faces.noise, do)


def from_noise(noise: Mapping[str, NDArray[np.float32]], do: Mapping[str, str] | None = None) -> Faces:
    """Pictures from their exogenous part. A whole has no mechanism of its own: setting `face` to `yes` sets all parts."""
    factors = solve(noise, do or {})
    return Faces(noise, factors, *render(factors))


def solve(noise: Mapping[str, NDArray[np.float32]], do: Mapping[str, str]) -> dict[str, NDArray[np.int8]]:
    """Every factor from its noise, and the whole from its parts."""
    found: dict[str, NDArray[np.int8]] = {}
    for name, values in VALUES.items():
        if name in do and name != "face":
            found[name] = np.full(len(noise[name]), values.index(do[name]), np.int8)
        elif name in PARENTS["face"]:
            there = (noise[name][:, 0] >= MISSING) | (do.get("face") == "yes")
            found[name] = np.where(there, 1 + np.floor(noise[name][:, 1] * 2), 0).astype(np.int8)
        elif name != "face":
            found[name] = np.floor(noise[name][:, 0] * len(values)).astype(np.int8)
    if do.get("face") == "no":
        _take_one_away(found, noise["face"][:, 0])
    found["face"] = is_face(found).astype(np.int8)
    return found


def is_face(factors: Factors) -> NDArray[np.bool_]:
    """`[B]`: all parts are there."""
    return np.all([factors[name] > 0 for name in PARENTS["face"]], 0)


def _take_one_away(found: dict[str, NDArray[np.int8]], roll: NDArray[np.float32]) -> None:
    whole, which = is_face(found), np.floor(roll * 3)
    for k, name in enumerate(PARENTS["face"]):
        found[name] = np.where(whole & (which == k), 0, found[name]).astype(np.int8)


def render(factors: Factors) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pixels `[B, 32, 32, 3]` and regions `[B, 32, 32]`."""
    grid = np.mgrid[:SIDE, :SIDE] + 0.5 - SIDE / 2
    off = {name: np.array([float(value) for value in VALUES[name]])[factors[name], None, None] for name in ("x", "y")}
    x, y = grid[1] - off["x"], grid[0] - off["y"]
    regions = np.zeros(x.shape, np.uint8)
    for name, inside in (("outline", _outline), ("eyes", _eyes), ("mouth", _mouth)):
        regions[inside(factors[name][:, None, None], x, y)] = REGIONS.index(name)
    n = len(regions)
    ground, hue = np.array(list(GREYS.values()))[factors["background"]], np.array(list(HUES.values()))[factors["hue"]]
    table = np.stack([ground, hue, *[np.broadcast_to(np.array(INK), (n, 3))] * 2], 1)
    return table[np.arange(n)[:, None, None], regions].astype(np.uint8), regions


Grid = NDArray[np.float64]


def _outline(kind: NDArray[np.int8], x: Grid, y: Grid) -> NDArray[np.bool_]:
    return ((kind == 1) & (x**2 + y**2 <= 121)) | ((kind == 2) & (np.maximum(abs(x), abs(y)) <= 10))


def _eyes(kind: NDArray[np.int8], x: Grid, y: Grid) -> NDArray[np.bool_]:
    across, down = abs(abs(x) - 4), abs(y + 3)
    return ((kind == 1) & (across <= 1.5) & (down <= 2)) | ((kind == 2) & (across <= 2.5) & (down <= 0.5))


def _mouth(kind: NDArray[np.int8], x: Grid, y: Grid) -> NDArray[np.bool_]:
    curve = np.where(abs(x) > 4, -1, 1) * np.where(kind == 1, 1, -1)  # corners up in a smile
    return (kind > 0) & (abs(x) <= 6) & (abs(y - 5 - curve) <= 1)


# -- words -----------------------------------------------------------------------------------------------------


def captions(factors: Factors, *, seed: Seed = 0, drop: float = 0.0) -> list[str]:
    """A sentence for each picture; hues and backgrounds go unsaid with probability `drop`, and so do the parts of a face."""
    rng = stream(4, seed)
    said = (rng.random((len(factors["face"]), 5)) >= drop).tolist()
    rows = zip(*(factors[name].tolist() for name in VALUES), strict=True)
    named = ({name: values[i] for (name, values), i in zip(VALUES.items(), row, strict=True)} for row in rows)
    return [_sentence(at, own) for at, own in zip(named, said, strict=True)]


def _sentence(at: Mapping[str, str], said: list[bool]) -> str:
    hue = [at["hue"]] if said[0] and at["outline"] != "none" else []
    outline = " ".join(["a", *hue, at["outline"], "outline"])
    parts = {"outline": outline, "eyes": f"{at['eyes']} eyes", "mouth": f"a {at['mouth']}"}
    there = [parts[name] for name in parts if at[name] != "none"]
    if at["face"] == "yes":
        body = " ".join(["a", *hue, *([at["outline"]] if said[1] else []), "face"])
        there = [body, *(parts[name] for k, name in enumerate(("eyes", "mouth")) if said[2 + k])]
        there = [" with ".join(there[:2]), *there[2:]]
    on = [f"on {at['background']}"] if said[4] else []
    return " ".join([" and ".join(there) or "nothing", *on])


def vocabulary() -> list[str]:
    """Every word that captions use, sorted."""
    kinds = {kind for name in PARENTS["face"] for kind in VALUES[name]} - {"none"}
    return sorted({"a", "and", "with", "on", "face", "outline", "eyes", "nothing", *kinds, *HUES, *GREYS})
