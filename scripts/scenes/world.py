"""Pictures whose causes are known: scenes of 32 × 32 pixels, drawn from factors that depend on each other as in `PARENTS`.

A factor is an index into its `VALUES`. It takes the admissible value that its own noise scores highest, so a scene is a
function of noise alone, and a counterfactual is the same noise with one factor set: its descendants follow, where the old value
is no longer admissible, and nothing else moves. Regions, shadows included, are exact.

    scene  = draw(1000, seed=0)                      # factors, pixels and regions of a thousand pictures
    night  = redraw(scene, {"scene": "night"})       # the same thousand, had it been night
    words  = captions(scene.factors, seed=0)

`B` pictures; object `k` of at most `MOST` has factors `shape.k`, `hue.k`, ….
"""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SIDE = 32
"""Pixels of an edge."""
MOST = 2
"""Objects of a scene, at most."""
HORIZON = 8
"""Rows above the ground."""

SCENES = ("day", "night", "sunset", "indoor")
LIGHTS = {"white": (255, 250, 215), "blue": (205, 220, 255), "orange": (255, 165, 50), "yellow": (255, 225, 120)}
"""A light's colour, and how its disc looks."""
TINTS = np.array([(1, 1, 1), (0.55, 0.65, 1), (1, 0.75, 0.55), (1, 0.93, 0.75)])
"""By what each light multiplies the colours it falls on."""
BACKGROUNDS = {
    "azure": (90, 170, 250), "pale": (195, 225, 245), "navy": (30, 35, 110), "violet": (110, 60, 150),
    "pink": (250, 170, 190), "scarlet": (225, 70, 80), "cream": (245, 230, 195), "mint": (165, 220, 190),
}  # fmt: skip
GROUNDS = {"grass": (95, 130, 50), "sand": (215, 190, 135), "stone": (135, 135, 140), "wood": (140, 90, 55)}
HUES = {
    "red": (235, 40, 40), "yellow": (250, 225, 30), "green": (40, 220, 80), "cyan": (60, 225, 230), "blue": (45, 70, 240),
    "purple": (185, 50, 215),
}  # fmt: skip
SHAPES, SIZES = ("square", "circle", "triangle", "cross"), ("small", "medium", "large")
TEXTURES = ("plain", "striped", "checked")
CELLS = ("back left", "back middle", "back right", "front left", "front middle", "front right")
DIAMETERS, CENTRES, BASES = (6, 8, 10), (5, 16, 27), (18, 29)
"""Of sizes, columns and rows, in pixels: an object stands on its base."""

OBJECT = {"shape": SHAPES, "hue": tuple(HUES), "size": SIZES, "texture": TEXTURES, "cell": CELLS}
VALUES: dict[str, tuple[str, ...]] = {
    "scene": SCENES,
    "light": tuple(LIGHTS),
    "side": ("left", "middle", "right"),
    "height": ("high", "low"),
    "background": tuple(BACKGROUNDS),
    "ground": tuple(GROUNDS),
    "count": ("one", "two"),
    **{f"{name}.{k}": values for k in range(MOST) for name, values in OBJECT.items()},
}
"""Factors in causal order, and what each can be."""

BY_SCENE: dict[str, dict[str, tuple[str, ...]]] = {
    "light": {"day": ("white",), "night": ("blue",), "sunset": ("orange",), "indoor": ("yellow",)},
    "side": {"day": VALUES["side"], "night": VALUES["side"], "sunset": ("left", "right"), "indoor": ("middle",)},
    "height": {"day": ("high",), "night": ("high",), "sunset": ("low",), "indoor": ("high",)},
    "background": {
        "day": ("azure", "pale"), "night": ("navy", "violet"), "sunset": ("pink", "scarlet"), "indoor": ("cream", "mint"),
    },
    "ground": {
        "day": ("grass", "sand", "stone"), "night": ("grass", "stone"), "sunset": ("grass", "sand"),
        "indoor": ("stone", "wood"),
    },
    "shape": {
        "day": SHAPES, "night": ("square", "circle", "cross"), "sunset": ("circle", "triangle", "cross"),
        "indoor": ("square", "circle", "triangle"),
    },
}  # fmt: skip
"""What each type of scene admits."""

PARENTS: dict[str, tuple[str, ...]] = {
    name: ("scene",) if name.partition(".")[0] in BY_SCENE else ("cell.0",) if name == "cell.1" else () for name in VALUES
}
"""Causes of each factor. Two objects never share a cell, so the second one's depends on the first one's."""

REGIONS = ("background", "light", "ground", *(f"{kind}.{k}" for kind in ("object", "shadow") for k in range(MOST)))
"""What a pixel can belong to: just one of them."""
PAINTS: dict[str, tuple[str, ...]] = {
    "scene": (),
    "light": REGIONS,
    "side": ("light", "shadow.0", "shadow.1"),
    "height": ("shadow.0", "shadow.1"),
    "background": ("background",),
    "ground": ("ground", "shadow.0", "shadow.1"),
    "count": ("object.1", "shadow.1"),
    **{
        f"{name}.{k}": (f"object.{k}",) if name in ("hue", "texture") else (f"object.{k}", f"shadow.{k}")
        for k in range(MOST)
        for name in OBJECT
    },
}
"""Regions in which each factor shows by itself, without its descendants."""

Factors = Mapping[str, NDArray[np.int8]]


class Scenes(NamedTuple):
    """Pictures and everything behind them."""

    noise: Mapping[str, NDArray[np.float32]]
    """Scores of each factor's values, `[B, values]`."""
    factors: Factors
    """`[B]` each; those of an object that is not there are kept, and show nowhere."""
    pixels: NDArray[np.uint8]
    """`[B, 32, 32, 3]`"""
    regions: NDArray[np.uint8]
    """`[B, 32, 32]`, indices into `REGIONS`."""


Seed = int | tuple[int, ...]


def stream(purpose: int, seed: Seed) -> np.random.Generator:
    """Random numbers, independent of those of another purpose or seed."""
    return np.random.default_rng((purpose, *((seed,) if isinstance(seed, int) else seed)))


def draw(n: int, *, seed: Seed = 0, do: Mapping[str, str] | None = None) -> Scenes:
    """`n` scenes, the same for the same seed."""
    return from_noise(noise(n, seed=seed), do)


def noise(n: int, *, seed: Seed = 0) -> dict[str, NDArray[np.float32]]:
    """The exogenous part of scenes: how each factor scores its values."""
    rng = stream(1, seed)
    return {name: rng.random((n, len(values)), np.float32) for name, values in VALUES.items()}


def redraw(scenes: Scenes, do: Mapping[str, str]) -> Scenes:
    """The same scenes, had some factors been set: descendants follow, everything else stays."""
    return from_noise(scenes.noise, do)


def from_noise(noise: Mapping[str, NDArray[np.float32]], do: Mapping[str, str] | None = None) -> Scenes:
    """Scenes from their exogenous part; `do` sets factors, whatever their causes say."""
    factors = solve(noise, do or {})
    return Scenes(noise, factors, *render(factors))


def solve(noise: Mapping[str, NDArray[np.float32]], do: Mapping[str, str]) -> dict[str, NDArray[np.int8]]:
    """Every factor from its causes and its noise, in causal order."""
    found: dict[str, NDArray[np.int8]] = {}
    for name, values in VALUES.items():
        if name in do:
            found[name] = np.full(len(noise[name]), values.index(do[name]), np.int8)
        else:
            found[name] = np.where(admissible(name, found, len(noise[name])), noise[name], -1).argmax(-1).astype(np.int8)
    return found


def admissible(name: str, factors: Factors, n: int) -> NDArray[np.bool_]:
    """`[B, values]`: what a factor can be, given its causes."""
    kind = name.partition(".")[0]
    if kind in BY_SCENE:
        table = [[value in BY_SCENE[kind][scene] for value in VALUES[name]] for scene in SCENES]
        return np.array(table)[factors["scene"]]
    free = np.ones((n, len(VALUES[name])), bool)
    if name == "cell.1":
        free[np.arange(n), factors["cell.0"]] = False
    return free


def descendants(name: str) -> set[str]:
    """All factors that follow one."""
    children = {child for child, parents in PARENTS.items() if name in parents}
    return children.union(*map(descendants, children))


def present(factors: Factors, k: int) -> NDArray[np.bool_]:
    """`[B]`: whether there is an object `k`."""
    return factors["count"] >= k


# -- pixels ----------------------------------------------------------------------------------------------------


def render(factors: Factors) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pixels and regions of scenes."""
    n, at = len(factors["scene"]), dict(factors)
    regions = _empty()[at["side"]].copy()
    dark = np.zeros_like(regions, bool)
    for kind in ("shadow", "object"):
        for k in reversed(range(MOST)):
            own = _sprites(kind)[_which(kind, at, k)] * present(at, k)[:, None, None].astype(np.uint8)
            np.copyto(regions, np.uint8(REGIONS.index(f"{kind}.{k}")), where=own > 0)
            np.copyto(dark, own > 1, where=own > 0)
    chosen = colours(at)[np.arange(n)[:, None, None], regions + len(REGIONS) * dark]
    chosen[:, :HORIZON] *= _haze(regions[:, :HORIZON])
    return (chosen + 0.5).astype(np.uint8), regions


def colours(factors: Factors) -> NDArray[np.float32]:
    """`[B, 2 · regions, 3]`: colour of each region under the light, then of its dark part."""
    table = {name: np.array(list(kinds.values()), np.float32) for name, kinds in _PAINT.items()}
    ground, tint = table["ground"][factors["ground"]], TINTS[factors["light"]].astype(np.float32)
    shade = np.array([0.55, 0.7, 0.5, 0.65], np.float32)[factors["light"], None]
    objects = [table["hue"][factors[f"hue.{k}"]] for k in range(MOST)]
    lit = np.stack([table["background"][factors["background"]], ground, *objects, *[ground * shade] * MOST], 1) * tint[:, None]
    flat = np.concatenate([lit[:, :1], table["light"][factors["light"], None], lit[:, 1:]], 1)
    return np.concatenate([flat, flat * 0.5], 1)


_PAINT = {"background": BACKGROUNDS, "light": LIGHTS, "ground": GROUNDS, "hue": HUES}


def _haze(regions: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The background is darker towards the top."""
    rows = np.linspace(0.8, 1, HORIZON, dtype=np.float32)[:, None]
    return np.where(regions == REGIONS.index("background"), rows, np.float32(1))[..., None]


def _which(kind: str, at: Factors, k: int) -> tuple[NDArray[np.int8], ...]:
    if kind == "object":
        return at[f"shape.{k}"], at[f"size.{k}"], at[f"cell.{k}"], at[f"texture.{k}"]
    return at[f"shape.{k}"], at[f"size.{k}"], at[f"cell.{k}"], at["side"], at["height"]


@cache
def _empty() -> NDArray[np.uint8]:
    """`[sides, 32, 32]`: regions of scenes without objects."""
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    plain = np.where(y < HORIZON, REGIONS.index("background"), REGIONS.index("ground"))
    discs = [(x - centre) ** 2 + (y - 4) ** 2 < 8 for centre in CENTRES]
    return np.stack([np.where(disc, REGIONS.index("light"), plain) for disc in discs]).astype(np.uint8)


@cache
def _sprites(kind: str) -> NDArray[np.uint8]:
    """`[shapes, sizes, cells, textures, 32, 32]`: 1 where an object is light, 2 where dark; of shadows by sides and heights."""
    variants = (TEXTURES,) if kind == "object" else (VALUES["side"], VALUES["height"])
    shape = (len(SHAPES), len(SIZES), len(CELLS), *map(len, variants))
    paint = _object if kind == "object" else _shadow
    return np.stack([paint(*index) for index in np.ndindex(shape)]).reshape(*shape, SIDE, SIDE)


def _object(shape: int, size: int, cell: int, texture: int) -> NDArray[np.uint8]:
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    diameter, centre, base = DIAMETERS[size], CENTRES[cell % 3], BASES[cell // 3]
    inside = covers(shape, diameter, x - centre, base - y)
    band = np.floor((base - y) / 2) + (np.floor((x - centre + diameter / 2) / 2) if TEXTURES[texture] == "checked" else 0)
    dark = (band % 2 == 1) & (TEXTURES[texture] != "plain")
    return (inside * (1 + dark)).astype(np.uint8)


def _shadow(shape: int, size: int, cell: int, side: int, height: int) -> NDArray[np.uint8]:
    """What stands `h` above the base darkens the ground `length · h` before it, and to the side away from the light."""
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    length, lean = ((0.4, 0.5), (0.8, 0.9))[height]
    h = (y - BASES[cell // 3]) / length
    return covers(shape, DIAMETERS[size], x - CENTRES[cell % 3] - (1 - side) * lean * h, h).astype(np.uint8)


def covers(shape: int, diameter: int, x: NDArray[np.float64], h: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether points `x` to the right of the centre of a shape and `h` above its base are inside."""
    r, middle = diameter / 2, h - diameter / 2
    within = (h >= 0) & (h <= diameter) & (abs(x) <= r)
    return (
        within
        & (
            np.ones_like(within),
            x**2 + middle**2 <= (0.95 * r) ** 2,
            abs(x) <= r * (1 - h / diameter) + 0.25,
            abs(abs(x) - abs(middle)) <= r / 3,  # upright, a small one is four pixels away from a circle
        )[shape]
    )


# -- words -----------------------------------------------------------------------------------------------------

WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "scene": {
        "day": ("by day", "in daylight", "at noon"), "night": ("at night", "by night", "at midnight"),
        "sunset": ("at sunset", "at dusk", "in the evening"), "indoor": ("indoors", "inside", "in a room"),
    },
    "side": {
        "left": ("lit from the left", "with light from the left"), "middle": ("lit from above", "with light from above"),
        "right": ("lit from the right", "with light from the right"),
    },
    "background": {
        "azure": ("under an azure sky",), "pale": ("under a pale sky",), "navy": ("under a navy sky",),
        "violet": ("under a violet sky",), "pink": ("under a pink sky",), "scarlet": ("under a scarlet sky",),
        "cream": ("before a cream wall",), "mint": ("before a mint wall",),
    },
    "ground": {
        "grass": ("on grass", "on a lawn"), "sand": ("on sand", "on a beach"), "stone": ("on stone", "on rock"),
        "wood": ("on wood", "on planks"),
    },
    "shape": {
        "square": ("square", "box"), "circle": ("circle", "disc", "ball"), "triangle": ("triangle", "wedge"),
        "cross": ("cross",),
    },
    "hue": {hue: (hue,) for hue in HUES},
    "size": {"small": ("small", "little", "tiny"), "medium": ("medium",), "large": ("large", "big", "huge")},
    "texture": {"plain": ("plain",), "striped": ("striped", "banded"), "checked": ("checked", "chequered")},
    "cell": {cell: (f"at the {cell}", f"in the {cell}") for cell in CELLS},
}  # fmt: skip
"""How captions say what a factor is."""


def captions(factors: Factors, *, seed: Seed = 0, drop: float = 0.0) -> list[str]:
    """A sentence for each scene; all but the shapes and the scene's type go unsaid with probability `drop`."""
    rng = stream(2, seed)
    rows = zip(*(factors[name].tolist() for name in VALUES), rng.random((len(factors["scene"]), 32)).tolist(), strict=True)
    return [_sentence(dict(zip(VALUES, row[:-1], strict=True)), iter(row[-1]), drop) for row in rows]


def _sentence(at: Mapping[str, int], chance: Iterator[float], drop: float) -> str:
    def said(name: str, *, always: bool = False) -> list[str]:
        words, roll, pick = WORDS[name.partition(".")[0]][VALUES[name][at[name]]], next(chance), next(chance)
        return [words[int(pick * len(words))]] if always or roll >= drop else []

    things = []
    for k in range(at["count"] + 1):
        before = sum((said(f"{name}.{k}") for name in ("size", "texture", "hue")), [])
        things.append(" ".join(["a", *before, *said(f"shape.{k}", always=True), *said(f"cell.{k}")]))
    scene, around = said("scene", always=True), sum(map(said, ("ground", "background", "side")), [])
    first = next(chance) < 0.5
    return " ".join([*(scene if first else []), " and ".join(things), *([] if first else scene), *around])


def vocabulary() -> list[str]:
    """Every word that captions use, sorted."""
    phrases = [phrase for kinds in WORDS.values() for words in kinds.values() for phrase in words]
    return sorted({word for phrase in [*phrases, "a and"] for word in phrase.split()})
