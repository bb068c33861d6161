"""Pictures whose wholes are known: figures of 32 × 32 pixels on three levels, `parts -> halves -> wholes`.

Four slots hold a part each, or nothing. A half is there if both of its parts are, and a whole if both of its halves are;
neither adds a pixel of its own. Every part belongs to two halves, and every half to two wholes. Parts and halves occur alone
and in wrong company too; some wholes are rare; and much is seen together that makes up nothing: every whole with a hood has
whiskers, most beaks are before a sky. So what occurs together is not what is composed.

    figures = draw(1000, seed=0)                          # factors, pixels and regions of a thousand pictures
    cats    = redraw(figures, {"cat": True})              # the same thousand, had a cat been there: its four parts are set
    bald    = redraw(figures, {"pointed ears": False})    # the same without pointed ears; other ears stay
    words   = captions(figures.factors, seed=0)

`B` pictures. Which part is where is exact: `regions`.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scenes.world import HUES, SIDE, Factors, Seed, stream

NONE = "none"
SLOTS: dict[str, tuple[str, ...]] = {
    "ears": (NONE, "pointed ears", "round ears", "antennae"),
    "eyes": (NONE, "round eyes", "slit eyes", "square eyes"),
    "cheeks": (NONE, "whiskers", "blush", "bolts"),
    "mouth": (NONE, "smile", "teeth", "beak"),
}
"""Places of a figure, and the parts that each can hold."""
HALVES: dict[str, tuple[str, str]] = {
    "hood": ("pointed ears", "round eyes"),
    "bonnet": ("round ears", "round eyes"),
    "visor": ("round ears", "square eyes"),
    "helmet": ("antennae", "square eyes"),
    "cowl": ("antennae", "slit eyes"),
    "mask": ("pointed ears", "slit eyes"),
    "muzzle": ("whiskers", "smile"),
    "grin": ("blush", "smile"),
    "bill": ("blush", "beak"),
    "chin": ("bolts", "beak"),
    "jaw": ("bolts", "teeth"),
    "snout": ("whiskers", "teeth"),
}
"""Six upper ones, then six lower ones: of nine pairs each. Neighbours share a part."""
WHOLES: dict[str, tuple[str, str]] = {
    "cat": ("hood", "muzzle"),
    "mouse": ("bonnet", "muzzle"),
    "bear": ("bonnet", "grin"),
    "panda": ("visor", "grin"),
    "parrot": ("visor", "bill"),
    "bee": ("helmet", "bill"),
    "drone": ("helmet", "chin"),
    "martian": ("cowl", "chin"),
    "robot": ("cowl", "jaw"),
    "goblin": ("mask", "jaw"),
    "wolf": ("mask", "snout"),
    "fox": ("hood", "snout"),
}
"""Twelve of the 36 pairs of an upper and a lower half. Neighbours share a half, so each half always comes with one part of
another: both wholes with a hood have whiskers."""
OFTEN = {"cat": 6, "panda": 6, "drone": 6, "goblin": 6}
"""How many times as often as others some wholes are drawn; halves that do not make up a whole are as frequent as in wholes."""
PARTS = tuple(part for parts in SLOTS.values() for part in parts[1:])
LEVELS: dict[str, tuple[str, ...]] = {"wholes": (*WHOLES,), "halves": (*HALVES,), "parts": PARTS}
"""Every concept, the most abstract first."""
CONCEPTS = tuple(name for names in LEVELS.values() for name in names)
PARENTS: dict[str, tuple[str, ...]] = {**dict.fromkeys(PARTS, ()), **HALVES, **WHOLES}
"""What each concept is made of: the true graph, whose arrows run from parts to wholes."""
BACKGROUNDS = {"grey": (150, 150, 150), "sand": (232, 214, 170), "sky": (165, 205, 240)}
SEEN_WITH = (*HUES, *BACKGROUNDS)
"""What makes up nothing, whatever it is seen with."""
COMPANY = {"hue": "ears", "background": "mouth"}
"""Factors that mostly go with the part of a slot, and make up nothing."""
TOGETHER = 0.9
"""How often they do: a third of the hues, or of the backgrounds, for each part."""
OFF = 4
"""Pixels by which a figure can be off the middle."""
VALUES: dict[str, tuple[str, ...]] = {
    **SLOTS,
    "hue": tuple(HUES),
    "background": tuple(BACKGROUNDS),
    "x": tuple(map(str, range(-OFF, OFF + 1))),
    "y": tuple(map(str, range(-OFF, OFF + 1))),
}
"""Factors, and what each can be."""
REGIONS = ("background", *SLOTS)
"""What a pixel can belong to: just one of them."""
KINDS = {"whole": 0.5, "halves": 0.22, "parts": 0.28}
"""How often a picture is of a whole; of one half, or of two that need not fit; of parts at random."""
THERE = 0.45
"""How often a part at random is there."""


class Figures(NamedTuple):
    """Pictures and everything behind them."""

    factors: Factors
    """`[B]` each, indices into `VALUES`."""
    pixels: NDArray[np.uint8]
    """`[B, 32, 32, 3]`"""
    regions: NDArray[np.uint8]
    """`[B, 32, 32]`, indices into `REGIONS`."""


def draw(n: int, *, seed: Seed = 0) -> Figures:
    """`n` pictures, the same for the same seed."""
    return drawn(sample(n, seed=seed))


def drawn(factors: Factors) -> Figures:
    """Pictures of factors."""
    return Figures(factors, *render(factors))


def redraw(figures: Figures, do: Mapping[str, bool]) -> Figures:
    """The same pictures, had concepts been there or not (`edited`)."""
    return drawn(edited(figures.factors, do))


def sample(n: int, *, seed: Seed = 0) -> dict[str, NDArray[np.int8]]:
    """Factors of `n` pictures."""
    rng = stream(6, seed)
    kind, which = rng.choice(len(KINDS), size=n, p=[*KINDS.values()]), rng.integers(3, size=(n, 1))
    whole = np.array([[[*HALVES].index(half) for half in made] for made in WHOLES.values()])
    weight = np.array([OFTEN.get(name, 1) for name in WHOLES])
    halves = whole[rng.choice(len(WHOLES), size=n, p=weight / weight.sum())]
    apart = np.stack([rng.permutation(half) for half in halves.T], 1)  # as frequent, but fit only by chance
    held = np.array([[SLOTS[slot].index(part) for slot, part in parts_of(half).items()] for half in HALVES])
    there = np.repeat((kind[:, None] == 0) | (which != [0, 1]), 2, 1)  # a third of `halves` lacks the upper one, or the lower
    composed = held[np.where(kind[:, None] == 0, halves, apart)].reshape(n, 4) * there
    alone = np.where(rng.random((n, 4)) < THERE, rng.integers(1, 4, (n, 4)), 0)
    slots = np.where(kind[:, None] == 2, alone, composed).astype(np.int8)
    found = dict(zip(SLOTS, slots.T, strict=True))
    found |= {name: rng.integers(len(values), size=n).astype(np.int8) for name, values in VALUES.items() if name not in SLOTS}
    return found | {name: _with_company(found[slot], found[name], len(VALUES[name]), rng) for name, slot in COMPANY.items()}


def _with_company(part: NDArray[np.int8], alone: NDArray[np.int8], count: int, rng: np.random.Generator) -> NDArray[np.int8]:
    """A factor that mostly is one of the third that goes with a part, where there is one."""
    own = (part - 1) * (count // 3) + alone % (count // 3)
    return np.where((part > 0) & (rng.random(len(part)) < TOGETHER), own, alone).astype(np.int8)


def slot_of(part: str) -> str:
    """The slot that holds a part."""
    return next(slot for slot, parts in SLOTS.items() if part in parts)


@cache
def parts_of(concept: str) -> Mapping[str, str]:
    """By slot, the parts that a concept is made of; of a part itself."""
    made = PARENTS[concept]
    return {slot_of(concept): concept} if not made else {slot: p for half in made for slot, p in parts_of(half).items()}


def edited(factors: Factors, do: Mapping[str, bool]) -> dict[str, NDArray[np.int8]]:
    """Factors with concepts set (all their parts are) or taken away (those of their parts that are there are)."""
    found = {name: value.copy() for name, value in factors.items()}
    for concept, there in sorted(do.items(), key=lambda item: item[1]):  # first what goes
        for slot, part in parts_of(concept).items():
            index = SLOTS[slot].index(part)
            found[slot] = np.full_like(found[slot], index) if there else np.where(found[slot] == index, 0, found[slot])
    return found


def present(factors: Factors, concepts: Sequence[str] = CONCEPTS) -> NDArray[np.bool_]:
    """`[B, concepts]`: which ones are there; also of `SEEN_WITH`, a hue where ears or a mouth have it."""
    return np.stack([np.all([*_signs(factors, name)], 0) for name in concepts], 1)


def _signs(factors: Factors, concept: str) -> Iterator[NDArray[np.bool_]]:
    """All that has to be so for a concept to be there."""
    if concept in HUES:
        yield (factors["ears"] > 0) | (factors["mouth"] > 0)
    if concept in SEEN_WITH:
        name = "hue" if concept in HUES else "background"
        yield factors[name] == VALUES[name].index(concept)
    else:
        yield from (factors[slot] == SLOTS[slot].index(part) for slot, part in parts_of(concept).items())


def places(figures: Figures, concept: str) -> NDArray[np.bool_]:
    """`[B, 32, 32]`: the pixels of a concept, none where it is not there."""
    mask = np.isin(figures.regions, [REGIONS.index(slot) for slot in parts_of(concept)])
    return mask & present(figures.factors, (concept,))[:, :, None]


def edges() -> set[tuple[str, str]]:
    """The true graph: part and whole of every arrow."""
    return {(part, whole) for whole, parts in PARENTS.items() for part in parts}


# -- pixels ----------------------------------------------------------------------------------------------------

PAINTS = ("background", "hue", "ink", "white", "pink")
"""What a pixel is painted with."""
INK, WHITE, PINK = (30, 30, 40), (250, 250, 250), (255, 150, 185)


def render(factors: Factors) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pixels and regions."""
    paint, regions = layers(factors)
    return palette(factors)[np.arange(len(paint))[:, None, None], paint], regions


def layers(factors: Factors) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """`[B, 32, 32]` each: indices into `PAINTS` and into `REGIONS`. A later slot of `ORDER` covers an earlier one."""
    paint = np.zeros((len(factors["x"]), SIDE, SIDE), np.uint8)
    regions = np.zeros_like(paint)
    for k, slot in enumerate(ORDER):
        own = _sprites()[k, factors[slot], factors["y"], factors["x"]]
        np.copyto(paint, own, where=own > 0)
        np.copyto(regions, np.uint8(REGIONS.index(slot)), where=own > 0)
    return paint, regions


ORDER = ("ears", "mouth", "cheeks", "eyes")
"""Slots from the bottom up."""


def palette(factors: Factors) -> NDArray[np.uint8]:
    """`[B, paints, 3]`"""
    ground, hue = (np.array([*table.values()])[factors[name]] for name, table in (("background", BACKGROUNDS), ("hue", HUES)))
    fixed = np.broadcast_to(np.array([INK, WHITE, PINK]), (len(ground), 3, 3))
    return np.concatenate([ground[:, None], hue[:, None], fixed], 1).astype(np.uint8)


@cache
def _sprites() -> NDArray[np.uint8]:
    """`[slots, parts, y, x, 32, 32]`: paint of each part at each place, 0 where it is not."""
    found = np.zeros((4, 4, 2 * OFF + 1, 2 * OFF + 1, SIDE, SIDE), np.uint8)
    for k, slot in enumerate(ORDER):
        for i, part in enumerate(SLOTS[slot][1:], 1):
            for down, across in np.ndindex(found.shape[2:4]):
                y, x = np.mgrid[:SIDE, :SIDE] + 0.5 - SIDE / 2
                _paint(part, x - (across - OFF), y - (down - OFF), found[k, i, down, across])
    return found


Grid = NDArray[np.float64]


def _paint(part: str, x: Grid, y: Grid, canvas: NDArray[np.uint8]) -> None:
    for paint, mask in SHAPES[part](abs(x), y):
        canvas[mask] = PAINTS.index(paint)


def _disc(x: Grid, y: Grid, r: float) -> NDArray[np.bool_]:
    return x**2 + y**2 <= r**2


def _box(x: Grid, y: Grid, across: float, down: float) -> NDArray[np.bool_]:
    return (abs(x) <= across) & (abs(y) <= down)


SHAPES = {
    "pointed ears": lambda a, y: [
        ("hue", (_disc(a, y, 8) & (y < 0)) | ((y > -12) & (y < -3) & (a <= 8) & (a >= 7.5 - 0.8 * (y + 12)))),
    ],
    "round ears": lambda a, y: [("hue", (_disc(a, y, 8) & (y < 0)) | _disc(a - 7, y + 7.5, 3.7))],
    "antennae": lambda a, y: [
        ("hue", _box(a, y + 3.5, 8, 3.5)),
        ("ink", (abs(a - 4.5) < 1) & (y > -11) & (y < -7)),
        ("hue", _box(a - 4.5, y + 10.5, 2, 1.5)),
    ],
    "round eyes": lambda a, y: [
        ("ink", _disc(a - 4, y + 3, 3)),
        ("white", _disc(a - 4, y + 3, 2)),
        ("ink", _disc(a - 4, y + 3, 1)),
    ],
    "slit eyes": lambda a, y: [("ink", (abs(y + 2.5 + 0.5 * (a - 4)) <= 1.1) & (abs(a - 4) <= 3))],
    "square eyes": lambda a, y: [("ink", _box(a - 4, y + 3, 3, 3)), ("white", _box(a - 4, y + 3, 2, 2))],
    "whiskers": lambda a, y: [
        ("ink", (a > 5) & (a < 12) & ((abs(y - 1.5 + 0.25 * (a - 5)) <= 0.6) | (abs(y - 4 - 0.15 * (a - 5)) <= 0.6))),
    ],
    "blush": lambda a, y: [("pink", _disc(a - 6, y - 3, 2.3))],
    "bolts": lambda a, y: [("ink", _box(a - 9.5, y - 2, 2, 2)), ("white", _box(a - 9.5, y - 2, 2, 1))],
    "smile": lambda a, y: [
        ("hue", _disc(a, y, 8) & (y > 0)),
        ("ink", (abs(y - 5.5 + np.where(a > 2, 1, 0) + np.where(a > 4, 1, 0)) <= 0.6) & (a < 5)),
    ],
    "teeth": lambda a, y: [
        ("hue", _box(a, y - 4, 7, 4)),
        ("white", _box(a, y - 5, 4.6, 1.6)),
        ("ink", _box(a, y - 5, 4.6, 1.6) & ((a < 1) | (abs(a - 3) < 0.6))),
    ],
    "beak": lambda a, y: [("hue", (y > 0) & (a <= 8 - 0.8 * y)), ("ink", (y > 2) & (y < 9) & (a <= 3.4 - 0.5 * (y - 2)))],
}  # fmt: skip
"""Paint and pixels of each part, from the bottom up; `a` is the distance from the axis."""


# -- words -----------------------------------------------------------------------------------------------------

NAMED = 0.6
"""How often a caption says a whole, or a half, by its name; otherwise it says what it is made of."""
BOTH = 0.15
"""How often it says each of the parts beside such a name."""
ARTICLE = {"smile", "beak"}
"""Parts that take one."""


def captions(factors: Factors, *, seed: Seed = 0, drop: float = 0.0) -> list[str]:
    """A sentence for each picture: wholes, halves or parts; hues and backgrounds go unsaid with probability `drop`."""
    rolls = stream(7, seed).random((len(factors["x"]), 12)).tolist()
    rows = zip(*(factors[name].tolist() for name in VALUES), strict=True)
    return [
        _sentence({name: VALUES[name][i] for name, i in zip(VALUES, row, strict=True)}, roll, drop)
        for row, roll in zip(rows, rolls, strict=True)
    ]


def _sentence(at: Mapping[str, str], roll: Sequence[float], drop: float) -> str:
    here = {slot: at[slot] for slot in SLOTS if at[slot] != NONE}
    things: list[tuple[str, set[str]]] = []
    for k, concept in enumerate(name for name in (*WHOLES, *HALVES) if parts_of(name).items() <= here.items()):
        made = parts_of(concept)
        if made.items() <= here.items() and roll[k] < NAMED:  # a half is not said of a whole that was
            here = {slot: part for slot, part in here.items() if slot not in made}
            own = [_phrase(part) for i, part in enumerate(made.values(), 6) if roll[i] < BOTH]
            things.append((" with ".join([f"a {concept}", *([" and ".join(own)] if own else [])]), {*made}))
    things += [(_phrase(part), {slot}) for slot, part in here.items()]
    said = [text for text, _ in things]
    coloured = [k for k, (_, slots) in enumerate(things) if slots & {"ears", "mouth"}]
    if coloured and roll[10] >= drop:
        first = coloured[0]
        said[first] = f"a {at['hue']} {said[first][2:]}" if said[first].startswith("a ") else f"{at['hue']} {said[first]}"
    on = [f"on {at['background']}"] if roll[11] >= drop else []
    return " ".join([" and ".join(said) or "nothing", *on])


def _phrase(part: str) -> str:
    return f"a {part}" if part in ARTICLE else part


def vocabulary() -> list[str]:
    """Every word that captions use, sorted."""
    phrases = [*WHOLES, *HALVES, *PARTS, *HUES, *BACKGROUNDS, "a and with on nothing"]
    return sorted({word for phrase in phrases for word in phrase.split()})
